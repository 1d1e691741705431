"""Coefficients of biases in a model: merged, undone, beside other tasks."""

from __future__ import annotations

import pytest
import torch
from models import layers_of, outputs, randomise
from partner_cases import CASES, ON_BIASES, is_partners, learn, learned, partner_tensors
from torch import Tensor, nn

from recast_peft import RecastConfig


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.endswith("bias") and not is_partners(n)}


@pytest.mark.parametrize("name", ON_BIASES)
class TestMergingBiases:
    def test_gives_the_live_output_and_goes_back_to_the_same_tensors(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        before = {n: (p.data_ptr(), p.detach().clone()) for n, p in biases(model).items()}
        live = outputs(model, inputs)
        for _ in range(3):
            model.merge_adapter(safe_merge=True)
            torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
            moved = [n for n, p in biases(model).items() if not torch.equal(p, before[n][1])]
            assert len(moved) == CASES[name].numbers
            model.merge_adapter()  # what is merged is not merged twice
            torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
            model.unmerge_adapter()
            assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in biases(model).items())
            assert torch.equal(outputs(model, inputs), live)

    def test_unloading_a_merged_model_gives_the_pretrained_one(self, name):
        model = learned(name)
        model.merge_adapter()
        plain = model.unload()
        assert torch.equal(outputs(plain, CASES[name].inputs()), outputs(CASES[name].build(), CASES[name].inputs()))

    def test_of_two_tasks_adds_what_both_change(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        parts = [partner_tensors(model, task) for task in ("first", "second")]
        pretrained = {n: p.detach().clone() for n, p in biases(model).items()}
        model.merge_adapter(["first"])
        model.merge_adapter(["second"])
        for key in parts[0]:
            place = key.partition(":")[0]
            (own,) = [n for n in pretrained if f"{place}.b" in n]
            expected = pretrained[own] * (1 + parts[0][key] + parts[1][key])
            torch.testing.assert_close(biases(model)[own].detach(), expected)

    def test_ends_where_another_task_is_put_in_force_or_added(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        model.add_adapter("bare", RecastConfig(target_modules=list(CASES[name].targets)))
        randomise(model, "bare", seed=4)
        inputs, before, live = CASES[name].inputs(), {n: p.detach().clone() for n, p in biases(model).items()}, {}
        for task in ("first", "second", "bare"):
            model.set_adapter(task)
            live[task] = outputs(model, inputs)
        for task in ("second", "bare"):
            model.set_adapter("first")
            model.merge_adapter()
            with pytest.warns(UserWarning, match="Unmerging the model first"):
                model.set_adapter(task)
            assert torch.equal(outputs(model, inputs), live[task])
        model.set_adapter("first")
        model.merge_adapter()
        merged = outputs(model, inputs)
        model.add_adapter("third", CASES[name].config)
        assert torch.equal(outputs(model, inputs), merged)  # a task is put in beside it, and changes nothing
        model.unmerge_adapter()
        assert torch.equal(outputs(model, inputs), live["first"])
        assert all(torch.equal(p, before[n]) for n, p in biases(model).items())

    def test_is_undone_where_tasks_are_switched_off(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        live = outputs(model, inputs)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), outputs(CASES[name].build(), inputs))
        assert torch.equal(outputs(model, inputs), live)

    def test_that_fails_leaves_no_bias_merged(self, name):
        model = learned(name)
        before = {n: p.detach().clone() for n, p in biases(model).items()}
        for layer in layers_of(model).values():
            layer.recast_coefficients["default"].data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert all(torch.equal(p, before[n]) for n, p in biases(model).items())

    def test_moves_with_the_model(self, name):
        model = learned(name)
        model.merge_adapter()
        model.to(torch.float64)
        inputs = CASES[name].inputs().double()
        model.unmerge_adapter()
        expected = learned(name).to(torch.float64)
        torch.testing.assert_close(outputs(model, inputs), outputs(expected, inputs))
