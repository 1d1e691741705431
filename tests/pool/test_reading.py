"""A task for a pool, read from a folder or from the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from models import move
from peft import PeftModel
from pools import TARGETS, model_with_pool, small_vit, tiny_pool
from safetensors.torch import load_file, save_file

from recast_peft import RecastConfig, RecastConfigError, RecastLoadError, get_recast_model


class TestFiles:
    def saved_task(self, folder: Path, name: str, seed: int, **config) -> None:
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, **config), name)
        move(model, f".{name}", seed, size=0.3)
        model.save_pretrained(folder)

    def test_saved_tasks_are_read_from_a_folder(self, tmp_path, images):
        self.saved_task(tmp_path, "one", 1)
        self.saved_task(tmp_path, "two", 2, num_classes=3)
        self.saved_task(tmp_path, "three", 3, num_coefficient_sets=3)
        model, pool = model_with_pool()
        assert pool.load_folder(tmp_path) == ["one", "three", "two"]
        for name in pool:
            expected = PeftModel.from_pretrained(small_vit(), tmp_path / name, name).eval()(images)
            pool.activate(name)
            assert torch.allclose(model(images), expected, atol=1e-6)

    def test_keywords_that_would_do_nothing_are_refused(self, tmp_path):
        self.saved_task(tmp_path, "one", 1)
        _, pool = model_with_pool()
        for source, given in (
            (None, {"num_classes": 3}),
            (RecastConfig(), {"revision": "main"}),
            ("first", {"subfolder": "one"}),
            (tmp_path, {"subfolder": "one", "sub_folder": "two"}),
        ):
            with pytest.raises(RecastConfigError, match=f"task 'task' was given {list(given)[-1]}: a saved task takes"):
                pool.add("task", source, **given)
        pool.add("task", tmp_path, subfolder="one", revision=None)
        assert pool.names == ["task"]

    def test_names_that_are_taken_leave_the_model_without_a_place_for_classifiers(self, tmp_path):
        self.saved_task(tmp_path / "tasks", "task0", 1, num_classes=3)
        _, source = model_with_pool()
        source.load_folder(tmp_path / "tasks")
        source.save(tmp_path / "pool")
        model, pool = model_with_pool(1)
        before = list(model.state_dict())
        for load, path in ((pool.load_folder, "tasks"), (pool.load, "pool")):
            with pytest.raises(RecastConfigError, match="these tasks already: task0"):
                load(tmp_path / path)
            assert list(model.state_dict()) == before

    def test_the_default_task_lies_in_the_folder_itself(self, tmp_path, images):
        self.saved_task(tmp_path, "default", 1)
        _, pool = model_with_pool()
        with pytest.raises(RecastLoadError, match="it is a saved task itself"):
            pool.load_folder(tmp_path)
        self.saved_task(tmp_path, "two", 2)
        model, pool = model_with_pool()
        assert pool.load_folder(tmp_path) == ["default", "two"]
        pool.activate("default")
        expected = PeftModel.from_pretrained(small_vit(), tmp_path).eval()(images)
        assert torch.allclose(model(images), expected, atol=1e-6)
        for path in [path for path in tmp_path.iterdir() if path.is_file()]:
            (tmp_path / "same").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "same")
        assert model_with_pool()[1].load_folder(tmp_path) == ["default", "same", "two"]  # no checkpoint of the Trainer
        shutil.copytree(tmp_path / "two", tmp_path / "default")
        with pytest.raises(RecastConfigError, match="both hold a task of the name 'default'"):
            model_with_pool()[1].load_folder(tmp_path)

    def test_the_root_of_a_checkpoint_is_a_copy(self, tmp_path):
        self.saved_task(tmp_path / "checkpoint-3", "two", 2)
        assert (tmp_path / "checkpoint-3" / "adapter_config.json").is_file()
        assert model_with_pool()[1].load_folder(tmp_path / "checkpoint-3") == ["two"]

    def test_a_task_of_the_model(self, images):
        model, pool = model_with_pool()
        model.add_adapter("trained", RecastConfig(target_modules=TARGETS, num_classes=4))
        move(model, ".trained", size=1.0)
        model.set_adapter("trained")
        expected = model(images)
        pool.add("copy", "trained")
        model.set_adapter("first")
        pool.activate("copy")
        assert torch.equal(model(images), expected)

    def test_damaged_files_put_nothing_in(self, tmp_path):
        self.saved_task(tmp_path, "good", 1)
        self.saved_task(tmp_path, "poor", 2)
        file = tmp_path / "poor" / "adapter_model.safetensors"
        entries = load_file(file)
        key = next(iter(entries))
        _, pool = model_with_pool(1)
        for broken in (
            {k: v for k, v in entries.items() if k != key},
            {**entries, "stranger": torch.zeros(1)},
            {**entries, key: torch.zeros(1, 5)},
            {**entries, key: torch.full_like(entries[key], float("nan"))},
        ):
            save_file(broken, file)
            with pytest.raises(RecastLoadError, match="does not fit"):
                pool.load_folder(tmp_path)
            assert pool.names == ["task0"]
        file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(RecastLoadError, match="is damaged"):
            pool.load_folder(tmp_path)
        file.rename(file.with_name("adapter_model.bin"))
        with pytest.raises(RecastLoadError, match="is damaged"):
            pool.load_folder(tmp_path)
        assert pool.names == ["task0"]
        with pytest.raises(RecastLoadError, match="no saved task"):
            pool.load_folder(tmp_path / "good")

    @pytest.mark.parametrize("name", ["a\nb", "__base__"])
    def test_a_folder_whose_name_no_task_can_have(self, name, tmp_path):
        self.saved_task(tmp_path, "one", 1)
        shutil.copytree(tmp_path / "one", tmp_path / name)
        _, pool = model_with_pool()
        with pytest.raises(RecastConfigError, match="adapter_name="):
            pool.load_folder(tmp_path)
        assert len(pool) == 0  # a file of a pool with a name of two lines could not be read

    @pytest.mark.parametrize("entries", [{"x": 1}, {"x": [0.0]}, {5: torch.zeros(1)}], ids=str)
    def test_a_state_dict_of_something_else(self, entries):
        with pytest.raises(RecastConfigError, match=r"task 'bad' holds .*tensors of torch by name"):
            tiny_pool().add("bad", entries)

    def test_folders_that_hold_no_task_say_where_one_may_be(self, tmp_path):
        pool = tiny_pool()
        pool.model.save_pretrained(tmp_path / "tasks")
        for folder, hint in (
            (tmp_path, "load_folder takes one of them"),
            (tmp_path / "tasks" / "first", r"pool\.add\('first'"),
            (tmp_path / "nowhere", "no such folder"),
        ):
            with pytest.raises(RecastLoadError, match=hint):
                pool.load_folder(folder)
        assert pool.load_folder(tmp_path / "tasks") == ["first"]
