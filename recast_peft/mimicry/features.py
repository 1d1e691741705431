"""Running a model on a batch of any form, and looking at what its blocks give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastConfigError


def call_arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which a model is called on a batch.

    Args:
        batch: a tensor; a mapping, passed as keyword arguments; or a tuple or list ``(inputs, labels, ...)`` as a
            ``DataLoader`` yields it, of which the first alone is passed.
        device: to which tensors are moved.

    Raises:
        RecastConfigError: for anything else.
    """
    if isinstance(batch, (tuple, list)) and batch:
        return call_arguments(batch[0], device)
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    if isinstance(batch, Mapping):
        return (), {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    raise RecastConfigError(
        f"a batch is a {type(batch).__name__}: expected a tensor, a mapping of keyword arguments, or a tuple (inputs, labels)"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def run_on(model: nn.Module, batch: Any, weights: dict[str, Tensor] | None = None) -> Any:
    """What a model gives for a batch of any form that ``call_arguments`` knows; ``weights`` take the place of its own."""
    args, kwargs = call_arguments(batch, device_of(model))
    return model(*args, **kwargs) if weights is None else torch.func.functional_call(model, weights, args, kwargs)


def main_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is about: itself, logits or hidden state by name, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                return output[name]
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((t for t in map(main_tensor, output) if t is not None), None)
    return None


@contextmanager
def captured_outputs(model: nn.Module, names: Iterable[str], last: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside, what the named modules give in each call is noted, by name; a later call overwrites an earlier one.

    With ``last`` only the one that was called last is held.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = main_tensor(output)
        if tensor is not None:
            if last:
                outputs.clear()
            outputs[name] = tensor

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(note, name)))
        yield outputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; every module has its own mode back afterwards."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module has its own mode, training or evaluation, back afterwards; those that came inside have the model's."""
    mode, modes = model.training, {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in (*modes, *model.modules()):
            module.training = modes.get(module, mode)
