"""What every mimicry method is: found by name, with options, seeds and templates measured in weights; what holds for all."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import outputs, tiny_vit, vit_input
from torch import Tensor
from weight_groups import QUICK, composed, error, group, moments_for, optimum

from recast_peft import RecastConfig, RecastConfigError, fit_bank, get_recast_model
from recast_peft.banks.template_bank import mix_templates
from recast_peft.mimicry import METHODS, Recipe, resolve_method
from recast_peft.mimicry.base import flatten, local_generator, scale_templates
from recast_peft.tasks.plan import plan_recast


def test_a_recipe_keeps_every_digit_as_plain_numbers() -> None:
    recipe = Recipe(torch.tensor([[1 / 3, 2.0]], dtype=torch.float64), torch.tensor([[0.1], [-7e-300]], dtype=torch.float64))
    again = Recipe.from_lists(json.loads(json.dumps(recipe.to_lists())))
    assert torch.equal(again.mix, recipe.mix)
    assert torch.equal(again.base, recipe.base)


def test_templates_get_the_mean_norm_of_the_weights_and_compose_the_same() -> None:
    weights = torch.tensor([[3.0, 4.0], [0.0, 15.0]])  # norms 5 and 15
    templates, base = scale_templates(torch.tensor([[2.0, 0.0], [0.0, 0.5]]), torch.tensor([[1.0, 2.0], [4.0, 0.0]]), weights)
    assert templates.tolist() == [[10.0, 0.0], [0.0, 10.0]]
    torch.testing.assert_close(base, torch.tensor([[0.2, 0.1], [0.8, 0.0]]))


def test_a_template_of_rounding_stays_and_weights_of_zeros_give_templates_of_zeros() -> None:
    weights, base = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    templates, scaled = scale_templates(torch.tensor([[5.0, 0.0], [1e-9, 0.0]]), base, weights)
    assert templates.tolist() == torch.tensor([[5.0, 0.0], [1e-9, 0.0]]).tolist()
    assert torch.equal(scaled, base)
    templates, scaled = scale_templates(torch.ones(2, 2), base, torch.zeros(1, 2))
    assert templates.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert torch.equal(scaled, base)


def test_a_seed_is_of_one_group_whatever_else_is_drawn() -> None:
    def drawn(seed: int, label: str) -> list[float]:
        return torch.rand(3, generator=local_generator(seed, label, torch.device("cpu"))).tolist()

    first = drawn(0, "a")
    torch.manual_seed(5)
    assert drawn(0, "a") == first
    different = [first, drawn(1, "a"), drawn(0, "b"), drawn(2**32, "a")]  # a generator takes the lower 32 bits alone
    assert len({tuple(values) for values in different}) == 4


def test_rows_are_the_weights_in_float32() -> None:
    rows = flatten([torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([[3.0, 4.0]], dtype=torch.float64)])
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[1.0, 2.0], [3.0, 4.0]]


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
            ({"method": "gradient", "steps": 0}, r"Gradient\(steps=0\): expected a whole number of at least 1"),
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
    def test_neither_autocast_nor_the_default_dtype_matters(self, name: str) -> None:
        weights = group()
        moments = moments_for(weights)

        def made() -> Tensor:
            found = QUICK[name].fit(weights, 2, label="g", moments=moments)
            return mix_templates(weights, found.mix) if isinstance(found, Recipe) else found.templates

        wanted = made()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(made(), wanted)
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                found = made()
            finally:
                torch.set_default_dtype(torch.float32)
            torch.testing.assert_close(found, wanted)

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


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradient", {"steps": True}),
        ("gradient", {"learning_rate": "a"}),
        ("gradient", {"learning_rate": float("inf")}),
        ("gradient", {"loss": []}),
        ("gradient", {"loss": "huber"}),
        ("gradient", {"clip_norm": "a"}),
        ("gradient", {"clip_norm": -1.0}),
        ("gradient", {"coefficient_noise": None}),
        ("gradient", {"coefficient_noise": -1.0}),
        ("gradient", {"seed": "a"}),
        ("autoencoder", {"hidden_size": 0}),
        ("autoencoder", {"learning_rate": None}),
        ("autoencoder", {"learning_rate": 0}),
        ("autoencoder", {"loss": {}}),
        ("autoencoder", {"seed": 1.5}),
        ("data_aware", {"sweeps": -1}),
        ("data_aware", {"ridge": "a"}),
        ("data_aware", {"ridge": -0.1}),
        ("data_aware", {"distill_learning_rate": float("nan")}),
    ],
)
def test_a_value_that_cannot_be_used_is_named_however_it_is_given(method: str, options: dict) -> None:
    (option,) = options
    for make in (lambda: METHODS[method](**options), lambda: resolve_method({"method": method, **options})):
        with pytest.raises(RecastConfigError, match=rf"{METHODS[method].__name__}\({option}="):
            make()
