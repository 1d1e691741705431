"""How strongly a task acts: live, merged, and in what PEFT and diffusers call layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import converted, layers_of, randomise, tiny_vit, vit_input
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale as peft_rescale
from torch import Tensor

from recast_peft import RecastConfig, RecastConfigError, rescale_adapter_scale


def model_with(size: float, **config: Any) -> Any:
    """The same random task, its numbers times ``size``."""
    model = converted(target_modules=["qkv", "fc1"], **config).eval()
    randomise(model, "default", size=0.2)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.recast_coefficients["default"].mul_(size)
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(vit_input(2))


@pytest.mark.parametrize("config", [{}, {"group_size": 1}, {"num_templates": 1}, {"num_coefficient_sets": 2}], ids=str)
def test_a_scaled_task_is_one_with_scaled_coefficients(config: dict[str, Any]) -> None:
    model, half = model_with(1.0, **config), model_with(0.5, **config)
    whole, expected = output(model), output(half)
    assert not torch.allclose(whole, expected, atol=1e-4)
    for layer in layers_of(model).values():
        layer.set_scale("default", 0.5)
        layer.set_scale("unknown", 3.0)
    torch.testing.assert_close(output(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected)
    model.unmerge_adapter()
    for layer in layers_of(model).values():
        layer.unscale_layer()
    assert torch.equal(output(model), whole)


def test_factors_are_multiplied_divided_and_set() -> None:
    model = model_with(1.0)
    layer = next(iter(layers_of(model).values()))
    layer.scale_layer(3.0)
    layer.scale_layer(0.5)
    assert layer.scaling == {"default": 1.5}
    layer.unscale_layer(3.0)
    assert layer.scaling == {"default": 0.5}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.0}
    layer.set_scale("default", 2.0)
    delta = layer.get_delta_weight("default")
    layer.set_scale("default", 1.0)
    torch.testing.assert_close(delta, 2 * layer.get_delta_weight("default"))
    model.add_adapter("second", RecastConfig(target_modules=["qkv", "fc1"]))
    layer.set_scale("second", 2.0)
    model.delete_adapter("second")
    assert layer.scaling == {"default": 1.0}


def test_gradients_are_those_of_a_scaled_task() -> None:
    model = model_with(1.0).train()
    for layer in layers_of(model).values():
        layer.set_scale("default", 0.5)
    half = model_with(0.5).train()
    for one in (model, half):
        one(vit_input(2)).square().sum().backward()
    for layer, other in zip(layers_of(model).values(), layers_of(half).values(), strict=True):
        gradient = layer.recast_coefficients["default"].grad
        torch.testing.assert_close(gradient, 0.5 * other.recast_coefficients["default"].grad)
        assert gradient.any()


def test_what_is_merged_follows() -> None:
    model, half = model_with(1.0), model_with(0.5)
    with model.disable_adapter():
        plain = output(model)
    model.merge_adapter()
    for layer in layers_of(model).values():
        layer.set_scale("default", 0.5)
    torch.testing.assert_close(output(model), output(half))
    with rescale_adapter_scale(model, 0):
        torch.testing.assert_close(output(model), plain)
    torch.testing.assert_close(output(model), output(half))


@pytest.mark.parametrize("config", [{}, {"lora_config": {"r": 2, "target_modules": ["proj"]}, "init_weights": False}], ids=str)
def test_all_tasks_of_a_model_for_the_time_of_a_block(config: dict[str, Any]) -> None:
    model = model_with(1.0, **config)
    before = output(model)
    with model.disable_adapter():
        plain = output(model)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(output(model), plain)
    with pytest.raises(RuntimeError, match="inside"), rescale_adapter_scale(model, 0.5):
        assert not torch.allclose(output(model), before, atol=1e-5)
        raise RuntimeError("inside")
    assert torch.equal(output(model), before)


def test_a_model_without_layers_and_a_multiplier_that_is_no_number_are_refused() -> None:
    with pytest.raises(RecastConfigError, match="no RECAST or LoRA layer"), rescale_adapter_scale(tiny_vit(), 0.5):
        pass
    with pytest.raises(TypeError, match="multiplier"), rescale_adapter_scale(model_with(1.0), "half"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="only supported for models with"), peft_rescale(model_with(1.0), 0.5):
        pass


def test_a_mixed_model_of_PEFT_refuses_before_anything_is_changed() -> None:
    plain = tiny_vit()
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(plain, RecastConfig(target_modules=["qkv"]), mixed=True)
    assert not any("base_layer" in name for name, _ in plain.named_modules())
    mixed = get_peft_model(plain, LoraConfig(target_modules=["qkv"]), mixed=True)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("second", RecastConfig(target_modules=["qkv"]))
    assert list(mixed.peft_config) == ["default"]
