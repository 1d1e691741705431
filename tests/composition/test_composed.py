"""A module whose weight is composed: what it answers for the weight, and what is the wrapped module's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import converted, layers_of, randomise, tiny_vit
from torch import Tensor, nn

from recast_peft import PiggybackConfig, RecastBankError, RecastConfig, RecastConfigError

QKV = "blocks.1.attn.qkv"
OFFSETS = {"a": torch.tensor([[0.5, -1.0], [1.5, 0.0]]), "b": torch.tensor([[2.0, 3.0]])}  # two sets, whose mean counts


def two_tasks(**config: Any) -> tuple[Any, Tensor, Tensor]:
    """The layer of the second block with two tasks, and the pretrained weights of its group."""
    model = converted("a", group_size=2, num_coefficient_sets=2, **config)
    model.add_adapter("b", RecastConfig(target_modules=["qkv"], group_size=2, **config))
    layer = layers_of(model)[QKV]
    with torch.no_grad():
        for name, values in OFFSETS.items():
            layer.recast_coefficients[name].copy_(values)
    first, second = (tiny_vit().get_submodule(f"blocks.{i}.attn.qkv").weight.detach() for i in range(2))
    return layer, first, second


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_tasks_add_to_the_pretrained_weight() -> None:
    layer, first, second = two_tasks()
    assert torch.equal(layer.compose([]), second)
    close(layer.compose(["a"]), 1.0 * first + 0.5 * second)  # the means are 1.0 and -0.5
    close(layer.compose(["a", "b"]), 3.0 * first + 3.5 * second)
    close(layer.compose(["b", "unknown"]), 2.0 * first + 4.0 * second)
    layer.scaling["b"] = 0.5
    close(layer.compose(["b"]), first + 2.5 * second)


def test_a_tensor_to_write_to_and_other_values() -> None:
    layer, first, second = two_tasks()
    out = torch.empty_like(second)
    with torch.no_grad():
        assert layer.compose(["b"], out=out).data_ptr() == out.data_ptr()
    close(out, 2.0 * first + 4.0 * second)
    close(layer.compose(["b"], values={"b": torch.tensor([[0.0, 1.0]])}), 2 * second)


@pytest.mark.parametrize("partners", [None, [PiggybackConfig()]])
def test_what_a_task_adds_is_the_weight_with_it_less_the_weight_without(partners: Any) -> None:
    layer, _, second = two_tasks(partners=partners)
    with torch.no_grad():
        for name in OFFSETS:
            if partners:
                next(layer.recast_masks[name].parameters()).uniform_(-1, 1)
            close(layer.get_delta_weight(name), layer.compose([name]) - second)
        assert not torch.equal(layer.get_delta_weight("a"), layer.get_delta_weight("b"))


def test_a_task_without_coefficients_adds_nothing_that_could_be_asked_for() -> None:
    layer, _, _ = two_tasks()
    with pytest.raises(RecastConfigError, match="task 'unknown' has no coefficients at blocks.1.attn.qkv; .*: a, b$"):
        layer.get_delta_weight("unknown")


def test_a_parameter_that_is_assigned_is_refused_and_changes_nothing() -> None:
    layer, first, second = two_tasks()
    for name in ("weight", "bias", "other"):
        with pytest.raises(RecastConfigError, match=f"'{name}' of blocks.1.attn.qkv cannot be assigned while tasks have"):
            setattr(layer, name, nn.Parameter(torch.zeros_like(second)))
    close(layer.compose(["a"]), 1.0 * first + 0.5 * second)
    assert not hasattr(layer, "other")


def test_the_tasks_that_a_call_computes_with() -> None:
    model = converted("a")
    model.add_adapter("elsewhere", RecastConfig(target_modules=["fc1"]))
    layer = layers_of(model)[QKV]
    assert layer.tasks_in_force() == ["a"]
    model.base_model.set_adapter(["a", "elsewhere"])
    assert layer.tasks_in_force() == ["a"]
    with model.disable_adapter():
        assert layer.tasks_in_force() == []
    model.set_adapter("elsewhere")
    assert layer.tasks_in_force() == []
    model.merge_adapter(["a"])
    assert layer.tasks_in_force() == ["a"]


def test_a_released_weight_is_an_error_that_says_how_to_keep_it() -> None:
    layer = layers_of(converted(num_templates=1))[QKV]
    assert layer.is_released
    with pytest.raises(RecastBankError, match="keep_base_weights=True"):
        _ = layer.pretrained_weight
    assert not hasattr(layer, "pretrained_weight")  # whoever asks for every attribute goes on
    assert (layer.weight_shape, layer.weight_dtype) == ((24, 8), torch.float32)
    kept = layers_of(converted(num_templates=1, keep_base_weights=True))[QKV]
    assert torch.equal(kept.pretrained_weight, tiny_vit().get_submodule(QKV).weight)


def test_other_attributes_are_those_of_the_wrapped_module() -> None:
    model = converted()
    randomise(model)
    layer = layers_of(model)[QKV]
    base = layer.get_base_layer()
    base._hf_hook, base.mine = "a hook of accelerate", 3
    assert (layer.in_features, layer.out_features, layer.mine) == (8, 24, 3)
    assert layer.bias is base.bias
    assert not hasattr(layer, "_hf_hook")
    with pytest.raises(AttributeError, match="nobodys"):
        _ = layer.nobodys
    assert isinstance(base.weight, nn.Parameter)
    assert not torch.equal(layer.weight, base.weight)
