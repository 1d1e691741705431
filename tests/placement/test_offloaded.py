"""Tensors of modules that accelerate keeps elsewhere between their calls."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from recast_peft.placement.offloaded import bring_back, execution_device, is_offloaded, kept_tensor


@pytest.fixture
def layer() -> nn.Linear:
    """A layer whose weight counts from 0 to 5, and whose bias is ones."""
    made = nn.Linear(3, 2)
    made.weight.data = torch.arange(6.0).reshape(2, 3)
    made.bias.data = torch.ones(2)
    return made


def offload(module: nn.Module, device: str | None = "cpu", append: bool = False) -> None:
    add_hook_to_module(module, AlignDevicesHook(device, offload=True), append=append)


def test_a_module_is_offloaded_if_one_of_its_hooks_takes_its_weights_away(layer: nn.Linear) -> None:
    assert not is_offloaded(layer)
    add_hook_to_module(layer, AlignDevicesHook("cpu"))  # it brings inputs, and leaves the weights
    assert not is_offloaded(layer)
    offload(layer, append=True)
    assert is_offloaded(layer)
    assert layer.weight.is_meta


def test_what_is_kept_are_the_values_from_before(layer: nn.Linear) -> None:
    assert kept_tensor(layer, "weight") is None  # it is where it belongs
    offload(layer)
    kept = kept_tensor(layer, "weight")
    assert kept is not None
    assert kept.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert kept_tensor(layer, "no such tensor") is None
    without = nn.Linear(3, 2, bias=False)
    offload(without)
    assert kept_tensor(without, "bias") is None


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
def test_the_device_is_that_of_the_hook_or_the_cpu(layer: nn.Linear, device: str | None) -> None:
    offload(layer, device)
    assert execution_device(layer) == torch.device(device or "cpu")


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_comes_back_with_a_storage_of_its_own(layer: nn.Linear, trained: bool) -> None:
    layer.weight.requires_grad_(trained)
    offload(layer)
    bring_back(layer, "weight", "cpu")
    assert layer.weight.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert layer.weight.requires_grad == trained
    assert layer.bias.is_meta  # nobody asked for it
    layer.weight.data.zero_()
    assert layer._hf_hook.weights_map["weight"].sum() == 15


def test_nothing_is_brought_back_that_was_never_away(layer: nn.Linear) -> None:
    offload(layer)
    bring_back(layer, "weight", "cpu")
    own = layer.weight
    bring_back(layer, "weight", "cpu")
    assert layer.weight is own
