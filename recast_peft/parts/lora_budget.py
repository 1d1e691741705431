"""What a budget leaves beside a task's coefficients, given to a LoRA part."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..config import RecastConfig
from ..errors import RecastTargetError
from ..holders import plain_modules, shared
from ..options.partner import resolve_partners
from ..planning.budget import DEFAULT_BUDGET, names_a_size
from ..planning.candidates import Candidate, find_candidates
from ..planning.plan import RecastPlan, plan_layers
from ..planning.targets import find_targets
from .lora import is_other_lora
from .lora_plan import rank_one, these_modules
from .saved import ADDED_BY_TASK_TYPE

MOST_USEFUL_RANK = 64  # more is as much as a dense update in most layers


def plan_within_budget(model: nn.Module, config: RecastConfig) -> tuple[RecastPlan, RecastConfig]:
    """Plan a task's layers, and give what ``max_coefficients`` leaves beside the coefficients to a LoRA part.

    A budget of at least the default one trains the default's coefficients where a LoRA part has room beside them, since larger
    groups gained less (docs/results/frontier.md); else the larger choice of coefficients. The part stands on the modules that
    PEFT's LoRA takes by default in such a model, else on its attention, else on the targets: with rank 1 on as many as fit, the
    cheapest and of equals the last first; if all do, with the highest rank that fits, but none above the modules' own. A
    config that names parts of its own gets none.

    Returns:
        the plan of the layers, and the config, with its ``lora_config`` where there is room for one.

    Raises:
        RecastTargetError: see ``plan_layers``.
        RecastConfigError: likewise.
    """
    budget = config.max_coefficients if isinstance(config, RecastConfig) and config.groups is None else None
    default = None
    if budget is not None and budget >= DEFAULT_BUDGET:
        usual = config.as_chosen(max_coefficients=None)
        if not names_a_size(usual):
            default = plan_layers(model, usual)
            chosen = f"max_coefficients={budget}: {default.num_coefficients} coefficients, as by default"
            default = replace(default, reason="\n".join(filter(None, (chosen, default.reason))))
            filled = _filled(model, config, default)
            if filled is not config:
                return default, filled
    plan = plan_layers(model, config)
    if default is not None and default.num_coefficients >= plan.num_coefficients:
        return default, config
    return plan, _filled(model, config, plan)


def _filled(model: nn.Module, config: RecastConfig, plan: RecastPlan) -> RecastConfig:
    """The config with a LoRA part that fits beside the coefficients, or the very config."""
    budget = config.max_coefficients
    partners = [partner for partner in resolve_partners(config.partners or []) if partner.is_trained]
    saved = set(config.modules_to_save or ()) - ADDED_BY_TASK_TYPE
    more = (config.lora_config, partners, config.bank, config.train_norms, saved, config.bias != "none")
    if budget is None or any(more) or config.is_stored_task or not config.train_coefficients:
        return config
    left = budget - plan.num_coefficients
    modules = plain_modules(model)
    free = [target for target in _usual_targets(model, config, plan) if not is_other_lora(shared(modules[target.name]))]
    found = {target.name: one for target in reversed(free) if (one := rank_one(target)) is not None}
    costs = {name: cost for name, (cost, _) in found.items()}
    full = max((full for _, full in found.values()), default=0)
    rank = min(left // sum(costs.values()), MOST_USEFUL_RANK, full) if costs else 0
    chosen = list(costs) if rank else []
    for name in [] if rank else sorted(costs, key=costs.__getitem__):
        if costs[name] <= left:
            left -= costs[name]
            chosen.append(name)
    if not chosen:
        return config
    rank = max(rank, 1)
    wanted = these_modules(chosen, find_candidates(model))
    return config.as_chosen(lora_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=wanted))


def _usual_targets(model: nn.Module, config: RecastConfig, plan: RecastPlan) -> list[Candidate]:
    """Where a LoRA stands if nobody says so."""
    kinds = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    names = [kind for kind in kinds if isinstance(kind, str)]
    kind = next((kind for kind in names if kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING), "")
    limits: dict[str, Any] = {key: getattr(config, key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")}
    wanted: Any
    for wanted in (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind), "all-attention"):
        with suppress(RecastTargetError):
            if wanted is not None:
                return find_targets(model, RecastConfig(target_modules=wanted, **limits))[0]
    return list(plan.candidates)
