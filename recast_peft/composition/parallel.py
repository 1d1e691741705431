"""Tensor parallelism: modules that compute with a part of their output (by columns) or of their input (by rows).

Such a layer is computed from outputs, each module called as it is. What a process sees of a coefficient's gradient is then its
part of a sum where the coefficient stands on the side that is split, and the whole of it on the other side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BY_COLUMNS, BY_ROWS = 0, 1  # the dimension of the weight that is split


def split_of(weight: Any) -> int | None:
    """The dimension along which tensor parallelism splits a weight for its call; None for any other."""
    if weight is None or not hasattr(weight, "full_tensor") or weight.device_mesh.ndim != 1:
        return None
    return getattr(weight.placements[0], "dim", None)


def for_own(offset: Tensor, weight: Tensor | None) -> Tensor:
    """A coefficient that scales the input of its layer."""
    return _Summed.apply(offset, weight) if split_of(weight) == BY_ROWS else offset


def for_neighbour(offset: Tensor, weight: Tensor | None) -> Tensor:
    """A coefficient that scales the output of a neighbour, or another tensor that all outputs are computed from."""
    return _Summed.apply(offset, weight) if split_of(weight) == BY_COLUMNS else offset


def summed_over_rows(part: Tensor, weight: Tensor | None) -> Tensor:
    """A product of this process's part of the input with its part of a weight, as all parts together have it."""
    return _Sum.apply(part, weight) if split_of(weight) == BY_ROWS else part


def own_part(value: Tensor, weight: Any) -> Tensor:
    """What this process has of a tensor that is split along the same dimension as a weight."""
    return spread_like(value, weight).to_local()  # type: ignore[attr-defined]


def spread_like(value: Tensor, weight: Any) -> Tensor:
    """A whole weight, spread over the processes as another one is; differentiable."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = DTensor.from_local(value, weight.device_mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=weight.placements)


class _Summed(torch.autograd.Function):
    """Changes nothing; its gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, offset: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return offset.view_as(offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_over_processes(grad, ctx.weight), None


class _Sum(torch.autograd.Function):
    """The sum over the processes, each of which has the whole gradient of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, weight: Any) -> Tensor:
        return _sum_over_processes(part, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum_over_processes(part: Tensor, weight: Any) -> Tensor:
    total = part.contiguous().clone()
    torch.distributed.all_reduce(total, group=weight.device_mesh.get_group())
    return total
