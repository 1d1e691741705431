"""A plan puts layers of one role and shape into groups of consecutive depth, and says so before anything is touched."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import Chain, TinyVit, converted, outputs, tiny_vit, vit_input
from torch import nn

from recast_peft import (
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastError,
    RecastTargetError,
    get_recast_model,
    plan_recast,
)
from recast_peft.names import bank_name, role_of

QKV = [f"blocks.{i}.attn.qkv" for i in range(6)]


def groups_of(model: nn.Module, **config: Any) -> list[list[str]]:
    config.setdefault("target_modules", ["qkv"])
    return [list(group.members) for group in plan_recast(model, RecastConfig(**config)).groups]


class TestGrouping:
    @pytest.mark.parametrize(
        ("depth", "config", "sizes"),
        [
            (6, {}, [2, 2, 2]),
            (5, {}, [2, 2, 1]),
            (6, {"group_size": 3}, [3, 3]),
            (5, {"group_size": 3}, [3, 2]),
            (4, {"group_size": 1}, [1, 1, 1, 1]),
            (4, {"group_size": 9}, [4]),
            (6, {"num_groups": 1}, [6]),
            (6, {"num_groups": 4}, [2, 2, 1, 1]),
            (3, {"num_groups": 9}, [1, 1, 1]),
            (1, {}, [1]),
            (6, {"layers_to_transform": [0, 1, 4]}, [2, 1]),
            (6, {"layers_to_transform": 3, "layers_pattern": "blocks"}, [1]),
            (6, {"exclude_modules": ["blocks.0.attn.qkv"]}, [2, 2, 1]),
        ],
    )
    def test_cuts_a_run_of_layers(self, depth: int, config: dict[str, Any], sizes: list[int]) -> None:
        groups = groups_of(tiny_vit(depth=depth), **config)
        assert [len(members) for members in groups] == sizes
        members = [m for group in groups for m in group]
        assert members == sorted(members)

    @given(st.integers(1, 30), st.integers(1, 8), st.booleans())
    def test_covers_every_layer_once_in_the_order_of_depth(self, depth: int, number: int, by_count: bool) -> None:
        model = Chain([nn.Linear(2, 2, bias=False) for _ in range(depth)])
        key = "num_groups" if by_count else "group_size"
        groups = groups_of(model, target_modules=r"layers\.\d+", **{key: number})
        assert [m for members in groups for m in members] == [f"layers.{i}" for i in range(depth)]
        sizes = [len(members) for members in groups]
        if by_count:
            assert len(groups) == min(number, depth)
            assert max(sizes) - min(sizes) <= 1
        else:
            assert all(size == number for size in sizes[:-1])
            assert 1 <= sizes[-1] <= number

    def test_keeps_roles_apart(self) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv", "fc1", "fc2"]))
        for group in plan.groups:
            assert len({role_of(member) for member in group.members}) == 1
        assert len(plan.groups) == 6

    def test_counts_depth_by_number_and_not_by_letter(self) -> None:
        groups = groups_of(tiny_vit(depth=12))
        assert groups[-1] == ["blocks.10.attn.qkv", "blocks.11.attn.qkv"]

    def test_cuts_where_the_shape_changes(self) -> None:
        widths = [2, 2, 2, 2, 3, 3, 3, 2]
        model = Chain([nn.Linear(a, b) for a, b in pairwise(widths)])
        groups = groups_of(model, target_modules=[str(i) for i in range(7)], group_size=4)
        assert groups == [["layers.0", "layers.1", "layers.2"], ["layers.3"], ["layers.4", "layers.5"], ["layers.6"]]

    def test_cuts_where_the_dtype_changes(self) -> None:
        model = tiny_vit()
        model.blocks[1].bfloat16()
        assert [len(g) for g in groups_of(model, group_size=4)] == [1, 1, 2]

    def test_cuts_where_the_class_changes(self) -> None:
        model = Chain([nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4)])
        assert [len(g) for g in groups_of(model, target_modules=["0", "1", "2", "3"], group_size=4)] == [2, 1, 1]

    def test_does_not_depend_on_the_order_in_which_modules_were_defined(self) -> None:
        class Shuffled(nn.Module):
            def __init__(self, order: list[int]) -> None:
                super().__init__()
                self.layer = nn.ModuleDict({str(i): nn.Linear(3, 3) for i in order})

        order = list(range(7))
        expected = sorted(groups_of(Shuffled(order), target_modules=r"layer\.\d+"))
        for seed in range(5):
            random.Random(seed).shuffle(order)
            assert sorted(groups_of(Shuffled(order), target_modules=r"layer\.\d+")) == expected

    def test_is_the_same_for_names_in_any_order(self) -> None:
        model = tiny_vit()
        first = groups_of(model, target_modules=["qkv", "fc1", "proj"])
        assert first == groups_of(model, target_modules=["proj", "qkv", "fc1"])
        assert first == groups_of(model, target_modules={"fc1", "qkv", "proj"})

    def test_uses_groups_that_were_given(self) -> None:
        groups = {"far": [QKV[0], QKV[3]], "near": [QKV[1]]}
        plan = plan_recast(tiny_vit(), RecastConfig(groups=groups))
        assert {g.name: list(g.members) for g in plan.groups} == groups

    def test_refuses_given_groups_whose_members_differ(self) -> None:
        with pytest.raises(RecastTargetError, match=r"'mixed' differ in shape(?s:.*)24x8(?s:.*)16x8"):
            plan_recast(tiny_vit(), RecastConfig(groups={"mixed": [QKV[0], "blocks.0.mlp.fc1"]}))

    def test_refuses_given_groups_of_modules_that_are_not_there(self) -> None:
        with pytest.raises(RecastTargetError, match=r"1 of 2 target modules(?s:.*)near \['blocks\.0\.attn\.qkv'"):
            plan_recast(tiny_vit(), RecastConfig(groups={"x": [QKV[0], "blocks.0.attn.qkvs"]}))


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
    @pytest.mark.parametrize("templates", [None, 1])
    def test_touches_neither_model_nor_config(self, templates: int | None) -> None:
        model, config = tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=templates)
        before, fields = copy.deepcopy(model), copy.deepcopy(config.__dict__)
        plan_recast(model, config)
        assert config.__dict__ == fields
        assert str(model) == str(before)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
        assert all(p.requires_grad for p in model.parameters())

    def test_gives_a_further_adapter_the_same_groups(self) -> None:
        plain = groups_of(tiny_vit(), target_modules=["qkv", "fc1"])
        for templates in (None, 1):
            model = converted(target_modules=["qkv", "fc1"], num_templates=templates)
            assert groups_of(model, target_modules=["qkv", "fc1"]) == plain

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

    @pytest.mark.parametrize("targets", [None, "all-attention", "all-linear", ["qkv"], r"blocks\.\d+\.attn\.qkv"])
    @pytest.mark.parametrize("pattern", [None, "blocks", ["blocks"]])
    def test_keeps_to_the_layers_that_were_asked_for(self, targets: Any, pattern: Any) -> None:
        if isinstance(targets, str) and "blocks" in targets:
            targets = ["attn.qkv"]  # PEFT restricts names to layers, not regular expressions
        config = RecastConfig(target_modules=targets, layers_to_transform=[0, 2], layers_pattern=pattern)
        plan = plan_recast(tiny_vit(), config)
        assert {name.split(".")[1] for name in plan.targets} == {"0", "2"}

    @pytest.mark.parametrize("targets", ["all-attention", ["qkv", "proj"]])
    @pytest.mark.parametrize("excluded", [["qkv"], r".*\.qkv", ["blocks.0.attn.qkv", "qkv"]])
    def test_leaves_out_what_was_excluded(self, targets: Any, excluded: Any) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(target_modules=targets, exclude_modules=excluded))
        assert {name.rpartition(".")[2] for name in plan.targets} == {"proj"}

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
        (eight_bit_floats, ["0"], "float8"),
        (sparse, ["0"], r"sparse_coo\), a sparse, integer"),
        (different_sizes, ["0"], "different sizes"),
        (parametrised, ["0"], "parametrised"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), ["0"], "not initialised"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), ["0"], "vector"),
        (lambda: nn.Sequential(nn.Linear(4, 4)).to("meta"), ["0"], "meta device"),
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
        if "keep_base_weights" not in second:  # such a bank approximates, and stands for the weights of its own task alone
            assert torch.equal(outputs(model, vit_input()), kept)

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
        ],
    )
    def test_that_cannot_be_combined_is_refused_with_the_reason(
        self, first: dict[str, Any], second: dict[str, Any], message: str
    ) -> None:
        model = converted(**first)
        shown, before = str(model), outputs(model, vit_input())
        with pytest.raises(RecastBankError, match=message):
            model.add_adapter("second", RecastConfig(target_modules=["qkv"], **second))
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


class TestNames:
    @pytest.mark.parametrize(
        ("name", "role"),
        [("blocks.11.attn.qkv", "blocks.*.attn.qkv"), ("0", "*"), ("layer1.0.conv1", "layer1.*.conv1"), ("head", "head")],
    )
    def test_of_roles_have_no_numbers(self, name: str, role: str) -> None:
        assert role_of(name) == role

    @pytest.mark.parametrize(
        ("members", "name"),
        [
            (["blocks.0.qkv", "blocks.1.qkv"], "blocks.{0,1}.qkv"),
            (["blocks.0.qkv"], "blocks.0.qkv"),
            (["a.0.b.0", "a.0.b.1"], "a.0.b.{0,1}"),
            (["a", "b.c"], "{a,b.c}"),
        ],
    )
    def test_of_banks_show_the_members(self, members: list[str], name: str) -> None:
        assert bank_name(members) == name

    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
    def test_of_banks_are_never_used_twice(self, outer: int, inner: int, size: int) -> None:
        model = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(inner)) for _ in range(outer))
        plan = plan_recast(model, RecastConfig(target_modules=r"\d+\.\d+", group_size=size))
        assert len({group.name for group in plan.groups}) == len(plan.groups)
        assert len(plan.targets) == outer * inner


def test_what_is_no_model_or_no_config_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="dict, RecastConfig.*expected an nn.Module"):
        plan_recast({}, RecastConfig())  # type: ignore[arg-type]
    with pytest.raises(RecastConfigError, match="TinyVit, dict.*and a RecastConfig"):
        plan_recast(tiny_vit(), {})  # type: ignore[arg-type]
    with pytest.raises(RecastConfigError, match="model is a str"):
        get_recast_model("vit_tiny")  # type: ignore[arg-type]


def test_every_error_of_planning_is_of_one_family() -> None:
    with pytest.raises(RecastError):
        plan_recast(TinyVit(), RecastConfig(target_modules=["nothing"]))
