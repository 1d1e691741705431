"""What the pretrained model makes of samples, for routing: caught in this call alone, whatever other threads compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..composition.mixed_batch import current_batch
from ..errors import RecastConfigError, RecastTargetError
from ..holders import plain_modules
from ..mimicry.features import evaluating
from ..model import RecastModel
from ..parts.head_building import find_head
from ..validation import shown


def base_features(
    tuner: RecastModel, head_module: str | None, inputs: Any, without_tasks: Callable[[int], AbstractContextManager[None]]
) -> Tensor:
    """What reaches the classifier of the pretrained model, ``(samples, features)`` in float32 on the CPU.

    Inside of ``without_tasks(n)`` n samples have no task.

    Raises:
        RecastConfigError: if there is no sample.
    """
    first = next(iter(inputs.values()), None) if isinstance(inputs, Mapping) else inputs
    if not isinstance(first, Tensor) or not len(first):
        raise RecastConfigError(
            f"inputs={shown(inputs)}: expected samples in a tensor, or a dictionary of such tensors that the model takes by "
            "name; at least one sample"
        )
    caught: list[Tensor] = []
    with _in_evaluation_mode(tuner), torch.no_grad(), without_tasks(len(first)):
        mine = current_batch()

        def catch(module: nn.Module, args: tuple) -> None:
            if current_batch() is mine:  # every thread's calls come by here
                caught.append(args[0])

        with ExitStack() as hooks:
            with suppress(RecastTargetError):  # a model without a classifier
                head = plain_modules(tuner.model)[find_head(tuner.model, head_module)]
                hooks.enter_context(head.register_forward_pre_hook(catch))
            out = tuner.model(**inputs) if isinstance(inputs, Mapping) else tuner.model(inputs)
    features = (caught[-1] if caught else out).detach().float().cpu()
    return features if features.ndim == 2 else features.flatten(1, -2).mean(dim=1)


@contextmanager
def _in_evaluation_mode(tuner: RecastModel) -> Iterator[None]:
    """A call in evaluation mode; where a module is in training mode no other call runs beside it."""
    if any(module.training for module in tuner.model.modules()):
        with tuner.calls.change(), evaluating(tuner.model):
            yield
    else:
        with tuner.calls.call():
            yield
