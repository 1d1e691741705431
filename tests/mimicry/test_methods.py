"""The registry, and what holds for every method in it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import outputs, tiny_vit, vit_input
from weight_groups import QUICK, composed, error, group, moments_for, optimum

from recast_peft import (
    RecastConfig,
    RecastConfigError,
    fit_bank,
    get_recast_model,
)
from recast_peft.banks.template_bank import mix_templates
from recast_peft.mimicry import METHODS, Recipe, resolve_method
from recast_peft.tasks.plan import plan_recast


class TestRegistry:
    @pytest.mark.parametrize("name", METHODS)
    def test_names_every_method(self, name: str) -> None:
        assert METHODS[name].name == name
        assert resolve_method(name) == METHODS[name]()

    @pytest.mark.parametrize("name", METHODS)
    def test_options_survive_json(self, name: str) -> None:
        stored = json.loads(json.dumps(QUICK[name].to_dict()))
        assert resolve_method(stored) == QUICK[name]
        assert RecastConfig(mimicry=QUICK[name]).mimicry == stored

    @pytest.mark.parametrize(
        ("mimicry", "message"),
        [
            ("closedform", "did you mean 'closed_form'"),
            ({"steps": 3}, "'method'"),
            ({"method": "gradient", "step": 3}, "no option 'step'; its options: steps"),
            ({"method": "gradient", "loss": "huber"}, "loss='huber'"),
            ({"method": "gradient", "steps": 0}, "steps=0"),
            ({"method": "gradient", "learning_rate": "fast"}, "wrong type"),
            ({"method": "gradient", "clip_norm": -1.0}, "clip_norm"),
            ({"method": "gradient", "coefficient_noise": -1.0}, "coefficient_noise"),
            ({"method": "autoencoder", "hidden_size": 0}, "hidden_size"),
            ({"method": "autoencoder", "learning_rate": 0}, "learning_rate"),
            ({"method": "data_aware", "sweeps": -1}, "sweeps"),
            ({"method": "data_aware", "ridge": -0.1}, "ridge"),
            (3, "mimicry=3"),
        ],
    )
    def test_refuses_with_what_was_expected(self, mimicry: object, message: str) -> None:
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(mimicry=mimicry)  # type: ignore[arg-type]


class TestEveryMethod:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)])
    def test_is_better_than_nothing_and_no_better_than_the_optimum(self, name: str, shape: tuple[int, ...]) -> None:
        weights = group(shape=shape)
        found = QUICK[name].fit(weights, 2, label="g", moments=moments_for(weights))
        assert composed(found, weights).shape == (4, *shape)
        least, energy = optimum(weights, 2), sum(float(w.square().sum()) for w in weights)
        assert least * (1 - 1e-6) <= error(found, weights) < 0.6 * energy

    @pytest.mark.parametrize("name", METHODS)
    def test_is_deterministic(self, name: str) -> None:
        weights = group()
        first, second = (
            composed(QUICK[name].fit(weights, 2, label="g", moments=moments_for(weights)), weights) for _ in range(2)
        )
        assert torch.equal(first, second)

    @pytest.mark.parametrize("name", ["gradient", "autoencoder"])
    def test_is_drawn_by_its_seed_and_not_by_the_global_one(self, name: str) -> None:
        weights, options = group(), {**QUICK[name].to_dict(), "steps": 3}
        results = []
        for seed, other in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(other)
            results.append(composed(resolve_method({**options, "seed": seed}).fit(weights, 2, label="g"), weights))
        assert torch.equal(results[0], results[1])
        assert not torch.allclose(results[0], results[2])

    @pytest.mark.parametrize("name", METHODS)
    def test_gives_templates_the_mean_norm_of_the_layers(self, name: str) -> None:
        weights = group()
        found = QUICK[name].fit(weights, 2, label="g", moments=moments_for(weights))
        templates = mix_templates(weights, found.mix) if isinstance(found, Recipe) else found.templates
        expected = torch.stack([w.norm() for w in weights]).mean()
        torch.testing.assert_close(templates.flatten(1).norm(dim=1), expected.expand(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["closed_form", "gradient", "autoencoder"])
def test_of_layers_of_zeros_is_nothing_at_all(name: str) -> None:
    weights = [torch.zeros(4, 3) for _ in range(3)]
    found = QUICK[name].fit(weights, 1, label="g")
    assert torch.equal(composed(found, weights), torch.zeros(3, 4, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", METHODS)
def test_works_in_bfloat16(name: str) -> None:
    plain = tiny_vit().to(torch.bfloat16)
    x = vit_input().to(torch.bfloat16)
    config = RecastConfig(target_modules=["fc1"], num_templates=1, mimicry=QUICK[name])
    bank = fit_bank(plain, config, [x])
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(bank=bank))
    assert outputs(model, x).dtype == torch.bfloat16
    assert torch.isfinite(outputs(model, x)).all()
    assert {g.dtype for g in plan_recast(plain, config).groups} == {torch.bfloat16}
