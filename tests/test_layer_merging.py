"""Tasks merged into the weights: to the last bit and back, several at once, in copies and other dtypes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import converted, layers_of, move, outputs, randomise, tiny_vit, vit_input
from peft import LoraConfig

from recast_peft import RecastConfig, TaskPool, get_recast_model


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

    @pytest.mark.parametrize("way", ["merge", "pool", "unload"])
    @pytest.mark.parametrize("fields", [{"num_directions": 4}, {"lora_config": LoraConfig(r=2, target_modules=["fc1"])}])
    def test_is_not_rounded_by_autocast(self, way: str, fields: dict[str, Any]) -> None:
        """What is merged stays, where the block of autocast ends."""
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **fields)).eval()
        randomise(model, size=0.3)
        move(model, "lora_", size=0.3)
        live, pool = outputs(model, vit_input()), TaskPool(model)
        pool.add("task", "default")
        with torch.autocast("cpu", torch.bfloat16):
            if way == "pool":
                pool.activate("task", merge=True)
            elif way == "unload":
                model = model.merge_and_unload()
            else:
                model.merge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), live, rtol=1e-5, atol=1e-5)

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

    def test_at_once_a_task_that_is_named_twice_counts_once(self) -> None:
        model = converted()
        randomise(model)
        layer = next(iter(layers_of(model).values()))
        expected = layer.weight.detach()
        layer.merge(adapter_names=["default", "default"])
        assert torch.equal(layer.base_layer.weight, expected)
        assert layer.merged_adapters == ["default"]

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
        live = outputs(model, vit_input())
        layers = layers_of(model)
        layer = layers["blocks.3.attn.qkv"]
        coefficients = layer.recast_coefficients["default"].data
        kept = coefficients.clone()
        coefficients[0, 0] = float("nan")
        weight = layer.base_layer.weight
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            layer.merge(safe_merge=True)
        assert not layer.merged
        assert layer.base_layer.weight is weight
        assert torch.isfinite(weight).all()
        with pytest.raises(ValueError, match="NaNs detected"):  # when three layers are taken out already
            model.merge_and_unload(safe_merge=True)
        assert layers_of(model) == layers
        assert not any(layer.merged for layer in layers.values())
        coefficients.copy_(kept)
        assert torch.equal(outputs(model, vit_input()), live)

    def test_safely_is_merging_where_all_is_well(self) -> None:
        model = converted()
        randomise(model)
        live = outputs(model, vit_input())
        torch.testing.assert_close(outputs(model.merge_and_unload(safe_merge=True), vit_input()), live, rtol=1e-5, atol=1e-6)

    def test_is_taken_out_as_it_would_be_merged_now(self) -> None:
        merged, fresh = converted(), converted()
        randomise(merged)
        randomise(fresh)
        merged.merge_adapter()
        for model in (merged, fresh):
            for layer in layers_of(model).values():
                layer.set_scale("default", 0.5)
        wanted, found = (model.merge_and_unload().state_dict() for model in (fresh, merged))
        assert all(torch.equal(found[key], value) for key, value in wanted.items())

    def test_knows_what_the_task_adds(self) -> None:
        model = converted()
        randomise(model)
        for layer in layers_of(model).values():
            expected = layer.weight - layer.pretrained_weight
            torch.testing.assert_close(layer.get_delta_weight("default"), expected)
