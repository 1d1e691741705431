"""ComposedModule: a module whose weight is composed from templates and coefficients, and what it answers for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import RecastBankError, RecastConfigError
from ..holders import TaskModules, TaskParameters
from ..placement.offloaded import computing_device, kept_tensor
from ..placement.sharded import is_plain, whole, whole_shape, whole_trained
from .compose import Terms, average_sets, compose_into, compose_weight
from .mixed_batch import MixedBatch
from .quantised import dequantised, device_of_weight, quantised_by
from .strength import Strength, at_strength

# Attribute of a weight that is in the place of the pretrained one: the pretrained one, or None if that was released.
STANDS_FOR = "recast_stands_for"
_NONE = object()
SAMPLE = 64  # numbers of a weight that are looked at


class _ReleasedWeightError(RecastBankError, AttributeError):
    """An AttributeError as well, for whoever asks a module for all of its attributes (torch.jit does)."""


def _child(name: str) -> Any:
    """A child of a module that every call asks for: torch's own look-up takes ten times as long."""
    return property(lambda module: module._modules[name])


class ComposedModule(Strength, nn.Module, BaseTunerLayer):
    """A module around another one, whose weight is composed from the templates of a bank.

    What is merged into it, and what a reader of its ``weight`` gets, is in merging.py.

    Args:
        base_layer: the module to wrap.
        module_name: its name in the plain model.
        weight_name: the parameter that is composed.
    """

    base_layer: Any = _child("base_layer")
    recast_coefficients: TaskParameters = _child("recast_coefficients")  # task -> (sets, templates)
    recast_masks: TaskModules = _child("recast_masks")  # task -> what changes its composed weight; see parts/piggyback.py
    history: Any  # with what calls computed; see recomputation.py

    def __init__(self, base_layer: nn.Module, module_name: str, weight_name: str) -> None:
        super().__init__()
        self.module_name = module_name
        self.other_layers: list[Any] = []  # layers of PEFT's other methods around or inside this one; see stacking.py
        self.held: tuple[str, ...] | None = None  # tasks in the weight that other methods are merged into; None: none is merged
        self.idle_slot: str | None = None  # an adapter that no task of its pool is in: it counts as none
        self.base_layer = base_layer
        self.weight_name = weight_name
        self.recast_bank: dict[str, Any] = {}  # task -> bank; a plain dict: the bank belongs to the group
        self.compressed_bank: tuple[Any, ...] = ()  # empty, or the one bank that stands for the weight
        self.kept_weight: tuple[nn.Parameter | None] | None = None  # the pretrained weight while something is merged
        self.merged_adapters: list[str] = []
        self.is_stale = False  # whether what is merged has to be composed once more
        self.instead: Callable[[Any], Tensor] | None = None  # composes another weight in place of the tasks', for measuring
        self.recast_coefficients = TaskParameters()
        self.scaling: dict[str, float] = {}  # task -> its strength, where that is not 1
        self.without_strength: dict[str, str] = {}
        self.recast_masks = TaskModules()
        self.coefficient_gradients: dict[str, str] = {}  # task -> how gradients of its coefficients are formed
        self._disable_adapters = False
        self._switched_off = False  # inside RecastModel.disable_part("recast")
        self._active_adapter = []
        self.known: Any = None  # what the last call computed with; see known.py

    # ---------------------------------------------------------------- the pretrained weight

    @property
    def is_compressed(self) -> bool:
        """Whether a compressed bank stands for the pretrained weight."""
        return bool(self.compressed_bank)

    @property
    def is_released(self) -> bool:
        """Whether the pretrained weight was given up for the compressed bank."""
        return bool(self.compressed_bank) and self.pretrained is None

    @property
    def pretrained(self) -> nn.Parameter | None:
        """The pretrained weight, also while something is merged, in any thread; None if it was released."""
        base = self.get_base_layer()
        found = base._parameters.get(self.weight_name)
        if type(found) is not nn.Parameter and not self.compressed_bank and quantised_by(base) is not None:
            return dequantised(base)  # type: ignore[return-value]
        mark = getattr(found, STANDS_FOR, _NONE)
        if mark is not _NONE:
            return mark  # type: ignore[return-value]
        kept = self.kept_weight  # a copy of a parameter has no mark
        return found if kept is None else kept[0]

    @property
    def pretrained_weight(self) -> Tensor:
        """The pretrained weight, also while something is merged; ``RecastBankError`` if it was released for a bank."""
        return whole(self._pretrained_here())

    def _pretrained_here(self) -> Tensor:
        """What this process holds of the pretrained weight: a shard, or all of it."""
        weight = self.pretrained
        if weight is None:
            raise self._released_error()
        kept = kept_tensor(self.get_base_layer(), self.weight_name) if weight.is_meta else None
        return weight if kept is None else kept

    def _released_error(self) -> _ReleasedWeightError:
        return _ReleasedWeightError(
            f"the pretrained weight of {self.module_name} was released when its bank was compressed; "
            "convert with keep_base_weights=True to keep it"
        )

    def weight_sample(self) -> Tensor | None:
        """A few numbers of the pretrained weight, by which what is written into it is seen; None where it is not at hand."""
        weight = self.pretrained
        if weight is None or not is_plain(weight) or weight.is_meta or weight.shape != self.weight_shape:
            return None
        flat = weight.detach().reshape(-1)
        return flat[:: max(1, flat.numel() // SAMPLE)].clone()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        held = self.compressed_bank
        return tuple(held[0].templates.shape[1:] if held else whole_shape(self._pretrained_here()))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return (self.compressed_bank[0].templates if self.compressed_bank else self._pretrained_here()).dtype

    @property
    def weight_device(self) -> torch.device:
        """Device of the weight."""
        base = self.get_base_layer()
        weight = base._parameters.get(self.weight_name)
        if weight is not None:
            return computing_device(base, weight)
        return self.compressed_bank[0].templates.device if self.compressed_bank else device_of_weight(base)

    def get_base_layer(self) -> nn.Module:
        """The innermost module. PEFT's own asks every module for an attribute that it lacks, which is slow at every call."""
        base: Any = self._modules["base_layer"]
        is_inside = "base_layer" in base._modules and isinstance(base, BaseTunerLayer)
        return base.get_base_layer() if is_inside else base

    @property
    def layers_inside(self) -> list[Any]:
        """Those of other methods' layers that lie inside this one."""
        return [other for other in self.other_layers if other in self.modules()] if self.other_layers else []

    @property
    def weight_parameter(self) -> Any:
        """The parameter that lies in the wrapped module now: the pretrained weight, a merged one, or None."""
        return self.get_base_layer()._parameters.get(self.weight_name)

    def set_weight_parameter(self, parameter: nn.Parameter | None) -> None:
        """Put a parameter into the wrapped module."""
        self.get_base_layer()._parameters[self.weight_name] = parameter

    # ---------------------------------------------------------------- the composed weight

    def compose(self, adapters: Sequence[str], out: Tensor | None = None, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weight for the given tasks together (their offsets add); tasks without coefficients here add nothing.

        Args:
            adapters: the tasks.
            out: a tensor to write the weight into, where nothing is differentiated.
            values: coefficients by task in place of those that the layer holds now.

        Returns:
            shaped like the weight and in its dtype; for no task at all the pretrained weight itself, or what the
            compressed bank makes of it where that was released.
        """
        masks = {name: self.recast_masks[name] for name in adapters if name in self.recast_masks}
        terms = self.terms(adapters, values)
        if out is not None and not masks and terms is not None and terms[1]:
            return compose_into(out, *terms)
        weight = self.pretrained_weight if terms is None else compose_weight(*terms)
        for name, mask in masks.items():
            weight = at_strength(weight, mask(weight), self.scaling.get(name, 1.0))
        return weight if out is None else out.copy_(weight)

    def terms(self, adapters: Sequence[str], values: Mapping[str, Tensor] | None = None) -> Terms | None:
        """Anchor, templates and coefficients of the tasks' weight; None for the pretrained weight alone."""
        names = self.with_coefficients(adapters)
        device = self.weight_device
        if self.compressed_bank and (names or self.is_released):
            bank = self.compressed_bank[0]
            coefficients = sum([self.offset(name, values) for name in names], bank.base_of(self.module_name))
            return None, bank.get_templates(device), coefficients.to(device)
        if not names:
            return None
        parts: dict[Any, Tensor] = {}  # bank -> the sum of its tasks' coefficients
        for name in names:
            bank, offset = self.recast_bank[name], self.offset(name, values)
            parts[bank] = parts[bank] + offset if bank in parts else offset
        anchor = self.pretrained_weight
        for bank in [bank for bank in parts if bank.is_factored]:
            anchor = bank.added_to(anchor, parts.pop(bank).to(device))
        templates = [template for bank in parts for template in bank.get_templates(device)]
        sums = [*parts.values()] or [offset.detach()[:0]]
        return anchor, templates, (sums[0] if len(sums) == 1 else torch.cat(sums)).to(device)

    # ---------------------------------------------------------------- tasks

    @property
    def acting_adapters(self) -> list[str]:
        """The active tasks; none while tasks are merged that have nothing here."""
        active = [] if self.stands_aside else self._active_adapter
        return [active] if isinstance(active, str) else active

    @property
    def disable_adapters(self) -> bool:
        """Whether the tasks are switched off here, all of them or their coefficients alone."""
        return self._disable_adapters or self._switched_off

    def is_off(self, batch: MixedBatch | None) -> bool:
        """Whether a call computes without any task; the tasks of a batch that began before they were switched off stay."""
        return self.disable_adapters and (batch is None or batch.is_off or self._switched_off)

    def has_task(self, adapter: str) -> bool:
        """Whether a task changes this weight."""
        return adapter in self.recast_coefficients or adapter in self.recast_masks

    def present(self, adapters: Sequence[str]) -> list[str]:
        """Those of the given tasks that change this weight."""
        coefficients, masks = self.recast_coefficients, self.recast_masks
        return [name for name in adapters if (name in coefficients or name in masks) and name != self.idle_slot]

    def with_coefficients(self, adapters: Sequence[str]) -> list[str]:
        """Those of the given tasks that have coefficients here."""
        held = self.recast_coefficients
        return [name for name in adapters if name in held and name != self.idle_slot]

    def is_masked(self, adapters: Sequence[str]) -> bool:
        """Whether one of the given tasks has a mask here."""
        masks = self.recast_masks
        return len(masks) > 0 and any(name in masks for name in adapters)

    def coefficients(self, name: str) -> Tensor:
        """The coefficients of a task, ``(sets, templates)``."""
        return whole_trained(self.recast_coefficients[name])

    def offset(self, name: str, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """What a task's templates are multiplied by, ``(templates,)``: the mean of its sets, times its strength here."""
        given = None if values is None else values.get(name)
        mean = average_sets(self.coefficients(name) if given is None else given)
        factor = self.scaling.get(name, 1.0)
        return mean if factor == 1 else mean * factor

    def tasks_in_force(self) -> list[str]:
        """The tasks that a call would compute with now."""
        return [] if self.disable_adapters else self.present(self.merged_adapters or self.acting_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a task adds to the weight, shaped like it, in its dtype; ``RecastConfigError`` if it has nothing here."""
        if adapter in self.recast_masks:
            return self.compose([adapter]) - self.compose([])
        if adapter not in self.recast_coefficients:
            known = ", ".join(self.recast_coefficients.keys()) or "none"
            raise RecastConfigError(f"task {adapter!r} has no coefficients at {self.module_name}; those that have: {known}")
        return self.recast_bank[adapter].added_to(None, self.offset(adapter).to(self.weight_device), self.weight_dtype)
