"""diffusers: its adapter verbs, which go through a model layer by layer, its models and its pipelines."""

from __future__ import annotations

import copy
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import move
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_peft import (
    AdaptFormerConfig,
    BiasConfig,
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    get_recast_model,
)

diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_k", "to_v"]
PARTS: dict[str, dict[str, Any]] = {
    "coefficients": {},
    "LoRA part": {"lora_config": {"r": 2, "target_modules": ["to_q", "proj_in"]}},
    "biases": {"partners": [BiasConfig()]},
    "masks": {"partners": ["piggyback"]},
    "norms": {"train_norms": True},
    "AdaptFormer": {"partners": [AdaptFormerConfig(bottleneck=4, dropout=0.0)]},
}
ADDING = ("coefficients", "LoRA part", "masks")  # of which several tasks can have theirs at once


def unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=2,
    ).eval()


def flux() -> Any:
    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [4, 4, 8]}
    return diffusers.FluxTransformer2DModel(**sizes, **heads, joint_attention_dim=16, pooled_projection_dim=16).eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


INPUTS: dict[Any, dict[str, Any]] = {
    unet: {"sample": drawn(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": drawn(2, 3, 8)},
    flux: {
        "hidden_states": drawn(1, 16, 4),
        "encoder_hidden_states": drawn(1, 5, 16),
        "pooled_projections": drawn(1, 16),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.zeros(16, 3),
        "timestep": torch.tensor([0.5]),
    },
}
SCALES = {unet: "cross_attention_kwargs", flux: "joint_attention_kwargs"}


def output(model: Any, build: Any = unet, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS[build], **kwargs).sample


def learn(model: nn.Module, name: str, seed: int = 1, size: float = 0.3) -> None:
    """Give all that a task has numbers that a test would see."""
    move(model, f".{name}.", seed, size)


def with_tasks(build: Any, part: str, *names: str) -> Any:
    return copy.deepcopy(converted(build, part, *names))


@cache
def converted(build: Any, part: str, *names: str) -> Any:
    model = build()
    for seed, name in enumerate(names or ("a", "b")):
        model.add_adapter(RecastConfig(target_modules=TARGETS, **PARTS[part]), name)
        learn(model, name, seed + 1)
    return model


class TestVerbs:
    @pytest.mark.parametrize("part", PARTS)
    def test_act_on_all_that_tasks_have(self, part: str) -> None:
        plain, model = output(unet()), unet()
        model.add_adapter(RecastConfig(target_modules=TARGETS, **PARTS[part]), "a")
        assert torch.equal(output(model), plain)
        model = with_tasks(unet, part)
        assert model.active_adapters() == ["b"]
        second = output(model)
        model.set_adapter("a")
        first = output(model)
        assert min((first - plain).abs().max(), (first - second).abs().max()) > 1e-3

        model.set_adapters(["a"], [0.0])
        assert torch.equal(output(model), plain)
        model.set_adapters(["a"], [0.5])
        half = output(model)
        assert min((half - plain).abs().max(), (half - first).abs().max()) > 1e-3
        model.set_adapters(["a"])
        assert torch.equal(output(model), first)
        assert torch.equal(output(model, cross_attention_kwargs={"scale": 0.0}), plain)
        torch.testing.assert_close(output(model, cross_attention_kwargs={"scale": 0.5}), half)
        assert torch.equal(output(model), first)

        for off, on in (("disable_adapters", "enable_adapters"), ("disable_lora", "enable_lora")):
            getattr(model, off)()
            assert torch.equal(output(model), plain)
            getattr(model, on)()
            assert torch.equal(output(model), first)

        if part == "AdaptFormer":
            with pytest.raises(RecastBankError, match="cannot be merged into a weight.*unfuse_lora"):
                model.fuse_lora()
            model.unfuse_lora()
            assert torch.equal(output(model), first)
            return
        model.fuse_lora(0.5)
        torch.testing.assert_close(output(model), half)
        fused = copy.deepcopy(model)
        fused.unload_lora()
        torch.testing.assert_close(output(fused), half)
        model.unfuse_lora()
        model.set_adapters(["a"])
        assert torch.equal(output(model), first)
        model.fuse_lora(adapter_names=["b"], safe_fusing=True)
        torch.testing.assert_close(output(model), second)
        model.unfuse_lora()
        assert torch.equal(output(model), first)

    @pytest.mark.parametrize("part", PARTS)
    def test_delete_and_take_out(self, part: str) -> None:
        plain, model = output(unet()), with_tasks(unet, part)
        model.set_adapter("a")
        first = output(model)
        model.delete_adapters("b")
        assert list(model.peft_config) == ["a"]
        assert torch.equal(output(model), first)
        model.delete_adapters("a")
        assert torch.equal(output(model), plain)
        for _ in range(2):
            model.add_adapter(RecastConfig(target_modules=TARGETS, **PARTS[part]), "c")
            assert model.active_adapters() == ["c"]
            assert torch.equal(output(model), plain)
            learn(model, "c")
            torch.testing.assert_close(output(model), first)
            model.unload_lora()
            assert torch.equal(output(model), plain)

    @pytest.mark.parametrize("build", [unet, flux])
    def test_several_tasks_by_weights_are_their_weighted_sum(self, build: Any) -> None:
        model = with_tasks(build, "coefficients")
        wrapped = get_recast_model(build(), RecastConfig(target_modules=TARGETS), "a").eval()
        wrapped.add_adapter("b", RecastConfig(target_modules=TARGETS))
        for seed, name in ((1, "a"), (2, "b")):
            learn(wrapped, name, seed)
        wrapped.add_weighted_adapter(["a", "b"], [0.5, 0.25], "sum")
        wrapped.set_adapter("sum")
        expected = output(wrapped, build)
        model.set_adapters(["a", "b"], [0.5, 0.25])
        torch.testing.assert_close(output(model, build), expected)
        model.set_adapters(["a", "b"], [1.0, 0.5])
        assert not torch.allclose(output(model, build), expected, atol=1e-4)
        torch.testing.assert_close(output(model, build, **{SCALES[build]: {"scale": 0.5}}), expected)
        model.fuse_lora(0.5)
        torch.testing.assert_close(output(model, build), expected)

    def test_weights_for_blocks(self) -> None:
        model, other = with_tasks(unet, "coefficients", "a"), with_tasks(unet, "coefficients", "a")
        model.set_adapters("a", {"mid": 0.0, "down": 0.5})
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                if "recast_coefficients" in key:
                    parameter.mul_(0.0 if key.startswith("mid") else 0.5 if key.startswith("down") else 1.0)
        torch.testing.assert_close(output(model), output(other))

    @pytest.mark.parametrize("part", [part for part in PARTS if part not in ADDING])
    def test_refuse_two_tasks_that_own_the_same_module(self, part: str) -> None:
        model = with_tasks(unet, part)
        with pytest.raises(RecastConfigError, match="Only one adapter can be set at a time"):
            model.set_adapters(["a", "b"], [0.5, 0.5])
        model.set_adapters(["b"])
        assert torch.equal(output(model), output(with_tasks(unet, part)))

    @pytest.mark.parametrize("part", ["coefficients", "LoRA part"])
    def test_go_with_LoRAs_of_diffusers_in_one_model(self, part: str) -> None:
        model, plain = with_tasks(unet, part, "a"), unet()
        task = output(model)
        lora = LoraConfig(r=2, target_modules=["to_k", "ff.net.2"], init_lora_weights=False)
        for one in (model, plain):
            torch.manual_seed(1)
            one.add_adapter(copy.deepcopy(lora), "style")
        alone = output(plain)
        torch.testing.assert_close(output(model), alone)
        model.set_adapters(["a", "style"], [1.0, 0.5])
        both = output(model)
        assert min((both - task).abs().max(), (both - alone).abs().max()) > 1e-3
        model.fuse_lora()
        torch.testing.assert_close(output(model), both)
        model.unfuse_lora()
        model.set_adapter("a")
        torch.testing.assert_close(output(model), task)  # a LoRA on a plain layer is subtracted again
        model.delete_adapters("style")
        model.set_adapter("a")
        torch.testing.assert_close(output(model), task)

    def test_an_error_in_the_middle_of_adding_is_the_one_that_is_seen(self) -> None:
        model = unet()
        model.add_adapter(RecastConfig(target_modules=TARGETS, bias="all"), "a")
        with pytest.raises(ValueError, match="only 1 adapter with bias"):
            model.add_adapter(RecastConfig(target_modules=TARGETS, bias="all"), "b")
        assert list(model.peft_config) == ["a"]
        model.add_adapter(RecastConfig(target_modules=TARGETS), "b")
        assert model.active_adapters() == ["b"]


class TestCopies:
    @pytest.mark.parametrize("part", PARTS)
    def test_of_a_scaled_model_compute_as_it_does(self, part: str) -> None:
        model = with_tasks(unet, part, "a")
        model.set_adapters("a", 0.5)
        expected = output(model)
        held = io.BytesIO()
        torch.save(model, held)
        held.seek(0)
        for other in (copy.deepcopy(model), torch.load(held, weights_only=False)):
            assert torch.equal(output(other), expected)
            other.set_adapters("a", 0.0)
            assert torch.equal(output(other), output(unet()))
        assert torch.equal(output(model), expected)


class TestTraining:
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    @pytest.mark.parametrize("part", PARTS)
    def test_with_checkpointing_forms_the_same_gradients(self, part: str, scale: float) -> None:
        model, found = with_tasks(unet, part, "a").train(), []
        for verb in ("enable_gradient_checkpointing", "disable_gradient_checkpointing"):
            getattr(model, verb)()
            model(**INPUTS[unet], cross_attention_kwargs={"scale": scale}).sample.square().sum().backward()
            found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        assert all(".a." in key for key in found[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


class TestFiles:
    @pytest.mark.parametrize("part", PARTS)
    def test_of_save_lora_adapter_hold_the_whole_task_and_its_config(self, part: str, tmp_path: Path) -> None:
        model = with_tasks(unet, part, "a")
        expected = output(model)
        model.set_adapters("a", 0.5)  # belongs to the model, not to the task
        model.save_lora_adapter(tmp_path, "a")
        path = tmp_path / "pytorch_lora_weights.safetensors"
        with safe_open(path, "pt") as file:
            config = RecastConfig(**json.loads(file.metadata()["lora_adapter_metadata"]))
        tensors, other = load_file(path), unet()
        inject_adapter_in_model(config, other, "a", state_dict=tensors)
        assert not set_peft_model_state_dict(other, tensors, "a").unexpected_keys
        torch.testing.assert_close(output(other), expected)

        other, before = unet(), output(unet())
        with pytest.raises(TypeError, match="LoraConfig"):  # what diffusers itself loads are LoRAs alone
            other.load_lora_adapter(tmp_path, prefix=None, adapter_name="a", use_safetensors=True)
        assert torch.equal(output(other), before)
        assert getattr(other, "peft_config", None) is None

    @pytest.mark.parametrize("build", [unet, flux])
    def test_of_a_wrapped_model_load_into_both_kinds(self, build: Any, tmp_path: Path) -> None:
        wrapped = get_recast_model(build(), RecastConfig(), "a").eval()
        learn(wrapped, "a")
        expected = output(wrapped, build)
        assert not torch.allclose(expected, output(build(), build), atol=1e-3)
        wrapped.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path / "a", "a").eval(), build), expected)
        model = build()
        model.add_adapter(RecastConfig.from_pretrained(tmp_path / "a"), "a")
        set_peft_model_state_dict(model, load_file(tmp_path / "a" / "adapter_model.safetensors"), "a")
        assert torch.equal(output(model, build), expected)

    def test_of_another_model_are_refused(self, tmp_path: Path) -> None:
        wrapped, other = get_recast_model(unet(), RecastConfig(), "a"), unet(seed=7)
        learn(wrapped, "a")
        wrapped.save_pretrained(tmp_path)
        with pytest.raises(RecastBaseMismatchError):
            other.add_adapter(RecastConfig.from_pretrained(tmp_path / "a"), "a")


class TestPipelines:
    @staticmethod
    def pipeline() -> Any:
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=[8, 8],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
        )
        parts = {"vae": vae, "unet": unet(), "scheduler": diffusers.DDIMScheduler()}
        absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        made = diffusers.StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    @staticmethod
    def picture(pipeline: Any, **kwargs: Any) -> Tensor:
        prompts = {"prompt_embeds": drawn(1, 3, 8), "negative_prompt_embeds": torch.zeros(1, 3, 8)}
        options = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np"}
        images = pipeline(**prompts, **options, generator=torch.Generator().manual_seed(0), **kwargs).images
        return torch.from_numpy(images)

    def test_take_two_tasks_at_weights(self) -> None:
        pipeline, picture = self.pipeline(), self.picture
        plain = picture(pipeline)
        for seed, name in ((1, "a"), (2, "b")):
            pipeline.unet.add_adapter(RecastConfig(target_modules=TARGETS), name)
            learn(pipeline.unet, name, seed, size=2.0)
        assert pipeline.get_list_adapters() == {"unet": ["a", "b"]}
        pipeline.set_adapters("a")
        first = picture(pipeline)
        pipeline.set_adapters(["a", "b"], [0.5, 0.25])
        both = picture(pipeline)
        assert pipeline.get_active_adapters() == ["a", "b"]
        assert min((first - plain).abs().max(), (both - first).abs().max(), (both - plain).abs().max()) > 1e-3
        pipeline.fuse_lora(components=["unet"])
        torch.testing.assert_close(picture(pipeline), both)
        pipeline.unfuse_lora(components=["unet"])
        assert torch.equal(picture(pipeline), both)
        pipeline.disable_lora()
        assert torch.equal(picture(pipeline), plain)
        pipeline.enable_lora()
        pipeline.delete_adapters("b")
        pipeline.set_adapters("a")
        assert torch.equal(picture(pipeline), first)
        pipeline.unload_lora_weights()
        assert torch.equal(picture(pipeline), plain)

    def test_take_a_wrapped_model_and_a_merged_one(self) -> None:
        pipeline = self.pipeline()
        plain = self.picture(pipeline)
        wrapped = get_recast_model(pipeline.unet, RecastConfig(target_modules=TARGETS), "a").eval()
        learn(wrapped, "a", size=2.0)
        pipeline.unet = wrapped
        task = self.picture(pipeline)
        assert not torch.allclose(task, plain, atol=1e-3)
        pipeline.unet = wrapped.merge_and_unload()
        torch.testing.assert_close(self.picture(pipeline), task)

    def test_of_a_model_without_adapter_verbs_take_it_wrapped(self) -> None:
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ).eval()
        pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(num_train_timesteps=4))
        pipeline.set_progress_bar_config(disable=True)

        def picture() -> Tensor:
            options = {"num_inference_steps": 1, "output_type": "np"}
            return torch.from_numpy(pipeline(**options, generator=torch.Generator().manual_seed(0)).images)

        plain = picture()
        pipeline.unet = wrapped = get_recast_model(model, RecastConfig(target_modules=["conv1", "conv2"]), "a").eval()
        assert torch.equal(picture(), plain)
        learn(wrapped, "a", size=2.0)
        task = picture()
        assert not torch.allclose(task, plain, atol=1e-3)
        pipeline.unet = wrapped.merge_and_unload()
        torch.testing.assert_close(picture(), task)
