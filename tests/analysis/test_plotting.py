"""Pictures show the numbers of what they are drawn from."""

from __future__ import annotations

import torch
from models import tiny_vit

from recast_peft import RecastConfig, grow_bank, growth_report
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
