"""What is left out has a reason in the plan, and a name that nothing has is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import Repeated, tiny_vit
from torch import nn

from recast_peft import RecastConfig, RecastTargetError, plan_recast

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qkv", "fcl"], r"(?s)no module called 'fcl'.*near: fc2, fc1"),
        (["qkv", "attn.porj", "zzz"], r"(?s)'attn.porj' or 'zzz'.*target_modules: \['qkv'"),
        (["blocks.9.attn.qkv", "blocks.0.attn.qkv"], r"(?s)'blocks.9.attn.qkv'.*near: blocks"),
        ("all-liner", r"(?s)Near: all-linear.*Shorthands \(all-linear, all-attention, all-mlp, all-conv\)"),
        (["all-linear"], r"Shorthands \(.*\) are given alone, not in a list"),
        (["qkv", "all-mlp"], r"(?s)no module called 'all-mlp'.*Shorthands \(.*\) are given alone, not in a list"),
    ],
)
def test_a_misspelt_target_is_refused_with_what_is_near(targets: Any, message: str) -> None:
    with pytest.raises(RecastTargetError, match=message):
        plan_recast(tiny_vit(), RecastConfig(target_modules=targets))


@pytest.mark.parametrize("saved", ["norm(", "[head", ".*"])
def test_a_module_to_save_is_a_name_and_no_regular_expression(saved: str) -> None:
    with pytest.raises(RecastTargetError, match=rf"modules_to_save names {re.escape(saved)}, which the model does not have"):
        plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv"], modules_to_save=[saved]))


def test_a_shorthand_that_fits_nothing_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecastTargetError, match="Shorthands that fit layers of this model: all-conv\n") as error:
        plan_recast(timm.create_model("test_efficientnet", num_classes=0), RecastConfig(target_modules="all-mlp"))
    assert "Near" not in str(error.value)


def test_a_name_whose_modules_are_left_out_is_none_that_nothing_has() -> None:
    plan = plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv", "fc1"], exclude_modules=["fc1"]))
    assert {name.rpartition(".")[2] for name in plan.targets} == {"qkv"}


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "test_resnet", "test_mambaout"])
def test_every_layer_that_a_default_leaves_out_has_a_reason(name: str) -> None:
    model = timm.create_model(name)
    plan = plan_recast(model, RecastConfig())
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {n for n, module in model.named_modules() if isinstance(module, kinds)}
    assert set(plan.skipped) == layers - set(plan.targets)
    assert all(plan.skipped.values())


def test_a_model_that_is_quantized_in_part_says_why_its_mlps_are_no_targets() -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.fc1.W_q = block.mlp.fc2.W_q = torch.zeros(1)
    plan = plan_recast(model, RecastConfig())
    assert {name.rpartition(".")[2] for name in plan.targets} == {"qkv", "proj"}
    for i in range(4):
        assert "quantized" in plan.skipped[f"blocks.{i}.mlp.fc1"]
    assert "and 5 more (Linear is quantized" in str(plan)


class Packed(torch.Tensor):
    """A tensor type of another package that calls itself a float32 one."""


Packed.__module__ = "packing.tensors"


def test_a_weight_of_a_type_from_elsewhere_is_no_target() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    del model[0].weight
    model[0]._parameters["weight"] = torch.zeros(4, 4).as_subclass(Packed)  # type: ignore[assignment]
    plan = plan_recast(model, RecastConfig())
    assert plan.targets == ("1",)
    assert "Packed of packing, a quantized or packed type" in plan.skipped["0"]


def test_fused_experts_are_named_with_the_reason() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(3, 8, 4)), nn.Parameter(torch.zeros(3, 4, 4))
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 8))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Linear(4, 4)
            self.mlp = Experts()

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    plan = plan_recast(model, RecastConfig())
    assert plan.targets == ("blocks.0.attn", "blocks.1.attn")
    assert "experts in fused parameters (gate_up_proj, down_proj)" in plan.skipped["blocks.0.mlp"]


@pytest.mark.parametrize("excluded", [["fc3"], ["fc1", "blocks.0"], "fc1"])
def test_what_leaves_nothing_out_is_said(excluded: list[str] | str) -> None:
    with pytest.warns(UserWarning, match="exclude_modules: nothing is left out by '(fc3|blocks.0|fc1)'"):
        plan_recast(tiny_vit(), RecastConfig(exclude_modules=excluded))


@pytest.mark.parametrize("targets", [["first"], ["again"], ["again", "own"], "again|own"])
def test_a_shared_module_is_refused_by_any_of_its_names(targets: Any) -> None:
    with pytest.raises(RecastTargetError, match="first: the module is shared by first and again"):
        plan_recast(Repeated(), RecastConfig(target_modules=targets))


@pytest.mark.parametrize("targets", [["blocks.0.0"], ["tail.0"], r"tail\.0"])
def test_a_module_of_a_shared_block_is_found_by_any_of_its_names(targets: Any) -> None:
    plan = plan_recast(Repeated(), RecastConfig(target_modules=targets))
    assert [group.members for group in plan.groups] == [("blocks.0.0",)]


def test_a_module_of_a_shared_block_is_left_out_by_any_of_its_names() -> None:
    plan = plan_recast(Repeated(), RecastConfig(target_modules=["0"], exclude_modules=["tail.0"]))
    assert [group.members for group in plan.groups] == [("blocks.1.0",)]


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.0|own"])
def test_a_module_of_a_shared_block_is_left_out_without_a_word(targets: Any, recwarn: pytest.WarningsRecorder) -> None:
    plan = plan_recast(Repeated(), RecastConfig(target_modules=targets, exclude_modules=["tail.0", "again"]))
    assert sorted(member for group in plan.groups for member in group.members) == ["blocks.1.0", "own"]
    assert not recwarn.list


@pytest.mark.parametrize("wanted", ["block.experts.down", "again.experts.down"])
def test_parameters_of_a_shared_block_are_found_by_any_of_its_names(wanted: str) -> None:
    model = nn.Module()
    experts = nn.Module()
    experts.down = nn.Parameter(torch.randn(2, 3, 4))
    model.block = nn.ModuleDict({"experts": experts})
    model.again = model.block
    plan = plan_recast(model, RecastConfig(target_parameters=[wanted]))
    assert [group.members for group in plan.groups] == [("block.experts",)]
