"""Gradient descent on templates and coefficients: every loss, optimiser and start."""

from __future__ import annotations

import pytest
import torch
from models import converted, outputs, tiny_vit, vit_input
from weight_groups import error, group, optimum

from recast_peft import (
    RecastConfig,
    RecastConfigError,
    get_recast_model,
    mimicry_report,
)
from recast_peft.mimicry import Gradient
from recast_peft.mimicry.base import flatten


@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "l1"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_nears_the_weights_with_every_loss_and_optimizer(loss: str, optimizer: str) -> None:
    weights = group()
    method = Gradient(steps=600, decay_every=120, loss=loss, optimizer=optimizer, progress=False)
    energy = sum(float(w.square().sum()) for w in weights)
    assert error(method.fit(weights, 4, label="g"), weights) < 0.05 * energy


@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
@pytest.mark.parametrize("rate", [1e-4, 0.1])
def test_from_the_closed_form_never_ends_worse(loss: str, rate: float) -> None:
    # the weights are below 1, where smooth L1 is half the square, so both losses are ordered as the squared error
    weights = group()
    method = Gradient(steps=30, start="closed_form", loss=loss, learning_rate=rate, progress=False)
    assert error(method.fit(weights, 2, label="g"), weights) <= optimum(weights, 2) * (1 + 1e-4)


def test_every_coefficient_of_every_set_has_noise_of_its_own() -> None:
    weights = group()
    start = Gradient(coefficient_noise=0.5, fit_sets=4).begin(weights, flatten(weights), 2, torch.Generator())
    assert start.noise is not None
    drawn = torch.stack([start.noise() for _ in range(500)])  # (draws, layers, templates)
    assert drawn.shape[1:] == (4, 2)
    torch.testing.assert_close(drawn.std(dim=0), torch.full((4, 2), 0.5 / 2), rtol=0.2, atol=0)  # of a mean of four


def test_paper_settings() -> None:
    assert Gradient.paper() == Gradient()
    resnet = Gradient.paper("resnet", seed=4)
    assert (resnet.steps, resnet.learning_rate, resnet.decay_every, resnet.seed) == (3000, 0.2, 500, 4)
    with pytest.raises(RecastConfigError, match="expected one of vit, resnet"):
        Gradient.paper("bert")


def test_fits_full_banks_too() -> None:
    plain, model = tiny_vit(), converted(target_modules=["qkv"], mimicry=Gradient(steps=5, progress=False))
    assert not mimicry_report(model).is_exact
    assert not torch.allclose(outputs(model, vit_input()), outputs(plain, vit_input()))


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[3].attn.qkv.weight.fill_(1e19)
    before, keys = outputs(model, vit_input()), list(model.state_dict())
    config = RecastConfig(target_modules=["qkv"], num_templates=1, mimicry=Gradient(steps=2, loss="mse", progress=False))
    with pytest.raises(RecastConfigError, match="finite loss"):
        get_recast_model(model, config)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(outputs(model, vit_input()), before, equal_nan=True, rtol=0, atol=0)
