"""CoreProduct: what a weight ``U C V`` adds to a module's output, by two narrow products with the core between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..composition.compose import composition_dtype, in_dtype
from ..composition.kinds import CONVOLUTION, CONVOLUTIONS, LayerKind, kind_of
from ..composition.parallel import BY_COLUMNS, for_neighbour, own_part, split_of, summed_over_rows


def _groups_of(module: Any) -> int:
    return getattr(module, "groups", 1)


@dataclass(frozen=True, eq=False)
class CoreProduct:
    """What the templates together add to a module's output: a narrow product, the core, and a product that widens again."""

    module: nn.Module  # linear layer or convolution for which ``takes_core`` holds
    narrow: Tensor  # shaped like the module's weight, with r in place of its outputs
    wide: Tensor  # ``(outputs, r)``
    scale: Tensor  # coefficients ``(1 or samples, r * r)``, row by row of the core, which is turned where the weight is

    def scaled_by(self, scale: Tensor) -> CoreProduct:
        """The same with other coefficients."""
        return replace(self, scale=scale)

    def split_like(self, weight: Any) -> SplitCoreProduct:
        """What this process adds to its part of the output, where tensor parallelism splits the module's weight."""
        by_columns = split_of(weight) == BY_COLUMNS
        narrow = self.narrow if by_columns else own_part(self.narrow, weight)
        wide = own_part(self.wide, weight) if by_columns else self.wide
        return SplitCoreProduct(self.module, narrow, wide, self.scale, weight)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The output with it, for the input that the module was given; each sample has its own core where there are several."""
        kind, rank = kind_of(self.module), self.wide.shape[1]
        assert kind is not None
        core, inner = self._core(kind), self._inner(kind, x)
        work = composition_dtype(core.dtype, self.wide.dtype)
        if _groups_of(self.module) > 1:
            return y + in_dtype(y.dtype, self._widened_in_groups(inner, in_dtype(work, self.wide) @ in_dtype(work, core)))
        if core.shape[0] == 1:
            matrix = in_dtype(inner.dtype, in_dtype(work, self.wide) @ in_dtype(work, core[0]))
        elif kind.channels > 0:
            inner = (core.to(inner.dtype) @ inner.flatten(2)).view_as(inner)
            matrix = self.wide.to(inner.dtype)
        else:
            flat = inner.reshape(inner.shape[0], -1, rank)  # len() would fix the number of samples in a graph
            inner = (flat @ core.transpose(1, 2).to(inner.dtype)).view_as(inner)
            matrix = self.wide.to(inner.dtype)
        return y + in_dtype(y.dtype, self._widened(inner, matrix))

    def _core(self, kind: LayerKind) -> Tensor:
        core = self.scale.view(-1, *[self.wide.shape[1]] * 2)
        return core.transpose(1, 2) if kind.is_transposed else core

    def _inner(self, kind: LayerKind, x: Tensor) -> Tensor:
        assert kind.call is not None
        narrow = in_dtype(x.dtype, self.narrow)
        groups = _groups_of(self.module)
        if groups > 1:
            narrow = narrow.repeat(groups, *[1] * (narrow.ndim - 1))
        return kind.call(self.module, narrow, x, False)

    def _widened_in_groups(self, inner: Tensor, matrices: Tensor) -> Tensor:
        """Of a convolution in groups, each with all r narrow outputs; ``matrices`` are ``(1 or samples, outputs, r)``."""
        groups, (outputs, rank) = _groups_of(self.module), self.wide.shape
        dimensions = self.narrow.ndim - 2
        samples, positions = inner.shape[: -dimensions - 1], inner.shape[-dimensions:]
        matrices = matrices.to(inner.dtype).view(-1, groups, outputs // groups, rank)
        wide = matrices @ inner.reshape(-1, groups, rank, positions.numel())
        return wide.view(*samples, outputs, *positions)

    def _widened(self, inner: Tensor, matrix: Tensor) -> Tensor:
        if kind_of(self.module) is not CONVOLUTION:
            return F.linear(inner, matrix)
        return CONVOLUTIONS[self.narrow.ndim](inner, matrix.view(*matrix.shape, *[1] * (self.narrow.ndim - 2)))


@dataclass(frozen=True, eq=False)
class SplitCoreProduct(CoreProduct):
    """The same where each process has a part of the inputs, or of the outputs; what they tell each other is as narrow as r."""

    weight: Any  # the module's, as tensor parallelism has it

    def _core(self, kind: LayerKind) -> Tensor:
        return for_neighbour(super()._core(kind), self.weight)

    def _inner(self, kind: LayerKind, x: Tensor) -> Tensor:
        return summed_over_rows(for_neighbour(super()._inner(kind, x), self.weight), self.weight)
