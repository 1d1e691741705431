"""Tasks as weighted combinations of others: in a model and in a pool."""

from __future__ import annotations

import pytest
import torch
from grown_biases import X, by_hand, config, filled, grown, learn_offsets, offsets, on
from hypothesis import given
from hypothesis import strategies as st
from models import converted, layers_of, outputs, randomise, small_vit, tiny_vit, vit_input
from peft import PeftModel

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, TaskPool, get_recast_model
from recast_peft.tasks.arithmetic import combine_rows


def three_tasks(**config) -> PeftModel:
    model = converted("k", **config)
    for name in "lm":
        model.add_adapter(name, RecastConfig(target_modules=["qkv"], **config))
    for seed, name in enumerate("klm"):
        randomise(model, name, seed)
    return model


def deltas(model: PeftModel, adapter: str) -> list[torch.Tensor]:
    return [layer.get_delta_weight(adapter).detach() for layer in layers_of(model).values()]


class TestNumbers:
    @given(weights=st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=4))
    def test_linear_is_the_weighted_sum_rounded_once(self, weights):
        rows = list(torch.randn(len(weights), 12, generator=torch.Generator().manual_seed(0)))
        exact = sum(w * row.double() for w, row in zip(weights, rows, strict=True))
        assert torch.equal(combine_rows(rows, weights), exact.float())

    def test_a_task_less_itself_is_nothing(self):
        row = torch.randn(48)
        assert not combine_rows([row, row.clone()], [1, -1]).any()

    def test_magnitude_prune_keeps_the_largest_of_each_task(self):
        rows = [torch.tensor([1.0, -4, 2, 0.5]), torch.tensor([3.0, 0.1, 0.2, -5])]
        assert combine_rows(rows, [1, 2], "magnitude_prune", 0.5).tolist() == [6, -4, 2, -10]

    def test_a_small_density_keeps_at_least_one_number(self):
        assert combine_rows([torch.tensor([1.0, -4, 2])], [1], "magnitude_prune", 0.01).tolist() == [0, -4, 0]

    def test_ties_drops_what_the_majority_contradicts(self):
        rows = [torch.tensor([1.0, 2, -3]), torch.tensor([1.0, -5, -1]), torch.tensor([-1.0, 1, 2])]
        # signs by sum: +, -, -; what is left of each column is averaged
        assert combine_rows(rows, [1, 1, 1], "ties", 1.0).tolist() == [1, -5, -2]
        # by count: +, +, -
        assert combine_rows(rows, [1, 1, 1], "ties", 1.0, "frequency").tolist() == [1, 1.5, -2]

    def test_ties_weighs_what_is_left(self):
        rows = [torch.tensor([1.0, 2, -3]), torch.tensor([1.0, -5, -1]), torch.tensor([-1.0, 1, 2])]
        # the signs are those of the tasks' own numbers: +, -, -; then (2 + 3) / 2, -15 / 1, (-6 - 3) / 2
        assert combine_rows(rows, [2, 3, 4], "ties", 1.0).tolist() == [2.5, -15, -4.5]


class TestModel:
    @pytest.mark.parametrize("sets", [1, 3])
    def test_adds_what_the_tasks_add_to_the_weights(self, sets):
        model = three_tasks(num_coefficient_sets=sets)
        model.add_weighted_adapter(["k", "m"], [0.5, -2.0], "mix")
        assert model.active_adapters == ["k"]
        assert model.peft_config["mix"].num_coefficient_sets == 1
        for mix, a, c in zip(deltas(model, "mix"), deltas(model, "k"), deltas(model, "m"), strict=True):
            torch.testing.assert_close(mix, 0.5 * a - 2 * c, rtol=1e-5, atol=1e-6)
            assert mix.abs().max() > 0.01

    def test_one_task_with_weight_one_is_that_task_to_the_last_bit(self):
        model = three_tasks()
        expected = outputs(model, vit_input())
        model.add_weighted_adapter(["k"], [1.0], "same")
        model.set_adapter("same")
        assert torch.equal(outputs(model, vit_input()), expected)

    def test_a_combination_is_saved_and_loaded_as_a_task(self, tmp_path):
        model = three_tasks()
        model.add_weighted_adapter(["k", "l"], [0.3, 0.7], "mix")
        model.set_adapter("mix")
        model.save_pretrained(tmp_path, selected_adapters=["mix"])
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "mix").eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    def test_shared_coefficients_stay_shared(self):
        model = three_tasks(coefficient_sharing="blocks")
        model.add_weighted_adapter(["k", "l"], [1, 1], "mix")
        layers = list(layers_of(model).values())
        assert layers[0].recast_coefficients["mix"] is layers[1].recast_coefficients["mix"]
        both = layers[0].recast_coefficients["k"] + layers[0].recast_coefficients["l"]
        torch.testing.assert_close(layers[1].recast_coefficients["mix"], both)

    @pytest.mark.parametrize(
        "extra", [{"num_templates": 1}, {"num_templates": 1, "mimicry": {"method": "gradient", "steps": 5}}]
    )
    def test_tasks_on_compressed_banks_are_combined(self, extra):
        model = three_tasks(**extra)
        model.add_weighted_adapter(["k", "l"], [1, 1], "mix")
        for mix, a, b in zip(deltas(model, "mix"), deltas(model, "k"), deltas(model, "l"), strict=True):
            torch.testing.assert_close(mix, a + b, rtol=1e-4, atol=1e-5)

    def test_other_ways_of_combining_reach_the_coefficients(self):
        model = three_tasks()
        model.add_weighted_adapter(["k", "l"], [1, 1], "few", "magnitude_prune", density=0.25)
        model.add_weighted_adapter(["k", "l"], [1, 1], "agreed", combination_type="ties", density=0.5)
        count = {
            name: sum(int(layer.recast_coefficients[name].count_nonzero()) for layer in layers_of(model).values())
            for name in ("k", "few", "agreed")
        }
        assert count["k"] == 8
        assert 2 <= count["few"] <= 4
        assert 0 < count["agreed"] <= 8

    @pytest.mark.parametrize("size", [{"group_size": 4}, {"num_directions": 2}])
    def test_tasks_on_different_banks_are_refused_and_add_up_when_both_are_active(self, size):
        model = three_tasks()
        model.add_adapter("other", RecastConfig(target_modules=["qkv"], **size))
        randomise(model, "other", 9)
        with pytest.raises(RecastBankError, match=r"different banks(?s:.*)base_model\.set_adapter"):
            model.add_weighted_adapter(["k", "other"], [1, 1], "mix")
        assert "mix" not in model.peft_config
        model.base_model.set_adapter(["k", "other"])
        layer = layers_of(model)["blocks.0.attn.qkv"]
        both = layer.get_delta_weight("k") + layer.get_delta_weight("other")
        torch.testing.assert_close(layer.weight - layer.pretrained_weight, both, rtol=1e-5, atol=1e-6)

    def test_a_task_that_owns_norms_is_refused(self):
        model = converted("k", train_norms=True)
        with pytest.raises(RecastConfigError, match="owns more than coefficients"):
            model.add_weighted_adapter(["k"], [1], "mix")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"adapters": "k"}, "expected a list"),
            ({"adapters": []}, "at least one task"),
            ({"adapters": ["k", "k"]}, "named twice"),
            ({"weights": [1.0]}, "one weight for each"),
            ({"weights": [1.0, float("nan")]}, "finite"),
            ({"adapters": ["k", "z"]}, "no RECAST task 'z'"),
            ({"adapter_name": "l"}, "has a task 'l' already"),
            ({"combination_type": "svd"}, "no rank to reduce"),
            ({"combination_type": "cat"}, "no rank that could grow"),
            ({"combination_type": "dare_ties"}, "at random"),
            ({"combination_type": "ties"}, "needs the share"),
            ({"density": 0.5}, "expected None"),
            ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "majority_sign_method='x'"),
            ({"heads": "x"}, "heads='x'"),
        ],
    )
    def test_wrong_arguments_are_refused_by_name(self, arguments, says):
        model = three_tasks()
        with pytest.raises(RecastConfigError, match=says):
            model.add_weighted_adapter(**{"adapters": ["k", "l"], "weights": [1, 1], "adapter_name": "mix", **arguments})
        assert set(model.peft_config) == {"k", "l", "m"}


def seeds_of_a_task(classes: tuple[int, int] = (5, 5)) -> PeftModel:
    model = get_recast_model(small_vit(), RecastConfig(num_classes=classes[0]), "k").eval()
    model.add_adapter("l", RecastConfig(num_classes=classes[1], seed=1))
    for seed, name in enumerate("kl"):
        randomise(model, name, seed)
    return model


class TestHeads:
    def test_seeds_are_averaged_with_their_heads(self):
        model = seeds_of_a_task()
        model.add_weighted_adapter(["k", "l"], [0.5, 0.5], "mean", heads="linear")
        heads = model.get_base_model().head.modules_to_save
        torch.testing.assert_close(heads["mean"].weight, (heads["k"].weight + heads["l"].weight) / 2)
        model.set_adapter("mean")
        assert outputs(model, torch.randn(2, 1, 16, 16)).shape == (2, 5)

    def test_the_first_head_or_the_models_own(self):
        model = seeds_of_a_task((5, 3))
        model.add_weighted_adapter(["l", "k"], [1, 1], "with", heads="first")
        model.add_weighted_adapter(["l", "k"], [1, -1], "without", heads="none")
        heads = model.get_base_model().head.modules_to_save
        assert torch.equal(heads["with"].weight, heads["l"].weight)
        assert heads["with"].weight is not heads["l"].weight
        model.set_adapter("without")
        assert outputs(model, torch.randn(2, 1, 16, 16)).shape == (2, 7)

    def test_what_becomes_of_heads_must_be_said(self):
        with pytest.raises(RecastConfigError, match="heads='first'"):
            seeds_of_a_task().add_weighted_adapter(["k", "l"], [1, 1], "mix")

    def test_heads_of_other_classes_are_not_added(self):
        with pytest.raises(RecastConfigError, match="other classes.*\n  k: 5 classes\n  l: 3 classes"):
            seeds_of_a_task((5, 3)).add_weighted_adapter(["k", "l"], [1, 1], "mix", heads="linear")
        model = get_recast_model(small_vit(), RecastConfig(id2label={0: "cat", 1: "dog"}), "k")
        model.add_adapter("l", RecastConfig(id2label={0: "dog", 1: "cat"}))
        with pytest.raises(RecastConfigError, match=r"k: 2 classes \(cat, dog\)\n  l: 2 classes \(dog, cat\)"):
            model.add_weighted_adapter(["k", "l"], [1, 1], "mix", heads="linear")

    @pytest.mark.parametrize("heads", ["first", "linear"])
    def test_a_task_without_a_head_has_none_to_give(self, heads):
        model = seeds_of_a_task()
        model.add_adapter("bare", RecastConfig())
        with pytest.raises(RecastConfigError, match="'bare' has no classifier"):
            model.add_weighted_adapter(["bare", "k"], [1, 1], "mix", heads=heads)


class TestPool:
    def test_gives_what_the_model_gives(self):
        model = seeds_of_a_task()
        pool = TaskPool(model, like="k")
        for name in "kl":
            pool.add(name, name)
        x = torch.randn(2, 1, 16, 16)
        row = pool.add_weighted_adapter(["k", "l"], [1.5, -0.5], "mix", heads="linear")
        assert pool.row("mix") == row
        pool.activate("mix")
        from_pool = outputs(model, x)
        model.add_weighted_adapter(["k", "l"], [1.5, -0.5], "same", heads="linear")
        model.set_adapter("same")
        assert torch.equal(outputs(model, x), from_pool)
        pool.activate("k")
        assert not torch.allclose(outputs(model, x), from_pool)

    def test_a_combination_does_not_change_its_parts(self):
        model = seeds_of_a_task()
        pool = TaskPool(model, like="k")
        for name in "kl":
            pool.add(name, name)
        before = pool.head(0).weight.clone(), pool.table[0].clone()
        pool.add_weighted_adapter(["k", "l"], [3, 1], "mix", heads="linear")
        assert torch.equal(pool.head(0).weight, before[0])
        assert torch.equal(pool.table[0], before[1])

    def test_refuses_what_cannot_be_and_stays_as_it_was(self):
        pool = TaskPool(seeds_of_a_task(), like="k")
        pool.add("k", "k")
        for arguments in ((["k", "z"], [1, 1], "mix"), (["k"], [1], "k"), (["k"], [1], "mix")):
            with pytest.raises(RecastConfigError):
                pool.add_weighted_adapter(*arguments)
        assert pool.names == ["k"]

    def test_works_on_fitted_banks(self):
        model = three_tasks(num_templates=1, mimicry={"method": "gradient", "steps": 5})
        pool = TaskPool(model)
        pool.add("k", "k")
        pool.add("l", "l")
        pool.add_weighted_adapter(["k", "l"], [1, 1], "mix")
        assert pool.coefficients("mix")


class TestBiases:
    def test_a_weighted_sum(self) -> None:
        bank = grown()
        model = on(bank, "one")
        model.add_adapter("two", config(bank))
        learn_offsets(model, "two", 2)
        model.base_model.add_weighted_adapter(["one", "two"], [0.25, -1.5], "mix")
        own = [offsets(model, name) for name in ("one", "two", "mix")]
        for place, values in own[2].items():
            torch.testing.assert_close(values, 0.25 * own[0][place] - 1.5 * own[1][place], rtol=1e-6, atol=1e-6)
        model.set_adapter("mix")
        torch.testing.assert_close(outputs(model, X), outputs(by_hand(bank, model, "mix").eval(), X), rtol=1e-5, atol=1e-5)
        pool = filled(bank, "one", "two")
        row = pool.add_weighted_adapter(["one", "two"], [0.25, -1.5], "mix")
        torch.testing.assert_close(pool.table[row], 0.25 * pool.table[0] - 1.5 * pool.table[1])

    def test_other_banks_are_refused(self) -> None:
        model = on(grown(), "one")
        model.add_adapter("two", config(grown((5, 6, 7))))
        model.add_adapter("three", RecastConfig(target_modules=["fc1"], group_size=1))
        for other in ("two", "three"):
            with pytest.raises(RecastBankError, match="tasks on different banks"):
                model.base_model.add_weighted_adapter(["one", other], [1, 1], "mix")
            assert "mix" not in model.peft_config
