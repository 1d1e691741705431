"""The optimiser trains coefficients and all else with learning rates of their own."""

from __future__ import annotations

import pytest
import torch
from models import converted, layers_of, vit_input
from torch import nn

from recast_peft import RecastConfigError, create_recast_optimizer


def test_every_trained_parameter_is_in_one_group_and_coefficients_do_not_decay() -> None:
    model = converted(depth=2, num_classes=3)
    optimizer = create_recast_optimizer(model, lr=1e-3, coefficient_lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    first, second = optimizer.param_groups
    coefficients = [layer.recast_coefficients["default"] for layer in layers_of(model).values()]
    assert {id(p) for p in first["params"]} == {id(p) for p in coefficients}
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.0)
    assert (second["lr"], second["weight_decay"], second["betas"]) == (1e-3, 0.5, (0.8, 0.9))
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(trained)


def test_a_step_of_sgd_moves_coefficients_by_their_own_rate() -> None:
    model = converted(depth=2)
    optimizer = create_recast_optimizer(model, torch.optim.SGD, lr=1.0, coefficient_lr=0.01)
    model(vit_input()).square().sum().backward()
    optimizer.step()
    for layer in layers_of(model).values():
        coefficients = layer.recast_coefficients["default"]
        assert coefficients.grad is not None
        torch.testing.assert_close(coefficients.detach(), -0.01 * coefficients.grad)
        assert coefficients.abs().sum() > 0


def test_a_model_without_coefficients_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="trains no RECAST coefficients"):
        create_recast_optimizer(nn.Linear(2, 2), lr=0.1)
