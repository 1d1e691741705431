"""How strongly a task acts: live, merged, and in what PEFT and diffusers call layer by layer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from grown_biases import by_hand, filled, grown, offsets, on
from models import converted, layers_of, move, outputs, randomise, reference_model, tiny_vit, vit_input
from partner_cases import CASES, ON_BIASES, ON_WEIGHTS, expected_model, learn, learned, partner_tensors, tiny_cnn
from partner_cases import image as cnn_input
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale as peft_rescale
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recast_peft import (
    AdaptFormerConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    TaskPool,
    convert_to_lora,
    get_recast_model,
    rescale_adapter_scale,
)
from recast_peft.parts.saved import TaskNorm


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


def set_scale(model: Any, scale: float, name: str = "default") -> None:
    """As diffusers does it: by a loop over the layers of PEFT's methods."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale(name, scale)  # type: ignore[attr-defined]


def half_by_hand(name: str) -> nn.Module:
    """A plain model with half of what a task's coefficients and its partner add."""
    model = learned(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "recast_coefficients" in key or key.endswith(".offset") or "up_projection" in key:
                parameter.mul_(0.5)
    if name not in ON_WEIGHTS:
        return expected_model(name, model)
    plain = reference_model(CASES[name].build(), model)
    for key, scores in partner_tensors(model).items():
        plain.get_submodule(key.partition(":")[0]).weight.data *= 0.5 + 0.5 * (scores > 0.005)
    return plain


@pytest.mark.parametrize("name", CASES)
def test_what_stands_beside_the_coefficients_acts_with_the_strength(name: str) -> None:
    model, x = learned(name), CASES[name].inputs(3)
    plain, whole, half = (outputs(m, x) for m in (CASES[name].build(), model, half_by_hand(name)))
    assert min((whole - half).abs().max(), (plain - half).abs().max()) > 0.01
    set_scale(model, 0.5)
    torch.testing.assert_close(outputs(model, x), half)
    mixed = outputs(model, x, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([half[0], plain[1], half[2]]))
    set_scale(model, 0.0)
    assert torch.equal(outputs(model, x), plain)
    set_scale(model, 1.0)
    assert torch.equal(outputs(model, x), whole)


@pytest.mark.parametrize("name", [*ON_BIASES, *ON_WEIGHTS])
def test_what_is_merged_beside_the_coefficients_follows(name: str) -> None:
    model, x = learned(name), CASES[name].inputs(3)
    plain, half = outputs(CASES[name].build(), x), outputs(half_by_hand(name), x)
    model.merge_adapter()
    whole = outputs(model, x)
    set_scale(model, 0.5)
    torch.testing.assert_close(outputs(model, x), half)
    set_scale(model, 1.0)
    assert torch.equal(outputs(model, x), whole)
    set_scale(model, 0.5)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, x), half)
    torch.testing.assert_close(outputs(model.merge_and_unload(), x), half)
    assert not torch.allclose(half, plain, atol=1e-2)


@pytest.mark.parametrize("scales", [False, True], ids=["biases", "biases and scales"])
def test_templates_of_biases_alone_and_in_a_pool(scales: bool) -> None:
    bank = grown(scales=scales)
    model, x = on(bank), vit_input(3)
    plain, whole = outputs(tiny_vit(), x), outputs(model, x)
    set_scale(model, 0.0)
    assert torch.equal(outputs(model, x), plain)
    set_scale(model, 0.5)
    live = outputs(model, x)
    if not scales:
        halved = on(bank)
        with torch.no_grad():
            for parameter in (
                *offsets(halved).values(),
                *(ly.recast_coefficients["default"] for ly in layers_of(halved).values()),
            ):
                parameter.mul_(0.5)
        torch.testing.assert_close(live, outputs(by_hand(bank, halved), x))
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), live)
    set_scale(model, 1.0)
    torch.testing.assert_close(outputs(model, x), whole)

    pool = filled(bank, "a", "b")
    before = outputs(pool.model, x, task_ids=pool.ids(["a", "b", None]))
    set_scale(pool.model, 0.5, pool.slot)
    mixed = outputs(pool.model, x, task_ids=pool.ids(["a", "b", None]))
    set_scale(pool.model, 1.0, pool.slot)
    assert torch.equal(outputs(pool.model, x, task_ids=pool.ids(["a", "b", None])), before)
    for row in range(len(pool)):
        pool.table[row].mul_(0.5)
    torch.testing.assert_close(mixed, outputs(pool.model, x, task_ids=pool.ids(["a", "b", None])))
    assert not torch.allclose(mixed[:2], before[:2], atol=1e-3)


def with_norms(build: Any = tiny_vit, targets: str = "qkv") -> Any:
    """A task whose norms are far from the model's."""
    model = get_recast_model(build(), RecastConfig(target_modules=[targets], train_norms=True, num_classes=2)).eval()
    randomise(model)
    nn.init.normal_(model.get_base_model().head.modules_to_save["default"].weight, generator=torch.Generator().manual_seed(4))
    for module in model.modules():
        if isinstance(module, TaskNorm):
            for parameter in module.modules_to_save["default"].parameters():
                nn.init.uniform_(parameter, 0.5, 2.0, generator=torch.Generator().manual_seed(3))
    return model


def test_norms_are_mixed_with_the_models_own_and_a_classifier_stays() -> None:
    model, x = with_norms(), vit_input(3)
    whole = outputs(model, x)
    half = with_norms()
    base = dict(tiny_vit().named_modules())
    with torch.no_grad():
        for layer in layers_of(half).values():
            layer.recast_coefficients["default"].mul_(0.5)
        for module in half.modules():
            if isinstance(module, TaskNorm):
                for own, plain in zip(
                    module.modules_to_save["default"].parameters(), base[module.module_name].parameters(), strict=True
                ):
                    own.lerp_(plain, 0.5)
    expected = outputs(half, x)
    set_scale(model, 0.5)
    torch.testing.assert_close(outputs(model, x), expected)
    torch.testing.assert_close(outputs(model, x, adapter_names=["default"] * 3), expected)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), expected)
    set_scale(model, 1.0)
    torch.testing.assert_close(outputs(model, x), whole)
    set_scale(model, 0.5)
    torch.testing.assert_close(outputs(model.merge_and_unload(), x), expected)

    model = with_norms()
    set_scale(model, 0.0)
    plain = tiny_vit()
    plain.head = model.get_base_model().head.modules_to_save["default"]
    assert torch.equal(outputs(model, x), outputs(plain, x))
    assert torch.equal(outputs(model.merge_and_unload(), x), outputs(plain, x))


def test_norms_with_statistics_at_a_strength_of_their_own_are_not_merged() -> None:
    model, x = with_norms(tiny_cnn, "conv1"), cnn_input(3)
    whole = outputs(model, x)
    set_scale(model, 0.5)
    half = outputs(model, x)
    assert not torch.allclose(half, whole, atol=1e-3)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RecastBankError, match=r"a strength of 0.5, and a norm at norm"):
            verb()
    assert torch.equal(outputs(model, x), half)
    set_scale(model, 1.0)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), whole)


LORA = {"lora_config": {"r": 2, "target_modules": ["proj", "qkv"]}, "init_weights": False}


@pytest.mark.parametrize("name", ["default", "v1.2"])
def test_a_merged_lora_part_follows_under_any_name(name: str) -> None:
    def built() -> Any:
        model = converted(name, **LORA)
        move(model, "lora_", size=0.3)
        return model

    model, halved, x = built(), built(), vit_input()
    with torch.no_grad():
        for key, parameter in halved.named_parameters():
            if "lora_B" in key or "recast_coefficients" in key:
                parameter.mul_(0.5)
    plain, whole, half = outputs(tiny_vit(), x), outputs(model, x), outputs(halved, x)
    assert not torch.allclose(whole, half, atol=1e-2)
    set_scale(model, 0.5, name)
    torch.testing.assert_close(outputs(model, x), half)
    set_scale(model, 1.0, name)
    model.merge_adapter()
    set_scale(model, 0.5, name)
    torch.testing.assert_close(outputs(model, x), half)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(outputs(model, x), plain)
    torch.testing.assert_close(outputs(model, x), half)
    set_scale(model, 1.0, name)
    torch.testing.assert_close(outputs(model, x), whole)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, x), whole)


def test_takers_of_a_task_warn_of_the_strength_that_they_leave_in_the_model() -> None:
    model, pool = model_with(1.0), TaskPool(model_with(1.0))
    takers: dict[str, Any] = {
        "the pool": lambda: pool.add("task", "default"),
        "add_weighted_adapter": lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
        "the LoRA": lambda: convert_to_lora(model, 2),
    }
    for taker, take in takers.items():
        changed = pool.model if taker == "the pool" else model
        set_scale(changed, 0.5)
        with pytest.warns(UserWarning, match=rf"{taker} takes task 'default' as it was trained, .* \(0.5\)") as caught:
            take()
        assert [warning.filename for warning in caught] == [__file__]
        set_scale(changed, 1.0)
    x = vit_input()
    assert not torch.equal(outputs(model, x), outputs(tiny_vit(), x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.replace("task", "default")
    torch.testing.assert_close(outputs(pool.model, x, task_ids=["task"] * len(x)), outputs(model, x))
    model.set_adapter("sum")
    torch.testing.assert_close(outputs(model, x), outputs(model_with(1.0), x))


def test_what_lies_on_top_of_a_merged_task_is_merged_again() -> None:
    def stacked() -> Any:
        model = get_peft_model(
            model_with(1.0).get_base_model(), LoraConfig(target_modules=["qkv"], init_lora_weights=False), "lora"
        )
        return model.eval()

    torch.manual_seed(1)
    model, x = stacked(), vit_input()
    recast = list(layers_of(model).values())
    whole = outputs(model, x)
    for layer in recast:
        layer.set_scale("default", 0.5)
    half = outputs(model, x)
    for layer in recast:
        layer.set_scale("default", 1.0)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), whole)
    for layer in recast:
        layer.set_scale("default", 0.5)
    torch.testing.assert_close(outputs(model, x), half)
    assert not torch.allclose(whole, half, atol=1e-3)


@pytest.mark.parametrize("bias", ["all", "recast_only"])
def test_biases_of_the_models_own_are_said_to_stay(bias: str) -> None:
    model = converted(bias=bias)
    with (
        pytest.warns(UserWarning, match=f"does not reach the model's own biases .bias='{bias}'."),
        rescale_adapter_scale(model, 0.5),
    ):
        pass
    model.add_adapter("second", RecastConfig(target_modules=["qkv"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_scale(model, 0.5, "second")


PARTS: dict[str, dict[str, Any]] = {
    "coefficients": {},
    "LoRA part": {"lora_config": {"r": 2, "target_modules": ["proj", "qkv"]}},
    "partner": {"partners": [AdaptFormerConfig(bottleneck=4, dropout=0.0)]},
    "biases": {"partners": ["bias"]},
    "norms": {"train_norms": True},
    "mask": {"partners": ["piggyback"]},
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpointed_call_is_computed_again_with_its_strength(part: str, reentrant: bool) -> None:
    torch.manual_seed(1)
    model = converted(**PARTS[part]).train()
    learn(model)
    move(model, "lora_B", size=0.3)
    found = []
    for scale, is_checkpointed in ((0.5, True), (0.5, False), (1.0, False)):
        set_scale(model, scale)
        y = vit_input().requires_grad_()
        for block in model.get_base_model().blocks:
            y = checkpoint(block, y, use_reentrant=reentrant) if is_checkpointed else block(y)
        set_scale(model, 1.0)  # as diffusers does when its call ends
        y.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)
    assert any(not torch.allclose(found[2][name], gradient, atol=1e-3) for name, gradient in found[1].items())


def test_a_deleted_task_leaves_no_strength_behind() -> None:
    model = learned("bias")
    model.add_adapter("second", CASES["bias"].config)
    set_scale(model, 0.5, "second")
    model.delete_adapter("second")
    assert {key for m in model.modules() if isinstance(m, BaseTunerLayer) for key in m.scaling} == set()  # type: ignore[attr-defined]


def test_a_strength_that_is_no_number_is_refused_before_anything_changes():
    model = converted(init_weights=False)
    layer, before = next(iter(layers_of(model).values())), outputs(model, vit_input())
    for wrong in ("half", math.nan, math.inf, [1.0]):
        for verb in (lambda scale: layer.set_scale("default", scale), layer.scale_layer, layer.unscale_layer):
            with pytest.raises(RecastConfigError, match="scale=.*expected a finite number"):
                verb(wrong)
    with pytest.raises(RecastConfigError, match="scale=0: expected another number than 0"):
        layer.unscale_layer(0)
    with pytest.raises(RecastConfigError, match="multiplier=nan"), rescale_adapter_scale(model, math.nan):
        pass
    assert torch.equal(outputs(model, vit_input()), before)
