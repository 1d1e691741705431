"""Everything that a conversion checks before a model is touched."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted, outputs, state, tiny_vit, vit_input
from peft import LoraConfig, PeftModel

from recast_peft import RecastConfig, RecastConfigError, RecastError, RecastLoadError, get_recast_model
from recast_peft.tasks.preparation import prepare_task, under_names_of


def test_sizes_of_a_stored_config_are_not_built_before_they_are_checked(tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], partners=["adaptformer"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    stored["partners"][0]["bottleneck"] = 2**31 - 1  # more than most machines have
    path.write_text(json.dumps(stored))
    with pytest.raises(RecastLoadError, match="wrongly shaped"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)
    stored["partners"][0]["bottleneck"] = 10**11
    path.write_text(json.dumps(stored))
    with pytest.raises(RecastConfigError, match="bottleneck=100000000000.*: expected .* at most 2,147,483,647"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_templates": 1, "keep_base_weights": True},
        {"num_classes": 4, "train_norms": True, "partners": ["adaptformer", "bias"]},
        {"lora_config": LoraConfig(r=2), "bias": "all"},
    ],
)
def test_preparing_a_task_touches_nothing(fields: dict[str, Any]) -> None:
    model = converted("first")
    before, live = state(model), outputs(model, vit_input())
    config = RecastConfig(target_modules=["fc1"], **fields)
    given = copy.deepcopy(vars(config))
    prepared = prepare_task(model.get_base_model(), config, "second")
    assert state(model) == before
    assert torch.equal(outputs(model, vit_input()), live)
    assert vars(config) == given
    assert {*prepared.visible} == {*prepared.layers} == {f"blocks.{i}.mlp.fc1" for i in range(4)}
    assert prepared.partner_banks == {}


@pytest.mark.parametrize(
    ("model", "config", "name", "message"),
    [
        (converted, RecastConfig(target_modules=["qkv"]), "default", "has a task 'default'"),
        (converted, RecastConfig(target_modules=["fc1"]), "default", "has a task 'default'"),
        (tiny_vit, RecastConfig(target_modules=["qkv"], partners=["clr"]), "new", "clr"),
        (tiny_vit, RecastConfig(target_modules=["qkv"], num_classes=2, head_module="nose"), "new", "no such module"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_built(model: Any, config: RecastConfig, name: str, message: str) -> None:
    given = model()
    backbone = given.get_base_model() if isinstance(given, PeftModel) else given
    before = state(backbone)
    with pytest.raises(RecastError, match=message):
        prepare_task(backbone, config, name)
    assert state(backbone) == before


def test_a_task_that_is_not_stored_keeps_its_names() -> None:
    config = RecastConfig(target_modules=["qkv"])
    assert under_names_of(tiny_vit(), config) is config
