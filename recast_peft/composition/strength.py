"""How strongly a task acts: the verbs that PEFT's LoRA layers have, which diffusers and PEFT's users call layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import RecastConfigError
from ..holders import TaskHolder
from ..names import modules_of
from ..validation import Unexpected, check_arguments, number, optional
from .blocks import with_attribute


class Strength(TaskHolder):
    """What a task's offsets are multiplied by in a layer; a mixin of what holds something of tasks.

    It belongs to the model, as the scale of a LoRA does, and is not saved. What is merged follows.
    """

    scaling: dict[str, float]  # task -> factor
    active_adapters: Any
    without_strength: dict[str, str] = {}  # task -> what of it a factor does not reach

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let a task act with a factor; 1 is what it was trained with. A task that has nothing here is passed over."""
        check_arguments(_factor, scale=scale)
        if self.has_task(adapter):
            if scale != 1 and adapter in self.without_strength:
                warnings.warn(
                    f"the strength of task {adapter!r} does not reach {self.without_strength[adapter]}, which stay as they are",
                    stacklevel=2,
                )
            self.scaling[adapter] = scale
            self.rescaled()

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active tasks."""
        check_arguments(_factor, scale=scale)
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active tasks; None sets them to 1."""
        check_arguments(optional(_divisor), scale=scale)
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scaling.get(name, 1.0) / scale)

    def rescaled(self) -> None:
        """Called after a factor was set."""


def _factor(value: Any) -> Any:
    """A finite number; a tensor of one is not looked at, since a device would be waited for."""
    return value if isinstance(value, Tensor) else number(value)


def _divisor(value: Any) -> Any:
    if not isinstance(value, Tensor) and number(value) == 0:
        raise Unexpected("another number than 0")
    return value


def at_strength(base: Tensor, changed: Tensor, factor: float) -> Tensor:
    """The way from what the base has to what a task makes of it, as far as a factor goes; 1 is all of it, to the last bit."""
    return changed if factor == 1 else torch.lerp(base.to(changed.dtype), changed, factor)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Let every task of a model act with a multiple of its strength until the block ends, with all of its parts.

    ``peft.helpers.rescale_adapter_scale`` for models with RECAST tasks; that one looks for LoRAs alone.

    Args:
        model: a model with tasks, in any wrapper.
        multiplier: 0 is the pretrained model, 1 the tasks as they are. Modules that a task owns whole (a classifier,
            ``modules_to_save``) and biases of the model's own that were trained (``bias=``) have no strength, as with LoRA.

    Raises:
        TypeError: if the multiplier is no number.
        RecastConfigError: if the multiplier is not finite, or the model has no layer that could be scaled.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    check_arguments(number, multiplier=multiplier)
    layers: list[Any] = modules_of(model, Strength, LoraLayer)
    if not layers:
        raise RecastConfigError("the model has no RECAST or LoRA layer whose strength could be set")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            factors = {name: layer.scaling.get(name, 1.0) * multiplier for name in layer._get_available_adapters()}
            if isinstance(layer, Strength):
                for name, factor in factors.items():
                    layer.set_scale(name, factor)
            else:
                _set(layer, {**layer.scaling, **factors})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            _set(layer, scaling)


def at_full_strength(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which what is composed of a model's tasks is what they were trained as; nothing that is merged changes."""
    return with_attribute(modules_of(model, Strength), "scaling", {})


def warn_of_strength(model: nn.Module, adapter: str, taker: str, stacklevel: int) -> None:
    """Warn that a task is taken as it was trained, where it acts in the model with another strength.

    ``stacklevel`` is that of ``warnings.warn``: the call that the warning names is as many frames above this function.
    """
    found = {float(layer.scaling.get(adapter, 1.0)) for layer in modules_of(model, Strength)} - {1.0}
    if found:
        warnings.warn(
            f"{taker} takes task {adapter!r} as it was trained, without the strength that it has in the model "
            f"({', '.join(f'{factor:g}' for factor in sorted(found))}): the strength belongs to the model (set_scale)",
            stacklevel=stacklevel,
        )


def _set(layer: Any, scaling: dict[str, float]) -> None:
    layer.scaling = scaling
    if hasattr(layer, "rescaled"):
        layer.rescaled()
