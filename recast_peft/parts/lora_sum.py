"""The LoRA part of a combined task: the tasks' parts side by side, which is their exact sum, or the nearest of a lower rank."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..errors import RecastConfigError
from ..holders import container_key
from ..planning.candidates import find_candidates
from .lora_plan import these_modules
from .lora_strength import part_layers


def nearest_pair(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of a lower rank whose product is nearest to that of two others (Eckart and Young).

    Args:
        first: ``(R, ...)``, as PEFT's ``lora_A`` is.
        second: ``(out, R)`` or ``(out, R, 1, ...)``, as ``lora_B`` is.
        rank: of what is returned.

    Returns:
        first ``(rank, ...)``, second ``(out, rank, ...)``, and the share of the product that they lack, by its norm.
    """
    inner, left = torch.linalg.qr(first.double().flatten(1).T)
    outer, right = torch.linalg.qr(second.double().flatten(1))
    u, sizes, v = torch.linalg.svd(right @ left.T, full_matrices=False)
    kept = sizes[:rank].sqrt()
    nearest = first.new_zeros(rank, *first.shape[1:]), second.new_zeros(len(second), rank, *second.shape[2:])
    nearest[0][: len(kept)] = ((inner @ v[:rank].T) * kept).T.reshape(-1, *first.shape[1:]).to(first.dtype)
    nearest[1][:, : len(kept)] = ((outer @ u[:, :rank]) * kept).reshape(len(second), -1, *second.shape[2:]).to(second.dtype)
    return *nearest, float(sizes[rank:].norm() / sizes.norm().clamp_min(torch.finfo(sizes.dtype).tiny))


def summed_config(model: nn.Module, adapters: Sequence[str], combination_type: str) -> LoraConfig | None:
    """Options of a LoRA part for the sum of several tasks' parts, with a factor of one; None if no task has one.

    Its rank at a module is the sum of theirs; of ``"svd"`` the largest of them.

    Raises:
        RecastConfigError: if what a part adds is no product of two factors alone.
    """
    ranks: dict[str, int] = {}
    for name in adapters:
        for layer in part_layers(model, name):
            key, config = container_key(name), layer._parts.configs[name]
            if key in layer.lora_variant or layer.lora_bias.get(key) or config.target_parameters:
                raise RecastConfigError(
                    f"task {name!r} cannot be combined with others: its LoRA part at {layer.module_name} is more than two "
                    "factors (DoRA or another variant, lora_bias, target_parameters)"
                )
            before = ranks.get(layer.module_name, 0)
            ranks[layer.module_name] = max(before, layer.r[key]) if combination_type == "svd" else before + layer.r[key]
    if not ranks:
        return None
    most = max(ranks.values())
    # PEFT takes a name for an ending; a pattern is not found again where the module lies deeper, or less deep
    keys = {
        n: n if sum(f".{o}".endswith(f".{n}") for o in ranks) == 1 else f"^{re.escape(n)}" for n in ranks if ranks[n] != most
    }
    others = {key: ranks[name] for name, key in keys.items()}
    wanted = these_modules(list(ranks), find_candidates(model))
    return LoraConfig(r=most, lora_alpha=most, rank_pattern=others, alpha_pattern=dict(others), target_modules=wanted)


@torch.no_grad()
def write_sum(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Write the weighted sum of tasks' LoRA parts into that of a task which was made with ``summed_config``.

    Where its rank is lower than that of the sum, it gets what is nearest.
    """
    for layer in part_layers(model, adapter_name):
        terms = []
        for name, weight in zip(adapters, weights, strict=True):
            # a task that came before RECAST's layer has a layer of its own below it
            for own in (other for other in part_layers(model, name) if other.module_name == layer.module_name):
                key = container_key(name)
                rank = math.sqrt(own.r[key]) if own._parts.configs[name].use_rslora else own.r[key]
                factor = weight * own.lora_alpha[key] / rank
                terms.append((factor, {entry.name: entry.tensor for entry in own.entries(name)}))
        a, b = sorted(layer.entries(adapter_name), key=lambda entry: entry.name)
        first = torch.cat([tensors[a.name] for _, tensors in terms])
        second = torch.cat([factor * tensors[b.name] for factor, tensors in terms], dim=1)
        if len(first) > len(a.tensor):
            first, second, _ = nearest_pair(first, second, len(a.tensor))
        a.tensor.data, b.tensor.data = first, second
