"""What the benchmarks share: timing in turns, the command line, tables, and results as JSON with a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Row = dict[str, Any]
Tables = dict[str, list[Row]]  # title -> rows with the same keys


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and the median of its ratios to the reference that was timed in the same round."""

    seconds: float
    ratio: float


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = ["wall"]  # the one that --clock names


def seconds(function: Callable[[], Any]) -> float:
    """Time of one call, by the clock that the command line names."""
    clock = CLOCKS[_clock[0]]
    begin = clock()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - begin


def compare(
    rounds: int, functions: dict[str, Callable[[], Any]], reference: str | None = None, repeat: int = 1
) -> dict[str, Timing]:
    """Time functions in turns, so that a busy machine slows all of them.

    Args:
        rounds: how often each is timed, after one round of warm-up (three on an accelerator).
        functions: what is compared, by name.
        reference: the name that ratios refer to; None means the first.
        repeat: calls within one timing, for what is too short to be timed alone.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    warm_up = 3 if torch.cuda.is_initialized() else 1  # an accelerator's libraries choose their kernels first
    for step in range(rounds + warm_up):
        for name, function in functions.items():
            taken = seconds(lambda f=function: [f() for _ in range(repeat)]) / repeat  # type: ignore[misc]
            if step >= warm_up:
                times[name].append(taken)
    base = times[reference or next(iter(functions))]
    ratios = {name: statistics.median(own / other for own, other in zip(t, base, strict=True)) for name, t in times.items()}
    return {name: Timing(statistics.median(own), ratios[name]) for name, own in times.items()}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the results as JSON and a picture")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few rounds: shows that it runs, measures nothing"
    )
    parser.add_argument("--threads", type=int, default=1)
    about = "cpu: time of this process alone, for a machine that has other work (default: %(default)s)"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=about)
    return parser


PRECISIONS = ("float32", "autocast", "bfloat16")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options of those that run on an accelerator as well."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    about = "float32; autocast: weights in float32, products in bfloat16; bfloat16: weights too (default: %(default)s)"
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help=about)
    about = "calls within one timing, for what is too short to be timed alone (default: %(default)s)"
    parser.add_argument("--repeat", type=int, default=1, help=about)


def in_precision(model: nn.Module, options: argparse.Namespace) -> Callable[..., Any]:
    """What calls a model on the device and in the precision that the command line names; the model is put there."""
    model.to(options.device)
    if options.precision == "bfloat16":
        model.bfloat16()
    if options.precision != "autocast":
        return model

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(torch.device(options.device).type, torch.bfloat16):
            return model(*args, **kwargs)

    return call


def where(options: argparse.Namespace) -> str:
    """What a table's title says of device and precision; nothing for float32 on a CPU."""
    device = "" if options.device == "cpu" else f", {options.device}"
    return device + ("" if options.precision == "float32" else f", {options.precision}")


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph that is replayed: what the device does, without the host's time to ask for it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def start(parser: argparse.ArgumentParser, given: list[str] | None) -> argparse.Namespace:
    """Read the command line, set threads and seed, and say what machine this is."""
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    _clock[0] = options.clock
    print(machine())
    return options


def machine() -> str:
    """The machine in one line."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} CPU thread(s)"
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_initialized() else ""
    return f"{platform.machine()} ({processor()}), {cores}{device}, torch {torch.__version__}"


def processor() -> str:
    """The processor's name, as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(rows: list[Row]) -> str:
    """Rows with the same keys as text, numbers to the right."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def markdown(rows: list[Row]) -> str:
    """Rows with the same keys as a table for a documentation page."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def finish(name: str, options: argparse.Namespace, tables: Tables, column: str | None = None) -> Tables:
    """Print the tables; with an output folder write them as JSON, and one column of them as a picture.

    Args:
        name: of the benchmark and its files.
        options: of the command line.
        tables: the results.
        column: to be drawn; None draws nothing.

    Returns:
        the tables.
    """
    for title, rows in tables.items():
        print(f"\n{title}\n{table(rows)}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "clock": options.clock, "quick": options.quick, "tables": tables}
        (options.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        if column is not None:
            bars(column, tables, options.output / f"{name}.png")
    return tables


def bars(column: str, tables: Tables, path: Path) -> None:
    """One column of the tables that have it as horizontal bars, with a line at the reference."""
    from matplotlib.figure import Figure

    tables = {title: rows for title, rows in tables.items() if column in rows[0]}
    figure = Figure(figsize=(5.5 * len(tables), 3.6), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        names = [str(next(iter(row.values()))) for row in rows]
        axes.barh(names, [row[column] for row in rows], color=["tab:red" if "RECAST" in n else "tab:gray" for n in names])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(column)
        axes.tick_params(labelsize=8)
        if "ratio" in column:
            axes.axvline(1, lw=0.8, color="black")
        elif max(row[column] for row in rows) > 100 * max(1e-9, min(row[column] for row in rows)):
            axes.set_xscale("log")
    figure.savefig(path, dpi=100)
