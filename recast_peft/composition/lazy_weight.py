"""A composed weight that is composed when its numbers are needed.

Some models ask a layer for its weight only to read the dtype or the device (T5's ``wo.weight.dtype``, three times a call). What
they get knows these; anything else that is done with it is done with the composed weight, which has been fixed at the moment of
reading: other coefficients or tasks afterwards do not change it.

Only for the model in its forward pass, and only where no gradient is recorded. Other readers may put the weight where a tensor
of a class of its own is refused, such as into a parameter; and an autograd function of the model's own would take it for a
leaf, so that the coefficients got no gradient in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .blocks import with_variable
from .mixed_batch import current_batch

_KNOWN = ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "shape")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _KNOWN),
    Tensor.dim,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
}

_IN_FORWARD: ContextVar[bool] = ContextVar("recast_in_forward", default=False)


@contextmanager
def model_reads() -> Iterator[None]:
    """A block in which it is the model that reads weights: its forward pass."""
    if torch.compiler.is_compiling():
        yield
        return
    with with_variable(_IN_FORWARD, True):
        yield


def is_read_by_the_model() -> bool:
    """Whether it is the model in its forward pass that reads a weight now."""
    return not torch.compiler.is_compiling() and (_IN_FORWARD.get() or current_batch() is not None)


class LazyWeight(Tensor):
    """A tensor of known shape, dtype and device that is computed at its first use."""

    _compose: Callable[[], Tensor]
    _composed: Tensor | None

    def __new__(
        cls, compose: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._compose, made._composed = compose, None
        return made

    def composed(self) -> Tensor:
        """The tensor itself."""
        if self._composed is None:
            self._composed = self._compose()
        return self._composed

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever is done with a lazy weight, but for reading what it knows already, is done with the composed one."""
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The same for calls that come from C++."""
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.composed, (args, kwargs or {}))
        return func(*args, **kwargs)


def of_no_sample(value: Tensor, error: Exception) -> Tensor:
    """What a model reads where each sample has its own: it has the dtype, shape and device of ``value``, and no numbers.

    Raises:
        error: as soon as its numbers are needed; at once in compiled code.
    """

    def refuse() -> Tensor:
        raise error

    return refuse() if torch.compiler.is_compiling() else LazyWeight(refuse, value.shape, value.dtype, value.device)
