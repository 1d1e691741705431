"""Cheaper gradients of coefficients: products in bfloat16.

In the backward pass of a linear layer or convolution one product is the coefficients' alone: the gradient of the weight,
whose inner product with every template is the gradient of its coefficient. Everything else the frozen model needs as well. This
product may be formed in bfloat16 and summed in float32 by the hardware, as the config's ``coefficient_gradient`` says; on
processors and accelerators with such products that is several times faster, and the error is that of rounding. ``"auto"``,
the default, takes it for layers in float32 on a processor where it was measured to be faster, and the exact product everywhere
else.

The estimate is corrected by what is known exactly: y is linear in the weight, so the inner product of the input with its
gradient, which the backward pass has formed anyway, is the sum of all coefficients times their gradients. The estimate is
moved to the nearest one with that sum. That takes the error along the coefficients, which at the start of a task is the whole
error of a layer's own template.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

AUTO, EXACT, BFLOAT16 = "auto", "exact", "bfloat16"
GRADIENT_CHOICES = (AUTO, EXACT, BFLOAT16)

# "auto" takes bfloat16 from here on: measured on an EPYC with AVX-512 BF16 by examples/benchmarks/single_layer.py, where such a
# layer's training step then takes 0.73 to 0.94 times as long; below it takes up to 1.6 times as long.
FASTER_ROWS = 128
FASTER_MULTIPLICATIONS = 16_000_000


@cache
def processor_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AVX-512 BF16 or AMX), so that they are fast."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in known if ask is not None)


def is_faster_in_bfloat16(device: torch.device, rows: int, multiplications: int) -> bool:
    """Whether the product for the coefficients is faster in bfloat16; rows: tokens, or positions of an output."""
    is_large = rows >= FASTER_ROWS and multiplications >= FASTER_MULTIPLICATIONS
    return is_large and device.type == "cpu" and processor_multiplies_bfloat16()


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
