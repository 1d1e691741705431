"""The LoRA part of a task as it is planned: targets, numbers, and what PEFT has no LoRA for."""

from __future__ import annotations

import pytest
import torch
from lora_parts import lora, lora_parameters
from models import KINDS, Around, layers_of, seeded, small_transformer, tiny_vit
from peft import PeftModel

from recast_peft import BiasConfig, RecastConfig, RecastTargetError, get_recast_model, plan_recast
from recast_peft.planning.roles import SHORTHANDS


@pytest.mark.filterwarnings("ignore")
class TestVariants:
    @pytest.mark.parametrize(
        ("name", "targets", "message"),
        [
            ("multi-head attention", ["0", "1"], "torch's multi-head attention"),
            ("conv2d depth-wise", ["0", "1", "2"], "rank 2"),
            ("conv2d with dilation and groups", ["0", "1", "2"], "PEFT has no such LoRA"),
        ],
    )
    def test_modules_that_peft_has_no_sound_lora_for(self, name, targets, message):
        model = seeded(KINDS[name].build)
        before = list(model.state_dict())
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(model, RecastConfig(target_modules=targets, lora_config=lora()))
        assert list(model.state_dict()) == before


class TestPlan:
    def test_the_plan_counts_both_parts(self):
        config = RecastConfig(target_modules=["qkv"], max_coefficients=8, lora_config=lora(target_modules=["fc1"]))
        plan = plan_recast(tiny_vit(), config)
        assert (plan.num_coefficients, plan.num_lora_numbers) == (8, 4 * 2 * (8 + 16))
        assert "LoRA part: 192 numbers per task on 4 target modules, 200 with the coefficients" in str(plan)

    @pytest.mark.parametrize(
        ("fields", "targets"),
        [
            ({}, ["blocks.1.attn.qkv", "blocks.3.attn.qkv"]),
            ({"target_modules": "all-mlp", "exclude_modules": ["fc2"]}, [f"blocks.{i}.mlp.fc1" for i in range(4)]),
            ({"target_modules": r".*\.[02]\..*fc1"}, ["blocks.0.mlp.fc1", "blocks.2.mlp.fc1"]),
            ({"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "blocks"}, ["blocks.1.mlp.fc1"]),
        ],
    )
    def test_targets_of_its_own(self, fields, targets):
        config = RecastConfig(target_modules=r".*\.[13]\..*qkv", lora_config=lora(**fields))
        assert list(plan_recast(tiny_vit(), config).lora.targets) == targets
        model = get_recast_model(tiny_vit(), config, "task")
        wanted = {key for key in lora_parameters(model) if key.endswith("lora_A.task.weight")}
        assert len(wanted) == len(targets)
        assert all(any(target in key for key in wanted) for target in targets)

    def test_a_shorthand_that_was_added_names_targets_here_too(self, monkeypatch):
        monkeypatch.setitem(SHORTHANDS, "all-first-mlp", lambda candidate: candidate.name.endswith("fc1"))
        config = RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules="all-first-mlp"))
        assert list(plan_recast(tiny_vit(), config).lora.targets) == [f"blocks.{i}.mlp.fc1" for i in range(4)]


class TestRefusals:
    def test_targets_that_are_not_there(self):
        model = tiny_vit()
        with pytest.raises(RecastTargetError, match="not found in the base model"):
            get_recast_model(model, RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=["nothing"])))
        assert not layers_of(model)

    def test_the_classifier_that_the_task_owns(self):
        config = RecastConfig(
            target_modules=["qkv"], num_classes=5, head_module="head", lora_config=lora(target_modules=["head"])
        )
        with pytest.raises(RecastTargetError, match="head is trained whole with this task"):
            get_recast_model(tiny_vit(), config)


class TestBudget:
    """tiny_vit has four blocks: 32 coefficients in groups of four; a LoRA of rank 1 costs 32 on qkv and 16 on proj."""

    def test_what_a_budget_leaves_goes_to_a_lora_on_the_last_modules_that_fit(self):
        plan = plan_recast(tiny_vit(), RecastConfig(max_coefficients=100))
        assert sorted(plan.lora.targets) == ["blocks.2.attn.proj", "blocks.3.attn.proj", "blocks.3.attn.qkv"]
        assert (plan.num_coefficients, plan.num_lora_numbers) == (32, 16 + 32 + 16)

    @pytest.mark.parametrize(("budget", "rank"), [(32 + 192, 1), (32 + 3 * 192 - 1, 2), (32 + 3 * 192, 3)])
    def test_where_all_modules_fit_the_rank_rises(self, budget, rank):
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=budget))
        assert model.peft_config["default"].lora_config.r == rank
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32 + rank * 192 <= budget

    @pytest.mark.parametrize("wrap", [lambda model: model, Around])
    def test_it_stands_where_peft_s_lora_would(self, wrap):
        plan = plan_recast(wrap(small_transformer("bert")), RecastConfig(max_coefficients=100_000))
        assert {name.rpartition(".")[2] for name in plan.lora.targets} == {"query", "value"}

    @pytest.mark.parametrize(
        "fields",
        [
            {"lora_config": lora(target_modules=["fc1"])},
            {"partners": [BiasConfig()]},
            {"bias": "all"},
            {"train_norms": True},
            {"max_coefficients": 32 + 15},
            {"max_coefficients": None},
        ],
    )
    def test_a_config_that_names_more_or_has_no_room_gets_none(self, fields):
        plan = plan_recast(tiny_vit(), RecastConfig(**{"max_coefficients": 1000, **fields}))
        assert plan.num_lora_numbers == (4 * 2 * (8 + 16) if "lora_config" in fields else 0)

    def test_a_task_keeps_what_its_conversion_decided(self, tmp_path):
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=100, init_weights=False), "task").eval()
        model.save_pretrained(tmp_path)
        config = RecastConfig.from_pretrained(tmp_path / "task")
        assert len(config.lora_config.target_modules) == 3
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval()
        x = torch.randn(2, 5, 8)
        assert torch.equal(loaded(x), model(x))

    def test_a_stored_task_without_a_lora_gets_none(self, tmp_path):
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=32), "task")
        model.save_pretrained(tmp_path)
        file = tmp_path / "task" / "adapter_config.json"
        file.write_text(file.read_text().replace('"max_coefficients": 32', '"max_coefficients": 1000'))  # as 0.1 wrote it
        assert plan_recast(tiny_vit(), RecastConfig.from_pretrained(tmp_path / "task")).lora is None
