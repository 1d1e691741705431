"""The whole plan of a task: its layers, and what each part beside the coefficients would cost."""

from __future__ import annotations

from dataclasses import replace

from peft import PeftModel
from torch import nn

from ..config import RecastConfig, check_again
from ..names import lies_in
from ..parts import pieces_of
from ..parts.base import Request
from ..parts.base_biases import biased_modules
from ..parts.saved import saved_by_task_type
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
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(config, RecastConfig):
        config = config.as_chosen()
        check_again(config)
    plan = plan_layers(model, config)
    if not config.is_stored_task:
        config = config.as_chosen(modules_to_save=saved_by_task_type(config))
    request = Request(model, config, plan.targets, counting=True)
    found = pieces_of(request)
    owned = [piece.place for part, own in found for piece in own if part.owns_modules]
    pieces = {part.name: own for part, own in found}
    lora = next(iter(pieces.pop("lora")), None)
    counts = {name: {piece.place: piece.num_parameters() for piece in own} for name, own in pieces.items()}
    biased = biased_modules(model, config.bias, [*plan.targets, *(lora.targets if lora is not None else ())])
    counts["biases"] = {name: module.bias.numel() for name, module in biased if not lies_in(name, owned)}  # type: ignore
    return replace(plan, lora=lora, parts={name: places for name, places in counts.items() if places})
