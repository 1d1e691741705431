"""AdaptFormer: the MLPs that it stands beside, its start and its dropout."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from models import TinyVit, outputs, seeded, tiny_vit, vit_input
from partner_cases import frozen_state, learn, partner_tensors, same_state
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from recast_peft import AdaptFormerConfig, RecastConfig, RecastTargetError, get_recast_model
from recast_peft.names import modules_of
from recast_peft.parts.partner import TaskPartners


class TestPlaces:
    @pytest.mark.parametrize("architecture", ["test_vit", "swin_tiny_patch4_window7_224"])
    def test_adaptformer_finds_the_mlps_of_timm(self, architecture):
        size = {"test_vit": 160, "swin_tiny_patch4_window7_224": 56}[architecture]
        small = {} if size == 160 else {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "img_size": size}
        backbone = seeded(lambda: timm.create_model(architecture, **small))
        places = [n for n, m in backbone.named_modules() if n.endswith(".mlp")]
        x = torch.randn(1, 3, size, size)
        before = outputs(backbone, x)
        model = get_recast_model(backbone, RecastConfig(partners=["adaptformer"])).eval()
        assert [holder.place for holder in modules_of(model, TaskPartners)] == places
        assert torch.equal(outputs(model, x), before)
        learn(model)
        assert not torch.allclose(outputs(model, x), before, atol=1e-2)

    def test_adaptformer_does_not_stand_beside_an_mlp_of_convolutions(self):
        backbone = seeded(lambda: nn.ModuleDict({"fc": nn.Linear(4, 4), "mlp": timm.layers.ConvMlp(4, 8, 4)}))
        partner = AdaptFormerConfig(target_modules=["mlp"])
        with pytest.raises(RecastTargetError, match="mlp: it begins or ends with a convolution"):
            get_recast_model(backbone, RecastConfig(target_modules=["fc"], partners=[partner]))

    def test_adaptformer_finds_the_mlps_of_transformers(self):
        small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        backbone = seeded(lambda: ViTModel(ViTConfig(image_size=16, patch_size=8, **small)))
        pixels = torch.randn(2, 3, 16, 16)
        expected = backbone(pixels).last_hidden_state
        model = get_recast_model(backbone, RecastConfig(partners=[AdaptFormerConfig(bottleneck=4)])).eval()
        assert len(modules_of(model, TaskPartners)) == 2
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, expected)
        learn(model)
        assert not torch.allclose(model(pixel_values=pixels).last_hidden_state, expected, atol=1e-2)

    def test_an_mlp_in_parts_is_refused_with_a_hint(self):
        small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        backbone = seeded(lambda: BertModel(BertConfig(vocab_size=20, **small)))
        before = frozen_state(backbone)
        with pytest.raises(RecastTargetError, match="split over several modules|name them with its target_modules"):
            get_recast_model(backbone, RecastConfig(partners=["adaptformer"]))
        with pytest.raises(RecastTargetError, match=r"intermediate: it holds no two layers"):
            get_recast_model(backbone, RecastConfig(partners=[AdaptFormerConfig(target_modules=["intermediate"])]))
        assert same_state(backbone, before)

    def test_that_give_no_tensor_are_said_when_the_model_runs(self):
        class Twice(TinyVit):
            def __init__(self) -> None:
                super().__init__(depth=1)
                inner = self.blocks[0].mlp.forward
                self.blocks[0].mlp.forward = lambda x: (inner(x), None)  # type: ignore[method-assign]

            def forward(self, x: Tensor) -> Tensor:
                return self.blocks[0].mlp(self.blocks[0].attn(x))[0]

        model = get_recast_model(seeded(Twice), RecastConfig(target_modules=["qkv"], partners=["adaptformer"]))
        with pytest.raises(RecastTargetError, match=r"blocks\.0\.mlp takes a Tensor and gives a tuple"):
            model(vit_input())


class TestFiles:
    def test_fresh_parameters_follow_the_seed_and_leave_the_global_generator(self):
        state = torch.get_rng_state()
        first, again, other = (
            partner_tensors(
                get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], partners=["adaptformer"], seed=seed))
            )
            for seed in (0, 0, 1)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["blocks.0.mlp:down_projection.weight"], other["blocks.0.mlp:down_projection.weight"])
        assert not torch.equal(first["blocks.0.mlp:down_projection.weight"], first["blocks.1.mlp:down_projection.weight"])
        # Kaiming uniform with a = sqrt(5): a bound of 1 / sqrt(inputs)
        down = first["blocks.0.mlp:down_projection.weight"]
        assert down.shape == (64, 8)
        assert 0.9 / math.sqrt(8) < down.abs().max() <= 1 / math.sqrt(8)
        assert not first["blocks.0.mlp:up_projection.weight"].any()


class TestTraining:
    def test_the_bottleneck_drops_out_in_training_alone(self):
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(dropout=0.5)])
        model = get_recast_model(tiny_vit(), config)
        learn(model)
        model.train()
        assert not torch.equal(model(vit_input()), model(vit_input()))
        model.eval()
        assert torch.equal(outputs(model, vit_input()), outputs(model, vit_input()))
