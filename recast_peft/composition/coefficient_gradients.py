"""Cheaper gradients of coefficients: from rows that are drawn, or from products in bfloat16.

In the backward pass of a linear layer or convolution one product is the coefficients' alone: the gradient of the weight,
whose inner product with every template is the gradient of its coefficient. Everything else the frozen model needs as well. This
product may be estimated, as the config's ``coefficient_gradient`` says:

- a share of the rows (tokens; of a convolution, samples): they are drawn with probabilities in proportion to what they can
  contribute, the norm of their gradient times that of their input, and weighted by one over the probability, so that the
  estimate has the exact gradient for its mean (Horvitz and Thompson, 1952; fixed count by systematic sampling, Madow, 1949);
- bfloat16: all rows, summed in float32 by the hardware; on processors and accelerators with such products that is several
  times faster, and the error is that of rounding. ``"auto"``, the default, takes it for layers in float32 on a processor where
  it was measured to be faster, and the exact product everywhere else.

Either estimate is corrected by what is known exactly: y is linear in the weight, so the inner product of the input with its
gradient, which the backward pass has formed anyway, is the sum of all coefficients times their gradients. The estimate is
moved to the nearest one with that sum. That keeps its mean and takes the error along the coefficients, which at the start of a
task is the whole error of a layer's own template.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

AUTO, EXACT, BFLOAT16 = "auto", "exact", "bfloat16"
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this length fill the unit interval evenly (Weyl)
MOST_ROUNDS = 8  # of sharing out what rows above probability one leave; each sets some of them to one
FEWEST_ROWS = 16  # below this there is nothing to save

# "auto" takes bfloat16 from here on: measured on an EPYC with AVX-512 BF16 by examples/benchmarks/single_layer.py, where such a
# layer's training step then takes 0.73 to 0.94 times as long; below it takes up to 1.6 times as long.
FASTER_ROWS = 128
FASTER_MULTIPLICATIONS = 16_000_000


@dataclass(frozen=True)
class Estimate:
    """How one call's gradient of the coefficients is formed.

    Attributes:
        share: of the rows, above 0 and below 1; None takes all of them in bfloat16.
        start: where the draw begins, 0 to below 1.
        if_faster: only where that is faster than the exact product.
    """

    share: float | None
    start: float = 0.0
    if_faster: bool = False


def is_coefficient_gradient(value: object) -> bool:
    """Whether a value says how gradients of coefficients are formed: ``"auto"``, ``"exact"``, ``"bfloat16"`` or a share."""
    if isinstance(value, str):
        return value in (AUTO, EXACT, BFLOAT16)
    return isinstance(value, float) and 0 < value < 1


@cache
def processor_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AVX-512 BF16 or AMX), so that they are fast."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in known if ask is not None)


def is_faster_in_bfloat16(device: torch.device, rows: int, multiplications: int) -> bool:
    """Whether the product for the coefficients is formed faster in bfloat16 than in float32.

    Args:
        device: of the layer.
        rows: tokens; of a convolution, positions of its output.
        multiplications: of the product.
    """
    is_large = rows >= FASTER_ROWS and multiplications >= FASTER_MULTIPLICATIONS
    return is_large and device.type == "cpu" and processor_multiplies_bfloat16()


def estimate_of(value: str | float, offset: float, call: int) -> Estimate | None:
    """The estimate for a call; None for the exact gradient.

    Args:
        value: ``coefficient_gradient`` of the config.
        offset: of the layer, so that layers do not draw alike.
        call: how many calls of the layer there were before; successive draws begin a golden section apart.
    """
    if value == EXACT:
        return None
    if value in (AUTO, BFLOAT16):
        return Estimate(None, if_faster=value == AUTO)
    return Estimate(float(value), (offset + call * GOLDEN) % 1.0)


def draw_rows(importance: Tensor, count: int, start: float) -> tuple[Tensor, Tensor]:
    """Rows with probabilities in proportion to their importance, and weights that make sums over them unbiased.

    Args:
        importance: ``(rows,)``, not negative.
        count: how many are drawn; rows whose probability would be above one are taken for certain, the others share the rest.
        start: uniform in [0, 1): it alone decides the draw.

    Returns:
        ``(count,)`` rows in ascending order and ``(count,)`` weights in float64: one over the probability, or zero where fewer
        rows than ``count`` have any importance.
    """
    importance = importance.double()
    chance = torch.zeros_like(importance)
    for _ in range(MOST_ROUNDS):
        certain = chance >= 1
        open_ones = importance.masked_fill(certain, 0)
        left = count - certain.sum()
        chance = torch.where(certain, 1.0, open_ones * (left / open_ones.sum().clamp_min(torch.finfo(torch.float64).tiny)))
    chance = chance.clamp(max=1)
    ends = chance.cumsum(0)
    points = start + torch.arange(count, dtype=torch.float64, device=importance.device)
    rows = torch.searchsorted(ends, points, right=True)
    hit = rows < len(importance)
    rows = rows.clamp(max=len(importance) - 1)
    return rows, torch.where(hit, 1 / chance[rows].clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def with_known_sum(estimates: Tensor, factors: Tensor, total: Tensor) -> Tensor:
    """The nearest numbers to the estimates whose sum with the factors is known: ``sum_i factors[i] * result[i] == total``.

    Args:
        estimates: ``(n,)``; where they are unbiased so is the result.
        factors: ``(n,)``.
        total: a number; where all factors are zero it says nothing, and the estimates stay.
    """
    size = torch.dot(factors, factors)
    step = (total - torch.dot(factors, estimates)) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return estimates + factors * torch.where(size > 0, step, torch.zeros_like(step))
