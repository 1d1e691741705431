"""An optimiser with learning rates of their own for the parts of a task."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .errors import RecastConfigError
from .holders import holders

COEFFICIENT_LR = 0.05  # in units of a template as large as the pretrained weight; what the demo trains with


def create_recast_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    coefficient_lr: float = COEFFICIENT_LR,
    lora_lr: float | None = None,
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
        coefficient_lr: of the coefficients, those of biases (``BiasConfig``) among them.
        lora_lr: of the LoRA part; None is ``lr``.
        partner_lr: of the task's partners; None is ``lr``, and for coefficients of biases ``coefficient_lr``.
        kwargs: for the optimiser (``weight_decay``, ``betas``, ...).

    Raises:
        RecastConfigError: if the model trains neither coefficients nor partners.
    """
    groups_of = {id(parameter): group for holder in holders(model) for group, parameter in holder.trained_as()}
    parts: dict[str, list[nn.Parameter]] = {"coefficients": [], "biases": [], "lora": [], "partners": [], "others": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parts[groups_of.get(id(parameter), "others")].append(parameter)
    if not parts["coefficients"] and not parts["biases"] and not parts["partners"]:
        raise RecastConfigError(
            f"{type(model).__name__} trains no RECAST coefficients or partners ({sum(map(len, parts.values()))} trainable "
            "parameters): convert it with get_recast_model, and activate a task that is not in inference mode"
        )
    options: dict[str, dict[str, Any]] = {
        "coefficients": {"lr": coefficient_lr, "weight_decay": 0.0},
        "biases": {"lr": coefficient_lr if partner_lr is None else partner_lr, "weight_decay": 0.0},
        "lora": {"lr": lr if lora_lr is None else lora_lr},
        "partners": {"lr": lr if partner_lr is None else partner_lr, "weight_decay": 0.0},
        "others": {"lr": lr},
    }
    groups = [{"params": parameters, **options[name]} for name, parameters in parts.items() if parameters]
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
