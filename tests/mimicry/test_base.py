"""What every mimicry method shares: recipes, seeds, checks of options, and templates measured in weights."""

from __future__ import annotations

import json

import pytest
import torch

from recast_peft import RecastConfigError
from recast_peft.mimicry import ClosedForm, Gradient, Recipe
from recast_peft.mimicry.base import flatten, local_generator, scale_templates


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


def test_a_value_that_is_refused_is_named_with_what_was_expected() -> None:
    with pytest.raises(RecastConfigError, match=r"mimicry gradient\(steps=0\): expected a whole number from 1"):
        Gradient(steps=0)
    with pytest.raises(RecastConfigError, match=r"mimicry gradient\(steps=True\)"):
        Gradient(steps=True)
    Gradient().check_counts("seed", least=0)
    assert ClosedForm().to_dict() == {"method": "closed_form"}
