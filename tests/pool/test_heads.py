"""Classifiers of a pool's tasks: one module for all that are alike, tensors for each."""

from __future__ import annotations

import copy

import pytest
import torch
from language_models import bert
from models import TinyVit, move, outputs, tiny_vit
from peft import PeftModel
from pools import tiny_pool
from torch import nn

from recast_peft import RecastConfig, RecastConfigError, TaskPool, get_recast_model


class TestClassifiers:
    def test_of_one_kind_share_a_module_and_take_their_tensors(self):
        pool = tiny_pool()
        for i in range(50):
            pool.add(f"t{i}", RecastConfig(num_classes=4, id2label={0: "a", 1: "b", 2: "c", 3: "d"}, seed=i))
        heads = list(pool._heads.values())
        assert len({id(head.kind) for head in heads}) == len({id(head.labels) for head in heads}) == 1
        assert pool.sizes()["heads"] == 50 * 4 * (4 * 8 + 4)
        assert "50 with a classifier" in repr(pool)
        assert "heads 7,200 bytes" in repr(pool)

    def test_in_half_precision_take_half(self, tokens):
        whole, half = tiny_pool(), tiny_pool(head_dtype="float16")
        for pool in (whole, half):
            pool.add("task", RecastConfig(num_classes=4, seed=3))
        assert half.sizes()["heads"] * 2 == whole.sizes()["heads"]
        out, expected = (pool.model(tokens, task_ids=["task", "task"]) for pool in (half, whole))
        assert out.dtype == torch.float32
        assert not torch.equal(out, expected)
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
        half.activate("task")
        assert torch.allclose(half.model(tokens), out, atol=1e-6)
        for pool in (whole, half):
            pool.model.to(torch.float64)
            assert pool.model(tokens.double(), task_ids=["task", "task"]).dtype == torch.float64
        assert half.sizes()["heads"] * 4 == whole.sizes()["heads"]  # the one that is kept in half precision stays so
        for dtype in ("int8", "float8_e4m3fn"):  # nobody could see whether the latter are finite
            with pytest.raises(RecastConfigError, match=f"head_dtype='{dtype}'"):
                tiny_pool(head_dtype=dtype)

    def test_that_will_be_saved_in_half_precision_lose_no_bit_in_memory(self):
        pool = tiny_pool()
        pool.add("task", RecastConfig(num_classes=4, seed=3, head_dtype="float16"))
        exact = tiny_pool()
        exact.add("task", RecastConfig(num_classes=4, seed=3))
        assert torch.equal(pool.head(0).weight, exact.head(0).weight)

    def test_that_were_asked_for_can_be_written_to(self, tokens):
        pool = tiny_pool()
        pool.add("task", RecastConfig(num_classes=4))
        before = pool.model(tokens, task_ids=["task", "task"])
        pool.head(pool.row("task")).bias.add_(1)
        torch.testing.assert_close(pool.model(tokens, task_ids=["task", "task"]), before + 1)

    def test_of_more_than_one_layer(self, tokens):
        torch.manual_seed(0)
        plain = TinyVit().eval()
        plain.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        config = {"target_modules": ["qkv"], "head_module": "head"}
        model = get_recast_model(plain, RecastConfig(num_classes=5, **config), "own").eval()
        move(model, ".own.", size=1.0)
        expected = model(tokens)
        pool = TaskPool(model)
        pool.add("task", "own")
        pool.add("other", RecastConfig(num_classes=2, head_module="head"))
        torch.testing.assert_close(pool.model(tokens, task_ids=["task", "other"])[0], expected[0])
        pool.activate("task")
        torch.testing.assert_close(model(tokens), expected)


def with_copied_head(plain: nn.Module):
    """A model that says nowhere how many classes it has; its task has a copy of its classifier."""
    model = get_recast_model(plain, RecastConfig(modules_to_save=["head"]), "copy").eval()
    for parameter in model.get_base_model().head.modules_to_save.parameters():
        parameter.data.add_(1)
    return model


class TestLabels:
    def pool(self) -> TaskPool:
        pool = TaskPool(get_recast_model(bert(), RecastConfig(target_modules=["query"])).eval())
        for name in ("one", "two"):
            pool.add(name, RecastConfig(num_classes=2))
        return pool

    def test_set_in_the_models_config_stay_with_the_active_task(self, tmp_path):
        pool = self.pool()
        config = pool.model.config
        pool.activate("one")
        config.id2label, config.problem_type = {0: "no", 1: "yes"}, "multi_label_classification"
        assert pool.labels("one") == {0: "no", 1: "yes"}
        pool.activate("two")
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
        assert config.problem_type is None
        config.id2label = {0: "cat", 1: "dog"}
        twin = copy.deepcopy(pool.model).base_model.task_pool[0]
        twin.model.config.id2label = {0: "frog", 1: "toad"}
        assert [pool.labels("two")[0], twin.labels("two")[0]] == ["cat", "frog"]
        pool.save(tmp_path / "pool")  # without a look at the second
        again = TaskPool(get_recast_model(bert(), RecastConfig(target_modules=["query"])).eval())
        again.load(tmp_path / "pool")
        assert [again.labels("one"), again.labels("two")] == [{0: "no", 1: "yes"}, {0: "cat", 1: "dog"}]
        again.activate("one")
        assert again.model.config.problem_type == "multi_label_classification"

    def test_set_under_another_pools_task_in_the_slot_are_that_ones(self):
        pool = self.pool()
        pool.activate("one")
        other = TaskPool(pool.model)
        other.add("third", RecastConfig(num_classes=2))
        other.activate("third")
        pool.model.config.id2label = {0: "no", 1: "yes"}
        assert pool.labels("one") is None
        assert other.labels("third") == {0: "no", 1: "yes"}

    def test_the_kind_of_loss_is_the_models_each_time(self):
        pool = TaskPool(get_recast_model(bert(problem_type="regression"), RecastConfig(target_modules=["query"])).eval())
        for name in ("one", "two", "three"):
            pool.add(name, RecastConfig(num_classes=pool.model.config.num_labels))
            pool.activate(name)
            assert pool.model.config.problem_type == "regression"


class TestCopiesOfTheModelsOwn:
    """``modules_to_save``, beside a task with ``num_classes`` in the same place."""

    def test_come_back_from_the_pools_file(self, tokens, tmp_path):
        model = with_copied_head(tiny_vit())
        expected = outputs(model, tokens)
        model.add_adapter("own", RecastConfig(num_classes=2))
        pool = TaskPool(model)
        pool.add("task", "copy")
        pool.save(tmp_path / "pool")
        again = TaskPool(get_recast_model(tiny_vit()).eval())
        again.load(tmp_path / "pool")
        again.activate("task")
        assert torch.equal(outputs(again.model, tokens), expected)

    def test_are_a_combined_tasks_classifier(self, tokens, tmp_path):
        model = with_copied_head(tiny_vit())
        expected = outputs(model, tokens)
        model.add_adapter("own", RecastConfig(num_classes=2))
        model.add_weighted_adapter(["copy"], [1], "same", heads="first")
        model.set_adapter("same")
        assert torch.equal(outputs(model, tokens), expected)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_vit(), tmp_path / "same").eval()
        assert torch.equal(outputs(again, tokens), expected)

    def test_without_a_layer_that_gives_scores_are_refused(self):
        plain = tiny_vit()
        plain.head, plain.num_features = nn.Identity(), 8
        model = with_copied_head(plain)
        model.add_adapter("own", RecastConfig(num_classes=2, head_module="head"))
        with pytest.raises(RecastConfigError, match="it owns head whole"):
            TaskPool(model).add("task", "copy")
