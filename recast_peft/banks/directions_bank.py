"""DirectionsBank: templates of rank one between the main directions of a weight, ``T_ij = s u_i v_j^T``.

A task turns and scales what the weight does along its main directions: ``W + s U C V``, with C the task's r x r coefficients.
The directions follow from the pretrained weight, so nothing is stored beside the coefficients. LoRA-XS (Balazy et al., 2024,
arXiv 2405.17604) trains such a core between singular vectors. Those of nearly equal singular values turn by any angle when a
weight is rounded, and their signs are free; but a task that is its core alone must find the same directions on every machine
and in every precision. So they come from a few steps of subspace iteration from a fixed start: they move as the weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..composition.compose import composition_dtype
from ..composition.composed import ComposedModule
from ..composition.kinds import kind_of
from .core_product import CoreProduct
from .template_bank import BankBeside

NEGLIGIBLE = 1e-10  # of the largest direction's size, squared: beyond, directions would be of rounding, another on each machine
ITERATIONS = 3  # more come closer to the singular vectors, and turn further where a weight is rounded


def main_directions(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The main directions of a weight, by subspace iteration from a fixed start.

    The first n of more directions are those of n, but for their common size. Those that a weight has not got are zero.

    Args:
        weight: of any shape; as a matrix it has the first dimension for rows, and the others together for columns.
        count: r, at most the smaller side of the matrix.

    Returns:
        ``(rows, r)`` and ``(r, columns)`` in float64: orthonormal columns times s, and orthonormal rows, with s the root mean
        square of the weight's core between them: a coefficient of 1 is as much as the weight has there in one direction.
    """
    left, right, *_ = _directions(weight, count)
    return left, right


def directions_before(weight: Tensor, count: int) -> Tensor:
    """What a weight ``(outputs, inputs)`` makes its left main directions of, so that ``W + U C V`` is ``W (1 + A C V)``.

    Returns:
        A, ``(inputs, r)`` in float64, with ``W A = U``: the iteration found U in the weight's range.
    """
    _, _, size, inner, middle = _directions(weight, count)
    return (inner @ torch.linalg.pinv(middle, rtol=NEGLIGIBLE) * size).contiguous()


def _directions(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """U and V, s, the directions of inputs that U was found from, and the weight between these and U / s."""
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    matrix = weight.detach().flatten(1).to(device, torch.float64)
    # numpy keeps the numbers of this generator for good
    start = np.random.RandomState(0).standard_normal((count, matrix.shape[1]))
    left = _orthonormal(matrix @ torch.from_numpy(start).T.to(device))
    for _ in range(ITERATIONS):
        inner = _orthonormal((left.T @ matrix).T)  # a product with the turned matrix takes ten times as long
        left = _orthonormal(matrix @ inner)
    core = (left.T @ matrix).T
    right = _orthonormal(core)
    size = (core.T @ right).norm() / count**0.5
    # torch's QR gives columns that lie apart, which ExecuTorch does not take
    return (left * size).contiguous(), right.T.contiguous(), size, inner, core.T @ inner


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of columns, in their order and with signs that are theirs; zero for those that are rounding."""
    q, r = torch.linalg.qr(columns)
    sizes = r.diagonal()
    return q * torch.where(sizes.abs() <= NEGLIGIBLE * sizes.abs().max(), 0.0, sizes.sign())


class DirectionsBank(BankBeside):
    """The templates between the main directions of one weight: r * r of them; zero coefficients give the pretrained weight.

    Args:
        name: name of the bank.
        members: the one target module.
        layers: its layer.
        num_directions: r.

    Shapes:
        ``left`` ``(rows, r)`` and ``right`` ``(r, columns)`` of the weight as a matrix, in the weight's dtype. They are buffers
        that no file holds.
    """

    left: Tensor
    right: Tensor
    is_factored = True
    _seen: Tensor | None = None  # a few numbers of the weight that they were found from

    def __init__(self, name: str, members: Sequence[str], layers: Sequence[ComposedModule], num_directions: int) -> None:
        super().__init__(name, members, layers)
        self.num_directions = num_directions
        self._find()

    def _find(self) -> None:
        weight = self.layers[0].pretrained_weight
        for side, tensor in zip(("left", "right"), main_directions(weight, self.num_directions), strict=True):
            # set in place of register_buffer, which low_cpu_mem_usage may redirect to the meta device
            self._buffers[side] = tensor.to(weight.device, weight.dtype)
            self._non_persistent_buffers_set.add(side)
        self._seen, self.is_outdated = self.layers[0].weight_sample(), False

    def _follow(self) -> None:
        """Find the directions of the weight that lies there now, if it is another one; banks are a model's last module."""
        now, seen = self.layers[0].weight_sample(), self._seen
        is_another = now is not None and (self.left.is_meta or (seen is not None and not torch.equal(now, seen.to(now))))
        if is_another or self.is_outdated:
            self._find()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._follow()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DirectionsBank:
        if not self.left.is_meta:  # else they have no numbers that could be moved
            super()._apply(fn, recurse)
        self._follow()
        return self

    @property
    def key(self) -> str:
        """Its name among the banks of a model."""
        return f"{self.name}@directions_{self.num_directions}"

    @property
    def num_templates(self) -> int:
        """One for each pair of an input and an output direction: r * r."""
        return self.num_directions**2

    def get_templates(self, device: torch.device) -> list[Tensor]:
        """All templates, each shaped like the weight: for looking at, not for computing with."""
        shape = self.layers[0].weight_shape
        pairs = [(i, j) for i in range(self.num_directions) for j in range(self.num_directions)]
        return [torch.outer(self.left[:, i], self.right[j]).view(shape).to(device) for i, j in pairs]

    def added_to(self, weight: Tensor | None, offsets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        like = self.left if weight is None else weight
        work = composition_dtype(offsets.dtype, like.dtype)
        core = offsets.to(work).view(self.num_directions, self.num_directions)
        left, right = (side.to(offsets.device, work) for side in (self.left, self.right))
        change = (left @ core @ right).view(self.layers[0].weight_shape)
        return (change if weight is None else weight.to(work) + change).to(dtype or like.dtype)

    def core_product(self, offsets: Tensor) -> CoreProduct:
        """What the templates add to the output of the member; ``offsets`` are ``(1 or samples, templates)``."""
        module: Any = self.layers[0].base_layer
        kind, device = kind_of(module), offsets.device
        held: Any = self._buffers  # torch's own look-up takes ten times as long, and every call would pay for it
        left, right = (side if side.device == device else side.to(device) for side in (held["left"], held["right"]))
        if kind is not None and kind.is_transposed:
            return CoreProduct(module, left, right.T, offsets)
        return CoreProduct(module, right.view(-1, *self.layers[0].weight_shape[1:]), left, offsets)

    def product_terms(
        self, member: str, offsets: Tensor, device: torch.device
    ) -> tuple[list[Tensor], Tensor | None, CoreProduct]:
        """The pretrained weight, and what the templates add to the output, where ``takes_core`` holds."""
        return [self.layers[0].pretrained_weight.to(device)], None, self.core_product(offsets.to(device))

    def extra_repr(self) -> str:
        return f"{self.name}, {self.num_directions} directions, templates={self.num_templates}"
