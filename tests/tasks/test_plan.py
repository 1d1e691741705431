"""The whole plan of a task, with what its parts would cost."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_vit
from partner_cases import CASES, frozen_state, same_state

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, get_recast_model, plan_recast


class TestThePlan:
    def test_shows_where_partners_would_stand_before_anything_is_touched(self):
        backbone = tiny_vit()
        before = frozen_state(backbone)
        config = RecastConfig(target_modules=["qkv"], partners=["piggyback", CASES["adaptformer"].partner])
        config.train_coefficients = False
        plan = plan_recast(backbone, config)
        assert plan.parts["adaptformer"] == {f"blocks.{i}.mlp": 93 for i in range(4)}
        assert plan.parts["piggyback"] == {f"blocks.{i}.attn.qkv": 8 * 24 for i in range(4)}
        assert "piggyback: 4 places (blocks.0.attn.qkv, " in str(plan)
        assert "768 trainable parameters per task" in str(plan)
        assert "coefficients stay at zero" in str(plan)
        assert same_state(backbone, before)
        assert "partner" not in str(plan_recast(backbone, RecastConfig(target_modules=["qkv"])))
        with pytest.raises(RecastTargetError, match="clr"):
            plan_recast(backbone, RecastConfig(target_modules=["qkv"], partners=["clr"]))

    @pytest.mark.parametrize(
        "fields",
        [
            {"bias": "all"},
            {"bias": "recast_only"},
            {"bias": "recast_only", "lora_config": {"r": 2, "target_modules": ["fc1"]}},
            {"bias": "all", "train_norms": True, "modules_to_save": ["blocks.0.mlp"]},
        ],
    )
    def test_counts_the_models_own_biases_that_are_trained(self, fields: dict) -> None:
        config = RecastConfig(target_modules=["qkv"], **fields)
        plan = plan_recast(tiny_vit(), config)
        trained = sum(p.numel() for p in get_recast_model(tiny_vit(), config).parameters() if p.requires_grad)
        counts = [sum(places.values()) for places in plan.parts.values()]
        assert plan.num_coefficients + plan.num_lora_numbers + sum(counts) == trained
        assert f"{sum(plan.parts['biases'].values()):,} trainable parameters per task" in str(plan)

    @pytest.mark.parametrize("templates", [None, 1])
    def test_touches_neither_model_nor_config(self, templates: int | None) -> None:
        model, config = tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=templates)
        before, fields = copy.deepcopy(model), copy.deepcopy(config.__dict__)
        plan_recast(model, config)
        assert config.__dict__ == fields
        assert str(model) == str(before)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
        assert all(p.requires_grad for p in model.parameters())


def test_what_is_no_model_or_no_config_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="dict, RecastConfig.*expected an nn.Module"):
        plan_recast({}, RecastConfig())  # type: ignore[arg-type]
    with pytest.raises(RecastConfigError, match="TinyVit, dict.*and a RecastConfig"):
        plan_recast(tiny_vit(), {})  # type: ignore[arg-type]
    with pytest.raises(RecastConfigError, match="model is a str"):
        get_recast_model("vit_tiny")  # type: ignore[arg-type]
