"""A conversion holds no more than it must, and coefficient sets collapse into one."""

from __future__ import annotations

import pytest
import torch
from models import converted, outputs, randomise, tiny_vit, vit_input
from torch import Tensor

from recast_peft import (
    RecastConfig,
    RecastConfigError,
    collapse_coefficient_sets,
    get_recast_model,
)
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


class TestCollapsingCoefficientSets:
    @pytest.mark.parametrize("fields", [{}, {"num_templates": 1}, {"coefficient_sharing": "all"}])
    def test_gives_the_same_model_with_one_set(self, fields: dict) -> None:
        model = converted(target_modules=["qkv", "fc1"], num_coefficient_sets=3, **fields)
        randomise(model)
        sets = [p for p in model.parameters() if p.requires_grad]
        assert all(not torch.equal(p[0], p[1]) for p in sets)
        before, numbers = outputs(model, vit_input()), sum(p.numel() for p in sets)
        collapse_coefficient_sets(model)
        assert torch.equal(outputs(model, vit_input()), before)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) * 3 == numbers
        assert model.peft_config["default"].num_coefficient_sets == 1

    def test_of_an_unknown_task_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="no task 'cars'; its tasks: default"):
            collapse_coefficient_sets(converted(), "cars")
