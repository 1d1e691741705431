"""CoreProduct: what a weight ``U C V`` adds to a module's output, by two narrow products with the core between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..composition.compose import in_dtype
from ..composition.kinds import CONVOLUTION, kind_of

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

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The output with it, for the input that the module was given; each sample has its own core where there are several."""
        kind, rank = kind_of(self.module), self.wide.shape[1]
        assert kind is not None
        assert kind.call is not None
        core = self.scale.view(-1, rank, rank)
        core = core.transpose(1, 2) if kind.is_transposed else core
        inner = kind.call(self.module, in_dtype(x.dtype, self.narrow), x, False)
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

    def _widened(self, inner: Tensor, matrix: Tensor) -> Tensor:
        if kind_of(self.module) is not CONVOLUTION:
            return F.linear(inner, matrix)
        dimensions = self.narrow.ndim - 2
        return _CONVOLUTIONS[dimensions](inner, matrix.view(*matrix.shape, *[1] * dimensions))
