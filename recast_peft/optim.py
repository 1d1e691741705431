"""An optimiser with a learning rate of its own for coefficients."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .errors import RecastConfigError
from .partner_places import MASKS
from .targets import PARTNER_CONTAINER

COEFFICIENT_LR = 0.05  # in units of a template as large as the pretrained weight; what the demo trains with


def create_recast_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    coefficient_lr: float = COEFFICIENT_LR,
    partner_lr: float | None = None,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser for the trainable parameters of a model, in the manner of PEFT's ``create_loraplus_optimizer``.

    Coefficients have a learning rate of their own, far above what suits a classifier, and no weight decay: zero is the
    pretrained weight, and tens of numbers need no pull towards it. A task's partners may have one of their own too; they are
    not decayed either, since a decayed mask would be one that loses its entries.

    Args:
        model: with a RECAST task that is trained.
        optimizer_cls: of torch or made like one.
        lr: of everything else that is trained: classifier, norms, biases.
        coefficient_lr: of the coefficients.
        partner_lr: of the task's partners; None is ``lr``.
        kwargs: for the optimiser (``weight_decay``, ``betas``, ...).

    Raises:
        RecastConfigError: if the model trains neither coefficients nor partners.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts: dict[str, list[nn.Parameter]] = {"coefficients": [], "partners": [], "others": []}
    for name, parameter in trained:
        parts[_part_of(name)].append(parameter)
    if not parts["coefficients"] and not parts["partners"]:
        raise RecastConfigError(
            f"{type(model).__name__} trains no RECAST coefficients or partners ({len(trained)} trainable parameters): "
            "convert it with get_recast_model, and activate a task that is not in inference mode"
        )
    groups: list[dict[str, Any]] = [
        {"params": parts["coefficients"], "lr": coefficient_lr, "weight_decay": 0.0},
        {"params": parts["partners"], "lr": lr if partner_lr is None else partner_lr, "weight_decay": 0.0},
        {"params": parts["others"], "lr": lr},
    ]
    return optimizer_cls([group for group in groups if group["params"]], lr=lr, **kwargs)  # type: ignore[call-arg]


def _part_of(name: str) -> str:
    """Which part of a task a parameter belongs to."""
    words = name.split(".")
    if "recast_coefficients" in words:
        return "coefficients"
    return "partners" if PARTNER_CONTAINER in words or MASKS in words else "others"
