"""What is resident in a pool: numbers that are finite, versions of its file, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from pools import tiny_pool

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, RecastLoadError
from recast_peft.storage.versions import roll_back, versions


class TestNumbersThatAreNotFinite:
    def test_are_refused_when_a_task_is_put_in(self):
        pool = tiny_pool()
        state = {f"base_model.model.blocks.{i}.attn.qkv.recast_coefficients": torch.zeros(1, 2) for i in range(4)}
        state["base_model.model.blocks.2.attn.qkv.recast_coefficients"][0, 1] = float("inf")
        with pytest.raises((RecastConfigError, RecastLoadError), match="finite|NaN"):
            pool.add("bad", state)
        for layer in pool.model.modules():
            if "first" in getattr(layer, "recast_bank", {}):
                layer.recast_coefficients["first"].data.fill_(float("nan"))
        with pytest.raises(RecastConfigError, match="'diverged' holds numbers that are not finite"):
            pool.add("diverged", "first")
        assert len(pool) == 0


class TestFreshTasks:
    @pytest.mark.parametrize(
        "fields",
        [
            {"target_modules": ["fc1"]},
            {"target_modules": ["qkv"], "group_size": 4},
            {"num_templates": 1, "target_modules": ["qkv"]},
            {"max_coefficients": 1000, "target_modules": ["qkv"]},
        ],
    )
    def test_a_config_of_other_targets_or_sizes_is_refused(self, fields):
        pool = tiny_pool()
        with pytest.raises(RecastBankError, match="task 'other' has other target modules or banks than the pool"):
            pool.add("other", RecastConfig(**fields))
        assert len(pool) == 0
        with pytest.raises(RecastConfigError, match="'other': it owns modules_to_save beside.*num_classes="):
            pool.add("other", RecastConfig(modules_to_save=["norm"]))
        pool.add("same", RecastConfig(target_modules=["qkv"], group_size=2, num_classes=3))
        assert pool.names == ["same"]


class TestFiles:
    def test_a_save_keeps_what_the_file_was_and_one_that_fails_does_not(self, tmp_path):
        pool, path = tiny_pool(), tmp_path / "pool.safetensors"
        pool.add("old")
        pool.save(path, keep=2)
        pool.replace("old", RecastConfig(num_classes=2))
        pool.save(path, keep=2)
        pool.table[pool.row("old")] = float("nan")
        with pytest.raises(RecastConfigError, match="not finite"):
            pool.save(path, keep=2)
        assert versions(path) == [1]
        pools = [tiny_pool(), tiny_pool()]
        pools[0].load(path)
        roll_back(path)
        pools[1].load(path)
        assert [other.head(other.row("old")) is None for other in pools] == [False, True]


class TestGrowing:
    def test_a_copy_is_a_pool_of_its_own(self, tokens):
        pool = tiny_pool()
        pool.add("a", RecastConfig(num_classes=3))
        other = copy.deepcopy(pool)
        other.add("b")
        other.table[0] = 1
        assert pool.names == ["a"]
        assert not torch.allclose(other.model(tokens, task_ids=["a", "a"]), pool.model(tokens, task_ids=["a", "a"]))


class TestMessages:
    def test_of_a_run_of_several_processes(self, monkeypatch):
        pool = tiny_pool()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RecastConfigError, match="each process would train other numbers"):
            pool.parameters()
