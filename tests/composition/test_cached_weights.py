"""Composed weights that are kept from call to call: composed once, and never when they no longer hold."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import converted, layers_of, randomise, vit_input
from peft import PeftModel
from torch import Tensor, nn

import recast_peft.layer as layer_module
from recast_peft import RecastConfig, TaskPool


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every composition of a weight."""
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(1)
        return compose(*args, **kwargs)

    compose = layer_module.compose_weight
    monkeypatch.setattr(layer_module, "compose_weight", counted)
    return made


def model_with_tasks(**options: Any) -> PeftModel:
    model = converted("cars", depth=2, **options)
    model.add_adapter("birds", RecastConfig(target_modules=["qkv"], **options))
    for seed, name in enumerate(("cars", "birds")):
        randomise(model, name, seed)
    return model.eval()


@torch.no_grad()
def test_a_weight_is_composed_once_and_gives_the_same_bits(compositions: list[int]) -> None:
    model, x = model_with_tasks(), vit_input()
    expected = model(x)
    assert len(compositions) == 2  # one for each block
    with model.cached_weights():
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert len(compositions) == 4
        assert torch.equal(
            next(iter(layers_of(model).values())).weight, next(iter(layers_of(model).values())).compose(["cars"])
        )
    compositions.clear()
    model(x)
    assert len(compositions) == 2  # nothing is kept after the block


def first(model: nn.Module) -> Any:
    return next(iter(layers_of(model).values()))


def add_in_place(model: nn.Module) -> None:
    first(model).recast_coefficients["cars"].add_(0.5)


def add_through_data(model: nn.Module) -> None:
    first(model).recast_coefficients["cars"].data.add_(0.5)


def train_a_step(model: nn.Module) -> None:
    with torch.enable_grad():
        loss = model(vit_input()).square().sum()
        loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def write_a_template(model: nn.Module) -> None:
    first(model).pretrained_weight.mul_(1.5)


def exchange_a_template(model: nn.Module) -> None:
    first(model).pretrained_weight.data = first(model).pretrained_weight.data * 1.5


def exchange_a_template_twice(model: nn.Module) -> None:
    """The third tensor may lie where the first one lay."""
    weight = first(model).pretrained_weight
    value = weight.data.clone()
    weight.data = value * 3
    weight.data = value * 1.5


def write_the_weight_that_was_read(model: nn.Module) -> None:
    first(model).weight.zero_()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": add_in_place,
    "through data": add_through_data,
    "by an optimiser": train_a_step,
    "the active task": lambda model: model.set_adapter("birds"),
    "a template in place": write_a_template,
    "a template's storage": exchange_a_template,
    "a template's storage twice": exchange_a_template_twice,
    "the dtype": lambda model: model.double(),
    "a merge": lambda model: model.merge_adapter(["birds"]),
    "the weight that was read": write_the_weight_that_was_read,
    "a state dict": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_noticed(change: str, mode: Callable) -> None:
    model, x = model_with_tasks(), vit_input()
    with mode(), model.cached_weights():
        before = model(x)
        if change != "by an optimiser":
            CHANGES[change](model)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                CHANGES[change](model)
        x = x.to(next(model.parameters()).dtype)
        after = model(x)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    assert torch.equal(after, expected)
    assert torch.equal(after, before) == (change == "the weight that was read")


@torch.no_grad()
def test_disabling_and_other_tasks_inside_the_block() -> None:
    model, x = model_with_tasks(), vit_input()
    with model.disable_adapter():
        plain = model(x)
    cars = model(x)
    with model.cached_weights():
        assert torch.equal(model(x), cars)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), cars)
        model.merge_adapter()
        torch.testing.assert_close(model(x), cars)
        model.unmerge_adapter()
        assert torch.equal(model(x), cars)


@torch.no_grad()
def test_a_pool_swaps_inside_the_block() -> None:
    model, x = converted("first", depth=2).eval(), vit_input()
    pool = TaskPool(model)
    for name in ("a", "b"):
        pool.add(name)
    pool.table[:2].normal_(generator=torch.Generator().manual_seed(0))
    expected = {}
    for name in ("a", "b"):
        pool.activate(name)
        expected[name] = model(x)
    assert not torch.equal(expected["a"], expected["b"])
    with model.cached_weights():
        for name in ("a", "b", "a"):
            pool.activate(name)
            assert torch.equal(model(x), expected[name])
            assert torch.equal(model(x), expected[name])


@pytest.mark.parametrize("templates", [None, 1])
def test_training_inside_the_block_is_as_outside(templates: int | None) -> None:
    model, x = converted(depth=2, num_templates=templates), vit_input()
    randomise(model)
    model(x).square().sum().backward()
    expected = [layer.recast_coefficients["default"].grad.clone() for layer in layers_of(model).values()]
    model.zero_grad()
    with model.cached_weights():
        with torch.no_grad():
            model(x)
        model(x).square().sum().backward()
    for layer, gradient in zip(layers_of(model).values(), expected, strict=True):
        assert torch.equal(layer.recast_coefficients["default"].grad, gradient)


@torch.no_grad()
def test_a_compressed_bank_keeps_what_it_composes(compositions: list[int]) -> None:
    model, x = converted(depth=2, num_templates=1).eval(), vit_input()
    randomise(model)
    expected = model(x)
    compositions.clear()
    with model.cached_weights():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert len(compositions) == 2


@torch.no_grad()
def test_blocks_nest_and_an_exception_ends_them(compositions: list[int]) -> None:
    model, x = model_with_tasks(), vit_input()
    with model.cached_weights():
        model(x)
        with pytest.raises(KeyError), model.cached_weights():
            raise KeyError
        compositions.clear()
        model(x)
        assert not compositions  # the outer block goes on
    model(x)
    assert len(compositions) == 2


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_inside_the_block_keep_nothing(duplicate: Callable, compositions: list[int]) -> None:
    model, x = model_with_tasks(), vit_input()
    keys = set(model.state_dict())
    with model.cached_weights():
        expected = model(x)
        assert set(model.state_dict()) == keys
        other = duplicate(model)
        add_through_data(other)
        assert not torch.equal(other(x), expected)
        compositions.clear()
        other(x)
        assert len(compositions) == 2
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_leaving_the_block_lets_go_of_the_weights() -> None:
    model = model_with_tasks()
    with model.cached_weights():
        model(vit_input())
        kept = weakref.ref(first(model).weight)
        gc.collect()
        assert kept() is not None
    gc.collect()
    assert kept() is None
