"""Modules are known by their names in the plain model, whatever stands around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import Around, layers_of, outputs, tiny_vit, vit_input
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from recast_peft import RecastConfig, RecastTargetError, get_recast_model, plan_recast
from recast_peft.names import unwrapped
from recast_peft.planning.candidates import find_candidates

compiled = partial(torch.compile, backend="eager")


def with_blocks(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = tiny_vit()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap(block)
    return model


def with_leaves(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.fc1 = wrap(block.mlp.fc1)
        block.mlp = wrap(block.mlp)
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: compiled(tiny_vit()),
    "compiled blocks": lambda: with_blocks(compiled),
    "checkpointed blocks": lambda: with_blocks(checkpoint_wrapper),
    "offloaded blocks": lambda: with_blocks(offload_wrapper),
    "one around the other": lambda: compiled(with_blocks(lambda block: checkpoint_wrapper(compiled(block)))),
    "checkpointed layers": lambda: with_leaves(checkpoint_wrapper),
    "data parallel": lambda: nn.DataParallel(tiny_vit()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_change_no_name_and_no_target(name: str) -> None:
    model, plain = WRAPPED[name](), tiny_vit()
    assert [c.name for c in find_candidates(model)] == [c.name for c in find_candidates(plain)]
    for targets in (None, "all-attention", ["qkv"], r"blocks\.\d\.mlp\.fc[12]"):
        config = RecastConfig(target_modules=targets)
        assert plan_recast(model, config).groups == plan_recast(plain, config).groups
    for candidate in find_candidates(model):
        assert model.get_submodule(candidate.place) is candidate.visible
        assert getattr(candidate.path[-1][1], candidate.slot) is candidate.visible


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "data parallel"])
def test_a_wrapped_model_is_converted_where_its_targets_stand(name: str) -> None:
    model = WRAPPED[name]()
    before = outputs(model, vit_input())
    converted = get_recast_model(model, RecastConfig(init_weights=False)).eval()
    plain = get_recast_model(tiny_vit(), RecastConfig(init_weights=False)).eval()
    assert sorted(layers_of(converted)) == sorted(layers_of(plain))
    assert not torch.equal(outputs(converted, vit_input()), before)
    torch.testing.assert_close(outputs(converted, vit_input()), outputs(plain, vit_input()))


def test_a_module_of_that_name_is_no_wrapper() -> None:
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    assert unwrapped(model) is model
    assert [c.name for c in find_candidates(model)] == ["module"]


@pytest.mark.parametrize("wrap", [Around, checkpoint_wrapper, lambda block: checkpoint_wrapper(Around(block))])
def test_a_wrapper_around_the_blocks_of_a_converted_model_changes_no_plan(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(), "first")
    blocks = model.get_base_model().blocks
    for i, block in enumerate(blocks):
        blocks[i] = wrap(block)
    model.add_adapter("second", RecastConfig())
    assert model.peft_config["second"].groups == model.peft_config["first"].groups
    model.add_adapter("third", RecastConfig(target_modules="all-linear"))
    assert len(layers_of(model)) == 16


def test_what_a_wrapper_holds_is_known_by_the_wrappers_name() -> None:
    def block() -> nn.ModuleDict:
        layers = {name: nn.Sequential(nn.Linear(4, 4)) for name in ("attn", "ffn")}  # nothing but their names tells them apart
        return nn.ModuleDict({name: checkpoint_wrapper(layer) for name, layer in layers.items()})

    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})
    assert plan_recast(model, RecastConfig()).targets == ("blocks.0.ffn.0", "blocks.1.ffn.0")


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (lambda: nn.Linear(8, 0), r"holds no numbers: its shape is \(0, 8\)"),
        (lambda: nn.Embedding(8, 8, max_norm=1.0), r"Embedding rescales its weight in each call \(max_norm\)"),
        (lambda: nn.EmbeddingBag(8, 8, max_norm=1.0), r"EmbeddingBag rescales its weight in each call \(max_norm\)"),
    ],
)
def test_weights_without_numbers_or_that_calls_change_are_no_targets(odd: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"odd": odd(), "one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    assert {layer for group in plan_recast(model, RecastConfig()).groups for layer in group.members} == {"one", "two"}
    with pytest.raises(RecastTargetError, match=reason):
        plan_recast(model, RecastConfig(target_modules=["odd", "one"]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_model_with_a_part_in_torchscript_is_refused_with_its_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(torch.jit.script(nn.Linear(8, 8))))
    for use in (plan_recast, get_recast_model):
        with pytest.raises(RecastTargetError, match=r"^1\.0 is compiled by TorchScript.*convert the model before"):
            use(model, RecastConfig())


class Holds(nn.Module):
    """Items of lists and dictionaries that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.list = nn.ParameterList([nn.Parameter(torch.eye(8)) for _ in range(2)])
        self.dict = nn.ParameterDict({"w": nn.Parameter(torch.eye(8))})
        self.modules_ = nn.ModuleList([nn.Linear(8, 8)])
        self.named = nn.ModuleDict({"a": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named["a"](self.modules_[0](self.layer(x) @ self.list[0] @ self.list[1] @ self.dict["w"]))


@pytest.mark.parametrize(("name", "kind"), [("list.0", "ParameterList"), ("dict.w", "ParameterDict"), ("w", "ParameterDict")])
def test_an_item_of_a_list_of_parameters_is_no_target(name: str, kind: str) -> None:
    with pytest.raises(RecastTargetError, match=rf"it is a {kind}: the model asks for its items"):
        plan_recast(Holds(), RecastConfig(target_parameters=[name]))


@pytest.mark.parametrize("name", ["list", "dict", "modules_", "named"])
def test_a_list_of_modules_is_not_saved_whole(name: str) -> None:
    config = RecastConfig(target_modules=["layer"], modules_to_save=[name])
    for use in (plan_recast, get_recast_model):
        with pytest.raises(
            RecastTargetError, match=rf"modules_to_save names {name}, a (Module|Parameter)(List|Dict), which the"
        ):
            use(Holds(), config)
