"""The least-squares optimum in closed form (Eckart and Young, 1936).

With the layers' weights flattened to the rows of M (layers x d), the best n templates for the squared error span the top n
right singular vectors of M. They follow from the eigenvectors U of the small Gram matrix M M^T alone: templates U^T M, base
coefficients U. The paper fits the same quantities by gradient descent (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22  # numbers of a weight held in float64 at once


def gram_matrix(weights: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs of weights, ``(layers, layers)`` in float64 on the CPU."""
    flat = [weight.detach().reshape(-1) for weight in weights]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].numel(), CHUNK):
        rows = torch.stack([f[start : start + CHUNK].to(torch.float64) for f in flat])
        total += (rows @ rows.T).cpu()
    return total


def closed_form(weights: Sequence[Tensor], num_templates: int) -> tuple[Tensor, Tensor]:
    """Templates and base coefficients with the least squared error.

    Args:
        weights: the group's pretrained weights, all of one shape.
        num_templates: n, at most the number of layers.

    Returns:
        mix ``(templates, layers)`` and base coefficients ``(layers, templates)`` in float64. Every template has the mean
        norm of the layers (so that a coefficient is measured in weights), and its largest mixing weight is positive.
    """
    gram = gram_matrix(weights)
    values, vectors = torch.linalg.eigh(gram)  # ascending
    top = vectors.flip(1)[:, :num_templates]  # (layers, templates)
    signs = torch.sign(top.gather(0, top.abs().argmax(dim=0, keepdim=True)))
    top = top * signs
    norms = values.flip(0)[:num_templates].clamp_min(0).sqrt()
    mean_norm = gram.diagonal().clamp_min(0).sqrt().mean()
    # a direction without energy keeps its length: scaling it up would only blow up rounding errors
    scale = torch.where(norms > 1e-6 * mean_norm, mean_norm / norms.clamp_min(1e-300), torch.ones_like(norms))
    return (top * scale).T.contiguous(), top / scale
