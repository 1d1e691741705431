"""A process that saves again and again is killed: what lies in the folder is whole, and of one moment.

``RECAST_KILLS=300 pytest tests/storage/test_killed.py`` kills each kind of save that often.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import signal
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_vit
from peft import PeftModel

from recast_peft import (
    RecastConfig,
    TaskPool,
    get_recast_model,
    load_bank,
    random_bank,
    save_compressed_model,
    write_model_card,
)
from recast_peft.hub.task_files import read_task_config
from recast_peft.integrations.compressed import _read
from recast_peft.integrations.serving import TaskStore
from recast_peft.storage.tensors import read_tensors

KILLS = int(os.environ.get("RECAST_KILLS", "15"))  # of each kind
QKV = {"target_modules": ["qkv"]}


def fill(model: PeftModel, value: int) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "recast_coefficients" in name:
                parameter.fill_(value)


class Tasks:
    def __init__(self) -> None:
        self.model = get_recast_model(tiny_vit(), RecastConfig(**QKV, num_classes=3), "task")

    def save(self, folder: Path, value: int) -> None:
        fill(self.model, value)
        self.model.peft_config["task"].results = {"value": value, **{f"more {i}": "x" * 100 for i in range(value)}}
        self.model.save_pretrained(str(folder))

    def read(self, folder: Path) -> set[int]:
        config = read_task_config(folder / "task")
        tensors = read_tensors(folder / "task" / "adapter_model.safetensors").tensors
        numbers = {float(t.max()) for key, t in tensors.items() if "coefficients" in key}
        assert (folder / "task" / "README.md").read_text(encoding="utf-8").endswith("-->\n")
        return {config.object("results").integer("value", 0, 9), *map(int, numbers)}


class Cards:
    """The card alone, beside a task that stays."""

    def __init__(self) -> None:
        self.model = get_recast_model(tiny_vit(), RecastConfig(**QKV), "task")

    def save(self, folder: Path, value: int) -> None:
        whole = ("adapter_config.json", "adapter_model.safetensors")  # another writer may be at it for the first time
        if not all((folder / "task" / file).is_file() for file in whole):
            self.model.save_pretrained(str(folder))
        results = {"value": value, **{f"more {i}": "x" * 1000 for i in range(value)}}
        write_model_card(folder / "task", results=results)

    def read(self, folder: Path) -> set[int]:
        text = (folder / "task" / "README.md").read_text(encoding="utf-8")
        assert text.endswith("-->\n")
        values = {int(value) for value in re.findall(r"^\| value \| (\d) \|", text, re.M)}
        return values | {len(re.findall(r"^\| more \d \| x{1000} \|", text, re.M))}


class Uploads:
    """A task that a store takes in from a zip file, as a service does it; whoever starts again finds it."""

    def __init__(self) -> None:
        self.model = get_recast_model(tiny_vit(), RecastConfig(**QKV), "task")
        self.store: TaskStore | None = None

    def save(self, folder: Path, value: int) -> None:
        fill(self.model, value)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive, tempfile.TemporaryDirectory() as saved:
            self.model.save_pretrained(saved)
            for path in Path(saved, "task").iterdir():
                archive.write(path, path.name)
        self.store = self.store or TaskStore(folder, TaskPool(self.model), keep=2)
        self.store.upload("task", content.getvalue())

    def read(self, folder: Path) -> set[int]:
        store = TaskStore(folder, TaskPool(self.model))
        store.refresh()
        assert not store.problems
        return {int(value) for row in store.pool.coefficients("task").values() for value in row}


class Banks:
    def __init__(self) -> None:
        self.banks = [random_bank(tiny_vit(), RecastConfig(**QKV), num_templates=2, seed=value) for value in range(3)]

    def save(self, folder: Path, value: int) -> None:
        self.banks[value].save(folder)

    def read(self, folder: Path) -> set[int]:
        fingerprint = load_bank(folder).fingerprint
        json.loads((folder / "recast_bank.json").read_text())
        return {value for value, bank in enumerate(self.banks) if bank.fingerprint == fingerprint}


class Models:
    def __init__(self) -> None:
        self.models = [get_recast_model(tiny_vit(seed=value), RecastConfig(**QKV, num_templates=1)) for value in range(3)]
        for value, model in enumerate(self.models):
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if name.endswith("mlp.fc1.bias")).fill_(value)

    def save(self, folder: Path, value: int) -> None:
        save_compressed_model(self.models[value], folder)

    def read(self, folder: Path) -> set[int]:
        bank, rest = _read(folder)  # refuses a bank beside another backbone
        assert bank.fingerprint
        return {int(next(t for name, t in rest.items() if name.endswith("mlp.fc1.bias"))[0])}


class Pools:
    def __init__(self) -> None:
        self.pool = TaskPool(get_recast_model(tiny_vit(), RecastConfig(**QKV), "first"))
        self.pool.add("first", "first")

    def save(self, folder: Path, value: int) -> None:
        self.pool.table.data.fill_(value)
        folder.mkdir(exist_ok=True)
        self.pool.save(folder / "pool.safetensors")

    def read(self, folder: Path) -> set[int]:
        return {int(read_tensors(folder / "pool.safetensors", floating=False).tensors["coefficients"].max())}


KINDS: dict[str, Callable[[], Any]] = {
    "task": Tasks,
    "card": Cards,
    "bank": Banks,
    "compressed model": Models,
    "packed pool": Pools,
    "upload": Uploads,
}


def save_for_ever(kind: Any, folder: Path, started: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    value = 1
    while True:
        value = 3 - value
        kind.save(folder, value)
        started.set()


@pytest.mark.skipif(os.name == "nt", reason="processes are killed by signals")
@pytest.mark.parametrize("name", KINDS)
def test_old_or_new_and_never_torn(name: str, tmp_path: Path) -> None:
    kind, rng = KINDS[name](), random.Random(name)
    context = multiprocessing.get_context("fork")
    kind.save(tmp_path / "out", 1)
    seen: set[int] = set()
    for _ in range(KILLS):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(kind, tmp_path / "out", started), daemon=True)
        start = time.monotonic()
        process.start()
        assert started.wait(60)
        took = time.monotonic() - start  # waits are counted in saves, whatever the machine does beside
        time.sleep(rng.random() * 6 * took)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = kind.read(tmp_path / "out")
        assert len(found) == 1, found
        assert found <= {1, 2}
        seen |= found
    assert seen == {1, 2}
    kind.save(tmp_path / "out", 1)  # what is left over does not matter to the next one
    assert kind.read(tmp_path / "out") == {1}


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files stands for a full disk")
@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_leaves_the_old_one(name: str, tmp_path: Path) -> None:
    import resource

    kind = KINDS[name]()
    kind.save(tmp_path / "out", 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
        with pytest.raises(OSError):
            kind.save(tmp_path / "out", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert kind.read(tmp_path / "out") == {1}
    assert not list(tmp_path.rglob("*.part"))  # nothing is left over either
    kind.save(tmp_path / "out", 2)
    assert kind.read(tmp_path / "out") == {2}


@pytest.mark.skipif(os.name == "nt", reason="sizes of files are limited by the operating system's own means")
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_full_disk_is_an_error_of_the_system_in_either_format(safe_serialization: bool, tmp_path: Path) -> None:
    import resource

    model = get_recast_model(tiny_vit(), RecastConfig(**QKV, num_classes=1000))  # 36,000 bytes, more than the card
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(OSError, match="could not be written"):
            model.save_pretrained(str(tmp_path), safe_serialization=safe_serialization)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="processes are killed by signals")
@pytest.mark.parametrize("name", [name for name in KINDS if name != "upload"])  # a folder has one store
def test_two_writers_do_not_mix(name: str, tmp_path: Path) -> None:
    kind, context = KINDS[name](), multiprocessing.get_context("fork")
    start = time.monotonic()
    started = [context.Event() for _ in range(2)]
    processes = [context.Process(target=save_for_ever, args=(kind, tmp_path / "out", event), daemon=True) for event in started]
    for process in processes:
        process.start()
    try:
        assert all(event.wait(60) for event in started)
        took = time.monotonic() - start
        for _ in range(3):  # held still, so that all files are of one moment
            time.sleep(6 * took)
            for process in processes:
                os.kill(process.pid or 0, signal.SIGSTOP)
            found = kind.read(tmp_path / "out")
            for process in processes:
                os.kill(process.pid or 0, signal.SIGCONT)
            assert len(found) == 1, found
    finally:
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    assert len(kind.read(tmp_path / "out")) == 1
