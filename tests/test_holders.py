"""Containers by a task's name, and modules by their names in the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from recast_peft.holders import TaskModules, TaskParameters, container_key, other_names, plain_modules, put_at, task_of_key

NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)


@given(NAMES)
def test_a_key_says_which_name_it_stands_for(name: str) -> None:
    assert task_of_key(container_key(name)) == name
    assert "." not in container_key(name)


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_containers_hold_tasks_of_any_name(names: list[str]) -> None:
    names = list(dict.fromkeys([*names, "training", "keys", "v1.2", "%"]))
    owner = nn.Module()
    owner.parameters_of, owner.modules_of = TaskParameters(), TaskModules()
    for place, name in enumerate(names):
        owner.parameters_of[name] = nn.Parameter(torch.full((1,), float(place)))
        owner.modules_of[name] = nn.Linear(1, 1)
    assert list(owner.parameters_of.keys()) == list(owner.modules_of.keys()) == names
    assert [float(owner.parameters_of[name]) for name in names] == list(range(len(names)))
    twin = copy.deepcopy(owner)
    del owner.parameters_of[names[0]], owner.modules_of[names[0]]
    assert names[0] not in owner.parameters_of
    assert names[0] not in owner.modules_of
    assert float(twin.parameters_of[names[0]]) == 0
    assert not any(twin.load_state_dict(twin.state_dict()))


@pytest.mark.parametrize("name", ["classifier", "my_score"])
def test_no_key_ends_as_PEFTs_models_for_a_task_type_look_for(name: str) -> None:
    assert not container_key(name).endswith(("classifier", "score"))


def test_a_shared_parameter_stays_shared_when_it_is_exchanged() -> None:
    one, two = TaskParameters(), TaskParameters()
    one["task"] = nn.Parameter(torch.zeros(2))
    two.share("task", one.holder("task"))
    two["task"] = nn.Parameter(torch.ones(2))
    assert one["task"] is two["task"]


def test_wrappers_give_modules_no_other_names() -> None:
    plain = plain_modules(tiny_vit())
    wrapped = tiny_vit()
    for i, block in enumerate(wrapped.blocks):
        wrapped.blocks[i] = checkpoint_wrapper(block) if i % 2 else torch.compile(block, backend="eager")
    assert list(plain_modules(torch.compile(wrapped, backend="eager"))) == list(plain)
    new = nn.Identity()
    put_at(wrapped, "blocks.1.mlp.fc1", new)
    assert plain_modules(wrapped)["blocks.1.mlp.fc1"] is new


def test_a_module_at_two_places_is_exchanged_at_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "inside": nn.Sequential(nn.ReLU())})
    model["again"] = model["inside"][0]
    new = nn.Identity()
    put_at(model, "inside.0", new)
    assert model["again"] is model["inside"][0] is new


def test_the_further_names_of_shared_modules_are_known() -> None:
    model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(2, 2)), "norm": nn.LayerNorm(2)})
    model["again"], model["last"] = model["first"], nn.Sequential(model["norm"])
    assert other_names(model) == {"again": "first", "again.0": "first.0", "last.0": "norm"}
    assert other_names(tiny_vit()) == {}
