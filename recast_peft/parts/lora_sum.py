"""The LoRA part of a combined task: the parts of the tasks side by side, so that what they add is summed exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig
from torch import nn

from ..errors import RecastConfigError
from ..holders import container_key
from ..planning.candidates import find_candidates
from .lora import lora_config_of
from .lora_plan import these_modules
from .lora_strength import part_layers


def summed_config(model: nn.Module, adapters: Sequence[str]) -> LoraConfig | None:
    """Options of a LoRA part that has room for those of several tasks, with a factor of one.

    Returns:
        None if no task has one.

    Raises:
        RecastConfigError: if what a part adds is no product of two factors alone.
    """
    ranks: dict[str, int] = {}
    for layer in part_layers(model):
        for name in (name for name in adapters if layer.has_task(name)):
            key, config = container_key(name), lora_config_of(model, name)
            assert config is not None
            if key in layer.lora_variant or layer.lora_bias.get(key) or config.target_parameters:
                raise RecastConfigError(
                    f"task {name!r} cannot be combined with others: its LoRA part at {layer.module_name} is more than two "
                    "factors (DoRA or another variant, lora_bias, target_parameters)"
                )
            ranks[layer.module_name] = ranks.get(layer.module_name, 0) + layer.r[key]
    if not ranks:
        return None
    most = max(ranks.values())
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}  # PEFT takes a name for an ending
    wanted = these_modules(list(ranks), find_candidates(model))
    return LoraConfig(r=most, lora_alpha=most, rank_pattern=others, alpha_pattern=dict(others), target_modules=wanted)


@torch.no_grad()
def write_sum(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Write the weighted sum of tasks' LoRA parts into that of a task which was made with ``summed_config``."""
    for layer in (layer for layer in part_layers(model) if layer.has_task(adapter_name)):
        # a task that came before RECAST's layer has a layer of its own below it
        here = [other for other in part_layers(model) if other.module_name == layer.module_name]
        terms = []
        for name, weight in zip(adapters, weights, strict=True):
            for own in (other for other in here if other.has_task(name)):
                key, config = container_key(name), lora_config_of(model, name)
                assert config is not None
                rank = math.sqrt(own.r[key]) if config.use_rslora else own.r[key]
                factor = weight * own.lora_alpha[key] / rank
                terms.append((factor, {entry.name: entry.tensor for entry in own.entries(name)}))
        for entry in layer.entries(adapter_name):
            if entry.name.partition(".lora_")[2].startswith(("A", "embedding_A")):
                entry.tensor.data = torch.cat([tensors[entry.name] for _, tensors in terms])
            else:
                entry.tensor.data = torch.cat([factor * tensors[entry.name] for factor, tensors in terms], dim=1)
