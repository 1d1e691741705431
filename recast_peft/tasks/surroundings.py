"""A weak fingerprint of what a model has beside a task's target modules: other weights, norms, running statistics.

A task's coefficients are bound to the weights of its targets, which are compared one by one. What stands around them counts
too: other running statistics alone can cost half of a task's accuracy. One fingerprint of samples of all of it says whether it
is what the task was learned on, up to a change of dtype; a difference is warned of and not refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..composition.fingerprint import same_weight, weight_fingerprint
from ..holders import plain_modules, unwrapped_module
from ..planning.heads import head_names
from .verbs import merged_tasks

SAMPLE = 4096  # numbers of a tensor that are looked at


def surroundings_fingerprint(model: nn.Module, targets: Collection[str]) -> str | None:
    """Fingerprint the parameters and persistent buffers of a model beside its targets and its classifier.

    Args:
        model: the backbone, with or without tasks.
        targets: names of the modules that have coefficients.

    Returns:
        None where it cannot be said: something is merged, holds no numbers, or is spread over processes.
    """
    if merged_tasks(model):
        return None
    parts = []
    for tensor in _tensors(model, targets):
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            return None
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float().cpu()
        size = sample.square().mean().sqrt()
        if torch.isfinite(sample).all() and size > 0:  # masks hold infinity
            parts += [sample / size, size.log2().view(1)]
    return weight_fingerprint(torch.cat(parts)) if parts else None


def _tensors(model: nn.Module, targets: Collection[str]) -> Iterator[Tensor]:
    heads, targeted = head_names(model), set(targets)
    for name, present in {"": model, **plain_modules(model)}.items():
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            continue
        module = unwrapped_module(present)
        buffers = (b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set)
        weights = (p for key, p in module._parameters.items() if name not in targeted or key == "bias")
        yield from (t for t in (*weights, *buffers) if t is not None and t.is_floating_point() and t.numel())


def warn_of_other_surroundings(model: nn.Module, targets: Collection[str], recorded: str | None) -> None:
    """Warn if what a model has beside a task's targets is not what the task was learned on.

    Args:
        model: the backbone.
        targets: names of the task's target modules.
        recorded: the fingerprint in the task; None in files of earlier versions.
    """
    actual = None if recorded is None else surroundings_fingerprint(model, targets)
    if recorded is not None and actual is not None and not same_weight(recorded, actual):
        warnings.warn(
            "The target modules have the weights that the task was learned on, but other weights, norms or running statistics "
            f"of the model are not the same\n  fingerprint in the task:  {recorded}\n  fingerprint of the model: {actual}\n"
            "The task may compute something else than it did: load the very checkpoint that it was learned on.",
            stacklevel=2,
        )
