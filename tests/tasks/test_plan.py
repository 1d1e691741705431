"""The whole plan of a task, with what its parts would cost."""

from __future__ import annotations

import pytest
from models import tiny_vit
from partner_cases import CASES, frozen_state, same_state

from recast_peft import RecastConfig, RecastTargetError, plan_recast


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
