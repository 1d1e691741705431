"""The table of tasks: rows, names and numbers."""

from __future__ import annotations

import pytest
import torch
from pools import model_with_pool, small_vit, tiny_pool

from recast_peft import RecastConfig, RecastConfigError, TaskPool


class TestRows:
    def test_removed_rows_are_used_again_and_names_keep_their_rows(self):
        _, pool = model_with_pool(4)
        kept = pool.coefficients("task3")
        pool.activate("task1")
        pool.remove("task1")
        assert pool.active is None
        assert "task1" not in pool
        assert pool.add("new") == 1
        assert pool.names == ["task0", "new", "task2", "task3"]
        assert all(torch.equal(a, b) for a, b in zip(kept.values(), pool.coefficients("task3").values(), strict=True))
        assert not any(v.any() for v in pool.coefficients("new").values())

    def test_ten_thousand_tasks_take_a_few_megabytes(self):
        _, pool = model_with_pool()
        for i in range(10_000):
            pool.add(f"t{i}")
        assert len(pool) == 10_000
        assert pool.nbytes() < 4e6
        assert pool.row("t9999") == 9999

    def test_unknown_and_taken_names(self):
        _, pool = model_with_pool(1)
        with pytest.raises(RecastConfigError, match="no task 'x'; it has 1: task0"):
            pool.activate("x")
        with pytest.raises(RecastConfigError, match="already"):
            pool.add("task0")
        for name in ("", "a\nb", 3):
            with pytest.raises(RecastConfigError, match="name="):
                pool.add(name)
        for name in ("a/b", "..", "/tmp/x"):  # it could not be saved as a folder
            with pytest.raises(RecastConfigError, match="plain name"):
                pool.add(name)
            with pytest.raises(RecastConfigError, match="plain name"):
                pool.add_weighted_adapter(["task0"], [1.0], name)
        for verb in (pool.remove, pool.activate, pool.labels, lambda names: pool.ids([names])):
            with pytest.raises(RecastConfigError, match=r"no task \['task0'\]; it has 1: task0"):
                verb(["task0"])
        assert len(pool) == 1

    def test_what_is_interrupted_puts_all_tasks_in_or_none(self, monkeypatch, tmp_path):
        _, pool = model_with_pool(3)
        pool.add("headed", RecastConfig(num_classes=2))
        pool.save(tmp_path / "pool")
        _, other = model_with_pool(1)
        other.remove("task0")
        other.add("mine")
        calls = []

        def interrupted(row, name, *args, **options):
            calls.append(name)
            if len(calls) == 3:
                raise KeyboardInterrupt
            occupy(row, name, *args, **options)

        occupy = other._occupy
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(other, "_occupy", interrupted)
            other.load(tmp_path / "pool")
        assert other.names == ["mine"]
        assert len(other) == 1
        assert "task0" not in other
        other.save(tmp_path / "other")
        assert other.load(tmp_path / "pool") == ["task0", "task1", "task2", "headed"]
        assert torch.equal(other.ids(["task2"]) >= 0, torch.tensor([True]))
        for name in ("task0", "task2"):
            assert all(torch.equal(value, other.coefficients(name)[key]) for key, value in pool.coefficients(name).items())
        assert other.labels("headed") == pool.labels("headed")
        with pytest.raises(RuntimeError, match="memory"), monkeypatch.context() as patch:
            patch.setattr(type(other._numbers), "__setitem__", lambda *args: (_ for _ in ()).throw(RuntimeError("memory")))
            other.add("late")
        assert "late" not in other

    def test_a_task_that_another_thread_activates_as_it_is_removed(self, monkeypatch):
        _, pool = model_with_pool(2)
        remove = pool.remove_row

        def later(row):
            pool.activate("task1")
            remove(row)

        monkeypatch.setattr(pool, "remove_row", later)
        pool.remove("task1")
        assert pool.active is None

    def test_a_model_without_tasks(self):
        with pytest.raises(RecastConfigError, match="get_recast_model"):
            TaskPool(small_vit())
        model, _ = model_with_pool()
        with pytest.raises(RecastConfigError, match="like="):
            TaskPool(model, like="nobody")


class TestGrowing:
    def test_while_it_is_trained_is_warned_of(self):
        _, pool = model_with_pool(16)
        pool.requires_grad_()
        with pytest.warns(UserWarning, match=r"grows beyond 16 tasks.*pool\.parameters"):
            pool.add("later")

    def test_inside_inference_mode(self, tokens):
        model = tiny_pool().model
        with torch.inference_mode():
            pool = TaskPool(model, slot="grown")
            for i in range(40):
                pool.add(f"t{i}", RecastConfig(num_classes=3, seed=i))
            pool.model(tokens, task_ids=["t1", "t39"])
        pool.requires_grad_()
        with torch.enable_grad():
            pool.model(tokens, task_ids=["t1", "t39"]).square().sum().backward()
        assert pool.table.grad[39].any()
        with torch.no_grad():
            pool.table.add_(1)
        pool.add("later")
