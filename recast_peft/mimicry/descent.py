"""Gradient descent on templates and coefficients: the loop of every method that trains them (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import RecastConfigError
from .base import FittedTemplates, scale_templates

LOSSES: dict[str, Callable[..., Tensor]] = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss, "l1": F.l1_loss}


def descend(
    weights: Sequence[Tensor],
    target: Tensor,
    templates: Tensor,
    coefficients: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    steps: int,
    loss: str,
    noise: Callable[[], Tensor] | None = None,
    loss_scale: float = 1.0,
    clip_norm: float | None = None,
    label: str = "",
    progress: bool = True,
) -> FittedTemplates:
    """Train until ``coefficients() @ templates`` is near the target; the best step is kept, the start among them.

    Args:
        weights: the pretrained weights of the group's layers.
        target: the same as rows, ``(layers, numbers)`` in float32.
        templates: ``(templates, numbers)``, trained.
        coefficients: gives ``(layers, templates)``, differentiable in what else is trained.
        optimizer: optimiser of all that is trained.
        schedule: schedule of its learning rate; it steps with it.
        steps: number of steps of the optimiser.
        loss: a name in ``LOSSES``.
        noise: is drawn in every step and added to the coefficients, ``(layers, templates)``; steps are judged without it.
        loss_scale: a factor on the loss.
        clip_norm: gradients are clipped to this norm; None leaves them.
        label: the group's name, for the progress bar and messages.
        progress: show a progress bar for a bank that takes over two seconds.

    Returns:
        templates in the shape and dtype of the weights, and their coefficients.

    Raises:
        RecastConfigError: if no step had a finite loss.
    """
    loss_of, least, best = LOSSES[loss], float("inf"), None
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in tqdm(range(steps + 1), desc=f"mimicry {label}", delay=2, leave=False, disable=not progress):
        base = coefficients()
        with torch.set_grad_enabled(noise is None):
            now = loss_of(base @ templates, target)
        if float(now.detach()) < least:
            least = float(now.detach())
            held = torch.empty_like(templates) if best is None else best[0]
            best = held.copy_(templates.detach()), base.detach().clone()
        if step == steps:
            break
        if noise is not None:
            now = loss_of((base + noise()) @ templates, target)
        optimizer.zero_grad(set_to_none=True)
        (loss_scale * now).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip_norm)
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
