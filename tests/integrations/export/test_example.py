"""The example that a model is exported with, and the dimensions that may differ from call to call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from exported import IDS, MASK, bert
from models import converted, vit_input
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastConfigError, export_program, get_recast_model
from recast_peft.integrations.export.program import Shapes

X = vit_input()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (X[0, 0], r"cannot be called with the example \(x: \(8,\) of float32\)"),
        (X.double(), r"cannot be called with the example \(x: .* of float64\)"),
        (X[:0], r"the example has no samples \(x: \(0, 5, 8\)\)"),
        ({"y": X}, r"does not fit what TinyVit takes: .*'y'"),
        ((X, X), r"does not fit what TinyVit takes: too many"),
    ],
)
def test_that_does_not_fit_the_model_is_told_with_what_it_is(example: Any, message: str) -> None:
    assert X.shape == (2, 5, 8)
    with pytest.raises(RecastConfigError, match=message):
        export_program(converted(), example)


def test_whose_tensors_do_not_fit_each_other_is_told_with_what_they_are() -> None:
    model = get_recast_model(bert(), RecastConfig(), "task").eval()
    with pytest.raises(RecastConfigError, match=r"input_ids: \(3, 7\) of int64, attention_mask: \(2, 7\) of int64"):
        export_program(model, {"input_ids": IDS, "attention_mask": MASK[:2]})


class Fixed(nn.Module):
    """Takes samples, positions or numbers of one kind alone."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.fc, self.positions = what, nn.Linear(8, 8), nn.Parameter(torch.ones(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "samples":
            x = x.reshape(3, 10, 8)
        elif self.what == "positions":
            x = x + self.positions
        elif x.sum() > 0:
            x = -x
        return self.fc(x)


@pytest.mark.parametrize(
    ("what", "shapes", "message"),
    [
        ("positions", {"x": {0: "batch", 1: "length"}}, r"no other size than the example's in some dimensions \(length=10\)"),
        ("samples", {"x": {0: "batch"}}, r"no other size than the example's in some dimensions \(batch=3\)"),
        ("numbers", None, r"no graph of the model with the example \(x: \(3, 10, 8\) of float32\)"),
    ],
)
def test_a_dimension_that_the_model_fixes_is_refused(what: str, shapes: Shapes | None, message: str) -> None:
    model = get_recast_model(Fixed(what), RecastConfig(target_modules=["fc"])).eval()
    with pytest.raises(RecastConfigError, match=message):
        export_program(model, torch.rand(3, 10, 8), dynamic_shapes=shapes)


def test_one_that_nobody_asked_for_is_warned_of() -> None:
    model = get_recast_model(Fixed("samples"), RecastConfig(target_modules=["fc"])).eval()
    with pytest.warns(UserWarning, match=r"\(batch=3\): the graph takes inputs of that size alone"):
        export_program(model, torch.rand(3, 10, 8))
    model = get_recast_model(Fixed("positions"), RecastConfig(target_modules=["fc"])).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the graph takes inputs of that size alone")
        export_program(model, torch.rand(3, 10, 8))
