"""CoreProduct: what a weight ``U C V`` adds to a module's output, by two narrow products with the core between them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..composition.compose import in_dtype
from ..composition.kinds import CONVOLUTION, LayerKind, kind_of
from ..composition.parallel import BY_COLUMNS, for_neighbour, own_part, split_of, summed_over_rows

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class CoreProduct:
    """What the templates together add to a module's output: a narrow product, the core, and a product that widens again.

    Attributes:
        module: linear layer or convolution for which ``takes_core`` holds.
        narrow: shaped like the module's weight, with r in place of its outputs.
        wide: ``(outputs, r)``.
        scale: coefficients ``(1 or samples, r * r)``, row by row of the core; the core is turned where the weight is.
    """

    module: nn.Module
    narrow: Tensor
    wide: Tensor
    scale: Tensor

    def scaled_by(self, scale: Tensor) -> CoreProduct:
        """The same with other coefficients."""
        return replace(self, scale=scale)

    def split_like(self, weight: Any) -> SplitCoreProduct:
        """What this process adds to its part of the output, where tensor parallelism splits the module's weight."""
        by_columns = split_of(weight) == BY_COLUMNS
        narrow = self.narrow if by_columns else own_part(self.narrow, weight)
        wide = own_part(self.wide, weight) if by_columns else self.wide
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("narrow", "wide")}
        return SplitCoreProduct(narrow=narrow, wide=wide, weight=weight, **others)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The output with it, for the input that the module was given; each sample has its own core where there are several."""
        kind, rank = kind_of(self.module), self.wide.shape[1]
        assert kind is not None
        core, inner = self._core(kind), self._inner(kind, x)
        if core.shape[0] == 1:
            matrix = in_dtype(inner.dtype, in_dtype(core.dtype, self.wide) @ core[0])
        elif kind.channels > 0:
            inner = (core.to(inner.dtype) @ inner.flatten(2)).view_as(inner)
            matrix = self.wide.to(inner.dtype)
        else:
            flat = inner.reshape(len(inner), -1, rank)
            inner = (flat @ core.transpose(1, 2).to(inner.dtype)).view_as(inner)
            matrix = self.wide.to(inner.dtype)
        return y + in_dtype(y.dtype, self._widened(inner, matrix))

    def _core(self, kind: LayerKind) -> Tensor:
        core = self.scale.view(-1, *[self.wide.shape[1]] * 2)
        return core.transpose(1, 2) if kind.is_transposed else core

    def _inner(self, kind: LayerKind, x: Tensor) -> Tensor:
        assert kind.call is not None
        return kind.call(self.module, in_dtype(x.dtype, self.narrow), x, False)

    def _widened(self, inner: Tensor, matrix: Tensor) -> Tensor:
        if kind_of(self.module) is not CONVOLUTION:
            return F.linear(inner, matrix)
        dimensions = self.narrow.ndim - 2
        return _CONVOLUTIONS[dimensions](inner, matrix.view(*matrix.shape, *[1] * dimensions))


@dataclass(frozen=True, eq=False)
class SplitCoreProduct(CoreProduct):
    """The same where each process has a part of the inputs, or of the outputs; what they tell each other is as narrow as r.

    Attributes:
        weight: the module's, as tensor parallelism has it.
    """

    weight: Any

    def _core(self, kind: LayerKind) -> Tensor:
        return for_neighbour(super()._core(kind), self.weight)

    def _inner(self, kind: LayerKind, x: Tensor) -> Tensor:
        return summed_over_rows(for_neighbour(super()._inner(kind, x), self.weight), self.weight)
