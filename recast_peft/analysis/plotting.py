"""Pictures of what rooms without a plotting library report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..growth.report import GrowthReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
