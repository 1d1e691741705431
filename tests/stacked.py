"""Another of PEFT's methods on one model with a RECAST task, around its layers or inside them."""

from __future__ import annotations

from typing import Any

import torch
from models import randomise, seed_cpu, tiny_vit
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from recast_peft import RecastConfig

TARGETS = ["proj"]  # square, as some methods want it
ORDERS = ("around", "inside")  # the other method's layer around RECAST's, or inside it

# Fields that a method's config needs here beside its targets.
FIELDS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "init_lora_weights": False},
    "ADALORA": {"total_step": 10},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "IA3": {"feedforward_modules": []},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 8},
    "WAVEFT": {"n_frequency": 8},
    "MISS": {"r": 4},
    "SHIRA": {"r": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SUPERTUNING": {"sparsity": 0.5},
    "LN_TUNING": {"target_modules": ["norm"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16, "topk": 2},
}


def method_config(name: str) -> Any:
    fields = dict(FIELDS.get(name, {}))
    if "target_modules" in PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)].__dataclass_fields__:
        fields.setdefault("target_modules", list(TARGETS))
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**fields)


def with_task(model: nn.Module) -> nn.Module:
    """A model with a RECAST task of known numbers; only the backbone is given back."""
    return task_model(model).base_model.model


def task_model(model: nn.Module) -> PeftModel:
    converted = get_peft_model(model, RecastConfig(target_modules=TARGETS), adapter_name="task").eval()
    randomise(converted, "task")
    return converted


def with_method(model: nn.Module, name: str) -> PeftModel:
    torch.manual_seed(5)
    result = get_peft_model(model, method_config(name), adapter_name="other").eval()
    generator = torch.Generator().manual_seed(6)
    for key, parameter in sorted((plain_key(k), p) for k, p in result.named_parameters()):
        if "other" in key and parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return result


def plain_key(key: str) -> str:
    return key.replace(".base_layer", "")


def stacked(name: str, order: str) -> PeftModel:
    """Both on one model; what is returned is the wrapper of the other method."""
    if order == "around":
        return with_method(with_task(tiny_vit().double()), name)
    other = with_method(tiny_vit().double(), name)
    with_task(other.base_model.model)
    return other


def with_seed(seed: int, build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        seed_cpu(seed)
        return build()


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **fields})
