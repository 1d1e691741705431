"""A config comes back from a folder as it was, and can be used again."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from models import converted, tiny_vit
from peft import PeftConfig, PeftType, get_peft_model

from recast_peft import RecastConfig, RecastConfigError, get_recast_model, plan_recast

GROUPS = {"bank": ["a", "b"]}


class TestAConfig:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [({}, 2), ({"group_size": 5}, 5), ({"num_groups": 3}, None)],
    )
    def test_says_the_group_size_that_is_used(self, fields: dict[str, int], expected: int | None) -> None:
        assert RecastConfig(**fields).effective_group_size == expected

    def test_is_of_a_type_that_PEFT_knows(self) -> None:
        assert RecastConfig().peft_type == PeftType.RECAST == "RECAST"

    def test_sorts_what_was_given_as_a_set(self) -> None:
        assert RecastConfig(target_modules={"c", "a", "b"}).target_modules == ["a", "b", "c"]

    def test_does_not_share_lists_with_the_caller(self) -> None:
        names = ["qkv"]
        config = RecastConfig(target_modules=names)
        names.append("proj")
        assert config.target_modules == ["qkv"]

    def test_comes_back_from_a_folder_as_it_was(self, tmp_path: Path) -> None:
        config = RecastConfig(
            target_modules="all-mlp",
            exclude_modules=["fc2"],
            layers_to_transform=[0, 1],
            layers_pattern="blocks",
            modules_to_save=["head"],
            bias="recast_only",
            group_size=3,
            num_templates=2,
            num_coefficient_sets=4,
            keep_base_weights=True,
            seed=7,
            groups={"bank": ["a", "b"]},
            recipes={"bank": {"mix": [[0.5, 0.25]], "base": [[1.0], [0.1]]}},
            base_fingerprint={"a": "x"},
        )
        config.save_pretrained(tmp_path)
        for reader in (RecastConfig, PeftConfig):
            read = reader.from_pretrained(tmp_path)
            assert isinstance(read, RecastConfig)
            # PEFT reads a saved config for inference unless asked otherwise
            assert {**read.to_dict(), "inference_mode": False} == config.to_dict()

    def test_keeps_every_digit_of_a_recipe(self, tmp_path: Path) -> None:
        mix = [[1 / 3, 2**0.5], [1e-17, -math.pi]]
        config = RecastConfig(groups=GROUPS, recipes={"bank": {"mix": mix, "base": mix}})
        config.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).recipes["bank"]["mix"] == mix

    def test_can_be_used_on_two_models(self) -> None:
        config = RecastConfig(target_modules=["qkv"])
        first = get_recast_model(tiny_vit(0, depth=2), config)
        second = get_recast_model(tiny_vit(1, depth=4), config)
        assert config.record is None
        assert len(first.peft_config["default"].groups) == 1
        assert len(second.peft_config["default"].groups) == 2

    def test_can_be_used_on_two_models_through_PEFT(self) -> None:
        # PEFT does not copy a config, so the second use meets what the first one wrote into it
        config = RecastConfig(target_modules=["qkv"])
        get_peft_model(tiny_vit(0, depth=2), config)
        second = get_peft_model(tiny_vit(1, depth=4), config)
        assert sum(map(len, second.peft_config["default"].groups.values())) == 4

    @pytest.mark.parametrize("use", [plan_recast, get_recast_model, get_peft_model])
    @pytest.mark.parametrize(("field", "value"), [("partners", ["biass"]), ("num_classes", "3"), ("target_modules", "(")])
    def test_is_checked_again_where_fields_were_set_since(self, use: Any, field: str, value: Any) -> None:
        config, model = RecastConfig(), tiny_vit()
        setattr(config, field, value)
        with pytest.raises(RecastConfigError, match=field):
            use(model, config)
        assert type(model.blocks[0].attn.qkv).__name__ == "Linear"

    def test_keeps_groups_that_were_given(self) -> None:
        groups = {"mine": ["blocks.0.attn.qkv", "blocks.3.attn.qkv"]}
        config = RecastConfig(groups=groups)
        for seed in (0, 1):
            assert get_recast_model(tiny_vit(seed), config).peft_config["default"].groups == groups

    def test_can_be_copied_deeply(self) -> None:
        config = converted().peft_config["default"]
        assert copy.deepcopy(config).to_dict() == config.to_dict()

    @pytest.mark.parametrize("name", ["gbank", {"name": "gbank"}])
    def test_keeps_a_bank_as_it_was_given(self, name: Any) -> None:
        assert RecastConfig(bank=name).bank == name

    def test_its_results_can_be_set(self) -> None:
        config = RecastConfig(results={"accuracy": 0.5})
        config.results = {"accuracy": 0.75}
        assert config.to_dict()["results"] == {"accuracy": 0.75}
