"""One wrapped module of every kind: the same output at the start, plain arithmetic afterwards, files, copies and hooks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_kind import build
from models import (
    KINDS,
    Chain,
    WeightReader,
    composed_weights,
    converted,
    layers_of,
    outputs,
    randomise,
    reference_model,
    seeded,
    tiny_vit,
    weight_names,
)
from torch import nn

from recast_peft import RecastBankError, RecastConfig, get_recast_model

kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TestEveryKindOfModule:
    @kinds
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_computes_the_same_to_the_last_bit_at_the_start(self, kind: str, dtype: torch.dtype) -> None:
        plain, model, inputs = build(kind, dtype)
        expected = outputs(plain, inputs)
        assert torch.equal(outputs(model, inputs), expected)
        plain.train()
        model.train()
        assert torch.equal(model(inputs), plain(inputs))

    @kinds
    @pytest.mark.parametrize("sets", [1, 3])
    def test_computes_what_plain_arithmetic_gives(self, kind: str, sets: int) -> None:
        plain, model, inputs = build(kind, torch.float64, num_coefficient_sets=sets)
        randomise(model)
        expected = outputs(reference_model(plain, model), inputs)
        result = outputs(model, inputs)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(result, outputs(plain, inputs), rtol=1e-3, atol=1e-3)

    @kinds
    @pytest.mark.parametrize("training", [True, False])
    def test_has_the_gradients_of_autograd(self, kind: str, training: bool) -> None:
        plain, model, inputs = build(kind, torch.float64)
        randomise(model)
        model.train(training)
        plain.train(training)
        coefficients = [layer.recast_coefficients["default"] for layer in layers_of(model).values()]
        actual = torch.autograd.grad(model(inputs).square().sum(), coefficients)
        weights = composed_weights(plain.requires_grad_(False), model)
        loss = torch.func.functional_call(plain, weights, (inputs,)).square().sum()
        expected = torch.autograd.grad(loss, coefficients)
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
            assert theirs.abs().max() > 0

    @kinds
    def test_trains(self, kind: str) -> None:
        plain, model, inputs = build(kind)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        target = outputs(plain, inputs) * 0.7
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model.train()
        losses = []
        for _ in range(8):
            optimiser.zero_grad()
            loss = F.mse_loss(model(inputs), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == ("recast_coefficients" not in name)

    @kinds
    def test_trains_nothing_but_its_coefficients(self, kind: str) -> None:
        _, model, _ = build(kind)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable
        assert all(".recast_coefficients.default" in name for name in trainable)

    @kinds
    def test_merges_into_the_weights_of_plain_arithmetic_and_back(self, kind: str) -> None:
        plain, model, inputs = build(kind)
        randomise(model)
        live, start = outputs(model, inputs), outputs(plain, inputs)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), start)

    @kinds
    def test_is_an_ordinary_module_again_after_unload(self, kind: str) -> None:
        plain, model, inputs = build(kind)
        randomise(model)
        unloaded = model.unload()
        assert str(unloaded) == str(plain)
        assert list(unloaded.state_dict()) == list(plain.state_dict())
        for name, value in plain.state_dict().items():
            assert torch.equal(unloaded.state_dict()[name], value)
        assert torch.equal(outputs(unloaded, inputs), outputs(plain, inputs))

    @kinds
    def test_is_an_ordinary_module_with_the_task_in_it_after_merge_and_unload(self, kind: str) -> None:
        plain, model, inputs = build(kind, torch.float64)
        randomise(model)
        live, weights = outputs(model, inputs), composed_weights(plain, model)
        merged = model.merge_and_unload()
        assert str(merged) == str(plain)
        torch.testing.assert_close(outputs(merged, inputs), live, rtol=1e-10, atol=1e-10)
        for name, weight in weights.items():
            torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-10, atol=1e-10, check_dtype=False)

    @kinds
    def test_shows_its_composed_weight_to_whoever_reads_it(self, kind: str) -> None:
        plain, model, _ = build(kind, torch.float64)
        randomise(model)
        names = weight_names(plain, list(layers_of(model)))
        weights = composed_weights(plain, model)
        for module, layer in layers_of(model).items():
            shown = getattr(layer, names[module].rpartition(".")[2])
            torch.testing.assert_close(shown, weights[names[module]], rtol=1e-10, atol=1e-10)
            assert shown.requires_grad

    @kinds
    def test_survives_saving_and_loading_to_the_last_bit(self, kind: str, tmp_path: Any) -> None:
        from peft import PeftModel

        plain, model, inputs = build(kind)
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))

    @kinds
    def test_survives_a_deep_copy_and_pickling(self, kind: str) -> None:
        _, model, inputs = build(kind)
        randomise(model)
        expected = outputs(model, inputs)
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copied, torch.load(buffer, weights_only=False)):
            assert torch.equal(outputs(other, inputs), expected)
            # the copy is a model of its own, down to the templates
            randomise(other, seed=5)
            assert not torch.equal(outputs(other, inputs), expected)
            for layer in layers_of(other).values():
                bank = layer.recast_bank["default"]
                assert any(mine is layer for mine in bank.layers)
        assert torch.equal(outputs(model, inputs), expected)

    @kinds
    def test_gives_every_sample_its_own_task_or_says_why_not(self, kind: str) -> None:
        plain, model, inputs = build(kind)
        model.add_adapter("other", RecastConfig(target_modules=KINDS[kind].targets))
        randomise(model, "default", 1)
        randomise(model, "other", 2)
        inputs = torch.cat([inputs, inputs.flip(0)])
        names = ["other", "__base__", "default", "other"]
        if not KINDS[kind].mixed_batch:
            with pytest.raises(RecastBankError, match="adapter_names"):
                outputs(model, inputs, adapter_names=names)
            assert torch.isfinite(outputs(model, inputs)).all()  # and nothing is left switched
            return
        result = outputs(model, inputs, adapter_names=names)
        alone = {"__base__": outputs(plain, inputs)}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = outputs(model, inputs)
        for i, name in enumerate(names):
            torch.testing.assert_close(result[i], alone[name][i], rtol=1e-4, atol=1e-5)

    @kinds
    def test_answers_for_the_module_that_it_wraps(self, kind: str) -> None:
        plain, model, _ = build(kind)
        for name, layer in layers_of(model).items():
            base = plain.get_submodule(name)
            for attribute in ("bias", "in_features", "kernel_size", "num_embeddings", "embed_dim", "batch_first", "nf"):
                if hasattr(base, attribute):
                    mine, theirs = getattr(layer, attribute), getattr(base, attribute)
                    assert torch.equal(mine, theirs) if isinstance(theirs, torch.Tensor) else mine == theirs

    @kinds
    def test_names_an_attribute_that_nobody_has(self, kind: str) -> None:
        _, model, _ = build(kind)
        layer = next(iter(layers_of(model).values()))
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = layer.no_such_thing


class TestAModelThatReadsWeights:
    def test_gets_a_gradient_through_what_it_read(self) -> None:
        model = get_recast_model(seeded(WeightReader), RecastConfig(target_modules=["proj"]))
        model(torch.randn(2, 8)).square().sum().backward()
        assert layers_of(model)["proj"].recast_coefficients["default"].grad.abs().sum() > 0

    def test_sees_the_merged_and_the_pristine_weight(self) -> None:
        plain = seeded(WeightReader)
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=["proj"]))
        randomise(model)
        layer = layers_of(model)["proj"]
        composed = layer.weight.detach().clone()
        model.merge_adapter()
        assert torch.equal(layer.weight, composed)
        with model.disable_adapter():
            assert torch.equal(layer.weight, plain.proj.weight)
        model.unmerge_adapter()
        assert torch.equal(layer.weight, composed)


class TestHooks:
    @pytest.mark.parametrize("kind", ["linear", "conv2d"])
    def test_on_the_wrapped_module_go_on_running(self, kind: str) -> None:
        _, model, inputs = build(kind)
        randomise(model)
        expected = outputs(model, inputs)
        seen = []
        base = next(iter(layers_of(model).values())).base_layer
        handle = base.register_forward_hook(lambda module, args, output: seen.append(output.shape) or 2 * output)
        changed = outputs(model, inputs)
        assert len(seen) == 1
        assert not torch.equal(changed, expected)
        handle.remove()
        assert torch.equal(outputs(model, inputs), expected)

    def test_that_replace_forward_go_on_running(self) -> None:
        _, model, inputs = build("linear")
        randomise(model)
        base = next(iter(layers_of(model).values())).base_layer
        plain_forward, calls = base.forward, []
        expected = outputs(model, inputs)
        base.forward = lambda *args, **kwargs: calls.append(1) or plain_forward(*args, **kwargs)
        assert torch.equal(outputs(model, inputs), expected)
        assert calls == [1]


class TestPrinting:
    def test_shows_the_weight_and_the_tasks(self) -> None:
        text = str(layers_of(converted())["blocks.0.attn.qkv"])
        assert text.startswith("recast.")
        assert "weight=weight, tasks={'default': '2 templates'}" in text

    def test_shows_banks(self) -> None:
        layer = layers_of(converted(num_templates=1))["blocks.0.attn.qkv"]
        assert "members=2, templates=1 (compressed)" in str(layer.compressed_bank[0])
        exact = layers_of(converted())["blocks.0.attn.qkv"].recast_bank["default"]
        assert "members=2, templates=2 (exact)" in str(exact)


def test_random_starts_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    def start(**config: Any) -> list[torch.Tensor]:
        model = converted(init_weights=False, **config)
        return [layer.recast_coefficients[name] for layer in layers_of(model).values() for name in layer.recast_coefficients]

    first = start(seed=0)
    assert all(map(torch.equal, first, start(seed=0)))
    assert not any(map(torch.equal, first, start(seed=1)))
    assert not any(map(torch.equal, first, start(seed=0, adapter_name="other")))
    assert all(((v.abs() >= 0.1) & (v.abs() <= 0.2)).all() for v in first)
    assert not torch.equal(first[0], first[1])


def test_a_global_seed_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = tiny_vit()
    get_recast_model(model, RecastConfig(target_modules=["qkv"], num_templates=1, init_weights=False))
    assert torch.equal(torch.rand(3), expected)


def test_a_wrapped_container_is_passed_over() -> None:
    # a name that is that of a container (like SKNet's) has no weight of its own
    model = seeded(lambda: Chain([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))]))
    model = get_recast_model(model, RecastConfig(target_modules=["layers.0", "layers.1", "layers.0.0", "layers.1.0"]))
    assert sorted(layers_of(model)) == ["layers.0.0", "layers.1.0"]


def test_float32_templates_and_weights_are_shared_and_not_copied() -> None:
    plain = tiny_vit()
    pointers = {n: p.data_ptr() for n, p in plain.named_parameters()}
    model = get_recast_model(plain, RecastConfig(target_modules=["qkv"]))
    for name, layer in layers_of(model).items():
        templates = layer.recast_bank["default"].get_templates(torch.device("cpu"))
        members = layer.recast_bank["default"].members
        assert [t.data_ptr() for t in templates] == [pointers[f"{m}.weight"] for m in members]
        assert layer.base_layer.weight.data_ptr() == pointers[f"{name}.weight"]
