"""What growth_report says of a grown bank."""

from __future__ import annotations

import pytest
from grown_weights import fitted_bank, grown, on
from models import layers_of

from recast_peft import RecastBankError, growth_report


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
