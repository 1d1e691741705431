"""How well weights are reproduced: cosine and relative error, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast_peft.mimicry import fidelity
from recast_peft.mimicry.fidelity import EXACT, Fidelity, measure_fidelity


def measured(weight: list[float], template: list[float], coefficient: float) -> Fidelity:
    (found,) = measure_fidelity([torch.tensor(weight)], torch.tensor([template]), torch.tensor([[coefficient]]))
    return found


@pytest.mark.parametrize(
    ("weight", "template", "coefficient", "cosine", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0, 1.0, 0.0),
        ([3.0, 4.0], [4.0, 3.0], 1.0, 24 / 25, 2**0.5 / 5),  # the difference is (1, -1)
        ([3.0, 4.0], [3.0, 4.0], 0.5, 1.0, 0.5),
        ([3.0, 4.0], [3.0, 4.0], -1.0, -1.0, 2.0),
        ([3.0, 4.0], [3.0, 4.0], 0.0, 0.0, 1.0),
        ([0.0, 0.0], [3.0, 4.0], 0.0, 1.0, 0.0),  # zeros have no direction: they are reproduced ...
        ([0.0, 0.0], [3.0, 4.0], 1.0, 0.0, 1.0),  # ... or they are not
    ],
)
def test_one_weight(weight: list[float], template: list[float], coefficient: float, cosine: float, error: float) -> None:
    found = measured(weight, template, coefficient)
    assert (found.cosine, found.relative_error) == pytest.approx((cosine, error), abs=1e-12)


def test_every_layer_has_its_own_coefficients_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    weights: list[Tensor] = [torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 5.0], [0.0, 0.0]])]
    base = torch.tensor([[3.0, 2.0], [0.0, 0.0]])
    whole = measure_fidelity(weights, templates, base)
    assert whole == [EXACT, Fidelity(cosine=0.0, relative_error=1.0)]
    monkeypatch.setattr(fidelity, "CHUNK", 12)  # three numbers at once
    assert measure_fidelity(weights, templates, base) == whole


def test_the_energy_that_is_kept() -> None:
    assert Fidelity(cosine=0.8, relative_error=0.6).energy_kept == pytest.approx(0.64)
    assert EXACT.energy_kept == 1
