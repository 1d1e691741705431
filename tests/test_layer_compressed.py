"""Layers on a compressed bank, which stands for the pretrained weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import layers_of, outputs, randomise, tiny_vit, vit_input
from torch import nn

from recast_peft import RecastBankError, RecastConfig, get_recast_model


class TestACompressedBank:
    def compress(self, **config: Any) -> tuple[nn.Module, Any]:
        plain = tiny_vit()
        config = {"target_modules": ["qkv", "fc1"], "num_templates": 1, **config}
        return plain, get_recast_model(copy.deepcopy(plain), RecastConfig(**config)).eval()

    @pytest.mark.parametrize("size", [2, 3, 4])
    @pytest.mark.parametrize("templates", [1, 2])
    def test_gives_the_best_approximation_there_is(self, size: int, templates: int) -> None:
        plain, model = self.compress(group_size=size, num_templates=templates, keep_base_weights=False)
        for members in model.peft_config["default"].groups.values():
            stacked = torch.stack([plain.get_parameter(f"{m}.weight").reshape(-1) for m in members]).double()
            u, s, vh = torch.linalg.svd(stacked, full_matrices=False)  # Eckart and Young: the truncated decomposition
            n = min(templates, len(members))
            best = (u[:, :n] * s[:n]) @ vh[:n]
            mine = torch.stack([layers_of(model)[m].weight.reshape(-1) for m in members]).double()
            torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-5)

    def test_releases_the_pretrained_weights(self) -> None:
        plain, model = self.compress()
        held = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        saved = 2 * 24 * 8 + 2 * 16 * 8  # one of two, for two groups of each role
        assert held == sum(p.numel() for p in plain.parameters()) - saved
        layer = layers_of(model)["blocks.0.attn.qkv"]
        assert layer.is_released
        assert "blocks.0.attn.qkv.base_layer.weight" not in model.base_model.model.state_dict()
        with pytest.raises(RecastBankError, match=r"blocks\.0\.attn\.qkv was released.*keep_base_weights=True"):
            _ = layer.pretrained_weight

    def test_can_keep_the_pretrained_weights(self) -> None:
        plain, model = self.compress(keep_base_weights=True)
        start = outputs(plain, vit_input())
        assert not torch.allclose(outputs(model, vit_input()), start, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), start)
        unloaded = model.unload()
        assert str(unloaded) == str(plain)
        assert all(map(torch.equal, unloaded.state_dict().values(), plain.state_dict().values()))

    def test_without_the_pretrained_weights_falls_back_on_what_it_makes_of_them(self) -> None:
        plain, model = self.compress()
        compressed = outputs(model, vit_input())
        randomise(model)
        assert not torch.allclose(outputs(model, vit_input()), compressed, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), compressed)
        unloaded = model.unload()
        assert str(unloaded) == str(plain)
        assert list(unloaded.state_dict()) == list(plain.state_dict())
        assert torch.equal(outputs(unloaded, vit_input()), compressed)

    @pytest.mark.parametrize("keep", [True, False])
    def test_merges_and_unmerges_exactly(self, keep: bool) -> None:
        _, model = self.compress(keep_base_weights=keep)
        randomise(model)
        live = outputs(model, vit_input())
        with model.disable_adapter():
            start = outputs(model, vit_input())
        for _ in range(3):
            model.merge_adapter()
            torch.testing.assert_close(outputs(model, vit_input()), live, rtol=1e-5, atol=1e-6)
            model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), live)
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), start)

    @pytest.mark.parametrize("keep", [True, False])
    def test_can_be_merged_and_unloaded(self, keep: bool) -> None:
        plain, model = self.compress(keep_base_weights=keep)
        randomise(model)
        live = outputs(model, vit_input())
        merged = model.merge_and_unload()
        assert str(merged) == str(plain)
        assert list(merged.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(outputs(merged, vit_input()), live, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("keep", [True, False])
    def test_adds_the_offsets_of_several_tasks(self, keep: bool) -> None:
        _, model = self.compress(keep_base_weights=keep, target_modules=["qkv"])
        model.add_adapter("second", RecastConfig(target_modules=["qkv"], num_templates=1))
        randomise(model, "default", 1)
        randomise(model, "second", 2)
        model.base_model.set_adapter(["default", "second"])
        layer = layers_of(model)["blocks.1.attn.qkv"]
        bank = layer.compressed_bank[0]
        scale = bank.base_coefficients[1] + sum(c.mean(dim=0) for c in layer.recast_coefficients.values())
        torch.testing.assert_close(layer.weight, scale[0] * bank.templates[0])

    def test_comes_from_the_meta_device_as_a_whole_state_dict_has_it(self) -> None:
        def task() -> nn.Module:
            return get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1)).eval()

        model, other = task(), task().to("meta").to_empty(device="cpu")
        randomise(model)
        other.load_state_dict(model.state_dict())
        assert torch.equal(outputs(other, vit_input()), outputs(model, vit_input()))

    def test_is_stored_as_a_recipe_and_rebuilt_to_the_last_bit(self, tmp_path: Any) -> None:
        from peft import PeftModel

        plain, model = self.compress(group_size=3, num_templates=2)
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
