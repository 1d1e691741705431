"""A layer's further calls: what the last one found out is known, and seen to hold at a glance.

Which task acts, on which templates, and whether these are ordinary tensors takes longer to find out than a small layer takes to
compute. A call notes the objects that it found; the next one computes with them if they are all in their places. No number is
kept: whatever is written into a tensor is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..placement.sharded import is_plain
from .calling import call_composed, is_hooked
from .compose import average_sets, needs_plain_operations
from .composed import ComposedModule
from .kinds import composes_cheaply, kind_of, takes_core
from .mixed_batch import current_batch
from .recomputation import is_recomputing, may_be_recomputed


class Known:
    """What a layer's call or merged swap computed with: one task, on the pretrained weights of the layer and its neighbours.

    Args:
        layer: the layer; ``_is_simple`` holds for it.
        note: of the call that found it out, where it may be computed again; see recomputation.py.
    """

    def __init__(self, layer: ComposedModule, note: Any) -> None:
        self.merged = list(layer.merged_adapters)
        self.active = list(layer.active_adapters)
        (self.task,) = layer.acting_adapters
        self.bank = layer.recast_bank[self.task]
        self.coefficients = layer.recast_coefficients[self.task]
        self.written, self.trained = self.coefficients._version, self.coefficients.requires_grad
        self.base, self.weight = layer.base_layer, layer.pretrained
        kind = kind_of(self.base)
        assert kind is not None
        assert kind.call is not None
        self.kind, self.product = kind, kind.call
        self.templates = [other.pretrained for other in self.bank.layers]
        # what is merged is not held on to
        found = {id(one): (one, one.base_layer, one.pretrained, one.kept_weight) for one in (layer, *self.bank.layers)}
        self.places = tuple(found.values())
        self.note = note

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of a layer knows nothing

    def holds(self, layer: ComposedModule, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call that begins now, and is not compiled, computes with the same."""
        if len(args) != 1 or kwargs or is_recomputing() or current_batch() is not None or layer.merged_adapters != self.merged:
            return False
        if self.merged:
            is_same = not (layer.is_stale or layer.disable_adapters or torch.is_grad_enabled()) and layer.held is None
        else:
            is_same = not needs_plain_operations() and self._acts(layer) and self._is_in_place(layer)
            is_same = is_same and (layer.zeros is None or not layer.zeros.are_all(layer))
        return is_same and (not may_be_recomputed() or (not torch.is_grad_enabled() and self._is_noted(layer)))

    def call(self, layer: ComposedModule, x: Tensor) -> Tensor:
        """What the layer computes."""
        if self.merged:
            return layer.base_layer(x)
        if self.bank.is_factored:
            return self.bank.core_product(average_sets(self.coefficients)[None]).add_to(layer.base_layer(x), x)
        terms = self.weight, self.templates, average_sets(self.coefficients)
        return call_composed(layer, self.product, x, terms, self.active)

    def is_merged(self, layer: ComposedModule, tasks: list[str]) -> bool:
        """Whether the task alone is merged into a layer, on the same templates, which are weights."""
        if self.bank.is_factored:
            return False
        return layer.merged_adapters == self.merged == tasks == [self.task] and self._acts(layer) and self._is_in_place(layer)

    def _acts(self, layer: ComposedModule) -> bool:
        """Whether the task acts here, alone."""
        return (
            layer._active_adapter == self.active
            and layer.recast_bank.get(self.task) is self.bank
            and not (layer.disable_adapters or layer.stands_aside or layer.scaling)
            and layer.held is None
            and layer.instead is None
            and not layer.compressed_bank
            and not len(layer.recast_masks)
            and layer.idle_slot != self.task
        )

    def _is_in_place(self, layer: ComposedModule) -> bool:
        """Whether the tensors are those that were found, on one device, and the module computes as it did."""
        device = self.coefficients.device
        for holder, base, weight, kept in self.places:
            if holder._modules["base_layer"] is not base or holder.kept_weight is not kept:
                return False
            if kept is None and base._parameters.get(holder.weight_name) is not weight:
                return False
            if weight.device != device or not is_plain(weight):
                return False
        is_same = layer.recast_coefficients[self.task] is self.coefficients and is_plain(self.coefficients)
        return is_same and kind_of(self.base) is self.kind and not is_hooked(self.base)

    def _is_noted(self, layer: ComposedModule) -> bool:
        is_same = not self.merged or layer.recast_coefficients[self.task] is self.coefficients
        is_same = is_same and self.coefficients._version == self.written and self.coefficients.requires_grad == self.trained
        return is_same and layer.history.goes_on(self.note)


def know(layer: ComposedModule, in_call: bool = True) -> None:
    """Let a layer know what it computes with now, in a call or in a merged swap; nothing where it is not simple."""
    known = None
    if _is_simple(layer):
        known = Known(layer, layer.history.latest() if in_call and may_be_recomputed() else None)
    layer.__dict__["known"] = known  # past torch's look at what is assigned, which every call would pay for


def _is_simple(layer: ComposedModule) -> bool:
    """Whether one task acts in a layer, by products of a known kind with pretrained weights that lie here as they are."""
    tasks, base = layer.acting_adapters, layer.base_layer
    if len(tasks) != 1 or tasks[0] not in layer.recast_coefficients or tasks[0] == layer.idle_slot:
        return False
    if layer.merged_adapters and layer.merged_adapters != tasks:
        return False
    bank, coefficients, kind = layer.recast_bank[tasks[0]], layer.recast_coefficients[tasks[0]], kind_of(base)
    if not (bank.is_exact or (bank.is_factored and takes_core(base) and not composes_cheaply(base))):
        return False
    if kind is None or kind.call is None or coefficients.is_inference() or not is_plain(coefficients):
        return False
    return all(_is_here(other) for other in (layer, *bank.layers))


def _is_here(layer: ComposedModule) -> bool:
    weight: Tensor | None = layer.pretrained
    is_parameter = isinstance(weight, nn.Parameter) and is_plain(weight) and not weight.is_meta
    return is_parameter and layer.base_layer is layer.get_base_layer()
