"""The example that a model is exported with, and the dimensions that may differ from call to call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import IDS, MASK, bert, onnx_tools, session
from models import converted, vit_input
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastConfigError, export_onnx, export_program, export_task, get_recast_model
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


class Several(nn.Module):
    """Takes two tensors, of which the second is optional, or several in one argument; they are told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        x, y = (x, y) if isinstance(x, Tensor) else x
        return self.fc(x) if y is None else self.fc(x) + 2 * y


def test_a_dictionary_in_whatever_order_gives_each_input_its_own_name(tmp_path: Path) -> None:
    onnx_tools()
    model = get_recast_model(Several(), RecastConfig(target_modules=["fc"])).eval()
    given = {"y": torch.ones(3, 8), "x": torch.randn(3, 8)}
    graph = session(export_onnx(model, tmp_path / "graph.onnx", given))
    assert [value.name for value in graph.get_inputs()] == ["coefficients", "x", "y"]
    task = export_task(model, tmp_path / "task")
    (found,) = graph.run(None, {name: value.numpy() for name, value in {**task, **given}.items()})
    torch.testing.assert_close(torch.from_numpy(found), model(**given).detach())


def test_texts_of_another_length_have_one_of_their_own() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 4)

        def forward(self, ids: Tensor, mask: Tensor, words: Tensor) -> Tensor:
            return self.fc((ids * mask)[..., None].float()).sum(1, keepdim=True) + self.fc(words[..., None].float())

    model = get_recast_model(Pair(), RecastConfig(target_modules=["fc"])).eval()
    task = {"coefficients": torch.zeros(1)}

    def given(samples: int, length: int, words: int) -> tuple[Tensor, ...]:
        return tuple(torch.randint(1, 9, (samples, size)) for size in (length, length, words))

    graph = export_program(model, given(2, 7, 4)).module()
    for sizes in ((2, 7, 4), (3, 5, 6), (3, 5, 5)):
        inputs = given(*sizes)
        torch.testing.assert_close(graph(task, *inputs)["output"], model(*inputs))


def test_tensors_inside_of_an_argument_are_refused_by_its_name() -> None:
    model = get_recast_model(Several(), RecastConfig(target_modules=["fc"])).eval()
    pair = (torch.ones(3, 8), torch.ones(3, 8))
    assert model(pair).shape == (3, 8)
    for example in ((pair,), ([*pair],), {"x": pair}):
        with pytest.raises(RecastConfigError, match="argument 'x' of the example is a (tuple|list)"):
            export_program(model, example)
