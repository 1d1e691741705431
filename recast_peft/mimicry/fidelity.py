"""How well templates and base coefficients reproduce the pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20  # numbers held in float64 at once


@dataclass(frozen=True)
class Fidelity:
    """How near one reproduced weight is to the pretrained one.

    Attributes:
        cosine: cosine of the angle between the two, flattened.
        relative_error: Frobenius norm of their difference, in units of the pretrained weight's.
    """

    cosine: float
    relative_error: float

    @property
    def energy_kept(self) -> float:
        """Share of the pretrained weight's squared norm that the difference leaves: 1 - relative_error squared."""
        return 1.0 - self.relative_error**2


EXACT = Fidelity(cosine=1.0, relative_error=0.0)


def measure_fidelity(weights: Sequence[Tensor], templates: Tensor, base: Tensor) -> list[Fidelity]:
    """Compare the weights that a bank composes with the pretrained ones.

    Args:
        weights: the pretrained weights of the group's layers.
        templates: ``(templates, *weight_shape)``.
        base: ``(layers, templates)``.

    Returns:
        one for each layer; sums are formed in float64, a few million numbers at a time.
    """
    flat = templates.detach().reshape(templates.shape[0], -1)
    result = []
    for layer, weight in enumerate(weights):
        target, sums = weight.detach().reshape(-1), torch.zeros(4, dtype=torch.float64)
        mix = base[layer].to(flat.device, torch.float64)
        chunk = max(1, CHUNK // (flat.shape[0] + 2))
        for start in range(0, target.numel(), chunk):
            w = target[start : start + chunk].to(flat.device, torch.float64)
            composed = mix @ flat[:, start : start + chunk].to(torch.float64)
            sums += torch.stack([w @ w, composed @ composed, w @ composed, (w - composed).square().sum()]).cpu()
        own, other, inner, error = sums.tolist()
        scale = (own * other) ** 0.5
        # a weight of zeros has no direction and no scale: it is reproduced, or it is not
        cosine = min(1.0, max(-1.0, inner / scale)) if scale > 0 else float(error == 0)
        result.append(Fidelity(cosine, (error / own) ** 0.5 if own > 0 else float(error > 0)))
    return result
