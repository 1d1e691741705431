"""The paper's variant in which a small network predicts the coefficients from the weights (section 3.2).

The network is the encoder and the templates are the decoder: coefficients = network(weight), weight = coefficients @
templates. After the fit the network is thrown away; what it says of the group's own layers is kept. The paper leaves open how
a weight enters the network: here it is averaged down to ``features`` numbers and standardised, which tells a group's few
layers apart and keeps the network as small as the paper calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import COUNT
from .descent import DescentMethod, Start, random_templates


@dataclass(frozen=True)
class AutoEncoder(DescentMethod):
    """A network with one hidden layer predicts the coefficients; it and the templates are trained together.

    Args:
        hidden_size: width of the hidden layer.
        features: numbers of a weight that the network sees.
        steps: RMSprop steps for each bank.
        learning_rate: at the start; it falls to zero along a cosine.
        loss: ``"smooth_l1"``, ``"mse"`` or ``"l1"``.
        seed: random seed for the start.
        progress: show a progress bar for a bank that takes over two seconds.
    """

    name: ClassVar[str] = "autoencoder"

    hidden_size: int = 8
    features: int = 1024
    steps: int = 2500
    learning_rate: float = 2e-3
    loss: str = "smooth_l1"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(COUNT, "hidden_size", "features")

    def begin(self, weights: Sequence[Tensor], target: Tensor, num_templates: int, generator: torch.Generator) -> Start:
        seen = F.adaptive_avg_pool1d(target[:, None], min(self.features, target.shape[1]))[:, 0]  # (layers, features)
        seen = (seen - seen.mean()) / seen.std().clamp_min(1e-12)
        parameters = [
            nn.init.kaiming_normal_(target.new_empty(self.hidden_size, seen.shape[1]), generator=generator),
            target.new_zeros(self.hidden_size),
            nn.init.orthogonal_(target.new_empty(num_templates, self.hidden_size), generator=generator),
            target.new_zeros(num_templates),
            random_templates(weights[0], num_templates, generator),
        ]
        for parameter in parameters:
            parameter.requires_grad_()
        into, into_bias, out, out_bias, templates = parameters
        optimizer = torch.optim.RMSprop(parameters, lr=self.learning_rate)
        return Start(
            templates,
            lambda: F.linear(torch.tanh(F.linear(seen, into, into_bias)), out, out_bias),
            optimizer,
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps),
        )
