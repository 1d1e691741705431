"""Composed weights that are kept from call to call, where nothing is differentiated and for as long as they hold.

Nothing is kept unless it is asked for: a kept weight is a tensor of the weight's size for every target, as a merged one is.
Whether it still holds is asked at every call: the coefficients are compared number by number, so that it does not matter how
they were written; the templates are compared by storage, dtype, shape and torch's count of in-place writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Source:
    """A template as it was."""

    alias: Tensor  # holds the storage, so that no other tensor can come to lie at its address
    version: int

    def is_still(self, tensor: Tensor) -> bool:
        alias = self.alias
        return (
            tensor.data_ptr() == alias.data_ptr()
            and tensor.dtype == alias.dtype
            and tensor.shape == alias.shape
            and tensor.stride() == alias.stride()
            and not tensor.is_inference()  # it has no count of writes
            and tensor._version == self.version
        )


@dataclass(frozen=True)
class _KeptWeight:
    """A composed weight and what it was composed from."""

    weight: Tensor
    version: int  # of the weight itself: whoever read it may have written into it
    sources: tuple[_Source, ...]
    coefficients: Tensor

    def holds(self, sources: Sequence[Tensor], coefficients: Tensor) -> bool:
        return (
            self.weight._version == self.version
            and len(sources) == len(self.sources)
            and all(kept.is_still(tensor) for kept, tensor in zip(self.sources, sources, strict=True))
            and coefficients.device == self.coefficients.device
            and torch.equal(coefficients, self.coefficients)
        )


_KEPT: WeakKeyDictionary[nn.Module, _KeptWeight | None] = WeakKeyDictionary()  # beside the layers: never copied or stored


def keeps_weight(layer: nn.Module) -> bool:
    """Whether a layer keeps its composed weight now: inside ``cached_weights``, where no gradient is recorded.

    A compiler decides by itself what it computes again.
    """
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and layer in _KEPT


def kept_weight(layer: nn.Module, sources: Sequence[Tensor], coefficients: Tensor, compose: Callable[[], Tensor]) -> Tensor:
    """The composed weight of a layer that keeps it.

    Args:
        layer: the layer.
        sources: whatever the weight is composed from, beside the coefficients.
        coefficients: ``(n,)``.
        compose: makes the weight anew.
    """
    kept = _KEPT.get(layer)
    if kept is not None and kept.holds(sources, coefficients):
        return kept.weight
    if any(tensor.is_inference() or tensor.is_meta for tensor in sources):
        return compose()
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be used outside of it
        copied = coefficients.clone()
        weight = compose()
        if weight.is_inference():
            return weight
        weight.requires_grad_()
    if layer in _KEPT:
        noted = tuple(_Source(tensor.detach(), tensor._version) for tensor in sources)
        _KEPT[layer] = _KeptWeight(weight, weight._version, noted, copied)
    return weight


@contextmanager
def cached_weights(layers: Sequence[nn.Module]) -> Iterator[None]:
    """A block in which layers keep their composed weights; see ``RecastModel.cached_weights``."""
    own = [layer for layer in layers if layer not in _KEPT]
    _KEPT.update(dict.fromkeys(own))
    try:
        yield
    finally:
        for layer in own:
            _KEPT.pop(layer, None)
