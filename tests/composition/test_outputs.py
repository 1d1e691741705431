"""A layer computed from outputs gives what the composed weight gives, without the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grown_weights import grown, on
from models import KINDS, WIDTH, composed_weights, converted, layers_of, randomise, seeded, tiny_vit, vit_input

from recast_peft import RecastConfig, get_recast_model
from recast_peft.composition import outputs
from recast_peft.composition.outputs import call_from_outputs, computes_from_outputs, is_out_of_reach


def two_tasks() -> Any:
    """A model with two tasks in one group of four, whose strengths differ."""
    model = converted("first", group_size=4)
    model.add_adapter("second", RecastConfig(target_modules=["qkv"], group_size=4, num_coefficient_sets=2))
    randomise(model, "first", 1)
    randomise(model, "second", 2)
    return model


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_it_is_the_product_with_the_composed_weight(names: list[str]) -> None:
    model, plain = two_tasks(), tiny_vit()
    weights, x = composed_weights(plain, model, names), vit_input()
    for name, layer in layers_of(model).items():
        wanted = F.linear(x, weights[f"{name}.weight"], plain.get_submodule(name).bias)
        torch.testing.assert_close(call_from_outputs(layer, names, x), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, plain.get_submodule(name)(x), atol=1e-2)


def test_gradients_of_coefficients_and_input_are_those_of_the_composed_weight() -> None:
    model = two_tasks()
    layer = layers_of(model)["blocks.1.attn.qkv"]
    found = []
    for call in (lambda x: call_from_outputs(layer, ["first"], x), lambda x: F.linear(x, layer.compose(["first"]), layer.bias)):
        x = vit_input().requires_grad_()
        coefficients = layer.recast_coefficients["first"]
        coefficients.grad = None
        call(x).square().sum().backward()
        found.append((coefficients.grad.clone(), x.grad))
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
        assert wanted.ne(0).all()


def test_zeros_change_nothing_to_the_last_bit_and_given_values_go_before_the_layers_own() -> None:
    model, plain = two_tasks(), tiny_vit()
    name, layer = next(iter(layers_of(model).items()))
    x = vit_input()
    zero = {"first": torch.zeros(1, 4)}
    assert torch.equal(call_from_outputs(layer, ["first"], x, zero), plain.get_submodule(name)(x))
    own = {"first": torch.tensor([[0.5, 0.0, 0.0, 0.0]])}  # half of the layer's own weight once more
    bias = plain.get_submodule(name).bias
    wanted = F.linear(x, 1.5 * plain.get_submodule(name).weight, bias)
    torch.testing.assert_close(call_from_outputs(layer, ["first"], x, own), wanted, rtol=1e-4, atol=1e-5)


def test_layers_without_a_bias() -> None:
    kind = KINDS["linear without bias"]
    model = get_recast_model(seeded(kind.build), RecastConfig(target_modules=kind.targets, group_size=3))
    randomise(model)
    for layer in layers_of(model).values():
        x = torch.randn(3, WIDTH)
        torch.testing.assert_close(call_from_outputs(layer, ["default"], x), F.linear(x, layer.weight), rtol=1e-4, atol=1e-5)


def test_only_weights_out_of_reach_of_exact_banks_take_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    models = converted(), converted(num_templates=1, keep_base_weights=True), on(grown())
    first, compressed, beside = (next(iter(layers_of(model).values())) for model in models)
    assert not is_out_of_reach(first)
    assert not computes_from_outputs(first, ["default"])
    monkeypatch.setattr(outputs, "is_offloaded", lambda module: True)
    assert computes_from_outputs(first, ["default"])
    assert not computes_from_outputs(first, ["unknown"])  # the plain module is called
    assert not computes_from_outputs(compressed, ["default"])
    assert not computes_from_outputs(beside, ["default"])  # some of its templates are no module's
