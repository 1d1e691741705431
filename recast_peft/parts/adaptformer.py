"""AdaptFormer: a bottleneck beside the MLP of every transformer block (Chen et al., NeurIPS 2022, arXiv 2205.13535).

The paper's branch reads what the MLP reads, the normalised input of the block's second half (section 3.2), and so does this
one; the authors' code gives it the input before that normalisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..composition.kinds import CONVOLUTION, family_of, in_and_out_features
from ..options.partner import PartnerCandidate, PartnerConfig
from ..validation import COUNT, flag, number, share

_MLP = re.compile(r"mlp|ffn|feed_?forward|Mlp|MLP|FFN|FeedForward|GLU|Glu")


@dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(PartnerConfig, method="adaptformer"):
    """A bottleneck beside the MLP: ``y = MLP(x) + scale * up(relu(down(x)))``.

    Args:
        target_modules: the modules that it stands beside; None takes the MLP of every block.
        bottleneck: width between ``down`` and ``up``.
        scale: factor on the branch's output.
        dropout: probability of dropout in the bottleneck, in training; 0.1 in the authors' code.
        layer_norm: normalise the branch's input by a norm of its own, for models that do not normalise before the MLP.

    Raises:
        RecastConfigError: naming the option and its value, if a value cannot be used.
    """

    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    layer_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(COUNT, "bottleneck")
        self.check(number, "scale")
        self.check(share, "dropout")
        self.check(flag, "layer_norm")

    def is_default_place(self, candidate: PartnerCandidate, targets: Collection[str]) -> bool:
        words = (candidate.name.rpartition(".")[2], type(candidate.module).__name__)
        return any(map(_MLP.search, words))

    def refusal(self, candidate: PartnerCandidate) -> str | None:
        layers = _layers(candidate.module)
        if len(layers) < 2:
            return "it holds no two layers, so it is no whole MLP (name the module from the MLP's input to its output)"
        if any(family_of(layer) is CONVOLUTION for layer in (layers[0], layers[-1])):
            return "it begins or ends with a convolution; the bottleneck is of linear layers over the last dimension"
        if _widths(layers[0])[0] != _widths(layers[-1])[1]:
            return f"its output is not as wide as its input ({_widths(layers[0])[0]} and {_widths(layers[-1])[1]})"
        return None

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        width = _widths(_layers(module)[0])[0]
        return Bottleneck(width, self, generator, **like)


class Bottleneck(nn.Module):
    """The branch of one block and task.

    Shapes:
        input and output of the MLP ``(..., width)``.
    """

    def __init__(self, width: int, config: AdaptFormerConfig, generator: torch.Generator, **like: Any) -> None:
        super().__init__()
        self.scale = config.scale
        self.dropout = config.dropout
        # names that modules_to_save=["norm"] or ["up"], which PEFT compares with the ends of names, does not mean
        self.normalization = nn.LayerNorm(width, **like) if config.layer_norm else None
        # without torch's own start, which would draw from the global generator
        self.down_projection = nn.utils.skip_init(nn.Linear, width, config.bottleneck, **like)
        self.up_projection = nn.utils.skip_init(nn.Linear, config.bottleneck, width, **like)
        if self.down_projection.weight.is_meta:  # it is only counted
            return
        with torch.no_grad():  # section 3.2: down by Kaiming, up zero, so that the branch starts at zero
            drawn = torch.empty(self.down_projection.weight.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self.down_projection.weight.copy_(drawn)
            for zero in (self.down_projection.bias, self.up_projection.weight, self.up_projection.bias):
                zero.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = x.to(self.down_projection.weight.dtype)
        if self.normalization is not None:
            hidden = self.normalization(hidden)
        hidden = F.dropout(torch.relu(self.down_projection(hidden)), self.dropout, self.training)
        return y + (self.scale * self.up_projection(hidden)).to(y.dtype)


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if (kind := family_of(layer)) is not None and kind.call is not None]


def _widths(layer: nn.Module) -> tuple[int, int]:
    return in_and_out_features(layer, tuple(getattr(layer.weight, "shape", ())))
