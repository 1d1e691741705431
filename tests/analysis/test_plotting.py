"""Pictures show the numbers of what they are drawn from."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from models import converted, tiny_vit

from recast_peft import RecastConfig, grow_bank, growth_report, mimicry_report, scaling_table
from recast_peft.analysis.matrix import AccuracyMatrix
from recast_peft.analysis.plotting import plot_growth


def test_growth_is_a_line_for_each_group_that_begins_at_zero() -> None:
    torch.manual_seed(0)
    sources = [{n: w + 0.1 * torch.randn_like(w) for n, w in tiny_vit().state_dict().items()} for _ in range(3)]
    report = growth_report(grow_bank(tiny_vit(), sources, RecastConfig(target_modules=["qkv"], group_size=1)))
    lines = plot_growth(report).axes[0].get_lines()
    assert [line.get_label() for line in lines] == [group.bank for group in report.groups]
    for line, group in zip(lines, report.groups, strict=True):
        assert list(line.get_ydata()) == [0.0, *group.energy]
        assert 0 < group.energy[0] < group.energy[-1]


@pytest.mark.parametrize(
    "made", [lambda: AccuracyMatrix(["a"]), lambda: mimicry_report(converted()), lambda: scaling_table(tiny_vit())]
)
def test_a_picture_without_matplotlib_is_an_import_error(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        made().plot()
