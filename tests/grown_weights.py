"""Banks grown from adapters that moved the weights of a tiny vision transformer, and tasks on them."""

from __future__ import annotations

import pytest
import torch
from models import layers_of, move, randomise, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from recast_peft import RecastConfig, StoredBank, get_recast_model, grow_bank

X = vit_input(4)
TARGETS = ["qkv", "fc1"]


def lora(seed: int, rank: int = 2, targets: list[str] | None = None, depth: int = 4) -> PeftModel:
    """An adapter that moved the weights."""
    model = get_peft_model(tiny_vit(depth=depth), LoraConfig(r=rank, target_modules=targets or TARGETS))
    move(model, seed=seed, size=0.2)
    return model


def config(**fields: object) -> RecastConfig:
    return RecastConfig(**{"target_modules": TARGETS, "group_size": 1, **fields})  # type: ignore[arg-type]


def grown(seeds: tuple[int, ...] = (0, 1, 2), depth: int = 4, **fields: object) -> StoredBank:
    sources = [(lora(seed, depth=depth), "default") for seed in seeds]
    return grow_bank(tiny_vit(depth=depth), sources, config(), **fields)  # type: ignore[arg-type]


def on(bank: object, name: str = "default", model: nn.Module | None = None, seed: int = 1) -> PeftModel:
    result = get_recast_model(model or tiny_vit(), RecastConfig(bank=bank), name).eval()  # type: ignore[arg-type]
    randomise(result, name, seed)
    return result


def composed_by_hand(bank: StoredBank, model: PeftModel, adapter: str = "default") -> nn.Module:
    """A plain copy whose weights were composed by plain arithmetic."""
    plain = tiny_vit()
    pretrained = tiny_vit()
    layers = layers_of(model)
    with torch.no_grad():
        for group in bank.groups.values():
            assert group.grown is not None
            templates: list[Tensor] = []
            if group.grown.plain:
                templates += [pretrained.get_parameter(f"{m}.weight") for m in group.members]
            templates += group.grown.dense()
            for member in group.members:
                offsets = layers[member].recast_coefficients[adapter].mean(0)
                assert len(offsets) == len(templates)
                for offset, template in zip(offsets, templates, strict=True):
                    plain.get_parameter(f"{member}.weight").add_(offset * template)
    return plain


def fitted_bank() -> StoredBank:
    from recast_peft import fit_bank
    from recast_peft.mimicry import Gradient

    return fit_bank(
        tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry=Gradient(steps=2, progress=False))
    )


EVERY_FORM = pytest.mark.parametrize(
    "fields", [{}, {"rank": 2}, {"plain_templates": False}, {"rank": 2, "plain_templates": False}]
)
