"""Neural Mimicry as the paper does it: templates and coefficients trained by gradient descent (section 3.2).

The defaults are the settings of the paper's notebooks for ViT-Small; ``Gradient.paper("resnet")`` has those for ResNet-34.
What they leave open is decided here: every bank is fitted on its own (with its own generator and its own clipping), the
coefficient sets are averaged before they are stored, and the step that is kept is the one with the least loss without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import RecastConfigError
from ..validation import COUNT, number_above, one_of, optional
from .closed_form import gram_matrix, recipe_from_gram
from .descent import DescentMethod, Start, random_templates

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}

PAPER: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {"steps": 3000, "decay_every": 500, "learning_rate": 0.2, "loss_scale": 3.5, "coefficient_noise": 0.0},
}


@dataclass(frozen=True)
class Gradient(DescentMethod):
    """Templates and coefficients by gradient descent on the difference of the weights.

    Args:
        steps: optimiser steps for each bank.
        loss: ``"smooth_l1"``, ``"mse"`` or ``"l1"`` between the composed and the pretrained weights.
        loss_scale: a factor on the loss.
        optimizer: ``"rmsprop"`` or ``"adam"``.
        learning_rate: at the start.
        decay: factor on the learning rate every ``decay_every`` steps.
        decay_every: steps between two decays.
        coefficient_noise: standard deviation of the normal noise on the coefficients in every step.
        clip_norm: gradients are clipped to this norm; None leaves them.
        fit_sets: coefficient sets that are fitted and averaged (K in the paper).
        start: ``"random"`` (templates Kaiming normal, coefficients orthogonal) or ``"closed_form"``, the least-squares
            optimum; as the best step is kept and the start counts as one, the result is never worse than that, by the loss.
        seed: random seed for the start and the noise.
        progress: show a progress bar for a bank that takes over two seconds.
    """

    name: ClassVar[str] = "gradient"

    steps: int = 1000
    loss: str = "smooth_l1"
    loss_scale: float = 2.0
    optimizer: str = "rmsprop"
    learning_rate: float = 0.1
    decay: float = 0.1
    decay_every: int = 200
    coefficient_noise: float = 1e-4
    clip_norm: float | None = 1.0
    fit_sets: int = 2
    start: str = "random"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(one_of(*OPTIMIZERS), "optimizer")
        self.check(one_of("random", "closed_form"), "start")
        self.check(COUNT, "decay_every", "fit_sets")
        self.check(number_above(0), "loss_scale", "decay")
        self.check(number_above(0, itself=True), "coefficient_noise")
        self.check(optional(number_above(0)), "clip_norm")

    @classmethod
    def paper(cls, backbone: str = "vit", **options: Any) -> Gradient:
        """The settings of the paper for ``"vit"`` or ``"resnet"``; further options override them.

        For the residual network the paper scales the loss by 3.5 for ``conv1`` and 2.5 for ``conv2``; RMSprop divides such
        a factor out again but for its epsilon, so one factor stands for both here.

        Raises:
            RecastConfigError: if the paper has no such settings.
        """
        if backbone not in PAPER:
            raise RecastConfigError(f"Gradient.paper({backbone!r}): expected one of {', '.join(PAPER)}")
        return cls(**{**PAPER[backbone], **options})

    def begin(self, weights: Sequence[Tensor], target: Tensor, num_templates: int, generator: torch.Generator) -> Start:
        if self.start == "closed_form":
            recipe = recipe_from_gram(gram_matrix(weights), num_templates)
            templates = recipe.mix.to(target) @ target
            sets = recipe.base.to(target).expand(self.fit_sets, -1, -1).clone()
        else:
            templates = random_templates(weights[0], num_templates, generator)
            sets = target.new_empty(self.fit_sets, len(target), num_templates)
            for one in sets:
                torch.nn.init.orthogonal_(one, generator=generator)
        trained = [templates.requires_grad_(), sets.requires_grad_()]
        optimizer = OPTIMIZERS[self.optimizer](trained, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.decay_every, self.decay)

        def noise() -> Tensor:
            drawn = torch.randn(sets.shape, generator=generator, dtype=sets.dtype, device=sets.device)
            return (drawn * self.coefficient_noise).mean(dim=0)

        return Start(templates, lambda: sets.mean(dim=0), optimizer, schedule, noise if self.coefficient_noise else None)
