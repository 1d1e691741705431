"""Tables and pictures of a study: gain over the linear probe against the numbers that a task trains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
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
        refitted: accuracies with a classifier that is fitted in closed form to the trained model's features.
        refitted_gains: points above the probe with such a classifier.
        head: learning rate and weight decay of the classifier, where they are known.
    """

    family: str
    name: str
    numbers: int
    lrs: dict[str, float]
    accuracies: dict[str, list[float]]
    gains: dict[str, list[float]]
    refitted: dict[str, list[float]]
    refitted_gains: dict[str, list[float]]
    head: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """Mean gain over tasks and seeds, in points."""
        return statistics.fmean(by_seed(self.gains))

    @property
    def refitted_gain(self) -> float:
        """The same with classifiers that are fitted in closed form."""
        return statistics.fmean(by_seed(self.refitted_gains))


def by_seed(values: dict[str, list[float]]) -> list[float]:
    """For every seed the mean over tasks."""
    return [statistics.fmean(each) for each in zip(*values.values(), strict=True)]


def spread(values: dict[str, list[float]]) -> float:
    """Standard deviation over seeds of the mean over tasks; 0 for one seed."""
    means = by_seed(values)
    return statistics.stdev(means) if len(means) > 1 else 0.0


def row_of(study: Study, family: str, method: Method, probe: Method, tasks: Sequence[str], seeds: Sequence[int]) -> Row | None:
    """What is known of a method, with those seeds of which all tasks are there; None without any."""
    whole = [s for s in seeds if all(study.known(m, task, s) for m in (method, probe) for task in tasks)]
    if not whole:
        return None
    found = {task: [study.run(method, task, s) for s in whole] for task in tasks}
    base = {task: [study.run(probe, task, s) for s in whole] for task in tasks}

    def points(what: str) -> dict[str, list[float]]:
        pairs = {task: zip(found[task], base[task], strict=True) for task in tasks}
        return {
            task: [100 * (getattr(run, what) - getattr(plain, what)) for run, plain in each] for task, each in pairs.items()
        }

    return Row(
        family=family,
        name=method.name,
        numbers=found[tasks[0]][0].numbers,
        lrs=method.lrs,
        head=(method.head_lr or study.schedule.head_lr, method.head_decay),
        accuracies={task: [run.accuracy for run in runs] for task, runs in found.items()},
        gains=points("accuracy"),
        refitted={task: [run.refitted for run in runs] for task, runs in found.items()},
        refitted_gains=points("refitted"),
    )


def table(rows: Sequence[Row], reference: str) -> str:
    """The rows as Markdown.

    Args:
        rows: the probe first.
        reference: the name of the row whose gain is 100 percent.

    Under "classifier" stand its learning rate and weight decay.
    """
    whole = next((row for row in rows if row.name == reference), None)
    lines = [
        f"| method | numbers | learning rate | classifier | accuracy | gain | share of {reference} "
        "| refitted: accuracy | gain | share | seeds |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        rate = " + ".join(f"{lr:g}" for lr in row.lrs.values()) or "-"
        head = ", ".join(f"{value:g}" for value in row.head or ()) or "-"
        trained = _cells(row.accuracies, row.gains, whole and whole.gain)
        refitted = _cells(row.refitted, row.refitted_gains, whole and whole.refitted_gain)
        cells = [row.name, f"{row.numbers:,}", rate, head, *trained, *refitted, str(len(by_seed(row.gains)))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(accuracies: dict[str, list[float]], gains: dict[str, list[float]], whole: float | None) -> list[str]:
    """Mean accuracy in percent, the gain with its spread over seeds, and its share of the reference's."""
    gain = statistics.fmean(by_seed(gains))
    share = f"{100 * gain / whole:.0f} %" if whole and whole > 0.05 and any(by_seed(gains)) else "-"
    around = f" ± {spread(gains):.2f}" if len(by_seed(gains)) > 1 else ""
    return [f"{100 * statistics.fmean(by_seed(accuracies)):.1f}", f"{gain:+.2f}{around}", share]


def paired(values: dict[str, list[float]], others: dict[str, list[float]]) -> tuple[float, float]:
    """Mean difference of two rows over the same tasks and seeds, and its standard error, in points.

    Args:
        values: accuracies by task, one for each seed.
        others: those that are taken off, of the same tasks and seeds.
    """
    differences = [100 * (a - b) for task in values for a, b in zip(values[task], others[task], strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def precision(rows: Sequence[Row]) -> float | None:
    """Standard error of a row's gain in points, by the spread over seeds that the rows have in common (pooled).

    The probe, whose gain is zero by definition, does not count.

    Returns:
        None if no row has two seeds.
    """
    errors = [spread(row.gains) ** 2 / seeds for row in rows if (seeds := len(by_seed(row.gains))) > 1 and row.numbers]
    return statistics.fmean(errors) ** 0.5 if errors else None


def draw(rows: Sequence[Row], path: Path, title: str, base: str = "linear probe") -> None:
    """Gain over the probe against numbers, on a logarithmic axis; bars are the spread over seeds.

    On the left with the classifier that was trained, on the right with one that is fitted afterwards.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 5.0), layout="constrained")
    panels = {"gains": f"points above the {base}", "refitted_gains": "the same, classifiers refitted in closed form"}
    for axes, (what, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        markers = cycle("osD^vP*Xp<>hd8H")
        for family in dict.fromkeys(row.family for row in rows if row.numbers):
            members = sorted((row for row in rows if row.family == family and row.numbers), key=lambda row: row.numbers)
            axes.errorbar(
                [row.numbers for row in members],
                [statistics.fmean(by_seed(getattr(row, what))) for row in members],
                [spread(getattr(row, what)) for row in members],
                marker=next(markers),
                linewidth=1.2 if len(members) > 1 else 0,
                elinewidth=0.8,
                capsize=2,
                label=family,
            )
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="numbers trained beside the classifier", title=label)
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
