"""Merging, deleting and switching off concern all parts of a task."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from models import move, outputs, tiny_vit, vit_input
from peft import PeftModel

from recast_peft import RecastConfig, RecastConfigError, get_recast_model

OWNED: dict[str, dict[str, Any]] = {
    "head": {"num_classes": 5},
    "saved module": {"modules_to_save": ["head"]},
    "norms": {"train_norms": True},
    "output partner": {"partners": ["adaptformer"]},
    "biases": {"partners": ["bias"]},
    "mask": {"partners": ["piggyback"]},
    "LoRA": {"lora_config": {"r": 2, "target_modules": ["proj"], "init_lora_weights": False}},
}

MERGEABLE = ["head", "saved module", "norms", "biases", "mask", "LoRA"]


def two_tasks(first: dict[str, Any], second: dict[str, Any]) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **first), "first")
    model.add_adapter("second", RecastConfig(target_modules=["fc1"], **second))
    seen = {}
    for seed, name in enumerate(("first", "second")):
        model.set_adapter(name)
        move(model, seed=seed)
        seen[name] = outputs(model.eval(), vit_input())
    return model, seen


@pytest.mark.parametrize("owned", OWNED)
def test_deleting_the_active_task_leaves_the_other_one_whole(owned: str) -> None:
    model, seen = two_tasks(OWNED[owned], {"num_classes": 2})
    model.delete_adapter("second")
    assert model.active_adapters == ["first"]
    assert torch.equal(outputs(model, vit_input()), seen["first"])


@pytest.mark.parametrize("owned", MERGEABLE)
def test_merging_by_name_shows_the_named_task_alone(owned: str) -> None:
    model, seen = two_tasks({"num_classes": 2}, OWNED[owned])
    model.set_adapter("first")
    model.merge_adapter(["second"])
    torch.testing.assert_close(outputs(model, vit_input()), seen["second"], rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, vit_input()), seen["first"])
    merged = model.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(outputs(merged, vit_input()), seen["second"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of_second", MERGEABLE)
@pytest.mark.parametrize("of_first", MERGEABLE)
def test_taken_out_by_name_a_task_is_what_it_was_whichever_is_active(of_first: str, of_second: str) -> None:
    """Parts of the one lie in and around layers of the other, as a LoRA on proj does that was there before its coefficients."""
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **OWNED[of_first]), "first")
    model.add_adapter("second", RecastConfig(target_modules=["qkv", "proj"], **OWNED[of_second]))
    seen = {}
    for seed, name in enumerate(("first", "second")):
        model.set_adapter(name)
        move(model, seed=seed)
        seen[name] = outputs(model.eval(), vit_input())
    for active, merged, name in itertools.product(("first", "second"), (None, ["first"], ["second"]), ("first", "second")):
        twin = copy.deepcopy(model)
        twin.set_adapter(active)
        if merged is not None:
            twin.merge_adapter(merged)
        if merged in (None, [name]):
            left = twin.merge_and_unload(adapter_names=[name])
            torch.testing.assert_close(outputs(left, vit_input()), seen[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(outputs(twin.unload(), vit_input()), outputs(tiny_vit(), vit_input()))


@pytest.mark.parametrize("names", [["typo"], ["first", "typo"], ["first", "second"]])
def test_merging_a_typo_or_two_heads_changes_nothing(names: list[str]) -> None:
    model, seen = two_tasks({"num_classes": 2}, {"num_classes": 5})
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RecastConfigError, match="no RECAST task 'typo'" if "typo" in names else "Only one adapter"):
            verb(adapter_names=names)
        assert torch.equal(outputs(model, vit_input()), seen["second"])


def test_a_safe_merge_looks_at_biases() -> None:
    model, _ = two_tasks({"partners": ["bias"]}, {})
    model.set_adapter("first")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    holder = next(m for m in model.modules() if type(m).__name__ == "TaskBiases")
    holder.modules_to_save["first"].offset.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.endswith("offset"))


@pytest.mark.parametrize("owned", OWNED)
def test_what_was_frozen_stays_frozen_after_a_block_without_tasks(owned: str) -> None:
    model, _ = two_tasks(OWNED[owned], {})
    for inference_mode in (True, False):
        model.set_adapter("first", inference_mode=inference_mode)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert bool(trained) != inference_mode
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_a_merged_task_is_not_deleted() -> None:
    model, seen = two_tasks({}, {})
    model.merge_adapter(["first"])
    with pytest.raises(RecastConfigError, match="merged"):
        model.delete_adapter("first")
    model.unmerge_adapter()
    assert torch.equal(outputs(model, vit_input()), seen["second"])


@pytest.mark.parametrize("owned", OWNED)
def test_a_task_that_is_added_in_inference_mode_can_be_trained_later(owned: str) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "first")
    with torch.inference_mode():
        model.add_adapter("second", RecastConfig(target_modules=["fc1"], **OWNED[owned]))
        model.set_adapter("second")
        model(vit_input())
    outputs(model.train(), vit_input())
    model(vit_input()).square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and not parameter.is_inference() for parameter in trained)
