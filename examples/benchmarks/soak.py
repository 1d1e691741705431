"""Eight clients on one server while tasks come, change, go and are rolled back; every answer is held against a reference.

    python examples/benchmarks/soak.py                 # ten minutes
    python examples/benchmarks/soak.py --seconds 60

Each client has an image of its own, so that an answer to another client's sample is as wrong as one of another task. Prints how
many requests were answered, the errors by kind (only those that were provoked may appear: requests for tasks that are gone,
inputs of a wrong shape), and the memory of the process in each tenth of the time. Exits with 1 if an answer is wrong.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import threading
import time
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
from fleet_servers import resident_megabytes
from rivals import QUICK, backbone, images
from swaps import TARGETS
from timing import Row, Tables, arguments, finish, start
from torch import Tensor

from recast_peft import RecastConfig, RecastError, TaskPool, get_recast_model
from recast_peft.integrations.serving import TaskServer, TaskStore

TASKS, CLIENTS = 12, 8


def packed_task(name: str, seed: int, folder: Path, options: Namespace) -> bytes:
    """A saved task with random numbers as a zip file."""
    model = get_recast_model(backbone(options.model), RecastConfig(target_modules=TARGETS, num_classes=2 + seed % 5), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}" in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder / str(seed))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in (folder / str(seed) / name).iterdir():
            archive.write(path, path.name)
    return content.getvalue()


class Soak:
    """One run."""

    def __init__(self, folder: Path, options: Namespace) -> None:
        self.options = options
        model = get_recast_model(backbone(options.model), RecastConfig(target_modules=TARGETS), "layout").eval()
        self.pool = TaskPool(model)
        self.pool.deactivate()
        self.store = TaskStore(folder / "live", self.pool)
        self.images = images(backbone(options.model), CLIENTS)
        self.uploads: dict[str, list[bytes]] = {}
        self.right: dict[str, list[Tensor]] = {}
        for i in range(TASKS):
            name = f"task-{i}"
            self.uploads[name] = [packed_task(name, 2 * i + version, folder, options) for version in range(2)]
            self.right[name] = []
            for content in self.uploads[name]:
                self.store.upload(name, content)
                self.right[name].append(model(self.images, task_ids=[name] * CLIENTS))
        self.check_answers_differ()
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.end = time.monotonic() + options.seconds

    def check_answers_differ(self) -> None:
        """Refuse references that would not show a wrong answer."""
        all_right = [answer for versions in self.right.values() for outputs in versions for answer in outputs]
        for i, first in enumerate(all_right):
            if any(is_same(first, second) for second in all_right[:i]):
                raise RuntimeError("two references are alike: no wrong answer would be noticed")

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def client(self, seed: int, server: TaskServer) -> None:
        rng, image = random.Random(seed), self.images[seed]
        while time.monotonic() < self.end:
            name = rng.choice([*self.right])
            is_bad = rng.random() < 0.02
            try:
                output = server(name, image[:, :7, :9] if is_bad else image).output
            except Exception as error:
                was_provoked = is_bad or "no task" in str(error) or "was removed" in str(error)
                was_provoked &= isinstance(error, RecastError)
                self.count(f"provoked: {type(error).__name__}" if was_provoked else "ERROR")
                continue
            self.count("answered")
            if not any(is_same(output, outputs[seed]) for outputs in self.right[name]):
                self.wrong.append(name)

    def operator(self) -> None:
        rng = random.Random(99)
        while time.monotonic() < self.end:
            name = rng.choice([*self.right])
            verb = rng.choice(["upload", "upload", "rollback", "remove"])
            try:
                if verb == "upload" or name not in self.pool:
                    self.store.upload(name, rng.choice(self.uploads[name]))
                elif verb == "rollback":
                    self.store.rollback(name)
                else:
                    self.store.remove(name)
                self.count(f"operator: {verb}")
            except Exception:
                self.count("ERROR")
            time.sleep(0.01)

    def run(self) -> list[Row]:
        """Run it, and give what happened."""
        samples: list[float] = []
        with TaskServer(self.pool) as server:
            threads = [threading.Thread(target=self.client, args=(i, server)) for i in range(CLIENTS)]
            threads.append(threading.Thread(target=self.operator))
            for thread in threads:
                thread.start()
            while time.monotonic() < self.end:
                time.sleep(min(1.0, self.options.seconds / 10))
                samples.append(resident_megabytes())
            for thread in threads:
                thread.join()
        tenth = max(1, len(samples) // 10)
        self.counts["wrong answers"] = len(self.wrong)
        rows: list[Row] = [{"what": what, "number": float(count)} for what, count in sorted(self.counts.items())]
        for first in range(0, len(samples) - tenth + 1, tenth):
            mean = sum(samples[first : first + tenth]) / tenth
            moment = self.options.seconds * first / len(samples)
            rows.append({"what": f"MB of the process, from {moment:.0f} s", "number": mean})
        return rows


def is_same(output: Tensor, right: Tensor) -> bool:
    """Whether an answer is this one; batches of other sizes round in other ways."""
    return output.shape == right.shape and torch.allclose(output, right, atol=1e-4)


@torch.no_grad()
def main(given: list[str] | None = None) -> Tables:
    """Run, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=QUICK, help="of timm (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0)
    options = start(parser, given)
    if options.quick:
        options.seconds = 1.5
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options)
        tables = finish("soak", options, {f"{options.seconds:.0f} seconds, {options.model}, {CLIENTS} clients": soak.run()})
    if soak.wrong or soak.counts["ERROR"]:
        sys.exit(1)
    return tables


if __name__ == "__main__":
    main()
