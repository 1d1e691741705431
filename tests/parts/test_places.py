"""Where partners stand: named, chosen or refused."""

from __future__ import annotations

import pytest
import torch
from models import Repeated, outputs, tiny_vit, vit_input
from partner_cases import frozen_state, learned, same_state, tiny_cnn
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from recast_peft import (
    AdaptFormerConfig,
    BiasConfig,
    CLRConfig,
    PiggybackConfig,
    RecastConfig,
    RecastConfigError,
    RecastTargetError,
    get_recast_model,
)
from recast_peft.names import modules_of
from recast_peft.parts.partner import TaskPartners


class TestPlaces:
    def test_can_be_named(self):
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(target_modules=["blocks.1.mlp", "3.mlp"])])
        model = get_recast_model(tiny_vit(), config)
        assert [holder.place for holder in modules_of(model, TaskPartners)] == ["blocks.1.mlp", "blocks.3.mlp"]
        config = RecastConfig(target_modules=["conv1"], partners=[CLRConfig(target_modules=r"conv\d")])
        model = get_recast_model(tiny_cnn(), config)
        assert [holder.place for holder in modules_of(model, TaskPartners)] == ["conv1", "conv2"]

    @pytest.mark.parametrize("partner", [BiasConfig, PiggybackConfig])
    @pytest.mark.parametrize("targets", [["tail.0"], ["blocks.0.0", "tail.0"], r"tail\.0"])
    def test_in_a_shared_block_have_any_of_its_names(self, partner, targets):
        config = RecastConfig(target_modules=["own"], partners=[partner(target_modules=targets)])
        model = get_recast_model(Repeated(), config)
        owned = [name for name, p in model.named_parameters() if p.requires_grad and "coefficients" not in name]
        assert len(owned) == 1
        assert "blocks%2E0%2E0" in owned[0] or "blocks.0.0" in owned[0]

    def test_that_are_shared_cannot_be_masked_by_any_name(self):
        config = RecastConfig(target_modules=["own"], partners=[PiggybackConfig(target_modules=["again"])])
        with pytest.raises(RecastTargetError, match="first: the module is shared by first and again"):
            get_recast_model(Repeated(), config)

    @pytest.mark.parametrize(
        ("partner", "message"),
        [
            (AdaptFormerConfig(), "adaptformer: it finds no place"),
            (AdaptFormerConfig(target_modules=["norm"]), "norm: it holds no two layers"),
            (CLRConfig(target_modules=["head"]), "head: Linear is no two-dimensional convolution"),
            (CLRConfig(target_modules=["point"], pointwise_kernel_size=None), "point: it is a 1x1 convolution"),
            (CLRConfig(target_modules=["konv1"]), r"konv1.*names no module of this model. Near: conv1"),
            (PiggybackConfig(target_modules=["norm"]), "norm: the weight of BatchNorm2d is a vector"),
        ],
    )
    def test_that_do_not_exist_or_do_not_suit_are_refused(self, partner, message):
        backbone = tiny_cnn()
        before = frozen_state(backbone)
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(backbone, RecastConfig(target_modules=["conv1"], partners=[partner]))
        assert same_state(backbone, before)
        assert isinstance(backbone.conv1, nn.Conv2d)

    def test_are_not_copied_whole_by_a_task(self):
        config = RecastConfig(target_modules=["qkv"], partners=["adaptformer"], modules_to_save=["blocks.3.mlp"])
        with pytest.raises(RecastConfigError, match=r"would copy blocks\.3\.mlp"):
            get_recast_model(tiny_vit(), config)

    def test_are_not_in_the_copy_that_another_task_has_of_their_place(self):
        model = learned("adaptformer")
        before = outputs(model, vit_input())
        model.add_adapter("second", RecastConfig(target_modules=["qkv"], modules_to_save=["blocks.3"]))
        copied = model.get_base_model().blocks[3].modules_to_save["second"]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())
        model.set_adapter("second")
        torch.testing.assert_close(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        model.set_adapter("default")
        assert torch.equal(outputs(model, vit_input()), before)

    def test_are_not_meant_by_names_of_the_models_own_modules(self):
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(layer_norm=True)], modules_to_save=["norm"])
        model = get_recast_model(tiny_vit(), config)
        saved = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        assert [n for n in saved if "recast_partners" not in n] == [f"base_model.model.blocks.{i}.norm" for i in range(4)]
        assert all(n.endswith(".adaptformer") for n in saved if "recast_partners" in n)
