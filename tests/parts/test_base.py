"""What every part of a task is: pieces at places, and a row in ``PARTS``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recast_peft import RecastConfig
from recast_peft.parts import PARTS
from recast_peft.parts.base import Piece, Request


def piece(place: str) -> Piece:
    found = Piece()
    found.place, found.module = place, nn.Linear(2, 3)
    return found


@pytest.mark.parametrize("place", ["blocks.0.mlp", "blocks.0._checkpoint_wrapped_module.mlp"])
def test_a_piece_is_stored_by_the_names_of_the_plain_model(place: str) -> None:
    assert piece(place).shapes() == {"blocks.0.mlp.weight": (3, 2), "blocks.0.mlp.bias": (3,)}
    assert piece(place).num_parameters() == 3 * 2 + 3


def test_a_module_may_be_called_as_wrappers_call_what_they_hold() -> None:
    assert set(piece("blocks.0.mlp.base_layer").shapes()) == {"blocks.0.mlp.base_layer.weight", "blocks.0.mlp.base_layer.bias"}


@pytest.mark.parametrize(
    ("model", "place", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),  # of the place, whatever the model is
        (torch.float64, torch.float32, torch.float32),
        (torch.float64, None, torch.float64),
    ],
)
def test_parameters_of_a_part_are_float32_at_least(
    model: torch.dtype, place: torch.dtype | None, expected: torch.dtype
) -> None:
    beside = nn.ReLU() if place is None else nn.Linear(2, 2, dtype=place)
    found = Request(nn.Linear(2, 2, dtype=model), RecastConfig(), ()).like(beside)
    assert found == {"device": torch.device("cpu"), "dtype": expected}


def test_parameters_that_are_only_counted_are_on_the_meta_device() -> None:
    counted = Request(nn.Linear(2, 2), RecastConfig(), (), counting=True)
    assert counted.like(nn.Linear(2, 2))["device"] == torch.device("meta")
    without_parameters = Request(nn.ReLU(), RecastConfig(), ())
    assert without_parameters.like(nn.ReLU()) == {"device": torch.device("cpu"), "dtype": torch.float32}


def test_no_two_parts_have_one_name() -> None:
    names = [part.name for part in PARTS]
    assert all(names)
    assert len(set(names)) == len(names)  # plans and cards count by name
