"""Files and copies of tasks with a LoRA part."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from lora_parts import TARGETS, close, fill, lora, two_parts
from models import layers_of, outputs, tiny_vit, vit_input
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.functional import set_adapter
from safetensors.torch import load_file, save_file

from recast_peft import AutoRecastModel, RecastConfig, RecastLoadError, push_task_to_hub
from recast_peft.cli import main


class TestFiles:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_a_task_is_one_folder(self, targets, tmp_path):
        model = two_parts(target_modules=targets)
        live = outputs(model, vit_input())
        model.save_pretrained(tmp_path)
        config = RecastConfig.from_pretrained(tmp_path / "task")
        assert isinstance(config.lora_config, LoraConfig)
        assert config.lora_config.target_modules == set(targets or ["qkv", "proj"])
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                tiny_vit(), tmp_path / "task", adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage
            ).eval()
            assert torch.equal(outputs(loaded, vit_input()), live)
            assert not any(p.requires_grad for p in loaded.parameters())

    def test_the_lora_part_alone_is_a_lora(self, tmp_path):
        model = two_parts(target_modules=["qkv", "fc1"], use_dora=True)
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
        alone = get_peft_model(tiny_vit(), LoraConfig(**content["lora_config"])).eval()
        entries = load_peft_weights(str(tmp_path / "task"))
        set_peft_model_state_dict(alone, {k: v for k, v in entries.items() if ".lora_" in k})
        with model.disable_part("recast"):
            assert torch.equal(outputs(alone, vit_input()), outputs(model, vit_input()))

    @pytest.mark.parametrize("damage", ["missing", "unexpected", "wrongly shaped", "not finite"])
    def test_a_damaged_part_is_refused_before_the_model_is_touched(self, damage, tmp_path):
        two_parts(target_modules=["fc1"]).save_pretrained(tmp_path)
        file = tmp_path / "task" / "adapter_model.safetensors"
        entries = load_file(file)
        key = "base_model.model.blocks.2.mlp.fc1.lora_A.weight"
        if damage == "missing":
            del entries[key]
        elif damage == "unexpected":
            entries[key.replace("fc1", "fc2")] = entries[key].clone()
        else:
            entries[key] = entries[key][:1].clone() if damage == "wrongly shaped" else entries[key] * float("nan")
        save_file(entries, file)
        model = tiny_vit()
        with pytest.raises(RecastLoadError, match=damage):
            PeftModel.from_pretrained(model, tmp_path / "task")
        assert list(model.state_dict()) == list(tiny_vit().state_dict())

    def test_one_config_for_two_models(self, tmp_path):
        given = LoraConfig(r=2)
        before = copy.deepcopy(given)
        config = RecastConfig(target_modules=["qkv"], lora_config=given)
        first = get_peft_model(tiny_vit(), config)
        config.target_modules = ["fc1"]
        get_peft_model(tiny_vit(depth=2), config)
        assert given == before
        first.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).lora_config.target_modules == {"qkv"}

    def test_the_card_and_inspect_count_both_parts(self, tmp_path, capsys):
        two_parts(target_modules=["fc1"]).save_pretrained(tmp_path)
        card = (tmp_path / "task" / "README.md").read_text()
        assert "208 (16 coefficients, 192 of the LoRA part)" in card
        assert "LoRA of rank 2 on `fc1`" in card
        assert main(["inspect", str(tmp_path / "task")]) == 0
        assert "LoRA part        192 numbers" in capsys.readouterr().out

    def test_injected_without_a_wrapper(self):
        config = RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=["qkv", "fc1"]))
        model = inject_adapter_in_model(config, tiny_vit(), "task").eval()
        inject_adapter_in_model(RecastConfig(target_modules=["qkv"]), model, "second")
        set_adapter(model, "task")
        fill(model)
        live = outputs(model, vit_input())
        assert not torch.allclose(live, outputs(tiny_vit(), vit_input()), atol=1e-3)
        state = get_peft_model_state_dict(model, adapter_name="task")
        assert {key.rpartition(".qkv.")[2] for key in state if ".qkv." in key} == {
            "recast_coefficients", "lora_A.weight", "lora_B.weight"
        }  # fmt: skip
        unnamed = RecastConfig(lora_config=lora(target_modules=["qkv", "fc1"]))
        other = inject_adapter_in_model(unnamed, tiny_vit(), "again", state_dict=state).eval()
        assert not set_peft_model_state_dict(other, state, adapter_name="again").unexpected_keys
        assert torch.equal(outputs(other, vit_input()), live)
        set_adapter(model, "second")
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        set_adapter(model, "task")
        assert torch.equal(outputs(model, vit_input()), live)

    def test_from_the_name_of_the_task(self, tmp_path):
        model = two_parts(target_modules=["fc1"])
        model.save_pretrained(tmp_path)
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tiny_vit(), is_trainable=True).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert len([p for p in loaded.parameters() if p.requires_grad]) == 8 + 8

    def test_pushed_and_fetched_by_name(self, hub):
        model = two_parts(target_modules=["fc1"])
        push_task_to_hub(model, "ada/two-parts")
        fetched = AutoRecastModel.from_pretrained("ada/two-parts", backbone=tiny_vit())
        assert torch.equal(outputs(fetched, vit_input()), outputs(model, vit_input()))


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
