"""A config that names no size trains fewer than 50 numbers on any model, and at least one; a size that is named is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import layers_of, outputs, randomise, tiny_vit, vit_input
from peft import PeftModel
from sweep.timm_cases import VARIANTS
from sweep.transformers_cases import transformers_cases
from torch import nn
from transformers.initialization import no_init_weights

from recast_peft import RecastBankError, RecastConfig, get_recast_model, plan_recast
from recast_peft.planning.budget import DEFAULT_BUDGET, DEFAULT_SIZES, default_sizes
from recast_peft.planning.groups import count_coefficients, layer_runs, plan_groups
from recast_peft.planning.targets import find_targets

timm = pytest.importorskip("timm")

FAMILIES = sorted(name for name, _ in json.loads(VARIANTS.read_text())["families"].values() if name)
LARGE = ["resnet152", "densenet201", "vit_giant_patch14_224", "tf_efficientnet_lite0", "efficientnet_b7", "nasnetalarge"]


def numbers_of(model: nn.Module, config: RecastConfig) -> int:
    """What a task would train on a model whose weights may be on the meta device."""
    targets, _ = find_targets(model, config)
    kept, choice, reason = default_sizes(targets, config)
    groups = plan_groups(layer_runs(kept), choice)
    assert bool(reason) == (choice.group_size != DEFAULT_SIZES[0].group_size)
    return count_coefficients(groups, choice.coefficient_sharing)


def test_of_every_architecture_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *sizes: tensor)  # one that is timm's own
    counts = {}
    for name in FAMILIES + LARGE:
        with torch.device("meta"), no_init_weights():  # there are none, yet drawing them takes as long as all the rest
            model = timm.create_model(name)
        counts[name] = numbers_of(model, RecastConfig())
    assert {name: count for name, count in counts.items() if not 0 < count <= DEFAULT_BUDGET} == {}


def test_of_every_architecture_of_transformers() -> None:
    counts = {name: plan_recast(case.build(), RecastConfig()).num_coefficients for name, case in transformers_cases().items()}
    assert {name: count for name, count in counts.items() if not 0 < count <= DEFAULT_BUDGET} == {}


@given(st.integers(1, 90), st.sampled_from([None, ["qkv"], "all-linear", ["fc1", "fc2", "qkv"]]))
def test_of_a_model_of_any_depth(depth: int, targets: Any) -> None:
    plan = plan_recast(tiny_vit(depth=depth, width=2), RecastConfig(target_modules=targets))
    assert 0 < plan.num_coefficients <= DEFAULT_BUDGET
    assert all(group.is_exact for group in plan.groups)


def test_neighbours_of_a_role_share_in_a_deep_model(tmp_path: Path) -> None:
    def deep() -> nn.Module:
        return tiny_vit(depth=40)

    plan = plan_recast(deep(), RecastConfig())
    assert (plan.num_coefficients, plan.coefficient_sharing) == (40, 2)
    assert "max_coefficients=48 (by default" in str(plan)
    assert "shared between 2 consecutive banks of a role" in str(plan)
    model = get_recast_model(deep(), RecastConfig()).eval()
    owner = {name: layer.recast_coefficients["default"] for name, layer in layers_of(model).items()}
    assert owner["blocks.2.mlp.fc1"] is owner["blocks.3.mlp.fc1"]
    assert owner["blocks.2.mlp.fc1"] is not owner["blocks.4.mlp.fc1"]
    assert owner["blocks.2.mlp.fc1"] is not owner["blocks.2.mlp.fc2"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 40
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deep(), tmp_path).eval()
    assert loaded.peft_config["default"].coefficient_sharing == 2
    assert not torch.equal(outputs(loaded, vit_input()), outputs(deep().eval(), vit_input()))
    assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({"group_size": 2}, 160),
        ({"group_size": 1}, 80),
        ({"num_groups": 40}, 80),
        ({"num_coefficient_sets": 2}, 320),
        ({"num_templates": 1}, 80),
        ({"coefficient_sharing": "roles"}, 80),
        ({"coefficient_sharing": 4}, 40),
        ({"max_coefficients": 100}, 80),  # one direction of each weight
        ({"max_coefficients": 7}, 6),
        ({"max_coefficients": 1}, 1),
        ({"train_coefficients": False, "partners": ["bias"]}, 160),
    ],
)
def test_a_size_that_is_given_is_kept(config: dict[str, Any], numbers: int) -> None:
    assert plan_recast(tiny_vit(depth=40), RecastConfig(**config)).num_coefficients == numbers


@pytest.mark.parametrize("other", [{"mimicry": "gradient"}, {"mimicry": "autoencoder"}, {"num_coefficient_sets": 2}])
def test_a_budget_beside_what_is_said_of_groups_goes_to_groups(other: dict[str, Any]) -> None:
    plan = plan_recast(tiny_vit(depth=4), RecastConfig(max_coefficients=100, **other))
    assert plan.num_directions is None
    assert any(len(group.members) > 1 for group in plan.groups)


def test_a_budget_on_a_compressed_model_goes_to_its_groups() -> None:
    model = get_recast_model(tiny_vit(depth=4), RecastConfig(num_templates=1))
    model.add_adapter("more", RecastConfig(group_size=2, num_templates=1, max_coefficients=48))
    with pytest.raises(RecastBankError, match=r"a compressed bank that the task does not share(?s:.*)num_templates"):
        model.add_adapter("other", RecastConfig(max_coefficients=48))


def test_a_convolutional_network_leaves_out_its_stem_before_layers_share() -> None:
    with torch.device("cpu"):
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    plan = plan_recast(model, RecastConfig())
    assert (plan.num_coefficients, plan.coefficient_sharing) == (48, None)
    assert "default of 48 numbers" in plan.skipped["conv_stem"]
    directions = plan_recast(model, RecastConfig(max_coefficients=48))  # one direction of each
    assert (directions.targets, directions.num_coefficients, directions.num_directions) == (plan.targets, 48, 1)
    assert "conv_stem" in directions.skipped
    named = plan_recast(model, RecastConfig(target_modules="all-conv"))
    assert "conv_stem" in named.targets
    assert named.num_coefficients <= DEFAULT_BUDGET
