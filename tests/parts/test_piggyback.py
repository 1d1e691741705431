"""Piggyback: masks on the composed weights, merged, trained and stored as bits."""

from __future__ import annotations

import math

import pytest
import torch
from models import composed_weights, layers_of, outputs, reference_model, tiny_vit, vit_input
from partner_cases import CASES, ON_WEIGHTS, WEIGHTS, frozen_state, learn, learned, same_state
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from recast_peft import RecastConfig, RecastLoadError, get_recast_model


@pytest.mark.parametrize("name", ON_WEIGHTS)
class TestMergingMasks:
    def test_gives_the_live_output_and_goes_back_to_the_same_tensors(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        layers = layers_of(model).values()
        before = [layer.pretrained_weight for layer in layers]
        kept = [weight.clone() for weight in before]
        live = outputs(model, inputs)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
        assert all((layer.get_base_layer().weight == 0).any() for layer in layers if layer.recast_masks)
        model.unmerge_adapter()
        assert all(
            layer.get_base_layer().weight.data_ptr() == weight.data_ptr() for layer, weight in zip(layers, before, strict=True)
        )
        assert all(torch.equal(layer.get_base_layer().weight, weight) for layer, weight in zip(layers, kept, strict=True))
        assert torch.equal(outputs(model, inputs), live)


class TestMasks:
    def test_of_two_tasks_keep_what_both_keep(self):
        model = learned("piggyback", "first")
        model.add_adapter("second", CASES["piggyback"].config)
        learn(model, "second", seed=2)
        model.base_model.set_adapter(["first", "second"])
        plain = tiny_vit()
        weights = composed_weights(plain, model, ("first", "second"))
        with torch.no_grad():
            for name, layer in layers_of(model).items():
                kept = (layer.recast_masks["first"].scores > 0.005) & (layer.recast_masks["second"].scores > 0.005)
                plain.get_submodule(name).weight.copy_(weights[f"{name}.weight"] * kept)
        torch.testing.assert_close(outputs(model, vit_input()), outputs(plain, vit_input()), rtol=1e-4, atol=1e-5)

    def test_are_trained_through_the_threshold(self):
        model = learned("piggyback").train()
        model(vit_input()).square().sum().backward()
        plain = reference_model(tiny_vit(), model).requires_grad_(False)
        masks = {}
        for name, layer in layers_of(model).items():
            masks[name] = (layer.recast_masks["default"].scores > 0.005).float().requires_grad_()
        weights = {f"{name}.weight": plain.get_submodule(name).weight * mask for name, mask in masks.items()}
        torch.func.functional_call(plain, weights, vit_input()).square().sum().backward()
        for name, layer in layers_of(model).items():
            torch.testing.assert_close(layer.recast_masks["default"].scores.grad, masks[name].grad, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ON_WEIGHTS)
    def test_take_one_bit_for_each_entry_in_the_file(self, name, tmp_path):
        model = learned(name)
        model.save_pretrained(tmp_path)
        bits = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if "recast_masks" in key}
        masks = {
            layer.module_name: layer.recast_masks["default"].scores for layer in layers_of(model).values() if layer.recast_masks
        }
        assert set(bits) == {f"base_model.model.{name}.recast_masks.mask" for name in masks}
        for name, scores in masks.items():
            stored = bits[f"base_model.model.{name}.recast_masks.mask"]
            assert stored.dtype == torch.uint8
            assert len(stored) == math.ceil(scores.numel() / 8)
            by_hand = [(int(stored[i // 8]) >> (i % 8)) & 1 for i in range(scores.numel())]
            assert by_hand == (scores > 0.005).flatten().int().tolist()
            assert 0 < sum(by_hand) < len(by_hand)

    def test_of_a_state_dict_come_back_and_a_missing_one_is_said(self):
        model = learned("piggyback")
        state, live = get_peft_model_state_dict(model), outputs(model, vit_input())
        fresh = get_recast_model(tiny_vit(), CASES["piggyback"].config).eval()
        set_peft_model_state_dict(fresh, state)
        assert torch.equal(outputs(fresh, vit_input()), live)
        key = next(key for key in state if key.endswith(".mask"))
        before = frozen_state(fresh)
        with pytest.raises(RecastLoadError, match="missing"):
            set_peft_model_state_dict(fresh, {k: v for k, v in state.items() if k != key})
        with pytest.raises(RecastLoadError, match="wrongly shaped"):
            set_peft_model_state_dict(fresh, {**state, key: state[key][1:]})
        assert same_state(fresh, before)

    def test_stand_on_the_weight_that_a_lora_is_put_on(self):
        model = learned("piggyback")
        live = outputs(model, vit_input())
        both = get_peft_model(model.base_model.model, LoraConfig(target_modules=["qkv"]), "lora").eval()
        torch.testing.assert_close(outputs(both, vit_input()), live)
        both.merge_adapter()
        torch.testing.assert_close(outputs(both, vit_input()), live, rtol=1e-5, atol=1e-6)
        both.unmerge_adapter()
        torch.testing.assert_close(outputs(both, vit_input()), live)

    def test_act_on_compressed_banks_too(self, tmp_path):
        config = RecastConfig(target_modules=["qkv"], num_templates=1, partners=["piggyback"])
        model = get_recast_model(tiny_vit(), config).eval()
        learn(model)
        live = outputs(model, vit_input())
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), tmp_path).eval(), vit_input()), live)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), live, rtol=1e-5, atol=1e-6)
