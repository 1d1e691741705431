"""One task, two parts: coefficients and a LoRA under one adapter name."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from models import layers_of, outputs, randomise, reference_model, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, get_recast_model, plan_recast

TARGETS = {
    "the same": None,
    "some of them": ["qkv"],
    "others": ["fc1"],
    "around and beside": ["proj", "fc2"],
}


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, **fields})


def two_parts(name: str = "task", **fields: Any) -> PeftModel:
    """A tiny vision transformer with one task of two parts that both do something."""
    config = RecastConfig(target_modules=["qkv", "proj"], lora_config=lora(**fields))
    model = get_recast_model(tiny_vit(), config, name).eval()
    fill(model, name)
    return model


def lora_parameters(model: nn.Module, name: str = "task") -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if ".lora_" in k and f".{name}" in k}


def fill(model: nn.Module, name: str = "task", seed: int = 3) -> None:
    randomise(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_lora_by_hand(plain: nn.Module, model: PeftModel, scale: float = 3.0, name: str = "task") -> nn.Module:
    """Adds scale * B A to the weights of a plain model, by the names in the task's keys."""
    parts = {k.partition(f".{name}")[0]: p.detach() for k, p in lora_parameters(model, name).items()}
    result = copy.deepcopy(plain)
    for key, b in parts.items():
        if key.endswith("lora_B"):
            module = key.removesuffix(".lora_B").removeprefix("base_model.model.").replace(".base_layer", "")
            with torch.no_grad():
                result.get_submodule(module).weight += scale * b @ parts[key.removesuffix("B") + "A"]
    return result


def expected(model: PeftModel, x: Tensor, name: str = "task") -> Tensor:
    """W + sum d T + scale B A, by plain arithmetic."""
    return outputs(with_lora_by_hand(reference_model(tiny_vit(), model, (name,)), model, name=name), x)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class TestComputation:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_a_fresh_task_changes_nothing(self, targets):
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=targets)))
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert len(lora_parameters(model, "default")) == 2 * 4 * (1 if targets is None else len(targets))

    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_both_parts_add(self, targets):
        model = two_parts(target_modules=targets)
        close(outputs(model, vit_input()), expected(model, vit_input()))
        with model.disable_part("lora"):
            close(outputs(model, vit_input()), outputs(reference_model(tiny_vit(), model, ("task",)), vit_input()))
        with model.disable_part("recast"):
            close(outputs(model, vit_input()), outputs(with_lora_by_hand(tiny_vit(), model), vit_input()))
        close(outputs(model, vit_input()), expected(model, vit_input()))

    def test_both_parts_are_trained_together(self):
        model = two_parts().train()
        model(vit_input()).square().sum().backward()
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trained == {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert len(trained) == 8 + 2 * 8


class TestMerging:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    @pytest.mark.parametrize("safe", [False, True])
    def test_merging_and_back_to_the_last_bit(self, targets, safe):
        model = two_parts(target_modules=targets)
        live = outputs(model, vit_input())
        pristine = {k: v.clone() for k, v in tiny_vit().state_dict().items()}
        for _ in range(3):
            model.merge_adapter(safe_merge=safe)
            close(outputs(model, vit_input()), live)
            model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), live)
        plain = model.unload()
        assert all(torch.equal(v, pristine[k]) for k, v in plain.state_dict().items())


class TestFiles:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_a_task_is_one_folder(self, targets, tmp_path):
        model = two_parts(target_modules=targets)
        live = outputs(model, vit_input())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", adapter_name="again").eval()
        assert torch.equal(outputs(loaded, vit_input()), live)

    def test_the_lora_part_alone_is_a_lora(self, tmp_path):
        model = two_parts(target_modules=["qkv", "fc1"])
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
        alone = get_peft_model(tiny_vit(), LoraConfig(**content["lora_config"])).eval()
        from peft import load_peft_weights, set_peft_model_state_dict

        entries = load_peft_weights(str(tmp_path / "task"))
        set_peft_model_state_dict(alone, {k: v for k, v in entries.items() if ".lora_" in k})
        with model.disable_part("recast"):
            assert torch.equal(outputs(alone, vit_input()), outputs(model, vit_input()))


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_stand_on_their_own(self, copied):
        model = two_parts(target_modules=["qkv", "fc1"])
        live = outputs(model, vit_input())
        twin = copied(model)
        fill(model, seed=8)
        assert torch.equal(outputs(twin, vit_input()), live)
        twin.merge_adapter()
        close(outputs(twin, vit_input()), live)
        assert not any(layer.merged for layer in layers_of(model).values())


class TestPlan:
    def test_the_plan_counts_both_parts(self):
        config = RecastConfig(target_modules=["qkv"], max_coefficients=8, lora_config=lora(target_modules=["fc1"]))
        plan = plan_recast(tiny_vit(), config)
        assert (plan.num_coefficients, plan.num_lora_numbers) == (8, 4 * 2 * (8 + 16))
        assert "LoRA part: 192 numbers per task on 4 target modules, 200 with the coefficients" in str(plan)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"init_lora_weights": "pissa"}, "writes into the pretrained weights"),
            ({"init_lora_weights": "olora"}, "writes into the pretrained weights"),
            ({"bias": "all"}, "to the RecastConfig"),
            ({"modules_to_save": ["head"]}, "to the RecastConfig"),
            ({"inference_mode": True}, "to the RecastConfig"),
            ({"task_type": "SEQ_CLS"}, "task_type"),
            ({"r": 0}, "rank of at least 1"),
        ],
    )
    def test_fields_that_make_no_sense_in_a_part(self, fields, message):
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(lora_config=lora(**fields))

    def test_targets_that_are_not_there(self):
        model = tiny_vit()
        with pytest.raises(RecastTargetError, match="not found in the base model"):
            get_recast_model(model, RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=["nothing"])))
        assert not layers_of(model)
