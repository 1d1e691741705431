"""Prototypes, spread and distances of the router, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from recast_peft import RecastConfigError
from recast_peft.pool.routing import nearest_task, summarise


def test_prototypes_and_spread_by_class() -> None:
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 5.0]])
    known = summarise(features, torch.tensor([3, 3, 7]))
    assert known.prototypes.tolist() == [[1.0, 0.0], [10.0, 5.0]]
    assert known.scatter.tolist() == [2.0, 0.0]
    assert known.samples == 3


def test_distances_count_in_units_of_the_spread() -> None:
    wide = summarise(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]))  # around (0, 0), wide along the first axis
    narrow = summarise(torch.tensor([[8.0, 1.1], [8.0, 0.9]]))  # around (8, 1)
    sample = torch.tensor([[6.0, 0.1]])
    # the spread: sqrt(2 * 81 / 4) = 6.4 along the first axis, sqrt(2 * 0.01 / 4) = 0.07 along the second
    assert (sample - narrow.prototypes).norm() < (sample - wide.prototypes).norm()  # 2.2 and 6.0 without units
    assert nearest_task(sample, {4: wide, 6: narrow}).tolist() == [4]  # 1.7 in units of the spread, the other 12.7
    assert nearest_task(torch.tensor([[6.0, 0.9]]), {4: wide, 6: narrow}).tolist() == [6]


def test_nothing_to_remember_or_to_choose_from() -> None:
    with pytest.raises(RecastConfigError, match="at least one sample"):
        summarise(torch.empty(0, 4))
    with pytest.raises(RecastConfigError, match=r"pool.remember"):
        nearest_task(torch.zeros(1, 2), {})


def test_what_cannot_be_remembered() -> None:
    good, labels = torch.ones(2, 3), [0, 1]
    with pytest.raises(RecastConfigError, match=r"labels:  \[0, 1\], no tensor"):
        summarise(good, labels)  # type: ignore[arg-type]
    for bad in (float("nan"), float("inf")):  # every sample would go to its task
        with pytest.raises(RecastConfigError, match="not finite"):
            summarise(torch.full((2, 3), bad), torch.tensor(labels))
    assert summarise(good, torch.tensor([True, False])).prototypes.shape == (2, 3)


def test_a_sample_that_is_no_number_goes_to_no_task() -> None:
    known = summarise(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RecastConfigError, match="features of the samples 1 are not finite"):
            nearest_task(torch.tensor([[1.0, 0.0], [1.0, bad]]), {4: known})
