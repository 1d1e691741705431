"""The whole plan of a task: its layers, and what each part beside the coefficients would cost."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import PeftModel
from torch import nn

from ..config import RecastConfig
from ..parts.lora_plan import plan_lora_part
from ..parts.places import prepare_partners
from ..planning.plan import RecastPlan, plan_layers


def plan_recast(model: nn.Module, config: RecastConfig) -> RecastPlan:
    """Say what converting ``model`` with ``config`` would do, without touching either.

    Args:
        model: any ``nn.Module``; on a model that is converted already, the plan is that of a further adapter.
        config: what to target and how to group it.

    Returns:
        the plan. Layers of the same role (the same name but for its numbers), shape and dtype are put into groups of
        consecutive depth (paper, section 3.1).

    Raises:
        RecastTargetError: if nothing can be targeted, a target is not supported, or groups that were given do not fit.
        RecastConfigError: if an argument is of another kind, or a budget cannot be kept.
    """
    plan = plan_layers(model, config)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config, targets = config.as_chosen(), list(plan.targets)
    return replace(plan, lora=plan_lora_part(model, config, targets), partners=_planned_partners(model, config, targets))


def _planned_partners(model: nn.Module, config: RecastConfig, targets: list[str]) -> dict[str, dict[str, int]]:
    """Where a task's partners would stand, and how many numbers they train there."""
    planned: dict[str, dict[str, int]] = {}
    for partner in prepare_partners(model, config, targets, torch.device("meta")):
        numbers = sum(parameter.numel() for parameter in partner.module.parameters())
        planned.setdefault(partner.config.method, {})[partner.candidate.name] = numbers
    return planned
