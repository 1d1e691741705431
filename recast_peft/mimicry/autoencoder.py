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

from ..composition.compose import without_autocast
from ..validation import COUNT, SEED, number_above, one_of
from .base import FittedTemplates, MimicryMethod, flatten, local_generator
from .descent import LOSSES, descend, random_templates


@dataclass(frozen=True)
class AutoEncoder(MimicryMethod):
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
    fits_full_banks: ClassVar[bool] = True

    hidden_size: int = 8
    features: int = 1024
    steps: int = 2500
    learning_rate: float = 2e-3
    loss: str = "smooth_l1"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        self.check(one_of(*LOSSES), "loss")
        self.check(COUNT, "hidden_size", "features", "steps")
        self.check(number_above(0), "learning_rate")
        self.check(SEED, "seed")

    @without_autocast()
    @torch.enable_grad()
    def fit(
        self, weights: Sequence[Tensor], num_templates: int, *, label: str = "", moments: Sequence[Tensor | None] | None = None
    ) -> FittedTemplates:
        """Train one bank; see :meth:`MimicryMethod.fit`."""
        target = flatten(weights)  # (layers, numbers)
        generator = local_generator(self.seed, label, target.device)
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
        return descend(
            weights,
            target,
            templates,
            lambda: F.linear(torch.tanh(F.linear(seen, into, into_bias)), out, out_bias),
            optimizer,
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps),
            steps=self.steps,
            loss=self.loss,
            label=label,
            progress=self.progress,
        )
