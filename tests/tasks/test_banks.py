"""The template banks of a model's tasks: collapsed sets, and banks as they are stored."""

from __future__ import annotations

import weakref

import pytest
import torch
from models import converted, layers_of, offsets_of, outputs, randomise, tiny_vit, vit_input

from recast_peft import RecastConfig, RecastConfigError, collapse_coefficient_sets
from recast_peft.tasks.banks import recast_banks, recipes_of, task_bank_reference, task_banks


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

    def test_groups_that_share_their_coefficients_keep_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[weakref.ref] = []

        def reused(one: object) -> int:
            """An ``id``: that of an object that is gone is the next one's, which in Python happens now and then."""
            known = [other() for other in asked]
            place = next((n for n, other in enumerate(known) if other is one), None)
            if place is None:
                place = next((n for n, other in enumerate(known) if other is None), len(asked))
                asked[place : place + 1] = [weakref.ref(one)]
            return place

        monkeypatch.setattr("recast_peft.tasks.banks.id", reused, raising=False)
        model = converted(num_coefficient_sets=2, coefficient_sharing=2)
        randomise(model)
        with torch.no_grad():  # a graph would hold the coefficients
            before = offsets_of(model)
        collapse_coefficient_sets(model)
        assert all(torch.equal(value, before[name]) for name, value in offsets_of(model).items())
        assert len([p for p in model.parameters() if p.requires_grad]) == 2

    def test_of_one_task_leaves_the_others(self) -> None:
        model = converted("first", num_coefficient_sets=3)
        model.add_adapter("second", RecastConfig(target_modules=["qkv"], num_coefficient_sets=2))
        collapse_coefficient_sets(model, "first")
        assert {len(layer.recast_coefficients["first"]) for layer in layers_of(model).values()} == {1}
        assert {len(layer.recast_coefficients["second"]) for layer in layers_of(model).values()} == {2}
        assert [config.num_coefficient_sets for config in model.peft_config.values()] == [1, 2]

    def test_of_an_unknown_task_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="the model has no RECAST task: convert it"):
            collapse_coefficient_sets(tiny_vit())
        with pytest.raises(RecastConfigError, match="no RECAST task 'cars'; its tasks: default"):
            collapse_coefficient_sets(converted(), "cars")


NAMES = ["blocks.{0,1}.attn.qkv", "blocks.{2,3}.attn.qkv"]


class TestTheBanksOfAModel:
    def test_are_listed_by_name_in_the_order_of_their_first_member(self) -> None:
        model = converted("first")
        model.add_adapter("other", RecastConfig(target_modules=["fc1"], group_size=4))
        own = {"first": NAMES, "other": ["blocks.{0,1,2,3}.mlp.fc1"]}
        for task, names in own.items():
            assert [*task_banks(model, task)] == names
        listed = [bank.name for bank in recast_banks(model).values()]
        assert listed == [NAMES[0], *own["other"], NAMES[1]]
        assert task_banks(model, "nobody") == {}

    def test_of_two_tasks_that_share_them_are_listed_once(self) -> None:
        model = converted("first")
        model.add_adapter("second", RecastConfig(target_modules=["qkv"]))
        assert len(recast_banks(model)) == 2
        assert all(task_banks(model, "first")[name] is task_banks(model, "second")[name] for name in NAMES)

    def test_that_follow_from_the_weights_have_neither_a_recipe_nor_a_file(self) -> None:
        banks = task_banks(converted(), "default")
        assert (recipes_of(banks), task_bank_reference(banks)) == (None, None)
        mixed = task_banks(converted(num_templates=1), "default")
        assert task_bank_reference(mixed) is None
        recipes = recipes_of(mixed)
        assert recipes is not None
        assert {name: (len(r["mix"]), len(r["mix"][0]), len(r["base"])) for name, r in recipes.items()} == {
            name: (1, 2, 2)
            for name in NAMES  # one template of two weights, for two layers
        }
