"""Copies of parts of a model."""

from __future__ import annotations

import pytest
import torch
from models import tiny_vit
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from recast_peft import RecastConfig, get_recast_model
from recast_peft.parts.copies import plain_copy


def test_a_copy_without_numbers_takes_no_memory() -> None:
    model = tiny_vit()
    empty = plain_copy(model, with_numbers=False)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert not any(parameter.is_meta for parameter in model.parameters())


def _pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.5)


@pytest.mark.parametrize("change", [weight_norm, spectral_norm, _pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_module_that_computes_its_weight_before_each_call_can_be_owned_by_a_task(change) -> None:
    model = tiny_vit()
    change(model.head)
    before = model.eval()(torch.ones(1, 4, 8))
    task = get_recast_model(model, RecastConfig(target_modules=["qkv"], modules_to_save=["head"])).eval()
    torch.testing.assert_close(task(torch.ones(1, 4, 8)), before)
    own = model.head.modules_to_save["default"]
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name != "bias":
                parameter.mul_(2 if change is _pruned else 1)
        own.bias.add_(1)
    weights = 2 if change is _pruned else 1
    bias = model.head.original_module.bias
    torch.testing.assert_close(task(torch.ones(1, 4, 8)), weights * (before - bias) + bias + 1)
