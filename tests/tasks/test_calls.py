"""A task for each sample, whatever method is called: served or refused, never swallowed."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, GenerationConfig, GPT2Config, GPT2LMHeadModel

from recast_peft import RecastConfig, RecastConfigError, TaskPool, get_recast_model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def clip() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8)
    return CLIPModel(config).eval()


def two_tasks(model: nn.Module, scale: float = 0.5, **config):
    """A model with the ordinary tasks one and two, and a pool with the same ones."""
    model = get_recast_model(model, RecastConfig(**config), "one").eval()
    model.add_adapter("two", RecastConfig(**config))
    pool = TaskPool(model)
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if name in getattr(layer, "recast_bank", {}):
                values = layer.recast_coefficients[name]
                values.data.add_(torch.randn(values.shape, generator=generator) * scale)
        pool.add(name, name)
    model.set_adapter("one")
    return model.eval(), pool


def features(model, images: Tensor, **tasks) -> Tensor:
    out = model.get_image_features(pixel_values=images, **tasks)
    return out if isinstance(out, Tensor) else out.pooler_output


class TestOtherMethods:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    tokens = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(5))

    def test_serve_what_was_asked_for(self):
        model, pool = two_tasks(clip())
        alone = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            alone[name] = features(model, self.images)
        expected = torch.stack([alone["one"][0], alone["two"][1]])
        assert not torch.allclose(expected, alone["two"], atol=1e-4)
        for tasks in ({"adapter_names": ["one", "two"]}, {"task_ids": pool.ids(["one", "two"])}, {"task_ids": ["one", "two"]}):
            for of in (model, model.base_model):
                torch.testing.assert_close(features(of, self.images, **tasks), expected)
        with pytest.raises(RecastConfigError, match="adapter_names and task_ids were both given"):
            features(model, self.images, adapter_names=["one", "two"], task_ids=["one", "two"])
        with pytest.raises(ValueError, match="typo"):
            features(model, self.images, adapter_names=["one", "typo"])
        with pytest.raises(ValueError, match=r"number of inputs, but got 1 and 2 respectively at .*\.fc1\. .*exclude_modules"):
            features(model, self.images, task_ids=["one"])

    def test_the_tuner_serves_as_the_model_does(self):
        model, _ = two_tasks(clip())
        inputs = {"input_ids": self.tokens, "pixel_values": self.images, "adapter_names": ["one", "two"]}
        assert torch.equal(model.base_model(**inputs).image_embeds, model(**inputs).image_embeds)

    @pytest.mark.parametrize("tasks", [{"adapter_names": ["one", "two"]}, {"task_ids": torch.tensor([0, 1])}])
    def test_the_plain_model_refuses(self, tasks):
        model, _ = two_tasks(clip())
        plain = model.get_base_model()
        with pytest.raises(RecastConfigError, match="knows nothing of tasks"):
            plain(input_ids=self.tokens, pixel_values=self.images, **tasks)
        with pytest.raises(RecastConfigError, match="knows nothing of tasks"):
            plain.get_image_features(pixel_values=self.images, **tasks)

    def test_unloading_leaves_no_hook(self):
        model, _ = two_tasks(clip())
        plain = model.unload()
        assert not [name for name, module in plain.named_modules() if module._forward_pre_hooks or module._forward_hooks]


class TestGenerating:
    tokens = torch.arange(1, 9).reshape(2, 4)

    def model(self):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return two_tasks(GPT2LMHeadModel(config).eval(), scale=8.0, task_type="CAUSAL_LM")

    @pytest.mark.parametrize("how", ["arguments", "config", "config of the model"])
    @pytest.mark.parametrize("counts", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}])
    def test_beams_and_several_sequences(self, how, counts):
        model, pool = self.model()
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        returned = counts.get("num_return_sequences", 1)
        if how == "config":
            options = {"generation_config": GenerationConfig(**options, **counts, bos_token_id=0, eos_token_id=0)}
            for name, value in counts.items():  # what is given goes before it
                setattr(model.get_base_model().generation_config, name, value + 1)
        elif how == "config of the model":
            for name, value in counts.items():
                setattr(model.get_base_model().generation_config, name, value)
                setattr(model.generation_config, name, value)
        else:
            options |= counts
        ids = {"adapter_names": ["one", "two"]}, {"task_ids": pool.ids(["one", "two"])}
        by_name, by_number = (model.generate(input_ids=self.tokens, **options, **tasks) for tasks in ids)
        with pool.batch(["one", "two"]):
            in_a_block = model.generate(input_ids=self.tokens, **options)
        assert torch.equal(by_name, by_number)
        assert torch.equal(by_name, in_a_block)
        for i, name in enumerate(("one", "two")):
            model.set_adapter(name)
            alone = model.generate(input_ids=self.tokens[i : i + 1], **options)
            mixed = by_name[i * returned : (i + 1) * returned]
            assert torch.equal(mixed[:, : alone.shape[1]], alone)

    def test_sampled_sequences(self):
        model, _ = self.model()
        out = model.generate(
            input_ids=self.tokens, adapter_names=["one", "two"], do_sample=True, num_return_sequences=3, max_new_tokens=2
        )
        assert out.shape[0] == 6


def test_a_method_that_peft_keeps_is_copied_and_pickled_with_the_model() -> None:
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16)).eval()
    model = get_recast_model(plain, RecastConfig(task_type="CAUSAL_LM"))
    kept = model.base_model_prepare_inputs_for_generation
    assert inspect.signature(kept) == inspect.signature(plain.prepare_inputs_for_generation)
    twin = copy.deepcopy(model)
    assert twin.base_model_prepare_inputs_for_generation.method.__self__ is twin.get_base_model()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    for each in (twin, loaded):
        assert torch.equal(each.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)
