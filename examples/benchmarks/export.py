"""An exported graph that takes a task, beside the plain graph and ONNX Runtime's own LoRA adapters.

    python examples/benchmarks/export.py                                     # ViT-Small, fc1 + fc2, batch 1 and 4
    python examples/benchmarks/export.py --model resnet18 --targets conv --no-lora
    python examples/benchmarks/export.py --level extended                    # without blocks of channels, as off x86

It needs onnx, onnxscript and onnxruntime. All graphs are exported the same way and run in ONNX Runtime on a CPU; LoRA's
matrices are inputs of its graph that a loaded ``LoraAdapter`` fills in.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from peft import LoraConfig, get_peft_model
from rivals import MODEL, QUICK, TARGET_SETS, backbone, images, randomise
from safetensors.numpy import load as load_tensors
from safetensors.numpy import load_file, save
from timing import Row, Tables, arguments, compare, finish, seconds, start
from torch import Tensor, nn

from recast_peft import RecastConfig, TaskPool, export_onnx, export_task, export_tasks, get_recast_model

ONE, TWO, PRODUCTS, TABLE = "RECAST, one template", "RECAST, groups of two", "RECAST, groups of two, products", "RECAST, table"
CORE = "RECAST, 2 directions"
LORA = "LoRA r=8, LoraAdapter"
CLASSES, SAMPLES_TASKS = 10, 4
MANY, REPEATS = 100, 300  # tasks of one file; swaps that are timed together
LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}


def task_model(options: Namespace, **config: Any) -> Any:
    """A model with one task of its own classifier."""
    targets = None if options.targets is None else TARGET_SETS[options.targets]
    model = get_recast_model(
        backbone(options.model), RecastConfig(target_modules=targets, num_classes=CLASSES, **config), "task"
    )
    randomise(model)
    return model.eval()


class WithLora(nn.Module):
    """A model with a LoRA whose matrices are given with each call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]

    def forward(self, x: Tensor, matrices: list[Tensor]) -> Tensor:
        """Output for images and all matrices, in the order of ``names``."""
        return torch.func.functional_call(self.model, dict(zip(self.names, matrices, strict=True)), (x,))


class Graphs:
    """Sessions of all graphs, with what each is given beside the images."""

    def __init__(self, folder: Path, options: Namespace) -> None:
        self.folder, self.options = folder, options
        self.calls: dict[str, Callable[[np.ndarray], Any]] = {}
        self.bytes: dict[str, int] = {}
        self.adapters: list[Any] = []

    def open(self, name: str, path: Path, task: dict[str, np.ndarray] | None = None, adapter: Path | None = None) -> None:
        """Open a graph, and remember how it is called."""
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # not that LoRA's matrices may be overridden
        settings.intra_op_num_threads = self.options.threads
        settings.graph_optimization_level = LEVELS[self.options.level]
        session = onnxruntime.InferenceSession(str(path), settings)
        run_options = onnxruntime.RunOptions()
        if adapter is not None:
            held = onnxruntime.LoraAdapter()
            held.Load(str(adapter))
            run_options.add_active_adapter(held)
            self.adapters.append(held)  # the options do not keep it
        rows = "rows" in [value.name for value in session.get_inputs()]

        def call(x: np.ndarray) -> Any:
            given = {"rows": np.arange(len(x)) % SAMPLES_TASKS} if rows else task or {}
            return session.run(None, {"x": x, **given}, run_options)

        self.calls[name] = call
        self.bytes[name] = path.stat().st_size

    def add_plain(self, x: Tensor) -> None:
        """The plain model."""
        path = self.folder / "plain.onnx"
        dynamic = ({0: torch.export.Dim("batch")},)
        model = backbone(self.options.model, CLASSES).eval()
        options: dict[str, Any] = {"dynamic_shapes": dynamic, "input_names": ["x"], "dynamo": True, "verbose": False}
        torch.onnx.export(model, (torch.cat([x, x]),), path, external_data=False, **options)
        self.open("plain", path)

    def add_task(self, name: str, x: Tensor, way: str = "auto", **config: Any) -> None:
        """A graph that takes a task."""
        model = task_model(self.options, **config)
        path = export_onnx(model, self.folder / f"{name}.onnx", x, way=way)
        export_task(model, self.folder / f"{name}.safetensors")
        self.open(name, path, load_file(self.folder / f"{name}.safetensors"))

    def add_table(self, x: Tensor) -> None:
        """A graph with a few tasks inside, another one for each sample."""
        model = task_model(self.options, group_size=1)
        self.open(TABLE, export_onnx(model, self.folder / "table.onnx", x, tasks=["task"] * SAMPLES_TASKS))

    def add_lora(self, x: Tensor) -> None:
        """PEFT's LoRA as ONNX Runtime has it."""
        targets = TARGET_SETS[self.options.targets]
        model = get_peft_model(backbone(self.options.model, CLASSES), LoraConfig(target_modules=targets, r=8)).eval()
        randomise(model)
        wrapped = WithLora(model)
        matrices = [model.get_parameter(name).detach() for name in wrapped.names]
        path = self.folder / "lora.onnx"
        dynamic = ({0: torch.export.Dim("batch")}, [None] * len(matrices))
        inputs = ["x", *wrapped.names]
        options: dict[str, Any] = {"dynamic_shapes": dynamic, "input_names": inputs, "dynamo": True, "verbose": False}
        torch.onnx.export(wrapped, (torch.cat([x, x]), matrices), path, external_data=False, **options)
        graph = onnx.load(path)
        zeros = [
            onnx.numpy_helper.from_array(np.zeros(m.shape, np.float32), n) for n, m in zip(wrapped.names, matrices, strict=True)
        ]
        graph.graph.initializer.extend(zeros)  # an adapter fills in only what has a default
        onnx.save(graph, path)
        adapter = onnxruntime.AdapterFormat()
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(m.numpy()) for n, m in zip(wrapped.names, matrices, strict=True)}
        adapter.set_parameters(values)
        adapter.export_adapter(str(self.folder / "lora.adapter"))
        self.open(LORA, path, adapter=self.folder / "lora.adapter")


@contextmanager
def graphs(options: Namespace) -> Iterator[Graphs]:
    """All graphs, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        made = Graphs(Path(folder), options)
        x = images(backbone(options.model, 0), 1)
        made.add_plain(x)
        made.add_task(ONE, x, group_size=1)
        if not options.swaps_only:
            made.add_table(x)
            made.add_task(CORE, x, num_directions=2)
        if options.two and not options.swaps_only:
            made.add_task(TWO, x, group_size=2)
            made.add_task(PRODUCTS, x, way="output", group_size=2)
        if options.lora and options.targets is not None:
            made.add_lora(x)
        yield made


def latency(made: Graphs, batch: int, rounds: int) -> list[Row]:
    """Milliseconds of a call, and sizes of the graphs."""
    x = images(backbone(made.options.model, 0), batch).numpy()
    timed = compare(rounds, {name: (lambda c=call: c(x)) for name, call in made.calls.items()})  # type: ignore[misc]
    size = made.bytes["plain"]
    return [
        {"graph": n, "ms": t.seconds * 1e3, "ratio to plain": t.ratio, "size, ratio to plain": made.bytes[n] / size}
        for n, t in timed.items()
    ]


def read_task(path: Path) -> dict[str, np.ndarray]:
    """A task from its file, without any library (docs/reference/files.md)."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {name: entry for name, entry in json.loads(content[8:start]).items() if name != "__metadata__"}
    return {
        name: np.frombuffer(content, "<f4", (end - begin) // 4, start + begin).reshape(entry["shape"])
        for name, entry in tensors.items()
        for begin, end in [entry["data_offsets"]]
    }


def swaps(made: Graphs, rounds: int) -> list[Row]:
    """Microseconds to have another task ready for the next call: over and over, and between calls of the plain graph."""
    folder, path = made.folder, made.folder / f"{ONE}.safetensors"
    many = load_tensors(save({name: np.stack([value] * MANY) for name, value in load_file(path).items()}))
    numbers = cycle(range(MANY))

    def row() -> dict[str, np.ndarray]:
        i = next(numbers)
        return {name: value[i] for name, value in many.items()}

    swap: dict[str, Callable[[], Any]] = {
        "RECAST, a task's file, by safetensors": lambda: load_file(path),
        "RECAST, a task's file, by hand": lambda: read_task(path),
        f"RECAST, a row of a file of {MANY} tasks that was read before": row,
    }
    if (folder / "lora.adapter").exists():
        swap["LoRA r=8, a LoraAdapter's file"] = lambda: onnxruntime.LoraAdapter().Load(str(folder / "lora.adapter"))
    over = compare(rounds, swap, repeat=REPEATS)
    x = images(backbone(made.options.model, 0), 1).numpy()
    times: dict[str, list[float]] = {name: [] for name in swap}
    for _ in range(rounds):
        for name, function in swap.items():
            made.calls["plain"](x)
            times[name].append(seconds(function))
    rows: list[Row] = [
        {"swap": n, "over and over": over[n].seconds * 1e6, "between calls": statistics.median(t) * 1e6}
        for n, t in times.items()
    ]
    again = compare(min(rounds, 5), {"": lambda: onnxruntime.InferenceSession(str(folder / "plain.onnx"))})[""].seconds * 1e6
    return [*rows, {"swap": "open the plain graph again", "over and over": again, "between calls": again}]


def files(made: Graphs, tasks: int) -> list[Row]:
    """Bytes of one task, and of many in one file."""
    folder = made.folder
    rows: list[Row] = [{"file": "RECAST, one task with a classifier", "bytes": (folder / f"{ONE}.safetensors").stat().st_size}]
    targets = None if made.options.targets is None else TARGET_SETS[made.options.targets]
    for count, classes in ((tasks, None), (100, CLASSES)):
        pool = TaskPool(
            get_recast_model(backbone(made.options.model, 0), RecastConfig(target_modules=targets, group_size=1)),
        )
        for i in range(count):
            pool.add(f"task {i}", None if classes is None else RecastConfig(num_classes=classes))
        export_tasks(pool, folder / "tasks.safetensors")
        what = f"{count:,} tasks" + ("" if classes is None else f" with classifiers of {classes} classes")
        rows.append({"file": f"RECAST, {what}", "bytes": (folder / "tasks.safetensors").stat().st_size})
    if (folder / "lora.adapter").exists():
        rows.append({"file": "LoRA r=8, one adapter without a classifier", "bytes": (folder / "lora.adapter").stat().st_size})
    return rows


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--targets", choices=[*TARGET_SETS, "default"], default="mlp")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--no-lora", dest="lora", action="store_false")
    parser.add_argument("--no-two", dest="two", action="store_false", help="leave groups of two out")
    parser.add_argument("--swaps-only", action="store_true", help="time no calls, and build only what swaps need")
    parser.add_argument("--level", choices=list(LEVELS), default="all", help="of ONNX Runtime's optimisations")
    options = start(parser, given)
    options.targets = None if options.targets == "default" else options.targets
    if options.quick:
        options.model, options.rounds, options.batches, options.tasks = QUICK, 1, [1], 20
    tables: Tables = {}
    with graphs(options) as made:
        what = f"{options.model}, targets {options.targets or 'by default'}, optimisations: {options.level}"
        for batch in [] if options.swaps_only else options.batches:
            tables[f"exported graphs, {what}, batch {batch}"] = latency(made, batch, options.rounds)
        tables[f"microseconds of a swap, {what}"] = swaps(made, options.rounds)
        if not options.swaps_only:
            tables[f"files, {what}"] = files(made, options.tasks)
    return finish("export", options, tables)


if __name__ == "__main__":
    main()
