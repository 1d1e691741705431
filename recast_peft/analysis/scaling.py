"""The parametric scaling strategy (paper, section 3.1): what group size, templates and sets cost and give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError
from ..growth.sources import check_plain
from ..mimicry import gram_matrix
from ..planning.plan import RecastPlan
from ..planning.table import text_table
from ..tasks.plan import plan_recast
from ..validation import is_count, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Grams = dict[tuple[str, ...], Tensor]  # inner products of groups' weights, by their members; each is computed once


@dataclass(frozen=True)
class ScalingRow:
    """One alternative.

    Attributes:
        targets: how the target modules were asked for.
        group_size: layers of a group at most.
        num_groups: G, banks in all.
        num_templates: templates of a full group.
        num_coefficient_sets: coefficient sets that are averaged (K of the paper).
        num_coefficients: numbers per task.
        model_bytes: bytes of the model after the conversion.
        relative_error: error of all target weights together, in closed form; 0 for exact banks, None if it was not asked for.
    """

    targets: str
    group_size: int
    num_groups: int
    num_templates: int
    num_coefficient_sets: int
    num_coefficients: int
    model_bytes: int
    relative_error: float | None

    @property
    def is_exact(self) -> bool:
        """Whether the pretrained weights themselves are the templates."""
        return self.num_templates == self.group_size


@dataclass(frozen=True)
class ScalingTable:
    """What ``scaling_table`` found; ``print(table)`` shows it, ``table.plot()`` draws it.

    Attributes:
        rows: the alternatives, in the order of numbers per task.
    """

    rows: tuple[ScalingRow, ...]

    def within(self, max_coefficients: int) -> ScalingTable:
        """Only the alternatives of at most so many numbers per task."""
        return ScalingTable(tuple(row for row in self.rows if row.num_coefficients <= max_coefficients))

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain values, ready for JSON."""
        return [{**asdict(row), "exact": row.is_exact} for row in self.rows]

    def plot(self) -> Figure:
        """Numbers per task against bytes of the model, coloured by the error of the weights.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.subplots()
        points = axes.scatter(
            [row.num_coefficients for row in self.rows],
            [row.model_bytes / 2**20 for row in self.rows],
            c=[row.relative_error or 0.0 for row in self.rows],
            cmap="viridis",
        )
        for row in self.rows:
            label = f"g{row.group_size} n{row.num_templates} K{row.num_coefficient_sets}"
            axes.annotate(
                label, (row.num_coefficients, row.model_bytes / 2**20), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
        axes.set(xscale="log", xlabel="numbers per task", ylabel="model (MiB)")
        figure.colorbar(points, label="relative error of the weights")
        return figure

    def __str__(self) -> str:
        header = ("targets", "group size", "groups G", "templates n", "sets K", "numbers per task", "model bytes", "error")
        rows = []
        for r in self.rows:
            error = "" if r.relative_error is None else "exact" if r.is_exact else f"{r.relative_error:.4f}"
            numbers = (r.group_size, r.num_groups, r.num_templates, r.num_coefficient_sets, r.num_coefficients)
            rows.append((r.targets, *map(str, numbers), f"{r.model_bytes:,}", error))
        return text_table(header, rows)


def scaling_table(
    model: nn.Module,
    targets: Sequence[RecastConfig | str | list[str] | None] | RecastConfig | str | None = None,
    group_sizes: Iterable[int] = (1, 2, 3, 4, 6, 12),
    templates: Iterable[int] | None = None,
    coefficient_sets: Iterable[int] = (1, 2),
    fidelity: bool = True,
) -> ScalingTable:
    """List what conversions of a model would cost and give; the model is not changed.

    Args:
        model: plain model with its pretrained weights.
        targets: what to target: a config (its targets are used), a value of ``target_modules``, or a list of such.
        group_sizes: sizes of the groups; one that is larger than every run of layers is left out.
        templates: numbers of templates; None means 1, half the group and the whole group. Those above the group's size are
            left out.
        coefficient_sets: numbers of coefficient sets (K of the paper).
        fidelity: also compute the error of the closed form, from the inner products of the weights alone.

    Returns:
        the alternatives in the order of numbers per task.

    Raises:
        RecastError: if nothing can be targeted, a size is no whole number from 1, or the model is converted already.
    """
    check_plain(model, "scaling_table")
    group_sizes, coefficient_sets = _counts("group_sizes", group_sizes), _counts("coefficient_sets", coefficient_sets)
    templates = None if templates is None else _counts("templates", templates)
    listed = list(targets) if isinstance(targets, (list, tuple)) and not _is_names(targets) else [targets]
    rows: list[ScalingRow] = []
    for target in listed:
        config = target if isinstance(target, RecastConfig) else RecastConfig(target_modules=cast(Any, target))
        grams: Grams | None = {} if fidelity else None
        for size in group_sizes:
            for count in sorted({1, max(1, size // 2), size} if templates is None else {n for n in templates if n <= size}):
                rows += _alternatives(model, config, size, count, coefficient_sets, grams)
    if not rows:
        raise RecastConfigError("no group size that was given fits the model: give smaller group_sizes")
    return ScalingTable(tuple(sorted(rows, key=lambda row: (row.num_coefficients, row.model_bytes))))


def _counts(name: str, given: Any) -> list[int]:
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if not listed or not all(map(is_count, listed)):
        raise RecastConfigError(f"{name}={shown(given)}: expected a list of whole numbers of at least 1")
    return listed


def _is_names(targets: Sequence[Any]) -> bool:
    """Whether a list is one value of ``target_modules``: names of modules, none of them a shorthand or an expression."""
    return bool(targets) and all(isinstance(t, str) and not t.startswith("all-") for t in targets)


def _alternatives(
    model: nn.Module, config: RecastConfig, size: int, count: int, sets: Iterable[int], grams: Grams | None
) -> list[ScalingRow]:
    sizes = {"group_size": size, "num_groups": None, "num_templates": None, "num_coefficient_sets": 1}
    unset = dict.fromkeys(("groups", "recipes", "bank", "num_directions", "max_coefficients", "coefficient_sharing"))
    full = plan_recast(model, config.as_chosen(**sizes, **unset, mimicry="closed_form"))
    if max(len(group.members) for group in full.groups) < size:
        return []
    groups = tuple(replace(group, num_templates=min(count, len(group.members))) for group in full.groups)
    plan = replace(full, groups=groups)
    error = None if grams is None else _error_of(plan, grams)
    shown = config.target_modules if isinstance(config.target_modules, (str, type(None))) else ", ".join(config.target_modules)
    one = ScalingRow(shown or "default", size, len(groups), count, 1, plan.num_coefficients, plan.model_bytes_after, error)
    return [replace(one, num_coefficient_sets=k, num_coefficients=one.num_coefficients * k) for k in sorted(set(sets))]


def _error_of(plan: RecastPlan, grams: Grams) -> float:
    """Relative error of the closed form over all groups of a plan: what the smallest eigenvalues leave out."""
    weights = {candidate.name: candidate.weight for candidate in plan.candidates}
    lost = total = 0.0
    for group in plan.groups:
        if group.members not in grams:
            grams[group.members] = gram_matrix([weights[name] for name in group.members])
        gram = grams[group.members]
        total += float(gram.diagonal().sum())
        values = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending
        lost += float(values[: len(group.members) - group.num_templates].sum())
    if not math.isfinite(total):
        raise RecastBankError("the target modules hold numbers that are not finite: load the pretrained weights anew")
    return math.sqrt(lost / total) if total > 0 else 0.0
