"""Tables and pictures of a study: gain over the linear probe against the numbers that a task trains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study import Method, Study


@dataclass(frozen=True)
class Row:
    """What a method reached.

    Attributes:
        family: methods of one family are joined by a line.
        name: of the method.
        numbers: trained beside the classifier.
        lrs: learning rates.
        accuracies: by task, one for each seed.
        gains: by task, points above the probe on the same images, one for each seed.
    """

    family: str
    name: str
    numbers: int
    lrs: dict[str, float]
    accuracies: dict[str, list[float]]
    gains: dict[str, list[float]]

    @property
    def by_seed(self) -> list[float]:
        """Gain of every seed, mean over tasks, in points."""
        return [statistics.fmean(each) for each in zip(*self.gains.values(), strict=True)]

    @property
    def gain(self) -> float:
        """Mean gain over tasks and seeds, in points."""
        return statistics.fmean(self.by_seed)

    @property
    def spread(self) -> float:
        """Standard deviation of the gain over seeds, in points; 0 for one seed."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else 0.0


def row_of(study: Study, family: str, method: Method, probe: Method, tasks: Sequence[str], seeds: Sequence[int]) -> Row | None:
    """What is known of a method, with those seeds of which all tasks are there; None without any."""
    whole = [s for s in seeds if all(study.known(m, task, s) for m in (method, probe) for task in tasks)]
    if not whole:
        return None
    found = {task: [study.run(method, task, s) for s in whole] for task in tasks}
    base = {task: [study.run(probe, task, s).accuracy for s in whole] for task in tasks}
    return Row(
        family=family,
        name=method.name,
        numbers=found[tasks[0]][0].numbers,
        lrs=method.lrs or {"head": method.head_lr or study.schedule.head_lr},
        accuracies={task: [run.accuracy for run in runs] for task, runs in found.items()},
        gains={t: [100 * (run.accuracy - b) for run, b in zip(found[t], base[t], strict=True)] for t in tasks},
    )


def table(rows: Sequence[Row], reference: str) -> str:
    """The rows as Markdown.

    Args:
        rows: the probe first.
        reference: the name of the row whose gain is 100 percent.
    """
    whole = next((row.gain for row in rows if row.name == reference), None)
    tasks = list(rows[0].gains)
    lines = [
        f"| method | numbers | learning rate | accuracy | gain | spread | share of {reference} | {' | '.join(tasks)} | seeds |",
        "|---" * (8 + len(tasks)) + "|",
    ]
    for row in rows:
        found = 100 * statistics.fmean(statistics.fmean(each) for each in row.accuracies.values())
        rate = " + ".join(f"{lr:g}" for lr in row.lrs.values())
        share = f"{100 * row.gain / whole:.0f} %" if whole and whole > 0 and any(row.by_seed) else "-"
        by_task = " | ".join(f"{statistics.fmean(each):+.1f}" for each in row.gains.values())
        cells = [row.name, f"{row.numbers:,}", rate, f"{found:.1f}", f"{row.gain:+.2f}", f"{row.spread:.2f}", share, by_task]
        lines.append(f"| {' | '.join(cells)} | {len(row.by_seed)} |")
    return "\n".join(lines)


def precision(rows: Sequence[Row]) -> float | None:
    """Standard error of a row's gain in points, by the spread over seeds that the rows have in common (pooled).

    The probe, whose gain is zero by definition, does not count.

    Returns:
        None if no row has two seeds.
    """
    spreads = [(row.spread**2, len(row.by_seed)) for row in rows if len(row.by_seed) > 1 and any(row.by_seed)]
    if not spreads:
        return None
    return statistics.fmean(variance / seeds for variance, seeds in spreads) ** 0.5


def draw(rows: Sequence[Row], path: Path, title: str, base: str = "linear probe") -> None:
    """Gain over the probe against numbers, on a logarithmic axis; bars are the spread over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    markers = iter("osD^vP*Xp<>h")
    for family in dict.fromkeys(row.family for row in rows if row.numbers):
        members = sorted((row for row in rows if row.family == family), key=lambda row: row.numbers)
        axes.errorbar(
            [row.numbers for row in members],
            [row.gain for row in members],
            [row.spread for row in members],
            marker=next(markers),
            linewidth=1.2 if len(members) > 1 else 0,
            elinewidth=0.8,
            capsize=2,
            label=family,
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="numbers trained beside the classifier", ylabel=f"points above the {base}", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
