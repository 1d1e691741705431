"""One wrapped module of every kind: the same output at the start, plain arithmetic afterwards, exact merging."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import (
    KINDS,
    Attention,
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
    vit_input,
    weight_names,
)
from torch import nn

from recast_peft import RecastBankError, RecastConfig, RecastLayer, get_recast_model

kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def build(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[nn.Module, Any, torch.Tensor]:
    """A plain model of a kind, the same model converted, and an input."""
    row = KINDS[kind]
    plain = seeded(row.build).to(dtype)
    inputs = row.inputs()
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=row.targets, **row.config, **config)).eval()
    return plain, model, inputs.to(dtype) if inputs.is_floating_point() else inputs


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


class TestMultiHeadAttention:
    def attention(self, **options: Any) -> tuple[nn.Module, Any]:
        plain = seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2, **options), nn.MultiheadAttention(8, 2, **options)))
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=["0", "1"]))
        randomise(model)
        return plain, model

    def test_is_targeted_with_both_of_its_projections(self) -> None:
        _, model = self.attention()
        assert sorted(layers_of(model)) == ["0", "0.out_proj", "1", "1.out_proj"]

    def test_can_leave_out_the_output_projection(self) -> None:
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
        model = get_recast_model(model, RecastConfig(target_modules=["0"], exclude_modules=["out_proj"]))
        assert sorted(layers_of(model)) == ["0"]

    def test_can_target_the_output_projection_alone(self) -> None:
        plain = seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2)))
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=["out_proj"]))
        assert sorted(layers_of(model)) == ["0.out_proj"]
        randomise(model)
        x = torch.randn(3, 2, 8)
        expected = reference_model(plain, model)[0](x, x, x)[0]
        torch.testing.assert_close(model.base_model.model[0](x, x, x)[0], expected, rtol=1e-5, atol=1e-6)

    def test_has_no_weight_where_the_module_has_none(self) -> None:
        _, model = self.attention()
        assert not hasattr(layers_of(model)["0"], "weight")

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "call",
        [
            {},
            {"need_weights": False},
            {"average_attn_weights": False},
            {"is_causal": True, "attn_mask": True},
            {"key_padding_mask": True},
        ],
        ids=str,
    )
    def test_takes_every_argument(self, batch_first: bool, bias: bool, call: dict[str, Any]) -> None:
        plain, model = self.attention(batch_first=batch_first, bias=bias)
        query, key = torch.randn(4, 4, 8), torch.randn(4, 4, 8)
        call = dict(call)
        if "attn_mask" in call:
            call["attn_mask"] = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
        if "key_padding_mask" in call:
            call["key_padding_mask"] = torch.tensor([[False, False, True, True]] * 4)
        expected = reference_model(plain, model)[1](query, key, key, **call)
        result = model.base_model.model[1](query, key, key, **call)
        for mine, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("mask", [False, True])
    def test_in_an_encoder_layer_is_not_passed_over_by_the_fast_path(self, mask: bool) -> None:
        plain, model, inputs = build("torch's transformer encoder")
        randomise(model)
        padding = torch.tensor([[False] * 5, [False, False, False, True, True]]) if mask else None
        expected = reference_model(plain, model).encoder(inputs, src_key_padding_mask=padding)
        with torch.no_grad():
            result = model.base_model.model.encoder(inputs, src_key_padding_mask=padding)
        keep = slice(None) if padding is None else ~padding
        torch.testing.assert_close(result[keep], expected[keep], rtol=1e-5, atol=1e-5)


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


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
class TestMerging:
    def test_many_times_at_random_ends_bit_for_bit_at_the_base(self) -> None:
        plain = tiny_vit().bfloat16()
        pristine = {name: value.clone() for name, value in plain.state_dict().items()}
        inputs = vit_input().bfloat16()
        model = get_recast_model(plain, RecastConfig(target_modules=["qkv", "fc1", "fc2"]), "task0").eval()
        names = [f"task{i}" for i in range(8)]
        for i, name in enumerate(names):
            if i:
                model.add_adapter(name, RecastConfig(target_modules=["qkv", "fc1", "fc2"], group_size=1 + i % 3))
            randomise(model, name, seed=i, size=0.05)
        live = {}
        for name in names:
            model.set_adapter(name)
            live[name] = outputs(model, inputs)
        assert len({tuple(value.flatten().tolist()) for value in live.values()}) == len(names)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            name = names[int(torch.randint(0, 8, (), generator=generator))]
            model.merge_adapter([name])
            # the same weights, so not even a rounding apart
            torch.testing.assert_close(outputs(model, inputs), live[name], rtol=0.01, atol=0.01)
            model.unmerge_adapter()
        base = model.unload()
        assert all(torch.equal(value, pristine[name]) for name, value in base.state_dict().items())

    @given(st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=5), st.booleans())
    def test_adds_tasks_one_by_one_or_together(self, order: list[str], at_once: bool) -> None:
        model = converted(adapter_name="one")
        for seed, name in enumerate(["one", "two", "three"]):
            if name != "one":
                model.add_adapter(name, RecastConfig(target_modules=["qkv"], group_size=seed + 1))
            randomise(model, name, seed)
        distinct = list(dict.fromkeys(order))
        model.base_model.set_adapter(distinct)
        live = outputs(model, vit_input())
        pristine = {n: layer.pretrained_weight for n, layer in layers_of(model).items()}
        if at_once:
            model.merge_adapter(distinct)
        else:
            for name in distinct:
                model.merge_adapter([name])
        torch.testing.assert_close(outputs(model, vit_input()), live, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        for name, layer in layers_of(model).items():
            assert layer.base_layer.weight.data_ptr() == pristine[name].data_ptr()

    def test_twice_changes_nothing(self) -> None:
        model = converted()
        randomise(model)
        model.merge_adapter()
        once = outputs(model, vit_input())
        model.merge_adapter()
        assert torch.equal(outputs(model, vit_input()), once)

    def test_leaves_the_neighbours_their_templates(self) -> None:
        model = converted(depth=2)
        randomise(model)
        expected = outputs(model, vit_input())
        first, second = layers_of(model).values()
        first.merge()
        # the second layer's composition must not take the merged weight of the first for a template
        torch.testing.assert_close(outputs(model, vit_input()), expected, rtol=1e-5, atol=1e-6)
        composed = second.weight.detach().clone()
        first.unmerge()
        assert torch.equal(second.weight, composed)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("templates", [None, 1])
    def test_outlives_a_change_of_dtype_while_merged(self, dtype: torch.dtype, templates: int | None) -> None:
        model = converted(num_templates=templates)
        randomise(model)
        reference = copy.deepcopy(model).to(dtype)
        model.merge_adapter()
        model.to(dtype)
        inputs = vit_input().to(dtype)
        close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(outputs(model, inputs), outputs(reference, inputs), **close)
        for layer in layers_of(model).values():
            assert layer.base_layer.weight.dtype == dtype
            assert layer.recast_coefficients["default"].dtype in (torch.float32, torch.float64)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, inputs), outputs(reference, inputs))
        with model.disable_adapter(), reference.disable_adapter():
            assert torch.equal(outputs(model, inputs), outputs(reference, inputs))

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("templates", [None, 1])
    def test_outlives_a_copy_while_merged(self, copier: Any, templates: int | None) -> None:
        model = converted(num_templates=templates)
        randomise(model)
        live = outputs(model, vit_input())
        model.merge_adapter()
        other = copier(model)
        assert torch.equal(outputs(other, vit_input()), outputs(model, vit_input()))
        other.unmerge_adapter()
        assert torch.equal(outputs(other, vit_input()), live)
        assert model.base_model.model.blocks[0].attn.qkv.merged

    def test_is_undone_when_the_adapter_is_disabled(self) -> None:
        model, start = converted(), outputs(tiny_vit(), vit_input())
        randomise(model)
        live = outputs(model, vit_input())
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), start)
        assert torch.equal(outputs(model, vit_input()), live)

    def test_safely_refuses_a_weight_that_is_not_finite(self) -> None:
        model = converted()
        randomise(model)
        layer = layers_of(model)["blocks.3.attn.qkv"]
        with torch.no_grad():
            layer.recast_coefficients["default"][0, 0] = float("nan")
        weight = layer.base_layer.weight
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            layer.merge(safe_merge=True)
        assert not layer.merged
        assert layer.base_layer.weight is weight
        assert torch.isfinite(weight).all()
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_and_unload(safe_merge=True)

    def test_safely_is_merging_where_all_is_well(self) -> None:
        model = converted()
        randomise(model)
        live = outputs(model, vit_input())
        torch.testing.assert_close(outputs(model.merge_and_unload(safe_merge=True), vit_input()), live, rtol=1e-5, atol=1e-6)

    def test_knows_what_the_task_adds(self) -> None:
        model = converted()
        randomise(model)
        for layer in layers_of(model).values():
            expected = layer.weight - layer.pretrained_weight
            torch.testing.assert_close(layer.get_delta_weight("default"), expected)


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

    def test_refuses_to_take_a_matrix_out_of_an_unknown_bank(self) -> None:
        _, model = self.compress()
        with pytest.raises(AssertionError):
            RecastLayer(nn.Linear(2, 2), "x", "weight", "").release_pretrained_weight()
        assert layers_of(model)

    def test_is_stored_as_a_recipe_and_rebuilt_to_the_last_bit(self, tmp_path: Any) -> None:
        from peft import PeftModel

        plain, model = self.compress(group_size=3, num_templates=2)
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())

    def test_keeps_its_base_coefficients_in_float32(self) -> None:
        _, model = self.compress()
        before = {n: layer.compressed_bank[0].base_coefficients.clone() for n, layer in layers_of(model).items()}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            model.to(dtype)
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.compressed_bank[0].base_coefficients, before[name])


class TestRefusals:
    def test_of_the_wrong_number_of_names(self) -> None:
        model = converted()
        with pytest.raises(ValueError, match="got 3 and 2"):
            outputs(model, vit_input(), adapter_names=["default"] * 3)

    def test_of_names_while_merged(self) -> None:
        model = converted()
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            outputs(model, vit_input(), adapter_names=["default", "__base__"])


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


def test_attention_in_a_module_of_ones_own_works() -> None:
    plain = seeded(lambda: Chain([Attention(8), Attention(8)]))
    model = get_recast_model(copy.deepcopy(plain), RecastConfig()).eval()
    assert len(layers_of(model)) == 4
    randomise(model)
    x = vit_input()
    torch.testing.assert_close(outputs(model, x), outputs(reference_model(plain, model), x), rtol=1e-5, atol=1e-6)
