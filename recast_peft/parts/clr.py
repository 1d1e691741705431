"""CLR, Channel-wise Lightweight Reprogramming (Ge et al., ICCV 2023, arXiv 2307.11386, section 3.2).

A depth-wise convolution after each convolution of a network, which starts as the identity. What is trained is the difference
to the identity kernel: it starts at zero, so a fresh task changes nothing in any precision, and weight decay pulls towards the
pretrained network.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..options.partner import PartnerCandidate, PartnerConfig
from ..planning.reading import why_unheard
from ..validation import Unexpected, is_count, optional


def _odd(value: Any) -> None:
    if not is_count(value) or value % 2 == 0:
        raise Unexpected("an odd whole number")


@dataclass(frozen=True, kw_only=True)
class CLRConfig(PartnerConfig, method="clr"):
    """A depth-wise convolution after each two-dimensional convolution.

    Args:
        target_modules: the convolutions that it follows; None takes all of the model but for its head.
        kernel_size: size of the depth-wise convolution, an odd number.
        pointwise_kernel_size: the same after 1x1 convolutions: 3 as after all others, 1 for one factor a channel; None leaves
            them out (the authors' code has all three).

    Raises:
        RecastConfigError: naming the option and its value, if a value cannot be used.
    """

    kernel_size: int = 3
    pointwise_kernel_size: int | None = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(_odd, "kernel_size")
        self.check(optional(_odd), "pointwise_kernel_size")

    def is_default_place(self, candidate: PartnerCandidate, targets: Collection[str]) -> bool:
        return True

    def refusal(self, candidate: PartnerCandidate) -> str | None:
        if not isinstance(candidate.module, nn.Conv2d):
            return f"{type(candidate.module).__name__} is no two-dimensional convolution"
        if self._size_after(candidate.module) is None:
            return "it is a 1x1 convolution, which pointwise_kernel_size=None leaves out"
        return why_unheard(candidate, "weight")

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        assert isinstance(module, nn.Conv2d)
        size = self._size_after(module)
        assert size is not None
        return Reprogramming(module.out_channels, size, **like)

    def _size_after(self, module: nn.Conv2d) -> int | None:
        return self.pointwise_kernel_size if tuple(module.kernel_size) == (1, 1) else self.kernel_size


class Reprogramming(nn.Module):
    """The depth-wise convolution of one place and task, as its difference to the identity.

    Shapes:
        output of the convolution ``(batch, channels, height, width)``; ``offset`` ``(channels, 1, size, size)``.
    """

    def __init__(self, channels: int, size: int, **like: Any) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(channels, 1, size, size, **like))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        offset = self.offset
        change = F.conv2d(y.to(offset.dtype), offset, padding=offset.shape[-1] // 2, groups=len(offset))
        return y + change.to(y.dtype)
