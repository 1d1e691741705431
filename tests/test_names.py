"""How modules, roles, banks and tasks are called."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import converted, state, tiny_vit
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from recast_peft import RecastConfig, RecastConfigError, get_recast_model, plan_recast
from recast_peft.names import bank_name, block_of, ends_in, held_name, lies_in, modules_of, plain_name, role_of, unwrapped


def test_modules_are_found_once_each_in_torchs_order() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(2, 2), shared), "shared": shared, "last": nn.Linear(2, 2)})
    model["first"].register_module("none", None)
    assert modules_of(model, nn.Module) == list(model.modules())
    assert modules_of(model, nn.Linear, nn.ReLU) == [one for one in model.modules() if isinstance(one, nn.Linear | nn.ReLU)]


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


@pytest.mark.filterwarnings("ignore:Adapter name")
class TestANameOfATask:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("my.task", None),
            ("__base__", "without any task"),
            ("", "not empty"),
            (None, "not empty"),
            (3, "not empty"),
            ("recast", None),
            ("recast_", None),
            ("keys", None),
            ("../up", "plain name"),
            ("/tmp/absolute", "plain name"),
            ("..", "plain name"),
            ("a\x00b", "plain name"),
            ("README.md", "lies beside"),
            ("readme.md", "lies beside"),
            (".saving-0.part", "lies beside"),
            (".README.md.0.part", "lies beside"),
            (".adapter_config.json.0.waiting", "lies beside"),
            ("adapter_model.bin", "lies beside"),
            (".versions", "lies beside"),
            (".hidden", None),
            ("first.part", None),
            ("weight", None),
            ("a task with spaces", None),
            ("aufgabe-ä", None),
            ("0", None),
        ],
    )
    def test_is_any_plain_name_of_a_folder(self, name: Any, message: str | None) -> None:
        model = tiny_vit()
        before = state(model)
        if message is None:
            model = get_recast_model(model, RecastConfig(target_modules=["qkv"]), name)
            assert list(model.peft_config) == [name]
            return
        with pytest.raises(RecastConfigError, match=message):
            get_recast_model(model, RecastConfig(target_modules=["qkv"]), name)
        assert state(model) == before
        if not isinstance(name, str):
            return  # PEFT's add_adapter fails on it before it asks the tuner
        later = converted()
        before = state(later)
        with pytest.raises(RecastConfigError, match=message):
            later.add_adapter(name, RecastConfig(target_modules=["qkv"]))
        assert state(later) == before


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("attn.base_layer.out_proj", "attn.out_proj"),
        ("base_layer.0.weight", "base_layer.0.weight"),  # a part of the model that bears this name, as in timm's DLA
        ("base_model.model.base_layer.0.weight", "base_model.model.base_layer.0.weight"),
        ("a.original_module.b", "a.b"),
        ("a._orig_mod.b", "a.b"),
        ("_fsdp_wrapped_module.a", "a"),
        ("a.my_base_layer.b", "a.my_base_layer.b"),
        ("a.base_layer", "a"),
        ("dla.base_layer.0.base_layer.weight", "dla.base_layer.0.weight"),
        ("a.original_module.0.weight", "a.0.weight"),
    ],
)
def test_names_of_the_plain_model_are_without_what_wrappers_put_in(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_module_stands_in_the_innermost_numbered_block() -> None:
    assert block_of("blocks.11.attn.qkv") == "blocks.11"
    assert block_of("stages.1.blocks.2.fc") == "stages.1.blocks.2"
    assert block_of("blocks.3.mlp.0") == "blocks.3"  # its own number is no block's
    assert block_of("layers.3") == "layers.3"
    assert block_of("fc") == "fc"


def test_a_module_lies_in_another_by_whole_parts_of_its_name() -> None:
    assert lies_in("head", ["head"])
    assert lies_in("head.fc", ["norm", "head"])
    assert not lies_in("header", ["head"])
    assert not lies_in("a.head", ["head"])


def test_a_name_in_a_list_means_the_last_whole_parts() -> None:
    assert ends_in("blocks.0.attn.qkv", ["fc1", "attn.qkv"])
    assert ends_in("qkv", ["qkv"])
    assert not ends_in("blocks.0.attn.qkv", ["kv", "attn", "0.attn"])


def test_wrappers_are_known_by_their_kind_and_not_by_a_child_called_module() -> None:
    inner = nn.Linear(2, 2)
    assert unwrapped(checkpoint_wrapper(nn.DataParallel(inner))) is inner
    own = nn.Module()
    own.module = inner
    assert (held_name(own), unwrapped(own)) == (None, own)
