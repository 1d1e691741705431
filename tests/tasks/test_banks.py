"""The template banks of a model's tasks: collapsed sets, and banks as they are stored."""

from __future__ import annotations

import pytest
import torch
from models import converted, outputs, randomise, vit_input

from recast_peft import RecastConfigError, collapse_coefficient_sets


class TestCollapsingCoefficientSets:
    @pytest.mark.parametrize("fields", [{}, {"num_templates": 1}, {"coefficient_sharing": "all"}])
    def test_gives_the_same_model_with_one_set(self, fields: dict) -> None:
        model = converted(target_modules=["qkv", "fc1"], num_coefficient_sets=3, **fields)
        randomise(model)
        sets = [p for p in model.parameters() if p.requires_grad]
        assert all(not torch.equal(p[0], p[1]) for p in sets)
        before, numbers = outputs(model, vit_input()), sum(p.numel() for p in sets)
        collapse_coefficient_sets(model)
        assert torch.equal(outputs(model, vit_input()), before)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) * 3 == numbers
        assert model.peft_config["default"].num_coefficient_sets == 1

    def test_of_an_unknown_task_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="no task 'cars'; its tasks: default"):
            collapse_coefficient_sets(converted(), "cars")
