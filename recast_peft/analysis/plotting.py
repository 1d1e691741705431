"""Pictures of fidelity and of sizes. Each function takes plain results and returns a matplotlib figure; none knows another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..growth.weights import GrowthReport
    from .report import MimicryReport
    from .scaling import ScalingTable


def plot_mimicry_report(report: MimicryReport) -> Figure:
    """Relative error of every weight, and of every block's features where the report has them.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = 2 if report.features else 1
    height = 1.5 + 0.22 * max(len(report.modules), len(report.features))
    figure = Figure(figsize=(6.0 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    known = [m for m in report.modules if m.relative_error is not None]
    axes[0].barh([m.module for m in known], [m.relative_error for m in known], color="tab:blue")
    axes[0].set(xlabel="relative error of the weight", title="exact banks" if report.is_exact else "weights")
    axes[0].invert_yaxis()
    if report.features:
        axes[1].barh([f.name for f in report.features], [f.relative_error for f in report.features], color="tab:orange")
        axes[1].set(xlabel="relative error of the features", title="features on the batch")
        axes[1].invert_yaxis()
    return figure


def plot_scaling(scaling: ScalingTable) -> Figure:
    """Numbers per task against bytes of the model, coloured by the error of the weights.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = scaling.rows
    points = axes.scatter(
        [row.num_coefficients for row in rows],
        [row.model_bytes / 2**20 for row in rows],
        c=[row.relative_error or 0.0 for row in rows],
        cmap="viridis",
    )
    for row in rows:
        label = f"g{row.group_size} n{row.num_templates} K{row.num_coefficient_sets}"
        axes.annotate(
            label, (row.num_coefficients, row.model_bytes / 2**20), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="numbers per task", ylabel="model (MiB)")
    figure.colorbar(points, label="relative error of the weights")
    return figure


def plot_growth(report: GrowthReport) -> Figure:
    """Share of the sources' energy that the grown templates keep, a line for each group.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for group in report.groups:
        axes.plot(range(len(group.energy) + 1), [0.0, *group.energy], marker="o", label=group.bank)
    axes.set(xlabel="grown templates", ylabel="energy of the sources kept", ylim=(0, 1.02))
    axes.legend(fontsize=7)
    return figure
