"""What a budget leaves beside the coefficients: where the LoRA part stands, and its rank."""

from __future__ import annotations

import pytest
import timm
import torch
from lora_parts import lora
from models import Around, small_transformer, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model

from recast_peft import BiasConfig, RecastConfig, get_recast_model, plan_recast


class TestBudget:
    """tiny_vit has four blocks: 16 coefficients by default, 32 at most; a LoRA of rank 1 costs 32 on qkv and 16 on proj."""

    @pytest.mark.parametrize(
        ("budget", "wanted"),
        [
            (60, ["blocks.2.attn.proj", "blocks.3.attn.proj"]),
            (100, [f"blocks.{i}.attn.proj" for i in range(4)]),
            (120, [*(f"blocks.{i}.attn.proj" for i in range(4)), "blocks.3.attn.qkv"]),
        ],
    )
    def test_what_a_budget_leaves_goes_to_a_lora_on_the_cheapest_modules_the_last_ones_first(self, budget, wanted):
        plan = plan_recast(tiny_vit(), RecastConfig(max_coefficients=budget))
        assert sorted(plan.lora.targets) == wanted
        numbers = sum(16 if name.endswith("proj") else 32 for name in wanted)
        assert (plan.num_coefficients, plan.num_lora_numbers) == (16, numbers)
        assert f"max_coefficients={budget}: 16 coefficients, as by default" in str(plan)

    @pytest.mark.parametrize(("budget", "rank"), [(16 + 192, 1), (16 + 3 * 192 - 1, 2), (16 + 3 * 192, 3)])
    def test_where_all_modules_fit_the_rank_rises(self, budget, rank):
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=budget))
        assert model.peft_config["default"].lora_config.r == rank
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 + rank * 192 <= budget

    def test_the_rank_is_no_higher_than_that_of_the_weights(self):
        plan = plan_recast(tiny_vit(), RecastConfig(max_coefficients=10**6))
        assert plan.num_lora_numbers == 8 * 192  # weights of width 8

    def test_the_default_budget_said_aloud_is_the_default(self):
        network = timm.create_model("mobilenetv3_small_050", num_classes=0)
        said, default = (plan_recast(network, RecastConfig(max_coefficients=n)) for n in (48, None))
        assert said.targets == default.targets
        assert said.num_coefficients == default.num_coefficients == 29

    @pytest.mark.parametrize("budget", [200, 500, 10_000, 50_000])
    def test_it_is_kept_where_a_name_is_the_ending_of_others(self, budget):
        model = get_recast_model(timm.create_model("resnet18", num_classes=0), RecastConfig(max_coefficients=budget))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= budget  # conv1 is no layer1.0.conv1

    def test_a_size_that_is_named_goes_before_the_part(self):
        plan = plan_recast(tiny_vit(), RecastConfig(max_coefficients=100, group_size=4))
        assert (plan.num_coefficients, plan.num_lora_numbers) == (32, 64)

    @pytest.mark.parametrize("wrap", [lambda model: model, Around])
    def test_it_stands_where_peft_s_lora_would(self, wrap):
        plan = plan_recast(wrap(small_transformer("bert")), RecastConfig(max_coefficients=100_000))
        assert {name.rpartition(".")[2] for name in plan.lora.targets} == {"query", "value"}

    def test_a_classifier_that_a_task_type_brings_is_no_part_that_was_named(self):
        plain, typed = (
            get_recast_model(small_transformer("bert"), RecastConfig(max_coefficients=300, **fields))
            for fields in ({}, {"task_type": "SEQ_CLS"})
        )
        numbers = [sum(p.numel() for n, p in m.named_parameters() if p.requires_grad and "lora_" in n) for m in (plain, typed)]
        assert numbers[0] == numbers[1] > 200

    @pytest.mark.parametrize(
        "fields",
        [
            {"lora_config": lora(target_modules=["fc1"])},
            {"partners": [BiasConfig()]},
            {"bias": "all"},
            {"train_norms": True},
            {"modules_to_save": ["proj"]},  # a LoRA would stand on it
            {"max_coefficients": 32 + 15},
            {"max_coefficients": None},
        ],
    )
    def test_a_config_that_names_more_or_has_no_room_gets_none(self, fields):
        plan = plan_recast(tiny_vit(), RecastConfig(**{"max_coefficients": 1000, **fields}))
        assert plan.num_coefficients == (16 if fields.get("max_coefficients", 0) is None else 32)  # the whole budget
        assert plan.num_lora_numbers == (4 * 2 * (8 + 16) if "lora_config" in fields else 0)

    @pytest.mark.parametrize(
        ("fields", "wanted"),
        [
            (
                {"layers_to_transform": [0, 1]},
                {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj"},
            ),
            ({"exclude_modules": ["qkv"]}, {f"blocks.{i}.attn.proj" for i in range(4)}),
        ],
    )
    def test_it_keeps_to_the_layers_that_the_config_leaves(self, fields, wanted):
        plan = plan_recast(tiny_vit(), RecastConfig(max_coefficients=1000, **fields))
        assert set(plan.lora.targets) == wanted

    def test_a_task_keeps_what_its_conversion_decided(self, tmp_path):
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=100, init_weights=False), "task").eval()
        model.save_pretrained(tmp_path)
        config = RecastConfig.from_pretrained(tmp_path / "task")
        assert config.lora_config.target_modules == {"proj"}
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval()
        x = torch.randn(2, 5, 8)
        assert torch.equal(loaded(x), model(x))

    def test_a_stored_task_without_a_lora_gets_none(self, tmp_path):
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=32), "task")
        model.save_pretrained(tmp_path)
        file = tmp_path / "task" / "adapter_config.json"
        file.write_text(file.read_text().replace('"max_coefficients": 32', '"max_coefficients": 1000'))  # as 0.1 wrote it
        assert plan_recast(tiny_vit(), RecastConfig.from_pretrained(tmp_path / "task")).lora is None

    @pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found")
    def test_it_leaves_modules_alone_that_have_a_lora_of_another_kind(self):
        model = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["qkv"])).base_model.model
        model = get_recast_model(model, RecastConfig(max_coefficients=1000))
        names = model.peft_config["default"].lora_config.target_modules
        assert {name.rpartition(".")[2] for name in names} == {"proj"}
