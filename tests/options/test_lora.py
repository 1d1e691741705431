"""The config of a LoRA part: what may be in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lora_parts import lora
from models import tiny_vit
from peft import AdaLoraConfig

from recast_peft import RecastConfig, RecastConfigError, get_recast_model


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"init_lora_weights": "pissa"}, "writes into the pretrained weights"),
            ({"init_lora_weights": "pissa_niter_4"}, "writes into the pretrained weights"),
            ({"init_lora_weights": "olora"}, "writes into the pretrained weights"),
            ({"init_lora_weights": "eva"}, "from data for a LoRA of its own"),
            ({"layer_replication": [(0, 2)]}, "changes the layers of the model"),
            ({"target_parameters": ["weight"]}, "name modules with target_modules"),
            ({"trainable_token_indices": [1]}, "modules_to_save of the RecastConfig"),
            ({"bias": "all"}, "to the RecastConfig"),
            ({"modules_to_save": ["head"]}, "to the RecastConfig"),
            ({"inference_mode": True}, "to the RecastConfig"),
            ({"task_type": "SEQ_CLS"}, "task_type"),
            ({"r": 0}, "at least 1 and at most 65,536 as its r"),
            ({"rank_pattern": None}, "a dictionary by names or regular expressions as its rank_pattern, not None"),
            ({"alpha_pattern": None}, "a dictionary by names or regular expressions as its alpha_pattern, not None"),
            ({"init_lora_weights": 3}, "True, False or the name of a way as its init_lora_weights, not 3"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_fields_that_make_no_sense_in_a_part(self, fields, message):
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(lora_config=lora(**fields))

    @pytest.mark.parametrize("given", [AdaLoraConfig(total_step=3), "r=4", 4, {"peft_type": "LOHA"}])
    def test_what_is_no_lora_config(self, given):
        with pytest.raises(RecastConfigError, match="expected a LoraConfig"):
            RecastConfig(lora_config=given)

    def test_a_field_that_does_not_exist(self, tmp_path):
        with pytest.raises(RecastConfigError, match="the fields of a LoraConfig, which has no 'rr', 'x'; did you mean 'r'"):
            RecastConfig(lora_config={"rr": 3, "x": 1})

    def test_a_field_of_a_later_version_in_a_stored_task_is_passed_over_with_a_warning(self, tmp_path):
        get_recast_model(tiny_vit(), RecastConfig(lora_config={"r": 3})).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        fields = json.loads(file.read_text())
        file.write_text(json.dumps({**fields, "lora_config": {**fields["lora_config"], "from_the_future": True}}))
        with pytest.warns(UserWarning, match="from_the_future"):
            assert RecastConfig.from_pretrained(tmp_path).lora_config.r == 3

    @pytest.mark.parametrize(
        "lora",
        [
            {"r": 0},
            {"r": 10**9},
            {"r": "8"},
            {"lora_alpha": None},
            {"lora_dropout": 1.5},
            {"target_modules": {"a": 1}},
            {"target_modules": "("},
            {"rank_pattern": {"(": 3}},
            {"rank_pattern": {"a": 10**9}},
            {"alpha_pattern": {"a": "b"}},
            {"use_dora": "yes"},
            {"r": {"r": {}}},
            {3: 4},
            {"peft_type": ["LORA"]},
            17,
        ],
    )
    def test_is_refused_in_a_lora_part(self, lora: Any) -> None:
        with pytest.raises(RecastConfigError, match="lora_config"):
            RecastConfig(lora_config=lora)
