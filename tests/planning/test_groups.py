"""Groups: runs of layers of one role and shape, cut by size, number and kind."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Chain, converted, tiny_vit
from torch import nn

from recast_peft import RecastBankError, RecastConfig, RecastTargetError, StoredBank, plan_recast
from recast_peft.banks.stored_group import StoredGroup
from recast_peft.names import role_of
from recast_peft.planning.groups import coefficient_owners, sharing_of

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

    def test_refuses_those_of_a_bank_that_has_others(self) -> None:
        stored = StoredGroup(("other",), torch.zeros(1, 2, 2), torch.ones(1, 1))  # a bank stores something
        bank = StoredBank({"near": StoredGroup((QKV[1],)), "other": stored}, {})
        for name, said in (("near", rf"\(24, 8\) for {QKV[1]}"), ("far", "no such group")):
            message = rf"does not fit group '{name}'\n  in the bank:  {said}\n  in the model: \(24, 8\) for {QKV[0]}"
            with pytest.raises(RecastBankError, match=message):
                plan_recast(tiny_vit(), RecastConfig(groups={name: [QKV[0]]}, bank=bank))

    def test_refuses_given_groups_of_modules_that_are_not_there(self) -> None:
        with pytest.raises(RecastTargetError, match=r"1 of 2 target modules(?s:.*)near \['blocks\.0\.attn\.qkv'"):
            plan_recast(tiny_vit(), RecastConfig(groups={"x": [QKV[0], "blocks.0.attn.qkvs"]}))


class TestPlanning:
    def test_gives_a_further_adapter_the_same_groups(self) -> None:
        plain = groups_of(tiny_vit(), target_modules=["qkv", "fc1"])
        for templates in (None, 1):
            model = converted(target_modules=["qkv", "fc1"], num_templates=templates)
            assert groups_of(model, target_modules=["qkv", "fc1"]) == plain


@given(st.integers(1, 12), st.integers(2, 15), st.sampled_from([1, 2, 3]))
def test_a_way_of_sharing_is_known_by_what_it_shares(depth: int, count: int, size: int) -> None:
    config = RecastConfig(target_modules=["qkv", "fc1"], group_size=size)
    groups = plan_recast(tiny_vit(depth=depth), config).groups
    owners = coefficient_owners(groups, count)
    assert all(owners[owner] == owner for owner in owners.values())
    found = sharing_of(groups, {name: hash(owner) for name, owner in owners.items()})
    assert coefficient_owners(groups, found) == owners


def test_roles_with_few_banks_share_in_one_sequence() -> None:
    model = nn.Sequential()
    for name in ("a", "b", "c"):
        model.add_module(name, nn.Linear(2, 2))
    model.deep = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    config = RecastConfig(target_modules=r"[abc]|deep\.\d", group_size=1, coefficient_sharing=2)
    plan = plan_recast(model, config)
    owners = coefficient_owners(plan.groups, 2)
    assert owners == {
        "a": "a",
        "b": "a",
        "c": "c",
        "deep.0": "deep.0",
        "deep.1": "deep.0",
        "deep.2": "deep.2",
        "deep.3": "deep.2",
    }
