"""Banks that keep the layers' outputs: each half step is a minimum, and the outputs change less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_groups import composed, error, group, moments_for, optimum

from recast_peft.mimicry import ClosedForm, DataAware, FittedTemplates, Recipe
from recast_peft.mimicry.data_aware import best_coefficients, best_templates, total_error


@given(st.integers(0, 5), st.integers(1, 3))
def test_half_steps_are_minima(seed: int, templates: int) -> None:
    weights = group(4, seed)
    moments = [m for m in moments_for(weights, seed) if m is not None]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(templates, 6, 5, generator=generator)
    base = best_coefficients(weights, moments, start)
    least = total_error(weights, moments, start, base)
    step = 0.01 * torch.randn(base.shape, generator=generator)
    assert least <= total_error(weights, moments, start, base + step) * (1 + 1e-5)
    better = best_templates(weights, moments, start, base)
    assert total_error(weights, moments, better, base) <= least * (1 + 1e-5)


def test_changes_the_outputs_less_than_the_closed_form() -> None:
    weights = group()
    moments = moments_for(weights)

    def change(found: Recipe | FittedTemplates) -> float:
        differences = torch.stack(weights).double() - composed(found, weights)
        return sum(float(((d @ s.double()) * d).sum()) for d, s in zip(differences, moments, strict=True))

    aware = change(DataAware(progress=False).fit(weights, 2, moments=moments))
    assert aware < 0.9 * change(ClosedForm().fit(weights, 2))


def test_with_the_same_white_moment_is_the_closed_form() -> None:
    weights = group()
    found = DataAware(progress=False, ridge=0.0).fit(weights, 2, moments=[torch.eye(5)] * 4)
    assert error(found, weights) == pytest.approx(optimum(weights, 2), rel=1e-4)
