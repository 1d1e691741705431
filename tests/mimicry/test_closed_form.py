"""The closed form is the optimum of Eckart and Young."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_groups import composed, error, group, optimum

from recast_peft.mimicry import ClosedForm


@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 5))
def test_is_the_eckart_young_optimum(layers: int, templates: int, seed: int) -> None:
    templates = min(templates, layers)
    weights = group(layers, seed)
    found = ClosedForm().fit(weights, templates)
    energy = sum(float(w.double().square().sum()) for w in weights)
    assert error(found, weights) == pytest.approx(optimum(weights, templates), rel=1e-3, abs=1e-10 * energy)


def test_is_the_identity_for_as_many_templates_as_layers() -> None:
    weights = group()
    assert torch.equal(composed(ClosedForm().fit(weights, 4), weights), torch.stack(weights).double())
