"""PEFT's verbs on RECAST tasks do what they do for every method."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import converted, layers_of, offsets_of, outputs, randomise, reference_model, tiny_vit, vit_input
from peft import PeftModel, get_peft_model
from three_tasks import NAMES, alone, with_tasks
from torch import nn

import recast_peft.layer
import recast_peft.model
from recast_peft import PiggybackConfig, RecastConfig, get_recast_model
from recast_peft.banks.template_bank import move_in_place


class TestSeveralTasks:
    def test_are_added_without_a_change_to_the_active_one(self) -> None:
        model = converted("cars")
        randomise(model, "cars")
        before = outputs(model, vit_input())
        model.add_adapter("birds", RecastConfig(target_modules=["qkv"]))
        assert torch.equal(outputs(model, vit_input()), before)
        assert model.active_adapter == "cars"
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("cars" in name for name in trainable)

    def test_compute_each_what_plain_arithmetic_gives(self) -> None:
        model, plain = with_tasks(), tiny_vit()
        for name in NAMES:
            model.set_adapter(name)
            expected = outputs(reference_model(plain, model, [name]), vit_input())
            torch.testing.assert_close(outputs(model, vit_input()), expected, rtol=1e-5, atol=1e-6)

    @given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=12))
    def test_can_be_swapped_in_any_order(self, order: list[str]) -> None:
        model = with_tasks()
        expected = alone(model)
        for name in order:
            model.set_adapter(name)
            assert torch.equal(outputs(model, vit_input()), expected[name])

    @pytest.mark.parametrize("active", [["cars", "birds"], ["flowers", "cars", "birds"], ["birds"]])
    def test_that_are_active_at_once_add_their_offsets(self, active: list[str]) -> None:
        model = with_tasks()
        model.base_model.set_adapter(active)
        expected = outputs(reference_model(tiny_vit(), model, active), vit_input())
        torch.testing.assert_close(outputs(model, vit_input()), expected, rtol=1e-5, atol=1e-6)

    def test_that_are_active_at_once_are_trained_at_once(self) -> None:
        model = with_tasks()
        model.base_model.set_adapter(["cars", "birds"])
        model(vit_input()).square().sum().backward()
        for layer in layers_of(model).values():
            for name in NAMES:
                assert (layer.recast_coefficients[name].grad is not None) == (name != "flowers")

    def test_switch_what_is_trained(self) -> None:
        model = with_tasks()
        model.set_adapter("birds")
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".birds." in n for n in trained)

    @pytest.mark.parametrize("inference_mode", [False, True])
    @pytest.mark.parametrize(
        "owned", [{}, {"num_classes": 3}, {"train_norms": True}, {"partners": ["bias"]}, {"lora_config": {"r": 2}}], ids=str
    )
    def test_leave_as_it_is_what_is_trained(self, owned: dict[str, Any], inference_mode: bool, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=["qkv"], **owned)
        get_recast_model(tiny_vit(), config, "stored").save_pretrained(tmp_path)
        model = get_recast_model(tiny_vit(), replace(config, inference_mode=inference_mode), "cars")
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.load_adapter(tmp_path / "stored", "birds")
        model.add_adapter("flowers", replace(config, inference_mode=not inference_mode))
        assert any(was for _, was in before) != inference_mode
        assert all(parameter.requires_grad == was for parameter, was in before)

    def test_do_not_touch_each_other_in_training(self) -> None:
        model = with_tasks()
        expected = alone(model)
        model.set_adapter("birds")
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(vit_input()).square().sum().backward()
        optimiser.step()
        after = alone(model)
        assert not torch.equal(after["birds"], expected["birds"])
        for name in ("cars", "flowers", "__base__"):
            assert torch.equal(after[name], expected[name])

    def test_can_be_deleted(self) -> None:
        model = with_tasks()
        expected = alone(model)
        model.delete_adapter("birds")
        assert list(model.peft_config) == ["cars", "flowers"]
        assert not any("birds" in name for name in model.state_dict())
        assert all("birds" not in layer.recast_bank for layer in layers_of(model).values())
        model.set_adapter("flowers")
        assert torch.equal(outputs(model, vit_input()), expected["flowers"])
        model.add_adapter("birds", RecastConfig(target_modules=["qkv"]))
        model.set_adapter("birds")
        assert torch.equal(outputs(model, vit_input()), expected["__base__"])

    def test_that_are_active_can_be_deleted(self) -> None:
        model = with_tasks()
        expected = alone(model)
        with pytest.warns(UserWarning, match="was active which is now deleted"):
            model.delete_adapter("cars")
        assert model.active_adapters == ["birds"]
        assert torch.equal(outputs(model, vit_input()), expected["birds"])

    @pytest.mark.parametrize("verb", ["set_adapter", "delete_adapter"])
    def test_of_which_none_has_the_name_is_PEFT_s_error(self, verb: str) -> None:
        model = with_tasks()
        with pytest.raises(ValueError, match="planes"):
            getattr(model, verb)("planes")

    def test_of_one_name_are_refused(self) -> None:
        model = with_tasks()
        with pytest.raises(ValueError, match="cars"):
            model.add_adapter("cars", RecastConfig(target_modules=["qkv"]))

    def test_can_have_targets_of_their_own(self) -> None:
        model = converted("cars")
        model.add_adapter("birds", RecastConfig(target_modules=["fc1"]))
        randomise(model, "cars", 1)
        randomise(model, "birds", 2)
        for active in (["cars"], ["birds"], ["cars", "birds"]):
            model.base_model.set_adapter(active)
            expected = outputs(reference_model(tiny_vit(), model, active), vit_input())
            torch.testing.assert_close(outputs(model, vit_input()), expected, rtol=1e-5, atol=1e-6)


class TestDisabling:
    @pytest.mark.parametrize("templates", [None, 1])
    @pytest.mark.parametrize("merged", [False, True])
    def test_gives_the_base_and_comes_back(self, templates: int | None, merged: bool) -> None:
        model = with_tasks(templates, keep_base_weights=True)
        live = outputs(model, vit_input())
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert torch.equal(outputs(model, vit_input()), live)

    def test_ends_also_after_an_error(self) -> None:
        model = with_tasks()
        live = outputs(model, vit_input())

        def fail() -> None:
            with model.disable_adapter():
                raise KeyError("x")

        with pytest.raises(KeyError):
            fail()
        assert torch.equal(outputs(model, vit_input()), live)


class TestFurtherOptions:
    def test_modules_to_save_are_trained_and_stored_whole(self, tmp_path: Path) -> None:
        model = converted(modules_to_save=["head"])
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 + 3 * 8 + 3
        randomise(model)
        model.base_model.model.head.modules_to_save["default"].weight.data *= 2
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    @pytest.mark.parametrize(("bias", "count"), [("none", 0), ("recast_only", 4 * 24), ("all", 4 * (24 + 8 + 8 + 16 + 8) + 3)])
    def test_biases_are_trained_as_asked(self, bias: str, count: int) -> None:
        model = converted(bias=bias)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 + count

    @pytest.mark.parametrize("bias", ["none", "recast_only", "all"])
    def test_biases_are_as_they_were_when_disabled(self, bias: str) -> None:
        model = converted(bias=bias)
        with model.disable_adapter() if bias == "none" else pytest.warns(UserWarning, match="bias"), model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_inference_mode_trains_nothing(self) -> None:
        assert not any(p.requires_grad for p in converted(inference_mode=True).parameters())

    def test_low_memory_creation_loads_to_the_same(self, tmp_path: Path) -> None:
        model = with_tasks(1)
        expected = alone(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "cars", "cars", low_cpu_mem_usage=True).eval()
        loaded.load_adapter(tmp_path / "birds", "birds", low_cpu_mem_usage=True)
        loaded.load_adapter(tmp_path / "flowers", "flowers", low_cpu_mem_usage=True)
        assert all(torch.equal(alone(loaded)[name], expected[name]) for name in NAMES)

    def test_low_memory_creation_without_a_file_is_on_meta_and_can_be_filled(self) -> None:
        model = get_peft_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), low_cpu_mem_usage=True)
        assert {p.device.type for n, p in model.named_parameters() if "recast_coefficients" in n} == {"meta"}
        assert not any(p.is_meta for n, p in model.named_parameters() if "recast_coefficients" not in n)

    def test_every_part_of_a_task_is_moved_to_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # PEFT reads a file to the machine's accelerator, wherever the model is, and asks every module to move the task back
        partners = ["bias", "adaptformer", PiggybackConfig(target_modules=["fc1"])]
        model = converted(target_modules=["qkv"], coefficient_sharing="all", num_classes=3, train_norms=True, partners=partners)
        moved: dict[int, torch.device] = {}
        for place in (recast_peft.layer, recast_peft.model):
            monkeypatch.setattr(place, "move_in_place", lambda tensors, device: moved.update({id(t): device for t in tensors}))
        for module in list(model.modules()):
            if hasattr(type(module), "_move_adapter_to_device_of_base_layer"):
                module._move_adapter_to_device_of_base_layer("default")
        named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in moved}
        assert set(named) == {name for name, _ in model.named_parameters(remove_duplicate=False) if ".default" in name}
        parts = {part for name in named for part in name.split(".")}
        assert {"recast_coefficients", "head", "norm", "offset", "adaptformer", "scores"} <= parts
        assert set(moved.values()) == {torch.device("cpu")}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_moved_stays_what_it_was(self, dtype: torch.dtype) -> None:
        parameters = [nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=grad) for grad in (True, False)]
        move_in_place(parameters, torch.device("cpu"))
        assert [(p.dtype, p.requires_grad) for p in parameters] == [(dtype, True), (dtype, False)]
        absent = nn.Parameter(torch.empty(2, device="meta"))
        move_in_place([absent], torch.device("cpu"))
        assert absent.is_meta

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("templates", [None, 1])
    def test_copies_are_models_of_their_own(self, copier: Any, templates: int | None) -> None:
        model = with_tasks(templates)
        expected = alone(model)
        other = copier(model)
        for got, wanted in zip(alone(other).values(), expected.values(), strict=True):
            assert torch.equal(got, wanted)
        other.base_model.model.blocks[0].attn.qkv.merge()
        other.delete_adapter("birds")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 1
        for got, wanted in zip(alone(model).values(), expected.values(), strict=True):
            assert torch.equal(got, wanted)

    @pytest.mark.parametrize("templates", [None, 1])
    def test_a_state_dict_of_the_whole_model_goes_out_and_in(self, templates: int | None) -> None:
        first, second = with_tasks(templates), with_tasks(templates)
        for i, name in enumerate(NAMES):
            randomise(second, name, seed=50 + i)
        second.load_state_dict(first.state_dict())
        for got, wanted in zip(alone(second).values(), alone(first).values(), strict=True):
            assert torch.equal(got, wanted)

    def test_weights_can_be_put_in_place_with_assign(self) -> None:
        first, second = with_tasks(), with_tasks()
        randomise(second, "cars", seed=60)
        second.load_state_dict(first.state_dict(), assign=True)
        for got, wanted in zip(alone(second).values(), alone(first).values(), strict=True):
            assert torch.equal(got, wanted)


class TestMergeAndUnload:
    @pytest.mark.parametrize("names", [None, ["birds"], ["cars", "flowers"], NAMES])
    def test_merges_the_tasks_that_are_named(self, names: list[str] | None) -> None:
        model = with_tasks()
        expected = outputs(reference_model(tiny_vit(), model, names or ["cars"]), vit_input())
        merged = model.merge_and_unload(adapter_names=names)
        torch.testing.assert_close(outputs(merged, vit_input()), expected, rtol=1e-5, atol=1e-6)
        assert str(merged) == str(tiny_vit())
        assert not hasattr(merged, "peft_config")
        assert not hasattr(merged, "recast_banks")

    def test_can_be_converted_again_afterwards(self) -> None:
        model = with_tasks()
        merged = model.merge_and_unload()
        start = outputs(merged, vit_input())
        again = get_recast_model(merged, RecastConfig(target_modules=["qkv"])).eval()
        assert torch.equal(outputs(again, vit_input()), start)

    @pytest.mark.parametrize("templates", [None, 1])
    def test_unload_can_be_followed_by_another_conversion(self, templates: int | None) -> None:
        model = with_tasks(templates, keep_base_weights=True)
        plain = model.unload()
        assert torch.equal(outputs(plain, vit_input()), outputs(tiny_vit(), vit_input()))
        again = get_recast_model(plain, RecastConfig(target_modules=["qkv"], group_size=4)).eval()
        assert torch.equal(outputs(again, vit_input()), outputs(tiny_vit(), vit_input()))


def test_offsets_of_the_helper_are_means_of_the_sets() -> None:
    # the reference that many tests rest on, checked by hand once
    model = converted(num_coefficient_sets=2, depth=2)
    for layer in layers_of(model).values():
        layer.recast_coefficients["default"].data = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert all(torch.equal(v, torch.tensor([2.0, 4.0])) for v in offsets_of(model).values())
    plain = tiny_vit(depth=2)
    first, second = (block.attn.qkv.weight for block in plain.blocks)
    expected = reference_model(plain, model)
    torch.testing.assert_close(expected.blocks[1].attn.qkv.weight, second + 2 * first + 4 * second)
