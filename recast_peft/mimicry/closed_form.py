"""The least-squares optimum in closed form (Eckart and Young, 1936).

With the layers' weights flattened to the rows of M (layers x d), the best n templates for the squared error span the top n
right singular vectors of M. They follow from the eigenvectors U of the small Gram matrix M M^T alone: templates U^T M, base
coefficients U. The paper fits the same quantities by gradient descent (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import MimicryMethod, Recipe, scale_to

CHUNK = 1 << 20  # numbers held in float64 at once, all layers together


def gram_matrix(weights: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs of weights, ``(layers, layers)`` in float64 on the CPU."""
    flat = [weight.detach().reshape(-1) for weight in weights]
    device = flat[0].device
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    chunk = max(1, CHUNK // len(flat))
    for start in range(0, flat[0].numel(), chunk):
        rows = torch.stack([f[start : start + chunk].to(device, torch.float64) for f in flat])
        total += (rows @ rows.T).cpu()
    return total


def principal_axes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(n,)`` and eigenvectors (columns) of inner products ``(n, n)``, the largest first.

    The sign of an eigenvector is free: its largest entry is positive.
    """
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(gram))
    return values, with_signs(vectors)


def with_signs(columns: Tensor) -> Tensor:
    """Columns whose sign is free, each with the sign that makes its largest entry positive."""
    return columns * columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).sign()


@dataclass(frozen=True)
class ClosedForm(MimicryMethod):
    """The templates and base coefficients with the least squared error; no options."""

    name: ClassVar[str] = "closed_form"

    def fit(
        self, weights: Sequence[Tensor], num_templates: int, *, label: str = "", moments: Sequence[Tensor | None] | None = None
    ) -> Recipe:
        """Recipe with the least squared error; see :meth:`MimicryMethod.fit`."""
        return recipe_from_gram(gram_matrix(weights), num_templates)


def recipe_from_gram(gram: Tensor, num_templates: int) -> Recipe:
    """The best recipe, from inner products alone.

    Args:
        gram: ``(layers, layers)`` in float64.
        num_templates: n, at most the number of layers.

    Returns:
        the recipe. Every template has the mean norm of the layers (so that a coefficient is measured in weights), and its
        largest mixing weight is positive. As many templates as layers give the identity: the weights are the templates.
    """
    if num_templates == gram.shape[0]:
        return Recipe(torch.eye(num_templates, dtype=torch.float64), torch.eye(num_templates, dtype=torch.float64))
    values, vectors = principal_axes(gram)
    top = vectors[:, :num_templates]  # (layers, templates)
    norms = values[:num_templates].clamp_min(0).sqrt()
    scale = scale_to(norms, gram.diagonal().clamp_min(0).sqrt().mean())
    return Recipe((top * scale).T.contiguous(), top / scale)
