"""A coefficient for each bias: which biases take part, and along which dimension they lie."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from models import layers_of, outputs, seeded
from partner_cases import learn, partner_tensors
from torch import nn

from recast_peft import BiasConfig, RecastConfig, RecastTargetError, get_recast_model, plan_recast


class TestBiases:
    def test_of_norms_over_channels_are_told_from_those_over_features(self):
        plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
        for parameter in plain.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        config = RecastConfig(target_modules=["3"], partners=[BiasConfig(target_modules=["0", "1", "2"])])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        learn(model)
        for place, own in partner_tensors(model).items():
            plain[int(place[0])].bias.data *= 1 + own
        plain[3].weight.data = layers_of(model)["3"].weight.detach()
        x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(outputs(model, x), outputs(plain.eval(), x))

    def test_of_layer_norms_lie_along_the_last_dimension(self):
        plain = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
        nn.init.uniform_(plain[1].bias, 0.5, 1.5)
        config = RecastConfig(target_modules=["0"], partners=[BiasConfig(target_modules=["1"])])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        with torch.no_grad():
            dict(model.named_parameters())["base_model.model.recast_partners.1.bias.modules_to_save.default.offset"].fill_(0.5)
        plain[1].bias.data *= 1.5
        x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))  # as many tokens as features
        torch.testing.assert_close(outputs(model, x), outputs(plain.eval(), x))

    def test_stand_by_themselves_neither_at_the_head_nor_at_the_patches(self):
        backbone = timm.create_model("test_vit", num_classes=5)
        places = plan_recast(backbone, RecastConfig(num_classes=3, partners=["bias"])).parts["bias"]
        names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert places == {f"blocks.{block}.{name}": 1 for block in range(len(backbone.blocks)) for name in names}

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: nn.Linear(4, 4, bias=False), "Linear has no bias"),
            (lambda: nn.MultiheadAttention(4, 2).out_proj, "a multi-head attention reads it"),
            (lambda: nn.Bilinear(4, 4, 4), "not known where the bias of Bilinear lies"),
        ],
    )
    def test_that_are_none_are_refused(self, build, message):
        plain = nn.ModuleDict({"target": nn.Linear(4, 4), "other": build()})
        config = RecastConfig(target_modules=["target"], partners=[BiasConfig(target_modules=["other"])])
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(plain, config)
