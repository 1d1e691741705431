"""What growth_report says of a grown bank."""

from __future__ import annotations

import pytest
import torch
from grown_biases import grown as grown_of_biases
from grown_weights import fitted_bank, grown, on
from models import layers_of

from recast_peft import RecastBankError, StoredBank, growth_report
from recast_peft.banks.grown_templates import GrownTemplates
from recast_peft.banks.stored_group import StoredGroup
from recast_peft.growth.report import GrownGroup


class TestWeights:
    def test_the_report(self) -> None:
        report = growth_report(grown(num_templates=2))
        assert all(0 < g.energy[0] < g.energy[1] < 1 for g in report.groups)
        assert "energy 2" in str(report)
        assert report.to_dict()["version"] == 1
        model = on(grown(num_templates=2))
        assert report.num_coefficients == sum(l.recast_coefficients["default"].numel() for l in layers_of(model).values())  # noqa: E741
        with pytest.raises(RecastBankError, match="no grown templates"):
            growth_report(fitted_bank())


def test_the_numbers_of_a_bank_by_hand() -> None:
    grown_group = StoredGroup(("a", "b"), grown=GrownTemplates((torch.ones(2, 2, 3),), (2, 3), True, (0.25, 0.75)))
    other = StoredGroup(("c",), grown=GrownTemplates((torch.ones(1, 4, 1), torch.ones(1, 1, 5)), (4, 5), False, (0.5,)))
    report = growth_report(StoredBank({"g": grown_group, "plain": StoredGroup(("d",)), "h": other}, version=3))
    # two pretrained weights and two grown ones, a coefficient of each for two members; 2 x 6 numbers of four bytes
    assert report.groups[0] == GrownGroup("g", 2, 4, 2, (0.25, 0.75), 48, 8)
    # a lone low-rank pair of 4 + 5 numbers
    assert report.groups[1] == GrownGroup("h", 1, 1, 1, (0.5,), 36, 1)
    assert len(report.groups) == 2  # a group of pretrained weights alone was not grown
    assert report.num_coefficients == 9
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[0] == ["bank", "members", "templates", "bytes", "energy", "1", "energy", "2"]
    assert ["g", "2", "4", "48", "0.250", "0.750"] in lines
    assert ["h", "1", "1", "36", "0.500"] in lines
    assert str(report).endswith("version 3, 9 numbers per task")
    assert report.to_dict()["groups"][1]["energy"] == (0.5,)


class TestBiases:
    def test_the_report(self) -> None:
        report = growth_report(grown_of_biases(num_templates=2))
        assert report.num_coefficients == 8
        assert [group.members for group in report.groups] == [5] * 4
        assert "8 numbers per task" in str(report)
