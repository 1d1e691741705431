"""Running a model on a batch of any form, and putting back what was changed for it."""

from __future__ import annotations

import pytest
import torch
from models import tiny_vit, vit_input
from torch import nn

from recast_peft import RecastConfigError
from recast_peft.mimicry.features import call_arguments, captured_outputs, evaluating, main_tensor


def test_every_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())).train()
    model[1][0].eval()  # a norm that the user keeps in evaluation mode
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, True, False, True]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_a_batch_may_be_a_tensor_a_mapping_or_inputs_with_labels() -> None:
    x = torch.ones(2, 3)
    cpu = torch.device("cpu")
    assert call_arguments((x, torch.zeros(2)), cpu)[0][0] is x
    assert call_arguments({"x": x, "flag": True}, cpu) == ((), {"x": x, "flag": True})
    with pytest.raises(RecastConfigError, match="a batch is a str"):
        call_arguments("x", cpu)


def test_the_main_tensor_is_the_logits_or_the_first_in_floating_point() -> None:
    ids, x, y = torch.zeros(2, dtype=torch.long), torch.ones(2), torch.ones(3)
    assert main_tensor(x) is x
    assert main_tensor(ids) is None
    assert main_tensor((None, ids, [x], y)) is x
    assert main_tensor({"loss": x, "last_hidden_state": y}) is y
    assert main_tensor({"last_hidden_state": y, "logits": x}) is x
    assert main_tensor({"loss": None, "features": x}) is x
    assert main_tensor((ids, None)) is None


def test_outputs_are_noted_inside_alone() -> None:
    model = tiny_vit().eval()
    with captured_outputs(model, ["blocks.0"]) as outputs:
        model(vit_input())
        first = outputs["blocks.0"]
        model(vit_input() * 2)
        assert not torch.equal(outputs["blocks.0"], first)
        last = outputs["blocks.0"]
    model(vit_input())
    assert outputs["blocks.0"] is last
