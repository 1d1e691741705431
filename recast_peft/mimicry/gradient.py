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
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import RecastConfigError
from .base import FittedTemplates, MimicryMethod, flatten, local_generator, scale_templates
from .closed_form import gram_matrix, recipe_from_gram

LOSSES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss, "l1": F.l1_loss}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}
STARTS = ("random", "closed_form")

PAPER: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {"steps": 3000, "decay_every": 500, "learning_rate": 0.2, "loss_scale": 3.5, "coefficient_noise": 0.0},
}


@dataclass(frozen=True)
class Gradient(MimicryMethod):
    """Templates and coefficients by gradient descent on the difference of the weights.

    Args:
        steps: of the optimiser, for each bank.
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
        seed: of the random start and of the noise.
        progress: show a progress bar for a bank that takes over two seconds.
    """

    name: ClassVar[str] = "gradient"
    fits_full_banks: ClassVar[bool] = True

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
        for option, table in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("start", STARTS)):
            self.check(option, getattr(self, option) in table, f"one of {', '.join(table)}")
        for option in ("steps", "decay_every", "fit_sets"):
            self.check(option, isinstance(getattr(self, option), int) and getattr(self, option) >= 1, "a whole number from 1")
        for option in ("loss_scale", "learning_rate", "decay"):
            self.check(option, getattr(self, option) > 0, "a number above 0")
        self.check("coefficient_noise", self.coefficient_noise >= 0, "a number of at least 0")
        self.check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a number above 0, or None")

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

    def fit(
        self, weights: Sequence[Tensor], num_templates: int, *, label: str = "", moments: Sequence[Tensor | None] | None = None
    ) -> FittedTemplates:
        """Train one bank; see :meth:`MimicryMethod.fit`."""
        with torch.enable_grad():
            return self._fit(weights, num_templates, label)

    def _fit(self, weights: Sequence[Tensor], num_templates: int, label: str) -> FittedTemplates:
        target = flatten(weights)  # (layers, numbers)
        generator = local_generator(self.seed, label, target.device)
        templates, sets = self._begin(weights, target, num_templates, generator)
        loss_of = LOSSES[self.loss]
        optimizer = OPTIMIZERS[self.optimizer]([templates, sets], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.decay_every, self.decay)
        best = Best()
        for _ in tqdm(range(self.steps), desc=f"mimicry {label}", delay=2, leave=False, disable=not self.progress):
            base = sets.mean(dim=0)  # (layers, templates)
            with torch.no_grad():
                best.offer(float(loss_of(base @ templates, target)), templates, base)
            if self.coefficient_noise:
                noise = torch.randn(sets.shape, generator=generator, device=sets.device) * self.coefficient_noise
                base = base + noise.mean(dim=0)
            loss = self.loss_scale * loss_of(base @ templates, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([templates, sets], self.clip_norm)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            base = sets.mean(dim=0)
            best.offer(float(loss_of(base @ templates, target)), templates, base)
        return best.result(weights, target, label)

    def _begin(
        self, weights: Sequence[Tensor], target: Tensor, num_templates: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Templates ``(templates, numbers)`` and coefficient sets ``(sets, layers, templates)`` to start from."""
        if self.start == "closed_form":
            recipe = recipe_from_gram(gram_matrix(weights), num_templates)
            templates = recipe.mix.to(target) @ target
            sets = recipe.base.to(target).expand(self.fit_sets, -1, -1).clone()
        else:
            templates = random_templates(weights[0], num_templates, generator)
            sets = target.new_empty(self.fit_sets, len(weights), num_templates)
            for one in sets:
                torch.nn.init.orthogonal_(one, generator=generator)
        return templates.requires_grad_(), sets.requires_grad_()


def random_templates(weight: Tensor, num_templates: int, generator: torch.Generator) -> Tensor:
    """Kaiming normal templates ``(templates, numbers)`` in float32, each scaled as a weight of this shape."""
    templates = torch.empty((num_templates, *weight.shape), device=weight.device)
    for template in templates:
        torch.nn.init.kaiming_normal_(template, generator=generator)
    return templates.reshape(num_templates, -1)


class Best:
    """The best step so far."""

    def __init__(self) -> None:
        self.loss = float("inf")
        self.templates: Tensor | None = None
        self.base: Tensor | None = None

    def offer(self, loss: float, templates: Tensor, base: Tensor) -> None:
        """Keep a copy of a step if its loss is the least so far."""
        if loss < self.loss:
            self.loss, self.base = loss, base.detach().clone()
            if self.templates is None:
                self.templates = torch.empty_like(templates)
            self.templates.copy_(templates.detach())

    def result(self, weights: Sequence[Tensor], target: Tensor, label: str) -> FittedTemplates:
        """The best step as templates in the shape and dtype of the weights.

        Raises:
            RecastConfigError: if no step had a finite loss.
        """
        if self.templates is None or self.base is None:
            raise RecastConfigError(
                f"mimicry of {label or 'a group'} never had a finite loss; give a smaller learning_rate, or use 'closed_form'"
            )
        templates, base = scale_templates(self.templates, self.base, target)
        shaped = templates.reshape(len(templates), *weights[0].shape).to(weights[0].dtype)
        return FittedTemplates(shaped, base.double().cpu())
