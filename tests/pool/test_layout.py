"""What fits a pool: target modules, weights, banks and parts."""

from __future__ import annotations

import pytest
import torch
from grown_biases import config, grown
from models import layers_of, tiny_vit
from peft import PeftModel
from pools import TARGETS, model_with_pool, small_vit, text_model

from recast_peft import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    TaskPool,
    get_recast_model,
    random_bank,
)


class TestFiles:
    def test_other_targets_and_other_weights_are_refused(self, tmp_path):
        _, pool = model_with_pool()
        other = get_recast_model(small_vit(), RecastConfig(target_modules=["proj"]), "proj")
        other.save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match="other target modules"):
            pool.add("proj", tmp_path / "proj")
        stranger = get_recast_model(small_vit(seed=5), RecastConfig(target_modules=TARGETS), "stranger")
        stranger.save_pretrained(tmp_path)
        with pytest.raises(RecastBaseMismatchError, match="other pretrained weights"):
            pool.add("stranger", tmp_path / "stranger")
        foreign = TaskPool(stranger)
        foreign.add("x")
        foreign.save(tmp_path / "foreign.safetensors")
        with pytest.raises(RecastBaseMismatchError):
            pool.load(tmp_path / "foreign.safetensors")
        assert len(pool) == 0


class TestBesideOrdinaryTasks:
    @pytest.mark.parametrize("owned", [{"train_norms": True}, {"modules_to_save": ["norm"]}, {"bias": "recast_only"}])
    def test_a_task_that_owns_more_than_a_pool_holds_is_refused(self, owned):
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS), "first")
        model.add_adapter("more", RecastConfig(target_modules=TARGETS, **owned))
        with pytest.raises(RecastConfigError, match="a pool cannot hold task 'more': it owns"):
            TaskPool(model).add("more", "more")

    def test_norms_are_called_what_the_config_calls_them(self):
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS), "first")
        model.add_adapter("more", RecastConfig(target_modules=TARGETS, train_norms=True))
        with pytest.raises(RecastConfigError, match=r"'more': it owns norms \(train_norms\) beside its coefficients\. Keep it"):
            TaskPool(model).add("more", "more")

    @pytest.mark.parametrize("owned", [{"modules_to_save": ["pooler"]}, {"task_type": "SEQ_CLS"}])
    def test_a_saved_or_fresh_one_as_well(self, owned, tmp_path):
        model = get_recast_model(text_model("SEQ_CLS"), RecastConfig(**owned), "more")
        model.save_pretrained(tmp_path)
        pool = TaskPool(get_recast_model(text_model("SEQ_CLS"), RecastConfig()))
        for source in (tmp_path / "more", RecastConfig(**owned)):
            with pytest.raises(RecastConfigError, match="a pool cannot hold task 'more': it owns modules_to_save"):
                pool.add("more", source)

    def test_a_classifier_that_the_task_gives_a_size_is_none_of_the_task_types(self, tmp_path):
        own = RecastConfig(task_type="SEQ_CLS", num_classes=3)
        get_recast_model(text_model("SEQ_CLS"), own, "own").save_pretrained(tmp_path)
        pool = TaskPool(get_recast_model(text_model("SEQ_CLS"), RecastConfig()))
        for name, source in (("saved", tmp_path / "own"), ("fresh", own)):
            assert pool.head(pool.add(name, source)).weight.shape[0] == 3


class TestOtherBanks:
    def test_a_fitted_bank_and_no_tasks_of_another_one(self, tmp_path, images):
        def fitted(steps: int) -> PeftModel:
            method = {"method": "gradient", "steps": steps, "progress": False}
            return get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, num_templates=1, mimicry=method), "first")

        model = fitted(2).eval()
        for layer in layers_of(model).values():
            layer.recast_coefficients["first"].data.fill_(0.2)
        expected = model(images)
        model.save_bank(tmp_path / "bank")
        model.save_pretrained(tmp_path, selected_adapters=["first"])
        pool = TaskPool(model)
        pool.add("own", "first")
        pool.activate("own")
        assert torch.equal(model(images), expected)
        pool.add("same", tmp_path / "first")
        pool.save(tmp_path / "pool")
        other = TaskPool(fitted(3))
        with pytest.raises(RecastBankError, match="another template bank"):
            other.add("task", tmp_path / "first")
        with pytest.raises(RecastBankError, match="another template bank"):
            other.load(tmp_path / "pool")


class TestFreshTasks:
    @pytest.mark.parametrize(
        "fields",
        [
            {"max_coefficients": 1},
            {"max_coefficients": 1, "target_modules": TARGETS, "group_size": 2},
            {"coefficient_sharing": "all"},
            {"coefficient_sharing": "blocks", "target_modules": TARGETS},
            {"init_weights": False},
            {"train_coefficients": False, "num_classes": 3},
        ],
    )
    def test_that_ask_for_less_than_a_row_trains_are_refused(self, fields):
        _, pool = model_with_pool()
        # 4 blocks in groups of two, two target modules each
        with pytest.raises(RecastConfigError, match="cannot have .*: its row has 16 numbers"):
            pool.add("less", RecastConfig(**fields))
        assert len(pool) == 0

    def test_whose_cost_a_row_keeps_are_taken(self):
        _, pool = model_with_pool()
        pool.add("enough", RecastConfig(target_modules=TARGETS, group_size=2, max_coefficients=16))
        assert pool.names == ["enough"]

    def test_on_the_pools_bank_are_taken_wherever_it_lies_and_on_another_refused(self, tmp_path):
        build = RecastConfig(target_modules=["qkv"])
        banks = [random_bank(tiny_vit(), build, seed=seed).save(tmp_path / str(seed)) for seed in (1, 2)]
        pool = TaskPool(get_recast_model(tiny_vit(), RecastConfig(bank=banks[0])))
        for i, bank in enumerate((banks[0], str(tmp_path / "1"))):
            pool.add(f"same {i}", RecastConfig(bank=bank))
        for bank in (banks[1], str(tmp_path / "2")):
            lines = f"another template bank than the pool\n  task: {banks[1].fingerprint}\n  pool: {banks[0].fingerprint}\n"
            with pytest.raises(RecastBankError, match=f"task 'other' has {lines}"):
                pool.add("other", RecastConfig(bank=bank))
        with pytest.raises(RecastBankError, match=f"task: {banks[0].fingerprint}\n  pool: no stored bank\n"):
            TaskPool(get_recast_model(tiny_vit(), build)).add("other", RecastConfig(bank=banks[0]))
        assert pool.names == ["same 0", "same 1"]

    def test_on_the_pools_bank_of_biases_are_taken_wherever_it_lies(self, tmp_path):
        bank = grown()
        bank.save(tmp_path / "bank")
        grown((4, 5)).save(tmp_path / "other")
        pool = TaskPool(get_recast_model(tiny_vit(), config(bank)))
        pool.add("same", config(str(tmp_path / "bank")))
        with pytest.raises(RecastBankError, match="coefficients of biases that are not the pool's"):
            pool.add("other", config(str(tmp_path / "other")))
        assert pool.names == ["same"]
