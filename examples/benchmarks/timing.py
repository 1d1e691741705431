"""Timing for the benchmarks: two things are timed in turns, so that a busy machine slows both, and medians are compared."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(rounds: int, *functions: Callable[[], Any], repeat: int = 1) -> list[float]:
    """Median seconds of each function, called in turns ``rounds`` times after one round of warm-up.

    Args:
        rounds: how often each is timed.
        functions: what is compared.
        repeat: calls within one timing, for what is too short to be timed alone.
    """
    times: list[list[float]] = [[] for _ in functions]
    for step in range(rounds + 1):
        for own, function in zip(times, functions, strict=True):
            taken = seconds(lambda f=function: [f() for _ in range(repeat)]) / repeat  # type: ignore[misc]
            if step:
                own.append(taken)
    return [statistics.median(own) for own in times]


def machine() -> str:
    """The machine in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as text, numbers to the right."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Write results as JSON with the machine, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
