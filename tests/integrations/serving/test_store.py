"""A folder of tasks in service: followed, changed, rolled back, and whole after a kill."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import alone, packed

from recast_peft import RecastConfigError, RecastLoadError
from recast_peft.integrations.serving import TaskStore


class TestStore:
    def test_follows_the_folder(self, store, saved, image):
        pool, folder = store.pool, store.folder
        before = alone(pool, "cats", image)
        shutil.copytree(saved / "second" / "cats", folder / "cats", dirs_exist_ok=True)
        assert store.refresh() == ["cats"]
        assert not torch.allclose(alone(pool, "cats", image), before, atol=1e-3)
        assert store.refresh() == []
        shutil.rmtree(folder / "dogs")
        assert store.refresh() == []  # another process may be putting a new one there
        assert store.refresh() == ["dogs"]
        assert sorted(pool.names) == ["cars", "cats"]

    def test_a_bad_task_leaves_the_former_in_service(self, store, image):
        pool = store.pool
        before = alone(pool, "cats", image)
        file = store.folder / "cats" / "adapter_model.safetensors"
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[-1] ^= 1
        for bad in (good[:100], bytes(flipped)):
            file.write_bytes(bad)
            assert store.refresh() == []
            assert "damaged" in store.problems["cats"]
            assert torch.equal(alone(pool, "cats", image), before)
        with pytest.raises(RecastLoadError):
            store.upload("dogs", b"no zip file")
        entries = load_file(store.folder / "cars" / "adapter_model.safetensors")
        shutil.copytree(store.folder / "cars", store.folder / ".bad" / "cars")
        broken = {key: value * float("nan") for key, value in entries.items()}
        save_file(broken, store.folder / ".bad" / "cars" / "adapter_model.safetensors")
        with pytest.raises((RecastLoadError, RecastConfigError), match="finite|NaN"):
            store.upload("cars", packed(store.folder / ".bad" / "cars"))
        assert store.versions("cars") == []
        file.write_bytes(good)
        assert store.refresh() == ["cats"]
        assert not store.problems

    def test_says_that_the_default_task_lies_in_the_folder_itself(self, store):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(store.folder / "cats" / file, store.folder / file)
        store.refresh()
        assert "move its files to" in store.problems["default"]
        (store.folder / "default").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.move(store.folder / file, store.folder / "default" / file)
        assert store.refresh() == ["default"]
        assert not store.problems

    def test_uploads_versions_and_rollback(self, store, saved, image):
        pool = store.pool
        first = alone(pool, "cats", image)
        store.upload("cats", packed(saved / "second" / "cats"))
        second = alone(pool, "cats", image)
        assert not torch.allclose(first, second, atol=1e-3)
        assert store.versions("cats") == [1]
        assert store.refresh() == []
        store.rollback("cats")
        assert torch.equal(alone(pool, "cats", image), first)
        store.remove("cats")
        assert "cats" not in pool
        assert store.versions("cats")
        store.rollback("cats")
        assert torch.equal(alone(pool, "cats", image), first)
        with pytest.raises(RecastConfigError, match="no version before"):
            store.rollback("dogs")
        for _ in range(8):
            store.upload("cats", packed(saved / "second" / "cats"))
        assert len(store.versions("cats")) == store.keep

    @pytest.mark.parametrize("name", ["../cats", "a/b", "", ".hidden", "/tmp/cats", "a\0b", "long" * 70, "notes.txt"])
    def test_names_that_leave_the_folder_or_are_none(self, store, saved, name):
        (store.folder / "notes.txt").write_text("not a task")
        verbs = (store.remove, store.rollback, lambda name: store.upload(name, packed(saved / "second" / "cats")))
        for verb in verbs:
            with pytest.raises(RecastConfigError):
                verb(name)
        assert (store.folder / "notes.txt").read_text() == "not a task"

    @pytest.mark.parametrize("last", ["adapter_model.safetensors", "adapter_config.json"])
    def test_a_zip_file_of_several_tasks_is_refused(self, store, saved, last):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for place in ("cats/adapter_config.json", "cats/adapter_model.safetensors", f"cars/{last}"):
                archive.write(saved / "second" / place, place)
        with pytest.raises(RecastLoadError, match="tasks in cars, cats"):
            store.upload("cats", content.getvalue())
        assert store.versions("cats") == []

    def test_damaged_zip_files_are_one_kind_of_error(self, store, saved):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                archive.write(saved / "second" / "cats" / name, name)
        whole = content.getvalue()
        for place in range(60, 120):  # behind the header of the first file: what zlib reads
            bad = bytearray(whole)
            bad[place] ^= 0xFF
            with pytest.raises(RecastLoadError):
                store.upload("birds", bytes(bad))
        assert "birds" not in store

    def test_a_folder_that_could_not_be_listed_for_a_while_is_no_problem_any_more(self, store):
        def waits_for(found):
            deadline = time.monotonic() + 30
            while found() is not True and time.monotonic() < deadline:
                time.sleep(0.01)
            assert found()

        store.folder.rename(store.folder.with_name("away"))
        store.follow(0.01)
        waits_for(lambda: len(store.problems) == 1)
        store.folder.with_name("away").rename(store.folder)
        waits_for(lambda: not store.problems)
        store.close()

    @pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "5"])
    def test_a_pause_that_is_none_is_refused(self, store, seconds):
        with pytest.raises(RecastConfigError, match="seconds="):
            store.follow(seconds)

    def test_a_kill_in_the_middle_of_an_upload(self, store, saved):
        folder = store.folder
        staged = folder / ".versions" / ".incoming-x"
        shutil.copytree(saved / "second" / "cats", staged / "cats")
        shutil.copytree(saved / "second" / "cars", folder / ".versions" / ".incoming-y" / "birds")  # never checked
        (folder / ".versions" / "cats").mkdir()
        (folder / "cats").rename(folder / ".versions" / "cats" / "1")
        TaskStore(folder, store.pool)
        assert (folder / "cats" / "adapter_config.json").is_file()
        assert not (folder / "birds").exists()
        assert not list((folder / ".versions").glob(".incoming*"))

    def test_a_kill_in_the_middle_of_a_rollback_loses_no_version(self, store, saved):
        store.upload("cats", packed(saved / "second" / "cats"))
        versions = store.folder / ".versions" / "cats"
        (versions / ".back-x").mkdir()
        (versions / "1").rename(versions / ".back-x" / "cats")
        again = TaskStore(store.folder, store.pool)
        assert again.versions("cats") == [1]
        assert not list(versions.glob(".back*"))

    def test_an_error_of_the_moment_is_tried_again(self, store, saved, monkeypatch):
        shutil.copytree(saved / "first" / "cats", store.folder / "lions")

        def fail(*args, **kwargs):
            raise OSError("Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(store.pool, "read", fail)
            assert store.refresh() == []
            assert "Too many open files" in store.problems["lions"]
        assert store.refresh() == ["lions"]
        assert not store.problems

    def test_a_name_that_the_file_system_takes_for_anothers(self, store, saved, monkeypatch):
        """As macOS and Windows do with "Cats" and "cats"; here the names that a folder holds are changed instead."""
        names = os.listdir
        monkeypatch.setattr(os, "listdir", lambda folder: [name.replace("cats", "Cats") for name in names(folder)])
        for verb in (store.remove, store.rollback, lambda name: store.upload(name, packed(saved / "second" / "cats"))):
            with pytest.raises(RecastConfigError, match="does not tell from it"):
                verb("cats")
        monkeypatch.undo()
        assert (
            sorted(path.parent.name for path in store.folder.glob("*/adapter_config.json"))
            == sorted(store.pool.names)
            == ["cars", "cats", "dogs"]
        )

    @pytest.mark.parametrize("target", ["../elsewhere", "nowhere"])
    def test_a_task_that_is_a_link_is_changed_where_it_lies(self, store, saved, image, target):
        """A version of it would be a link that leads nowhere, or to what somebody else changes."""
        elsewhere, link = store.folder.parent / "elsewhere", store.folder / "cats"
        link.rename(elsewhere)
        link.symlink_to(target, target_is_directory=True)
        before = alone(store.pool, "cats", image)
        for verb in (store.remove, store.rollback, lambda name: store.upload(name, packed(saved / "second" / "cats"))):
            with pytest.raises(RecastConfigError, match="'cats': the task in .* is a link"):
                verb("cats")
        assert link.is_symlink()
        assert store.versions("cats") == []
        assert torch.equal(alone(store.pool, "cats", image), before)

    def test_an_upload_is_on_the_disk_before_it_takes_the_place(self, store, saved, monkeypatch):
        flushed, moved = [], []
        fsync, move = os.fsync, os.replace

        def flushes(handle):
            flushed.append(os.fstat(handle).st_ino)
            fsync(handle)

        def moves(old, new):
            if new == store.folder / "cats":
                moved.extend(flushed)
            move(old, new)

        monkeypatch.setattr(os, "fsync", flushes)
        monkeypatch.setattr(os, "replace", moves)
        store.upload("cats", packed(saved / "second" / "cats"))
        files = [store.folder / "cats" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        assert {file.stat().st_ino for file in files} <= {*moved}
        assert store.folder.stat().st_ino in flushed[len(moved) :]

    def test_what_the_pool_does_not_take_is_not_left_in_the_folder(self, store, saved, image, monkeypatch):
        def fail(*args, **kwargs):
            raise MemoryError

        before, file = alone(store.pool, "cats", image), store.folder / "cats" / "adapter_model.safetensors"
        content = file.read_bytes()
        store.upload("dogs", packed(saved / "second" / "dogs"))
        for verb in (lambda: store.upload("cats", packed(saved / "second" / "cats")), lambda: store.rollback("dogs")):
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(store.pool, "replace_row", fail)
                verb()
        assert file.read_bytes() == content
        assert (store.versions("cats"), store.versions("dogs")) == ([], [1])
        assert store.refresh() == []
        assert torch.equal(alone(store.pool, "cats", image), before)

    @pytest.mark.skipif(os.name == "nt", reason="writers do not take turns there")
    def test_one_that_is_opened_meanwhile_waits_for_an_upload(self, store, saved, image, monkeypatch):
        """Another process that looked for what a killed one left behind took the upload's files away."""
        read, opened = store.pool.read, []

        def read_late(*args, **kwargs):
            thread = threading.Thread(target=lambda: opened.append(TaskStore(store.folder, store.pool)))
            thread.start()
            thread.join(0.5)
            assert not opened
            monkeypatch.undo()
            threads.append(thread)
            return read(*args, **kwargs)

        threads: list[threading.Thread] = []
        monkeypatch.setattr(store.pool, "read", read_late)
        store.upload("lions", packed(saved / "second" / "cats"))
        threads[0].join()
        assert len(opened) == 1
        assert "lions" in store.pool
        assert (store.folder / "lions").is_dir()


class TestFullDisk:
    """Whichever of its moves fails, a verb leaves folder, versions and service as they were."""

    @pytest.mark.parametrize("fails", [1, 2])
    def test_upload(self, fails, store, saved, image, monkeypatch):
        self.check(lambda: store.upload("cats", packed(saved / "second" / "cats")), fails, store, image, monkeypatch)

    @pytest.mark.parametrize("fails", [1, 2, 3])
    def test_rollback(self, fails, store, saved, image, monkeypatch):
        store.upload("cats", packed(saved / "second" / "cats"))
        self.check(lambda: store.rollback("cats"), fails, store, image, monkeypatch)

    def test_remove(self, store, image, monkeypatch):
        self.check(lambda: store.remove("cats"), 1, store, image, monkeypatch)

    @staticmethod
    def check(verb, fails, store, image, monkeypatch):
        def files():
            return sorted(path.relative_to(store.folder) for path in store.folder.rglob("*") if path.is_file())

        before, lay, replace, calls = alone(store.pool, "cats", image), files(), os.replace, []

        def fail_once(old, new):
            calls.append(new)
            if len(calls) == fails:
                raise OSError("No space left on device")
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail_once)
            with pytest.raises(OSError, match="No space"):
                verb()
        assert files() == lay
        assert torch.equal(alone(store.pool, "cats", image), before)
        assert store.refresh() == store.refresh() == []
        assert store.problems == {}
        verb()  # and it can be done again
        assert files() != lay
