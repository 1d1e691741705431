"""Partners of a task that has a LoRA part too."""

from __future__ import annotations

import copy

import pytest
import torch
from models import move, outputs, tiny_vit, vit_input
from peft import LoraConfig, PeftModel

from recast_peft import AdaptFormerConfig, BiasConfig, RecastBankError, RecastConfig, create_recast_optimizer, get_recast_model


class TestBesideALoraPart:
    """Coefficients, a LoRA part, a mask and a bottleneck as one task."""

    @pytest.fixture
    def task(self) -> PeftModel:
        config = RecastConfig(
            target_modules=["fc1", "fc2"],
            lora_config=LoraConfig(r=2, target_modules=["qkv", "fc1"]),
            partners=[AdaptFormerConfig(bottleneck=4), "piggyback"],
        )
        model = get_recast_model(tiny_vit(), config, "task").eval()
        move(model, size=0.05)
        return model

    def test_all_of_them_change_the_output_and_come_back_from_the_file(self, task, tmp_path):
        x = vit_input()
        live, plain = outputs(task, x), outputs(tiny_vit(), x)
        without = {}
        for key in ("recast_coefficients", "lora_B", "recast_masks", "recast_partners"):
            other = copy.deepcopy(task)
            for name, parameter in other.named_parameters():
                if key in name:
                    parameter.data.fill_(1.0 if key == "recast_masks" else 0.0)
            without[key] = outputs(other, x)
        assert not any(torch.allclose(live, other) for other in without.values())
        task.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval(), x), live)
        with task.disable_adapter():
            assert torch.equal(outputs(task, x), plain)

    def test_a_refused_merge_changes_none_of_them(self, task):
        x = vit_input()
        live = outputs(task, x)
        with pytest.raises(RecastBankError, match="adaptformer"):
            task.merge_adapter()
        assert torch.equal(outputs(task, x), live)

    def test_unload_gives_the_plain_model(self, task):
        assert torch.equal(outputs(task.unload(), vit_input()), outputs(tiny_vit(), vit_input()))

    def test_each_has_a_learning_rate_of_its_own(self, task):
        groups = create_recast_optimizer(task, lr=1.0, coefficient_lr=2.0, lora_lr=3.0, partner_lr=4.0).param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        expected = {"recast_coefficients": 2.0, "lora_": 3.0, "recast_masks": 4.0, "recast_partners": 4.0}
        for name, parameter in task.named_parameters():
            if parameter.requires_grad:
                assert rates[id(parameter)] == next(rate for key, rate in expected.items() if key in name)


@pytest.mark.parametrize("place", ["fc2", "qkv"])
@pytest.mark.parametrize("is_dora", [True, False])
def test_coefficients_of_biases_are_merged_only_where_the_merged_model_is_the_live_one(place, is_dora):
    """DoRA scales what its module puts out but for the pretrained bias, and no weight and bias say the same."""
    lora = LoraConfig(r=2, target_modules=[place], use_dora=is_dora)
    config = RecastConfig(target_modules=["qkv"], lora_config=lora, partners=[BiasConfig()])
    model = get_recast_model(tiny_vit(), config).eval()
    move(model)
    live = outputs(model, vit_input())
    if is_dora:
        with pytest.raises(RecastBankError, match="that scales its output, with the coefficient of its bias in it"):
            model.merge_adapter()
    else:
        model.merge_adapter()
    torch.testing.assert_close(outputs(model, vit_input()), live, rtol=1e-4, atol=1e-5)
