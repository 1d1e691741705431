"""What is found in a folder of tasks, banks and pools, without building a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fitted_models import fitted
from models import converted, randomise
from safetensors.torch import load_file, save_file

from recast_peft import TaskPool
from recast_peft.hub.verify import ERROR, INFO, WARNING, verify_folder


def found(folder: Path, level: str) -> str:
    return "\n".join(f"{finding.place.name}: {finding.text}" for finding in verify_folder(folder) if finding.level == level)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    model = converted("pets")  # four layers in groups of two: 8 coefficients
    randomise(model, "pets")
    model.save_pretrained(tmp_path)
    return tmp_path / "pets"


class TestATask:
    def test_that_is_whole_has_its_numbers_counted_and_what_nobody_knows_said(self, task: Path) -> None:
        (task.parent / "run" / "step").mkdir(parents=True)
        task.rename(task.parent / "run" / "step" / "pets")
        (task.parent / "linked").symlink_to(task.parent / "run")  # nothing is said twice
        for folder in (task.parent / "run" / "step" / "pets", task.parent / "run", task.parent):
            assert found(folder, INFO) == "pets: a task of 8 coefficients, whole"
            assert found(folder, ERROR) == ""
            said = found(folder, WARNING).splitlines()
            assert [line for line in said if "no repository on the Hub" in line]
            assert [line for line in said if "no license is stated" in line]
            assert len(said) == 2

    def test_of_which_a_file_is_missing_is_an_error(self, task: Path) -> None:
        config = (task / "adapter_config.json").rename(task.parent / "away")
        assert "holds no adapter_config.json" in found(task, ERROR)
        config.rename(task / "adapter_config.json")
        (task / "adapter_model.safetensors").unlink()
        assert "the task's numbers are missing" in found(task, ERROR)
        assert "whole" not in found(task, INFO)

    def test_that_was_damaged_is_one_error(self, task: Path) -> None:
        content = bytearray((task / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (task / "adapter_model.safetensors").write_bytes(content)
        (error,) = (finding for finding in verify_folder(task) if finding.level == ERROR)
        assert "is damaged: its numbers are not those" in error.text

    def test_with_a_number_that_no_training_gives_is_warned_of(self, task: Path) -> None:
        tensors = load_file(task / "adapter_model.safetensors")
        key = next(iter(tensors))
        tensors[key][0, 0] = -5e4
        save_file(tensors, task / "adapter_model.safetensors")  # as another program writes it
        said = found(task, WARNING)
        assert f"{key} holds 5e+04" in said
        assert "has no checksum" in said
        tensors[key][0, 0] = float("inf")
        save_file(tensors, task / "adapter_model.safetensors")
        assert key in found(task, ERROR)
        save_file({**tensors, key: torch.ones_like(tensors[key]).int()}, task / "adapter_model.safetensors")
        assert f"numbers of another kind\n  {key}: int32" in found(task, ERROR)

    def test_names_a_bank_that_lies_beside_it_or_does_not(self, tmp_path: Path) -> None:
        model = fitted()
        model.save_bank(tmp_path / "bank")
        model.save_pretrained(tmp_path / "task")
        assert "task: its bank lies at" in found(tmp_path, INFO)
        assert "bank: a bank of 4 groups" in found(tmp_path, INFO)
        (tmp_path / "bank").rename(tmp_path / "elsewhere")
        assert "does not lie here and was not looked at" in found(tmp_path, WARNING)


class TestAPool:
    @pytest.fixture
    def packed(self, tmp_path: Path) -> Path:
        model = converted("pets")
        pool = TaskPool(model)
        pool.add("one", "pets")
        pool.save(tmp_path / "pool.safetensors")
        return tmp_path / "pool.safetensors"

    def test_is_found_by_its_file_and_by_its_folder(self, packed: Path) -> None:
        for place in (packed, packed.parent):
            assert "pool.safetensors: a packed pool of" in found(place, INFO)
            assert found(place, ERROR) == ""

    def test_that_was_damaged_is_an_error(self, packed: Path) -> None:
        content = bytearray(packed.read_bytes())
        content[-1] ^= 1
        packed.write_bytes(content)
        assert "damaged" in found(packed.parent, ERROR)


def test_where_nothing_of_this_library_lies_that_is_an_error(tmp_path: Path) -> None:
    assert "no such folder or file" in found(tmp_path / "missing", ERROR)
    assert "there is no task, bank, compressed model or packed pool" in found(tmp_path, ERROR)
    save_file({"x": torch.ones(1)}, tmp_path / "others.safetensors")
    assert "there is no task, bank, compressed model or packed pool" in found(tmp_path, ERROR)
    assert "it is no packed pool" in found(tmp_path / "others.safetensors", ERROR)
