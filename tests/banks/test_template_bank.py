"""Template banks: templates that are mixed, base coefficients that reproduce the members, and what follows a move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import converted, layers_of
from torch import Tensor

from recast_peft.banks import template_bank
from recast_peft.banks.template_bank import TemplateBank, follow_device, mix_templates
from recast_peft.mimicry import Recipe

FIRST = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def recipe(mix: list[list[float]], base: list[list[float]]) -> Recipe:
    return Recipe(torch.tensor(mix, dtype=torch.float64), torch.tensor(base, dtype=torch.float64))


def mixed_bank(*weights: Tensor, mix: list[list[float]], base: list[list[float]]) -> TemplateBank:
    """A bank whose layers are nothing but their weights."""
    layers: Any = [SimpleNamespace(pretrained_weight=weight) for weight in weights]
    return TemplateBank("g", [f"layer{i}" for i in range(len(weights))], layers, recipe=recipe(mix, base))


class TestMixing:
    def test_is_the_sum_of_the_weights_by_hand(self) -> None:
        second = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
        mix = torch.tensor([[0.5, 0.25], [2.0, -1.0]], dtype=torch.float64)
        assert mix_templates([FIRST, second], mix).tolist() == [[[3.0, 1.0], [1.5, 4.5]], [[-8.0, 4.0], [6.0, -2.0]]]

    def test_low_precision_is_summed_in_float32(self) -> None:
        weights = [torch.tensor([[256.0]], dtype=torch.bfloat16)] * 2
        found = mix_templates(weights, torch.tensor([[1 + 2**-8, -1.0]], dtype=torch.float64))
        assert found.dtype == torch.bfloat16
        assert found.item() == 1  # the first coefficient in bfloat16 is 1

    def test_in_parts_it_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = [torch.randn(3, 5) for _ in range(2)]
        mix = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
        whole = mix_templates(weights, mix)
        monkeypatch.setattr(template_bank, "MIXED_AT_ONCE", 8)  # four numbers of each weight: 15 are no multiple of it
        assert torch.equal(mix_templates(weights, mix), whole)


class TestACompressedBank:
    def test_says_how_well_its_members_are_reproduced(self) -> None:
        bank = mixed_bank(FIRST, 2 * FIRST, mix=[[1.0, 0.0]], base=[[1.0], [1.0]])
        assert (bank.num_templates, bank.is_exact, bank.is_anchored) == (1, False, False)  # before anything is built
        assert bank.fidelity == {}
        bank.build()
        assert bank.get_templates(FIRST.device)[0].tolist() == FIRST.tolist()
        # the second weight is twice the template: of its norm one half is missing, its direction is right
        errors = {name: (found.relative_error, found.cosine) for name, found in bank.fidelity.items()}
        assert errors["layer0"] == pytest.approx((0.0, 1.0))
        assert errors["layer1"] == pytest.approx((0.5, 1.0))

    def test_knows_its_own_recipe_alone(self) -> None:
        bank = mixed_bank(FIRST, FIRST, mix=[[1.0, 0.0]], base=[[1.0], [1.0]])
        assert bank.same_recipe(recipe([[1.0, 0.0]], [[1.0], [1.0]]))
        assert not bank.same_recipe(recipe([[0.0, 1.0]], [[1.0], [1.0]]))
        assert not bank.same_recipe(recipe([[1.0, 0.0]], [[1.0], [2.0]]))
        assert not TemplateBank("exact", bank.members, bank.layers).same_recipe(recipe([[1.0, 0.0]], [[1.0], [1.0]]))

    def test_in_low_precision_keeps_its_base_coefficients_in_float32(self) -> None:
        bank = mixed_bank(FIRST, FIRST, mix=[[1.0, 0.0]], base=[[1.0 + 2**-20], [1.0]])
        bank.build()
        bank.to(torch.bfloat16)
        assert bank.get_templates(FIRST.device)[0].dtype == torch.bfloat16
        assert bank.base_of("layer0").tolist() == [1 + 2**-20]  # bfloat16 would make one of it


def test_an_exact_bank_gives_a_member_its_own_weight() -> None:
    layers = layers_of(converted(depth=2))
    name, layer = list(layers.items())[1]
    bank = layer.recast_bank["default"]
    assert bank.is_exact
    assert bank.base_row(name, torch.zeros(1, dtype=torch.float64)).tolist() == [0.0, 1.0]
    templates, scale, pairs = bank.product_terms(name, torch.tensor([[0.5, 0.25], [0.0, 0.0]]), layer.weight_device)
    assert [template.data_ptr() for template in templates] == [one.pretrained_weight.data_ptr() for one in layers.values()]
    assert scale.tolist() == [[0.5, 1.25], [0.0, 1.0]]
    assert pairs is None


@pytest.mark.parametrize(
    ("asked", "given"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_coefficients_follow_a_cast_to_no_less_than_float32(asked: torch.dtype, given: torch.dtype) -> None:
    values = torch.tensor([1 + 2**-20])
    found = follow_device(lambda tensor: tensor.to(asked), values)
    assert found.dtype == given
    assert found.item() == values.item()
