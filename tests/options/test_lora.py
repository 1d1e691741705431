"""The config of a LoRA part: what may be in it."""

from __future__ import annotations

from typing import Any

import pytest
from lora_parts import lora
from peft import AdaLoraConfig

from recast_peft import RecastConfig, RecastConfigError


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
