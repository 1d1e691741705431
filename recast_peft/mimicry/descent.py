"""Gradient descent on templates and coefficients: what every method that trains them has in common (paper, section 3.2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ..composition.compose import without_autocast
from ..errors import RecastConfigError
from ..validation import COUNT, SEED, number_above, one_of
from .base import FittedTemplates, MimicryMethod, flatten, local_generator, scale_templates

LOSSES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss, "l1": F.l1_loss}


class Start(NamedTuple):
    """Where descent on one group begins, and what is trained."""

    templates: Tensor  # ``(templates, numbers)``
    coefficients: Callable[[], Tensor]  # gives ``(layers, templates)``, differentiable in what else is trained
    optimizer: Optimizer
    schedule: LRScheduler  # steps with the optimiser
    noise: Callable[[], Tensor] | None = None  # drawn in each step and added to coefficients; steps are judged without it


class DescentMethod(MimicryMethod):
    """A method that trains until ``coefficients @ templates`` is near the weights; a subclass says where it starts.

    The best step is kept, the start among them. Each subclass has the options that stand here without a value.
    """

    fits_full_banks: ClassVar[bool] = True
    loss_scale = 1.0  # a factor on the loss
    clip_norm: float | None = None  # gradients are clipped to this norm; None leaves them

    steps: int
    learning_rate: float
    loss: str
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        self.check(one_of(*LOSSES), "loss")
        self.check(COUNT, "steps")
        self.check(number_above(0), "learning_rate")
        self.check(SEED, "seed")

    @abstractmethod
    def begin(self, weights: Sequence[Tensor], target: Tensor, num_templates: int, generator: torch.Generator) -> Start:
        """Where to begin.

        Args:
            weights: the pretrained weights of the group's layers.
            target: the same as rows ``(layers, numbers)`` in float32.
            num_templates: n.
            generator: the group's own.
        """

    @without_autocast()
    @torch.enable_grad()
    def fit(
        self, weights: Sequence[Tensor], num_templates: int, *, label: str = "", moments: Sequence[Tensor | None] | None = None
    ) -> FittedTemplates:
        """Train one bank; see :meth:`MimicryMethod.fit`.

        Raises:
            RecastConfigError: if no step had a finite loss.
        """
        target = flatten(weights)
        generator = local_generator(self.seed, label, target.device)
        templates, coefficients, optimizer, schedule, noise = self.begin(weights, target, num_templates, generator)
        loss_of, least, best = LOSSES[self.loss], float("inf"), None
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for step in tqdm(range(self.steps + 1), desc=f"mimicry {label}", delay=2, leave=False, disable=not self.progress):
            base = coefficients()
            with torch.set_grad_enabled(noise is None):
                now = loss_of(base @ templates, target)
            if float(now.detach()) < least:
                least = float(now.detach())
                held = torch.empty_like(templates) if best is None else best[0]
                best = held.copy_(templates.detach()), base.detach().clone()
            if step == self.steps:
                break
            if noise is not None:
                now = loss_of((base + noise()) @ templates, target)
            optimizer.zero_grad(set_to_none=True)
            (self.loss_scale * now).backward()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, self.clip_norm)
            optimizer.step()
            schedule.step()
        if best is None:
            raise RecastConfigError(
                f"mimicry of {label or 'a group'} never had a finite loss; give a smaller learning_rate, or use 'closed_form'"
            )
        scaled, base = scale_templates(*best, target)
        shaped = scaled.reshape(len(scaled), *weights[0].shape).to(weights[0].dtype)
        return FittedTemplates(shaped, base.double().cpu())


def random_templates(weight: Tensor, num_templates: int, generator: torch.Generator) -> Tensor:
    """Kaiming normal templates ``(templates, numbers)`` in float32, each scaled as a weight of this shape."""
    templates = torch.empty((num_templates, *weight.shape), dtype=torch.float32, device=weight.device)
    for template in templates:
        torch.nn.init.kaiming_normal_(template, generator=generator)
    return templates.reshape(num_templates, -1)
