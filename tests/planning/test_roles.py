"""What a module is for: the shorthands of target modules, and what None stands for."""

from __future__ import annotations

import pytest
from models import Chain, tiny_vit
from torch import nn

from recast_peft import RecastConfig, plan_recast


class TestShorthands:
    @pytest.mark.parametrize(
        ("targets", "leaves"),
        [
            (None, {"fc1", "fc2"}),
            ("all-attention", {"qkv", "proj"}),
            ("all-mlp", {"fc1", "fc2"}),
            ("all-linear", {"qkv", "proj", "fc1", "fc2"}),
        ],
    )
    def test_finds_the_modules_of_a_shorthand_and_no_head(self, targets: str | None, leaves: set[str]) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(target_modules=targets))
        assert {name.rpartition(".")[2] for name in plan.targets} == leaves

    @pytest.mark.parametrize(("targets", "expected"), [("all-attention", "attention.qkv"), ("all-mlp", "mlp.fc1")])
    def test_leaves_out_other_kinds_of_layers_and_what_computes_position_biases(self, targets: str, expected: str) -> None:
        def block(leaf: str) -> nn.ModuleDict:
            return nn.ModuleDict({leaf: nn.Linear(4, 4), "table": nn.Embedding(4, 4), "pairs": nn.Bilinear(4, 4, 4)})

        model = nn.ModuleDict({"attention": block("qkv"), "mlp": block("fc1"), "cpb_mlp": block("fc1")})
        assert plan_recast(model, RecastConfig(target_modules=targets)).targets == (expected,)

    def test_by_a_shorthand_of_certain_layers_picks_nothing_outside_them(self) -> None:
        model = tiny_vit()
        model.stem = nn.Linear(4, 4)
        plan = plan_recast(model, RecastConfig(target_modules="all-linear", layers_to_transform=[1]))
        assert len(plan.targets) == 4
        assert all(name.startswith("blocks.1.") for name in plan.targets)

    def test_without_a_target_leaves_out_what_was_excluded(self) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(exclude_modules=["fc1"]))
        assert {name.rpartition(".")[2] for name in plan.targets} == {"fc2"}

    def test_without_a_target_takes_the_attention_where_all_else_was_excluded(self) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(exclude_modules=r".*\.fc[12]"))
        assert {name.rpartition(".")[2] for name in plan.targets} == {"qkv", "proj"}

    def test_without_a_target_takes_convolutions_where_there_is_no_attention(self) -> None:
        model = Chain([nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(2, 2)])
        assert plan_recast(model, RecastConfig()).targets == ("layers.0", "layers.1")
