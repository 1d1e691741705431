"""Partners on outputs: they cannot be merged, and stand beside the coefficients of other tasks."""

from __future__ import annotations

import pytest
import torch
from models import layers_of, outputs, randomise
from partner_cases import CASES, ON_OUTPUTS, frozen_state, learn, learned, same_state

from recast_peft import RecastBankError, RecastConfig, RecastConfigError


@pytest.mark.parametrize("name", ON_OUTPUTS)
class TestPartnersOnOutputs:
    def test_cannot_be_merged_and_nothing_is_changed(self, name):
        model = learned(name)
        model.add_adapter("bare", RecastConfig(target_modules=list(CASES[name].targets)))
        randomise(model, "bare", seed=4)
        before, live = frozen_state(model), outputs(model, CASES[name].inputs())
        for call in (
            model.merge_adapter,
            lambda: model.merge_adapter(["default"]),
            model.merge_and_unload,
        ):
            with pytest.raises(RecastBankError, match=CASES[name].partner.method):
                call()
        assert same_state(model, before)
        assert torch.equal(outputs(model, CASES[name].inputs()), live)
        model.merge_adapter(["bare"])  # while it is merged, the active task's partner does not act
        merged = outputs(model, CASES[name].inputs())
        model.unmerge_adapter()
        assert torch.equal(outputs(model, CASES[name].inputs()), live)
        model.set_adapter("bare")
        bare = outputs(model, CASES[name].inputs())
        torch.testing.assert_close(merged, bare, rtol=1e-5, atol=1e-6)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, CASES[name].inputs()), bare, rtol=1e-5, atol=1e-6)

    def test_are_there_again_after_a_merge_that_failed(self, name):
        model = learned(name, "first")
        live = outputs(model, CASES[name].inputs())
        model.add_adapter("broken", RecastConfig(target_modules=list(CASES[name].targets)))
        model.set_adapter("broken")
        for layer in layers_of(model).values():
            layer.recast_coefficients["broken"].data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            model.merge_and_unload(safe_merge=True)
        model.set_adapter("first")
        assert torch.equal(outputs(model, CASES[name].inputs()), live)

    def test_of_two_tasks_are_not_in_force_together(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        live = outputs(model, CASES[name].inputs())
        with pytest.raises(RecastConfigError, match="first, second"):
            model.base_model.set_adapter(["first", "second"])
        assert model.active_adapters == ["first"]
        assert torch.equal(outputs(model, CASES[name].inputs()), live)

    def test_of_one_task_stand_beside_the_coefficients_of_another(self, name):
        case = CASES[name]
        model = learned(name, "first")
        model.add_adapter("bare", RecastConfig(target_modules=list(case.targets)))
        randomise(model, "bare", seed=4)
        model.base_model.set_adapter(["first", "bare"])
        together = outputs(model, case.inputs())
        model.base_model.set_adapter("first")
        with torch.no_grad():  # the coefficients of both in one task
            for layer in layers_of(model).values():
                layer.recast_coefficients["first"] += layer.recast_coefficients["bare"]
        torch.testing.assert_close(outputs(model, case.inputs()), together, rtol=1e-4, atol=1e-5)
