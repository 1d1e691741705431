"""A conversion holds no more than it must, and puts no task on templates that are not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import outputs, randomise, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor

from recast_peft import RecastBankError, RecastConfig, get_recast_model
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


def test_a_task_is_on_its_own_templates_or_on_none(tmp_path: Path) -> None:
    def compressed(**mimicry: object) -> PeftModel:
        groups = {"target_modules": ["qkv"], "num_groups": 1, "num_templates": 2}
        return get_recast_model(tiny_vit(), RecastConfig(mimicry=mimicry, **groups), "own").eval()

    stored, from_weights = compressed(method="gradient", steps=1), compressed(method="closed_form")
    stored.base_model.save_bank(tmp_path / "bank")
    for name, model in {"stored": stored, "from weights": from_weights}.items():
        randomise(model, "own")
        model.save_pretrained(tmp_path / name)
    for model, name in ((stored, "from weights"), (from_weights, "stored")):
        before = outputs(model, vit_input())
        with pytest.raises(RecastBankError, match="of other contents|another template bank than that of the model"):
            model.load_adapter(str(tmp_path / name / "own"), "other")
        assert torch.equal(outputs(model, vit_input()), before)
    for model, name in ((stored, "stored"), (from_weights, "from weights")):
        model.load_adapter(str(tmp_path / name / "own"), "again")
        before = outputs(model, vit_input())
        model.set_adapter("again")
        assert torch.equal(outputs(model, vit_input()), before)
