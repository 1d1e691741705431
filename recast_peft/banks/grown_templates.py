"""Grown templates: directions beside the pretrained weights, each a dense tensor or a low-rank pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..composition.kinds import kind_of
from ..mimicry.closed_form import gram_matrix, principal_axes

# Names of the tensors in a bank, by how many there are: one of dense templates, or two of low-rank pairs.
PARTS = {1: ("grown",), 2: ("left", "right")}
NEGLIGIBLE = 1e-10  # share of the energy below which a component is rounding


@dataclass(frozen=True, eq=False)
class GrownTemplates:
    """The grown templates of one group.

    Attributes:
        tensors: one ``(templates, *weight_shape)``, or two factors ``(templates, rows, rank)`` and ``(templates, rank,
            columns)`` of the weight as a matrix (all dimensions but the first taken together).
        weight_shape: shape of every member's weight.
        plain: whether the members' pretrained weights are templates too; they come first then.
        energy: share of the sources' squared norm that the first 1, 2, ... templates keep; for information.
    """

    tensors: tuple[Tensor, ...]
    weight_shape: tuple[int, ...]
    plain: bool = True
    energy: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the templates as they are held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def first(self, count: int) -> GrownTemplates:
        """The first templates alone, in the same memory."""
        return replace(self, tensors=tuple(t[:count] for t in self.tensors), energy=self.energy[:count])

    def dense(self) -> list[Tensor]:
        """Every template shaped like the weight."""
        if len(self.tensors) == 1:
            return list(self.tensors[0].unbind(0))
        # one product for each template: in a batch of them the bits would depend on how many there are
        return [(left @ right).reshape(self.weight_shape) for left, right in zip(*self.tensors, strict=True)]

    def named(self, bank: str) -> dict[str, Tensor]:
        """The tensors by their names in a bank file, which say whether the plain templates are there too."""
        only = "" if self.plain else "only_"
        return {f"{bank}.{only}{part}": t for part, t in zip(PARTS[len(self.tensors)], self.tensors, strict=True)}


def as_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as rows ``(tensors, numbers)`` in float64 on the CPU."""
    return torch.stack([tensor.detach().reshape(-1).double().cpu() for tensor in tensors])


def orthonormal_basis(templates: Sequence[Tensor]) -> Tensor:
    """A basis ``(numbers, templates)`` in float64 whose first columns span the first templates."""
    return torch.linalg.qr(as_rows(templates).T).Q


def energy_kept(moves: Sequence[Tensor], grown: GrownTemplates) -> tuple[float, ...]:
    """Share of the squared norm of changes of weights in the span of the first 1, 2, ... templates."""
    if not moves or not len(grown):
        return ()
    flat = as_rows(moves)
    shares = (flat @ orthonormal_basis(grown.dense())).square().sum(0) / flat.square().sum().clamp_min(1e-300)
    return tuple(float(share) for share in shares.cumsum(0))


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """What all low-rank pairs together add to a linear layer's output: one pair of products, however many pairs there are."""

    first: Tensor  # ``(inputs, numbers)``, the first factors side by side; each pair has rank numbers
    second: Tensor  # ``(numbers, outputs)``
    scale: Tensor  # ``(samples, numbers)``, each sample's coefficients, every one rank times

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The output ``(samples, ..., outputs)`` for the input ``(samples, ..., inputs)``; ``y`` is written to."""
        scale = self.scale.view(len(x), *[1] * (x.ndim - 2), -1)
        narrow = ((x @ self.first.to(x.dtype)) * scale.to(x.dtype)).to(y.dtype)
        flat = y.view(-1, y.shape[-1])
        # one pass over the output, which is the wide one
        return flat.addmm_(narrow.reshape(-1, narrow.shape[-1]), self.second.to(y.dtype)).view(y.shape)


def low_rank_sum(module: nn.Module, pairs: tuple[Tensor, Tensor], coefficients: Tensor) -> LowRankSum:
    """Stack low-rank pairs.

    Args:
        module: a linear layer, of a kind that ``takes_low_rank``.
        pairs: ``(templates, rows, rank)`` and ``(templates, rank, columns)`` of its weight.
        coefficients: ``(samples, templates)``.
    """
    left, right = pairs
    scale = coefficients.repeat_interleave(left.shape[2], dim=1)
    rows, columns = left.transpose(0, 1).flatten(1), right.flatten(0, 1)  # (rows, numbers), (numbers, columns)
    kind = kind_of(module)
    if kind is not None and kind.is_transposed:
        return LowRankSum(rows, columns, scale)
    return LowRankSum(columns.T, rows.T, scale)


def principal_components(
    moves: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, count: int | None, rank: int | None, plain: bool
) -> GrownTemplates:
    """The principal components of task vectors (not centred: what they have in common counts too), largest first.

    Args:
        moves: task vectors, each ``(*shape)``.
        shape: shape of a template.
        dtype: dtype of the templates.
        count: components at most; None takes all.
        rank: rank of low-rank pairs; None keeps templates dense.
        plain: whether the members' own weights are templates too.
    """
    if not moves:
        return GrownTemplates(_tensors_of(torch.zeros((0, *shape)), rank, dtype), tuple(shape), plain)
    mix = principal_mix(gram_matrix(moves), count)
    templates = (mix.T @ as_rows(moves)).float().reshape(-1, *shape)
    grown = GrownTemplates(_tensors_of(templates, rank, dtype), tuple(shape), plain)
    return replace(grown, energy=energy_kept(moves, grown))


def principal_mix(gram: Tensor, count: int | None) -> Tensor:
    """How vectors are mixed to their principal components, each of the root mean square norm of the vectors.

    Args:
        gram: inner products ``(vectors, vectors)`` in float64.
        count: components at most; None takes all that are more than rounding.

    Returns:
        ``(vectors, components)``, the largest component first.
    """
    values, mix = principal_axes(gram)
    kept = int((values > NEGLIGIBLE * values.sum()).sum())
    kept = min(kept, count or kept)
    size = (values.sum() / len(gram)).sqrt()
    return mix[:, :kept] * (size / values[:kept].sqrt())


def _tensors_of(templates: Tensor, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = (templates,) if rank is None else factorise(templates, rank)
    return tuple(t.to(dtype) for t in tensors)


def factorise(templates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest low-rank pair of every template (Eckart and Young).

    Args:
        templates: ``(templates, *weight_shape)``.
        rank: rank of the pairs; at most the smaller side of the weight as a matrix.

    Returns:
        ``(templates, rows, rank)`` and ``(templates, rank, columns)``, the singular values divided evenly between them.
    """
    matrices = templates.flatten(2) if templates.ndim > 2 else templates[..., None]
    rank = min(rank, *matrices.shape[1:])
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    root = values[:, :rank].sqrt()
    return (left[:, :, :rank] * root[:, None]).contiguous(), (right[:, :rank] * root[..., None]).contiguous()
