"""Piggyback: learned binary masks on frozen weights (Mallya et al., ECCV 2018, arXiv 1801.06519, section 3).

A weight keeps the entries whose real-valued score is above a threshold. Scores are trained through the threshold as if it were
not there; a stored task has one bit for each entry. With RECAST the mask is put on the weight that the task composes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastLoadError
from ..options.partner import PartnerCandidate, PartnerConfig
from ..validation import number, number_above

# Bit i of a byte stands for the i-th of eight entries.
_PLACES = tuple(range(8))


@dataclass(frozen=True, kw_only=True)
class PiggybackConfig(PartnerConfig, method="piggyback"):
    """A binary mask on the weight of each target module.

    Args:
        target_modules: the modules whose weight is masked; None takes the task's own target modules.
        initial_score: score of every entry, above the threshold: the mask starts at all ones.
        threshold: entries whose score is not above it are zero.

    Raises:
        RecastConfigError: naming the option and its value, if a value cannot be used.
    """

    acts_on = "weight"

    initial_score: float = 1e-2
    threshold: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(number, "threshold")
        self.check(number_above(self.threshold), "initial_score")

    def is_default_place(self, candidate: PartnerCandidate, targets: Collection[str]) -> bool:
        return candidate.name in targets

    def refusal(self, candidate: PartnerCandidate) -> str | None:
        if candidate.weight_name is None:
            return candidate.reason or f"{type(candidate.module).__name__} has no weight of its own"
        return candidate.reason

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        assert shape is not None
        return WeightMask(shape, self.initial_score, self.threshold, **like)

    def stored_shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        assert isinstance(module, WeightMask)
        return {"mask": module.packed_shape}


class WeightMask(nn.Module):
    """The mask of one weight and task.

    Shapes:
        weight and ``scores`` alike; packed ``(ceil(entries / 8),)`` in uint8.
    """

    def __init__(self, shape: tuple[int, ...], initial_score: float, threshold: float, **like: Any) -> None:
        super().__init__()
        self.initial_score, self.threshold = initial_score, threshold
        self.shape = tuple(shape)  # the parameter may be a shard
        self.scores = nn.Parameter(torch.full(shape, initial_score, **like))

    def forward(self, weight: Tensor) -> Tensor:
        kept = (self.scores > self.threshold).to(weight.dtype)
        if torch.is_grad_enabled() and self.scores.requires_grad:
            # the threshold's gradient is taken to be one (straight-through); the difference is zero, to the last bit
            kept = kept + (self.scores - self.scores.detach()).to(weight.dtype)
        return weight * kept

    def pack(self, scores: Tensor) -> Tensor:
        """The mask of scores as bits, eight entries a byte."""
        kept = (scores.detach() > self.threshold).flatten()
        kept = nn.functional.pad(kept, (0, -len(kept) % 8)).view(-1, 8)
        return sum(kept[:, place].to(torch.uint8) << place for place in _PLACES)  # type: ignore[return-value]

    def unpack(self, bits: Tensor) -> Tensor:
        """Scores of a stored mask: the initial score, or as far below the threshold; ``RecastLoadError`` if it does not fit."""
        if bits.dtype != torch.uint8 or tuple(bits.shape) != self.packed_shape:
            raise RecastLoadError(
                f"a mask does not fit its weight\n  given:    {bits.dtype} {tuple(bits.shape)}\n"
                f"  expected: {torch.uint8} {self.packed_shape}, one bit for each of {self.shape}"
            )
        kept = torch.stack([(bits >> place) & 1 for place in _PLACES], dim=1).flatten()[: math.prod(self.shape)].bool()
        scores = torch.full(kept.shape, self.initial_score, dtype=self.scores.dtype, device=bits.device)
        return torch.where(kept, scores, 2 * self.threshold - scores).view(self.shape)

    @property
    def packed_shape(self) -> tuple[int]:
        """Shape of the packed mask."""
        return (math.ceil(math.prod(self.shape) / 8),)
