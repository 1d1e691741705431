"""Merged swaps in a row: whatever changes between two of them is seen, and nothing is found out twice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import layers_of
from pools import model_with_pool
from torch import Tensor, nn

from recast_peft import RecastLayer, TaskPool

QKV, OTHER = "blocks.0.attn.qkv", "blocks.1.attn.qkv"  # of one group


def another_home_of_the_numbers(model: Any) -> None:
    held = layers_of(model)[QKV].recast_coefficients
    held["task_pool"] = nn.Parameter(held["task_pool"].detach().clone())


def another_weight_of_the_neighbour(model: Any) -> None:
    layers_of(model)[OTHER].unmerge()
    base = layers_of(model)[OTHER].base_layer
    base.weight = nn.Parameter(base.weight.detach() * 2)


@torch.no_grad()
def written_weight_of_the_neighbour(model: Any) -> None:
    layers_of(model)[OTHER].pretrained.mul_(2)


def exchanged_data_of_the_neighbour(model: Any) -> None:
    pretrained = layers_of(model)[OTHER].pretrained
    pretrained.data = pretrained.data * 2


WITHOUT_EFFECT: list[Callable[[Any], Any]] = [
    lambda model: layers_of(model)[QKV].unmerge(),
    lambda model: layers_of(model)[OTHER].unmerge(),
    lambda model: model.merge_adapter(["first"]),
    another_home_of_the_numbers,
]
WITH_EFFECT = [
    another_weight_of_the_neighbour,
    written_weight_of_the_neighbour,
    exchanged_data_of_the_neighbour,
    lambda model: layers_of(model)[QKV].set_scale("task_pool", 0.5),
    lambda model: model.to(torch.bfloat16).float(),
]


def swapped(model: Any, pool: TaskPool, images: Tensor, *names: str) -> Tensor:
    for name in names:
        pool.activate(name, merge=True)
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("change", [*WITHOUT_EFFECT, *WITH_EFFECT])
def test_a_change_between_two_is_seen(change: Callable[[Any], Any], images: Tensor) -> None:
    model, pool = model_with_pool(2)
    before = swapped(model, pool, images, "task1", "task0", "task1")
    change(model)
    after = swapped(model, pool, images, "task0", "task1")
    pool.deactivate()
    assert torch.equal(after, swapped(model, pool, images, "task1"))  # which finds everything out
    assert torch.equal(after, before) == (change in WITHOUT_EFFECT)


def test_a_further_one_finds_nothing_out(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = model_with_pool(2)
    expected = swapped(model, pool, images, "task0")
    assert not torch.equal(swapped(model, pool, images, "task1"), expected)
    monkeypatch.setattr(RecastLayer, "terms", lambda *args: pytest.fail("a swap like the last one asked for its templates"))
    assert torch.equal(swapped(model, pool, images, "task0"), expected)


def test_nothing_of_them_is_kept_once_the_pretrained_weights_are_back(images: Tensor) -> None:
    model, pool = model_with_pool(2)
    swapped(model, pool, images, "task0", "task1")
    merged = weakref.ref(layers_of(model)[QKV].weight_parameter)
    assert merged() is not None
    pool.deactivate()
    gc.collect()
    assert merged() is None
