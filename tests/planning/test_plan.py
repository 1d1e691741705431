"""A plan says what a task would cost, what it leaves out and why, and how it fits the tasks that are there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import converted, outputs, tiny_vit, vit_input
from peft import LoraConfig
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from recast_peft import RecastBankError, RecastConfig, RecastTargetError, get_recast_model, plan_recast, random_bank


class TestSizes:
    def test_of_an_exact_bank_cost_no_memory(self) -> None:
        plan = plan_recast(tiny_vit(depth=6), RecastConfig(target_modules=["qkv"]))
        assert all(group.is_exact for group in plan.groups)
        assert plan.num_coefficients == 6 * 2
        assert plan.model_bytes_after == plan.model_bytes

    @pytest.mark.parametrize("sets", [1, 2, 3])
    def test_of_the_paper_come_out(self, sets: int) -> None:
        # RECAST-Att of the paper: 12 blocks, groups of 2, 2 templates, 2 sets: 48 numbers
        plan = plan_recast(tiny_vit(depth=12), RecastConfig(target_modules=["qkv"], num_coefficient_sets=sets))
        assert plan.num_coefficients == 24 * sets

    @pytest.mark.parametrize("keep", [True, False])
    def test_of_a_compressed_model_are_what_it_takes_then(self, keep: bool) -> None:
        model = tiny_vit(depth=6)
        config = RecastConfig(target_modules=["fc1", "fc2"], group_size=3, num_templates=1, keep_base_weights=keep)
        plan = plan_recast(model, config)
        one = 16 * 8 * 4  # fc1 and fc2 have one size
        assert plan.model_bytes == sum(p.numel() * 4 for p in model.parameters())
        assert plan.model_bytes_after == plan.model_bytes + (4 * one if keep else -8 * one)
        task = get_recast_model(model, config)
        frozen = [p for n, p in task.named_parameters() if "recast_coefficients" not in n]
        assert plan.model_bytes_after == sum(p.numel() * p.element_size() for p in frozen)

    def test_are_what_the_conversion_makes(self) -> None:
        config = RecastConfig(target_modules=["qkv", "fc1"], num_coefficient_sets=3, group_size=3)
        plan = plan_recast(tiny_vit(), config)
        model = get_recast_model(tiny_vit(), config)
        assert plan.num_coefficients == model.get_nb_trainable_parameters()[0]
        assert {g.name: list(g.members) for g in plan.groups} == model.peft_config["default"].groups

    def test_above_every_group_are_refused(self) -> None:
        with pytest.raises(RecastTargetError, match=r"num_templates=3(?s:.*)largest group: 2 layers"):
            plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv"], num_groups=2, num_templates=3))

    def test_above_a_remainder_are_lowered_for_it(self) -> None:
        plan = plan_recast(tiny_vit(depth=5), RecastConfig(target_modules=["qkv"], num_templates=2, group_size=4))
        assert [(len(g.members), g.num_templates) for g in plan.groups] == [(4, 2), (1, 1)]

    def test_are_shown_as_a_table(self) -> None:
        text = str(plan_recast(tiny_vit(depth=3), RecastConfig(target_modules=["qkv"])))
        assert "blocks.{0,1}.attn.qkv" in text
        assert "blocks.2.attn.qkv" in text
        assert "2 banks, 3 target modules, 5 numbers per task" in text


class TestPlanning:
    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (["query"], r"(?s)\['query'\] not found.*has these modules.*fc1, fc2.*qkv"),
            (["qvk"], r"(?s)Near: .*qkv"),
            ("blocks", "not found"),
            (r"nothing\..*", "not found"),
            ("all-conv", r"(?s)not found.*has these modules"),
        ],
    )
    def test_that_finds_nothing_says_what_there_is(self, targets: Any, message: str) -> None:
        with pytest.raises(RecastTargetError, match=message):
            plan_recast(tiny_vit(), RecastConfig(target_modules=targets))

    def test_that_leaves_out_everything_says_what_left_it_out(self) -> None:
        with pytest.raises(RecastTargetError, match=r"exclude_modules=\['qkv'\]"):
            plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv"], exclude_modules=["qkv"]))
        with pytest.raises(RecastTargetError, match=r"layers_to_transform=\[9\]"):
            plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv"], layers_to_transform=[9]))

    def test_of_a_model_without_any_target_says_none(self) -> None:
        with pytest.raises(RecastTargetError, match="can be targets: none"):
            plan_recast(nn.Sequential(nn.ReLU()), RecastConfig(target_modules=["qkv"]))

    def test_lists_what_it_left_out_with_the_reason(self) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(target_modules=["attn", "qkv"]))
        assert set(plan.skipped) == {f"blocks.{i}.attn" for i in range(4)}
        assert "has no weight of its own" in str(plan)

    @pytest.mark.parametrize("targets", [None, "all-attention", "all-linear", ["qkv"], r"blocks\.\d+\.attn\.qkv"])
    @pytest.mark.parametrize("pattern", [None, "blocks", ["blocks"]])
    def test_keeps_to_the_layers_that_were_asked_for(self, targets: Any, pattern: Any) -> None:
        config = RecastConfig(target_modules=targets, layers_to_transform=[0, 2], layers_pattern=pattern)
        plan = plan_recast(tiny_vit(), config)
        assert {name.split(".")[1] for name in plan.targets} == {"0", "2"}

    @pytest.mark.parametrize("targets", ["all-attention", ["qkv", "proj"]])
    @pytest.mark.parametrize("excluded", [["qkv"], r".*\.qkv", ["blocks.0.attn.qkv", "qkv"]])
    def test_leaves_out_what_was_excluded(self, targets: Any, excluded: Any) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(target_modules=targets, exclude_modules=excluded))
        assert {name.rpartition(".")[2] for name in plan.targets} == {"proj"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.out.weight = self.embed.weight


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(4, 4)
        self.first, self.second = nn.Sequential(inner), nn.Sequential(inner)


class IntegerWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.out.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.out.qweight = torch.zeros(4, 4, dtype=torch.int32)


def rounded_in_each_call() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].quantization_scheme = object()  # as compressed-tensors leaves it; the weight is in float all the same
    return model


def fine_grained_floats() -> nn.Module:
    return nn.Sequential(FP8Linear(4, 4, block_size=(2, 2)))


def eight_bit_floats() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return model


def sparse() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    return model


def different_sizes() -> nn.Module:
    return nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3))


def tied_projection() -> nn.Module:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    model[1].weight = model[0].out_proj.weight
    return model


def parametrised() -> nn.Module:
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("build", "target", "message"),
    [
        (Tied, ["out"], r"tied: one parameter is embed\.weight and out\.weight"),
        (Tied, ["embed"], "tied"),
        (Shared, r"first\.0", r"shared by first\.0 and second\.0"),
        (IntegerWeight, ["out"], "integer or quantized"),
        (Quantized, ["out"], "quantized"),
        (rounded_in_each_call, ["0"], r"Linear is quantized \(it has a quantization_scheme\)"),
        (fine_grained_floats, ["0"], r"FP8Linear is of torch\.float8_e4m3fn(?s:.*)dequantize=True"),
        (eight_bit_floats, ["0"], "float8"),
        (sparse, ["0"], r"sparse_coo\), a sparse, integer"),
        (different_sizes, ["0"], "different sizes"),
        (tied_projection, ["0"], r"tied: one parameter is 0\.out_proj\.weight and 1\.weight"),
        (parametrised, ["0"], "parametrised"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), ["0"], "not initialised"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), ["0"], "vector"),
    ],
)
def test_a_module_that_cannot_be_a_target_is_refused_with_the_reason(build: Any, target: Any, message: str) -> None:
    model = build()
    shown, modules = str(model), {name: id(m) for name, m in model.named_modules()}
    trainable = [p.requires_grad for p in model.parameters()]
    for act in (plan_recast, get_recast_model):
        with pytest.raises(RecastTargetError, match=message):
            act(model, RecastConfig(target_modules=target))
    assert str(model) == shown
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_model_on_the_meta_device_is_planned_and_not_converted() -> None:
    config = RecastConfig(num_classes=3, partners=["bias"], train_norms=True, lora_config=LoraConfig(target_modules=["fc1"]))
    plain, empty = tiny_vit(), tiny_vit().to("meta")
    assert str(plan_recast(empty, config)) == str(plan_recast(plain, config))
    shown = str(empty)
    with pytest.raises(RecastTargetError, match="target modules are on the meta device"):
        get_recast_model(empty, config)
    assert str(empty) == shown


def test_many_modules_that_cannot_be_targets_are_counted() -> None:
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(11)))
    with pytest.raises(RecastTargetError, match="and 3 more"):
        plan_recast(model, RecastConfig(target_modules=[str(i) for i in range(11)]))


class TestALaterAdapter:
    def agree(self, first: dict[str, Any], second: dict[str, Any], depth: int = 4) -> None:
        plain = tiny_vit(depth=depth)
        expected = outputs(plain, vit_input())
        model = get_recast_model(plain, RecastConfig(target_modules=["qkv"], **first)).eval()
        kept = outputs(model, vit_input())
        if "num_templates" not in first:
            assert torch.equal(kept, expected)
        model.add_adapter("second", RecastConfig(**{"target_modules": ["qkv"], **second}))
        assert torch.equal(outputs(model, vit_input()), kept)
        model.set_adapter("second")
        # such a bank approximates, and stands for the weights of its own task alone
        assert torch.equal(outputs(model, vit_input()), kept) == ("keep_base_weights" not in second)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({}, {}),
            ({}, {"group_size": 4}),
            ({"group_size": 3}, {"group_size": 2}),
            ({}, {"num_coefficient_sets": 3}),
            ({}, {"target_modules": ["fc1"]}),
            ({}, {"target_modules": ["fc1"], "num_templates": 1, "keep_base_weights": True}),
            ({"num_templates": 1}, {"num_templates": 1}),
            ({"num_templates": 1}, {"num_templates": 1, "num_coefficient_sets": 2}),
            ({"num_templates": 1}, {"target_modules": ["fc1"]}),
            ({"num_templates": 1}, {"target_modules": ["fc1"], "num_templates": 1, "keep_base_weights": True}),
        ],
    )
    def test_agrees_with_the_banks_or_brings_its_own(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        self.agree(first, second)

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ({}, {"num_templates": 1}, r"cannot be compressed(?s:.*)\['default'\]"),
            ({"num_templates": 1}, {}, r"does not share(?s:.*)1 templates(?s:.*)2 templates"),
            ({"num_templates": 1}, {"group_size": 3, "num_templates": 1}, "does not share"),
            ({"num_templates": 1}, {"group_size": 1}, "does not share"),
            ({"num_templates": 1}, {"layers_to_transform": [1, 2], "num_templates": 1}, "does not share"),
            ({}, {"group_size": 4, "num_templates": 1}, "cannot be compressed"),
            ({}, {"target_modules": ["fc1"], "num_templates": 1}, "tasks default of this model.*keep_base_weights=True"),
        ],
    )
    def test_that_cannot_be_combined_is_refused_with_the_reason(
        self, first: dict[str, Any], second: dict[str, Any], message: str
    ) -> None:
        model = converted(**first)
        shown, before = str(model), outputs(model, vit_input())
        with pytest.raises(RecastBankError, match=message):
            model.add_adapter("second", RecastConfig(**{"target_modules": ["qkv"], **second}))
        assert str(model) == shown
        assert list(model.peft_config) == ["default"]
        assert torch.equal(outputs(model, vit_input()), before)

    def test_whose_recipe_differs_is_refused(self) -> None:
        model = converted(num_templates=1)
        written = model.peft_config["default"]
        recipes = copy.deepcopy(written.recipes)
        next(iter(recipes.values()))["base"][0][0] += 0.5
        config = RecastConfig(groups=written.groups, recipes=recipes)
        with pytest.raises(RecastBankError, match=r"does not share(?s:.*)mixed otherwise|other contents"):
            model.add_adapter("second", config)

    @given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
    def test_computes_what_it_would_alone(self, first: int, second: int, depth: int) -> None:
        assume(first != second)
        self.agree({"group_size": first}, {"group_size": second}, depth)


def test_what_a_bank_says_cannot_be_said_otherwise_in_silence() -> None:
    bank = random_bank(tiny_vit(), RecastConfig(target_modules=["qkv"], group_size=1))
    with pytest.warns(UserWarning, match=r"the bank says.*target_modules=\['fc1'\], group_size=2 is not looked at"):
        plan = plan_recast(tiny_vit(), RecastConfig(bank=bank, target_modules=["fc1"], group_size=2))
    assert {name.rpartition(".")[2] for name in plan.targets} == {"qkv"}
