"""A conversion holds no more than it must."""

from __future__ import annotations

import pytest
from models import tiny_vit
from torch import Tensor

from recast_peft import RecastConfig, get_recast_model
from recast_peft.banks.template_bank import mix_templates


def test_no_more_than_one_group_is_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from recast_peft.banks import template_bank as bank_module

    held: list[int] = []
    model = tiny_vit()
    names = [f"blocks.{i}.attn.qkv" for i in range(4)]

    def count(weights: list[Tensor], mix: Tensor) -> Tensor:
        layers = [model.get_submodule(name) for name in names]
        held.append(sum(layer.base_layer.weight is not None for layer in layers))
        return mix_templates(weights, mix)

    monkeypatch.setattr(bank_module, "mix_templates", count)
    get_recast_model(model, RecastConfig(target_modules=["qkv"], num_templates=1))
    assert held == [4, 2]  # when the second bank is built, the first group's weights are gone
