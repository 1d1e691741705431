"""An optimiser with learning rates of their own for the parts of a task."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .errors import RecastConfigError
from .lora_part import PartLayer

COEFFICIENT_LR = 0.05  # in units of a template as large as the pretrained weight; what the demo trains with


def create_recast_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    coefficient_lr: float = COEFFICIENT_LR,
    lora_lr: float | None = None,
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
        lora_lr: of the LoRA part; None is ``lr``.
        kwargs: for the optimiser (``weight_decay``, ``betas``, ...).

    Raises:
        RecastConfigError: if the model has no coefficients that are trained.
    """
    lora = {
        key for module in model.modules() if isinstance(module, PartLayer) for key in map(id, module.own_parameters().values())
    }
    groups: dict[str, list[nn.Parameter]] = {"coefficients": [], "lora": [], "others": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if id(parameter) in lora else "others"
            groups["coefficients" if "recast_coefficients" in name.split(".") else kind].append(parameter)
    if not groups["coefficients"]:
        raise RecastConfigError(
            f"{type(model).__name__} trains no RECAST coefficients ({sum(map(len, groups.values()))} trainable parameters): "
            "convert it with get_recast_model, and activate a task that is not in inference mode"
        )
    options: dict[str, dict[str, Any]] = {
        "coefficients": {"lr": coefficient_lr, "weight_decay": 0.0},
        "lora": {"lr": lr if lora_lr is None else lora_lr},
        "others": {"lr": lr},
    }
    chosen = [{"params": parameters, **options[name]} for name, parameters in groups.items() if parameters]
    return optimizer_cls(chosen, lr=lr, **kwargs)  # type: ignore[call-arg]
