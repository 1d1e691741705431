"""An optimiser with a learning rate of its own for coefficients."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .errors import RecastConfigError

COEFFICIENT_LR = 0.05  # in units of a template as large as the pretrained weight; what the demo trains with


def create_recast_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    coefficient_lr: float = COEFFICIENT_LR,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser for the trainable parameters of a model, in the manner of PEFT's ``create_loraplus_optimizer``.

    Coefficients have a learning rate of their own, far above what suits a classifier, and no weight decay: zero is the
    pretrained weight, and tens of numbers need no pull towards it.

    Args:
        model: with a RECAST task that is trained.
        optimizer_cls: of torch or made like one.
        lr: of everything else that is trained: classifier, norms, biases.
        coefficient_lr: of the coefficients.
        kwargs: for the optimiser (``weight_decay``, ``betas``, ...).

    Raises:
        RecastConfigError: if the model has no coefficients that are trained.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    coefficients = [parameter for name, parameter in trained if "recast_coefficients" in name.split(".")]
    others = [parameter for name, parameter in trained if "recast_coefficients" not in name.split(".")]
    if not coefficients:
        raise RecastConfigError(
            f"{type(model).__name__} trains no RECAST coefficients ({len(trained)} trainable parameters): "
            "convert it with get_recast_model, and activate a task that is not in inference mode"
        )
    groups: list[dict[str, Any]] = [{"params": coefficients, "lr": coefficient_lr, "weight_decay": 0.0}]
    if others:
        groups.append({"params": others, "lr": lr})
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
