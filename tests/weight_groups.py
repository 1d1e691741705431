"""Groups of weights with a part in common, quick mimicry methods, and what a fit may be measured by."""

from __future__ import annotations

import torch
from torch import Tensor

from recast_peft.banks.template_bank import mix_templates
from recast_peft.mimicry import AutoEncoder, ClosedForm, DataAware, FittedTemplates, Gradient, Recipe

QUICK = {
    "closed_form": ClosedForm(),
    "gradient": Gradient(steps=300, decay_every=60, progress=False),
    "autoencoder": AutoEncoder(steps=400, learning_rate=1e-2, progress=False),
    "data_aware": DataAware(distill_steps=3, progress=False),
}


def group(layers: int = 4, seed: int = 0, shape: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    """Weights that have a part in common, as layers of one role have, each of its own size."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return [(0.5 + 0.3 * i) * (0.1 * common + 0.1 * torch.randn(shape, generator=generator)) for i in range(layers)]


def moments_for(weights: list[Tensor], seed: int = 3) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    size = weights[0][0].numel()
    roots = [torch.randn(3 * size, size, generator=generator) * torch.linspace(0.1, 3, size) for _ in weights]
    return [root.T @ root / len(root) for root in roots]


def composed(found: Recipe | FittedTemplates, weights: list[Tensor]) -> Tensor:
    templates = mix_templates(weights, found.mix) if isinstance(found, Recipe) else found.templates
    return torch.tensordot(found.base, templates.double(), dims=1)


def error(found: Recipe | FittedTemplates, weights: list[Tensor]) -> float:
    """Squared Frobenius error over the group."""
    return float((composed(found, weights) - torch.stack(weights).double()).square().sum())


def optimum(weights: list[Tensor], templates: int) -> float:
    """Eckart-Young: the squared singular values that are left out."""
    matrix = torch.stack([w.flatten() for w in weights]).double()
    return float(torch.linalg.svdvals(matrix)[templates:].square().sum())
