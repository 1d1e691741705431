"""Who answers in the benchmark of a fleet: a pool of RECAST tasks, in the process and over HTTP, and what is used instead."""

from __future__ import annotations

import copy
import http.client
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rivals import CONFIGS, backbone
from safetensors.torch import save
from swaps import TARGETS
from timing import seconds
from torch import Tensor, nn

from recast_peft import RecastConfig, TaskPool, get_recast_model
from recast_peft.pool.heads import StoredHead

CLASSES, SLOTS = 10, 25
LORA = "LoRA r=8"
Answers = Callable[[list[int]], Any]  # computes one batch for tasks by number


def resident_megabytes(process: int | str = "self") -> float:
    """Memory of a process, as Linux counts it; zero elsewhere."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def alone(work: Callable[[], Any]) -> Any:
    """Do something in a process of its own, so that the memory that it takes is its own."""
    if not hasattr(os, "fork"):
        return work()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


# ---------------------------------------------------------------- a pool


def write_pool(tasks: int, path: Path, options: Namespace) -> None:
    """Write a file of random tasks, each with a classifier in half precision."""
    pool = TaskPool(get_recast_model(backbone(options.model), RecastConfig(target_modules=TARGETS), "first").eval())
    pool.add("task-0", RecastConfig(num_classes=CLASSES, head_dtype="float16"))
    kind, (weight, bias) = (head := pool._heads[0]).kind, head.tensors
    heads = {
        i: StoredHead(kind, (torch.randn_like(weight), bias.clone()), head.labels, torch.float16) for i in range(tasks - 1)
    }
    pool.add_rows([f"task-{i}" for i in range(1, tasks)], torch.randn(tasks - 1, pool.numbers_per_task) * 0.1, heads)
    pool.save(path)


def read_pool(path: Path, options: Namespace) -> tuple[TaskPool, float]:
    """A pool with the tasks of a file, and the seconds that reading them took."""
    pool = TaskPool(get_recast_model(backbone(options.model), RecastConfig(target_modules=TARGETS), "first").eval())
    return pool, seconds(lambda: pool.load(path))


def pooled(pool: TaskPool, x: Tensor) -> Answers:
    """Every batch by the names of its tasks."""
    return lambda tasks: pool.model(x[: len(tasks)], task_ids=pool.ids([f"task-{task}" for task in tasks]))


# ---------------------------------------------------------------- others


def plain(x: Tensor, options: Namespace) -> Answers:
    """The model without any task."""
    model = backbone(options.model).eval()
    return lambda tasks: model(x[: len(tasks)])


def resident_loras(tasks: int, x: Tensor, options: Namespace) -> Answers:
    """PEFT's LoRAs, all of them in memory, mixed batches."""
    model = get_peft_model(backbone(options.model), CONFIGS[LORA](TARGETS), "a0").eval()
    for i in range(1, tasks):
        model.add_adapter(f"a{i}", CONFIGS[LORA](TARGETS))
    model.eval()
    return lambda asked: model(x[: len(asked)], adapter_names=[f"a{task}" for task in asked])


def merged_models(tasks: int, x: Tensor, options: Namespace) -> Answers:
    """One merged model for each task: each computes its own samples of a batch."""
    first = get_peft_model(backbone(options.model), CONFIGS[LORA](TARGETS)).merge_and_unload().eval()
    models: list[nn.Module] = [first, *(copy.deepcopy(first) for _ in range(1, tasks))]

    def answers(asked: list[int]) -> Any:
        return [models[task](x[[i for i, other in enumerate(asked) if other == task]]) for task in {*asked}]

    return answers


class Slots:
    """A few of PEFT's LoRAs in memory, the others on the disk; the one that was not used for the longest time makes room."""

    def __init__(self, x: Tensor, folder: str, options: Namespace) -> None:
        self.x = x
        self.model: PeftModel = get_peft_model(backbone(options.model), CONFIGS[LORA](TARGETS), "stored").eval()
        self.model.save_pretrained(folder)
        self.file = str(Path(folder) / "stored")
        self.held: OrderedDict[int, None] = OrderedDict()
        self.loads = 0

    def __call__(self, asked: list[int]) -> Any:
        wanted = set(asked)
        for task in sorted(wanted):
            if task not in self.held:
                self._load(task, wanted)
            self.held.move_to_end(task)
        return self.model(self.x[: len(asked)], adapter_names=[f"a{task}" for task in asked])

    def _load(self, task: int, wanted: set[int]) -> None:
        spare = [held for held in self.held if held not in wanted]
        while len(self.held) >= max(SLOTS, len(wanted)) and spare:
            gone = spare.pop(0)
            del self.held[gone]
            self.model.delete_adapter(f"a{gone}")
        self.model.load_adapter(self.file, f"a{task}")
        self.model.eval()
        self.held[task] = None
        self.loads += 1


# ---------------------------------------------------------------- over HTTP


class Loopback:
    """``recast-peft serve``'s application with a pool, in another process of this machine.

    Attributes:
        process: id of the server's process.
    """

    def __init__(self, port: int, process: int, image: Tensor) -> None:
        self.port, self.process, self._body = port, process, save({"inputs": image.contiguous()})
        self._mine = threading.local()

    def ask(self, task: int) -> None:
        """One request, over this thread's own connection."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/vnd.safetensors"}
        self._mine.connection.request("POST", f"/v1/tasks/task-{task}/predict", self._body, headers)
        answer = self._mine.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text[:200]!r}")


@contextmanager
def loopback(path: Path, image: Tensor, options: Namespace) -> Iterator[Loopback]:
    """A server of the tasks in a file, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(path, port, options), daemon=True)
    process.start()
    try:
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield Loopback(port, process.pid or 0, image)
    finally:
        process.terminate()
        process.join()


def _serve(path: Path, port: int, options: Namespace) -> None:
    import uvicorn

    from recast_peft.integrations.serving import TaskServer
    from recast_peft.integrations.serving.app import task_app

    pool, _ = read_pool(path, options)
    uvicorn.run(task_app(TaskServer(pool, max_batch=options.batch)), port=port, log_level="error")


@contextmanager
def folder() -> Iterator[Path]:
    """A folder until the block ends."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
