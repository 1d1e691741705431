"""Tensor parallelism: which coefficients' gradients are parts of a sum. What processes do together: tests/integrations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recast_peft.composition.parallel import BY_COLUMNS, BY_ROWS, for_neighbour, for_own, split_of, summed_over_rows


def split(dim: int | None, dimensions: int = 1) -> Any:
    """What is asked of a weight that lies in parts on several processes."""
    mesh = SimpleNamespace(ndim=dimensions, get_group=lambda: "the group")
    placement = SimpleNamespace() if dim is None else SimpleNamespace(dim=dim)
    return SimpleNamespace(full_tensor=None, device_mesh=mesh, placements=[placement])


@pytest.mark.parametrize(
    ("weight", "dim"),
    [
        (None, None),
        (nn.Parameter(torch.ones(2, 2)), None),
        (split(0), BY_COLUMNS),
        (split(1), BY_ROWS),
        (split(None), None),  # a copy on each process
        (split(0, dimensions=2), None),
    ],
)
def test_how_a_weight_is_split(weight: Any, dim: int | None) -> None:
    assert split_of(weight) == dim


@pytest.mark.parametrize(("verb", "summed"), [(for_own, BY_ROWS), (for_neighbour, BY_COLUMNS)])
@pytest.mark.parametrize("dim", [BY_ROWS, BY_COLUMNS])
def test_gradients_are_summed_on_the_side_that_is_split(
    verb: Any, summed: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three processes, of which the others have the gradients 10 and 20."""
    groups = []

    def all_reduce(tensor: Tensor, group: Any) -> None:
        groups.append(group)
        tensor += 30

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    offset = torch.tensor(0.5, requires_grad=True)
    found = verb(offset, split(dim))
    assert found.item() == 0.5
    (4 * found).backward()
    assert offset.grad.item() == (34 if dim == summed else 4)
    assert groups == ["the group"] * (dim == summed)
    assert verb(offset, None) is offset


@pytest.mark.parametrize("dim", [BY_ROWS, BY_COLUMNS])
def test_parts_are_summed_where_the_input_is_split(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes have 30 together; each has the whole gradient."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.add_(30))
    part = torch.tensor(0.5, requires_grad=True)
    found = summed_over_rows(part, split(dim))
    assert found.item() == (30.5 if dim == BY_ROWS else 0.5)
    (4 * found).backward()
    assert part.grad.item() == 4
