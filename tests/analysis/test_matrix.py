"""AccuracyMatrix: what is recorded, shown, drawn and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recast_peft import RecastConfigError, RecastSequenceError
from recast_peft.analysis.matrix import AccuracyMatrix

FORGETFUL = [[0.90, 0.30, 0.20], [0.95, 0.80, 0.45], [0.70, 0.60, 0.80]]  # measures by hand in test_metrics.py
BASELINE = [0.05, 0.10, 0.20]
nan = float("nan")
LOWER = [[0.9, nan, nan], [0.9, 0.8, nan], [0.9, 0.8, 0.5]]


def filled(values: Any = FORGETFUL, baseline: Any = BASELINE) -> AccuracyMatrix:
    matrix = AccuracyMatrix(["flowers", "cars", "birds"])
    for name, accuracy in zip(matrix.tasks, baseline or (), strict=False):
        matrix.record(None, name, accuracy)
    for after, row in zip(matrix.tasks, values, strict=True):
        for task, accuracy in zip(matrix.tasks, row, strict=True):
            if np.isfinite(accuracy):
                matrix.record(after, task, accuracy)
    return matrix


class TestTheMatrix:
    def test_summarises_all_that_was_recorded(self) -> None:
        assert filled().summary() == {
            "average_accuracy": pytest.approx(0.70),
            "average_incremental_accuracy": pytest.approx(0.825),
            "backward_transfer": pytest.approx(-0.20),
            "forgetting": pytest.approx(0.225),
            "forward_transfer": pytest.approx(0.225),
        }

    def test_summarises_what_there_is(self) -> None:
        assert set(filled(LOWER, None).summary()) == {
            "average_accuracy",
            "average_incremental_accuracy",
            "backward_transfer",
            "forgetting",
        }
        assert AccuracyMatrix(["a", "b"]).summary() == {}

    def test_summarises_a_sequence_that_is_not_finished(self) -> None:
        matrix = filled([[0.9, nan, nan], [0.6, 0.8, nan], [nan, nan, nan]], None)
        assert matrix.learned == 2
        assert matrix.summary()["average_accuracy"] == pytest.approx(0.7)
        assert matrix.summary()["forgetting"] == pytest.approx(0.3)

    def test_prints_as_a_table(self) -> None:
        lines = str(filled(LOWER, None)).splitlines()
        assert lines[0].split() == ["flowers", "cars", "birds"]
        assert lines[2].split() == ["after", "cars", "0.900", "0.800", "-"]
        assert "average accuracy: +0.733" in lines
        assert len({line.rindex(" ") for line in filled().table().splitlines()[1:5]}) == 1
        assert filled().table().splitlines()[1].split() == ["before", "0.050", "0.100", "0.200"]

    def test_comes_back_from_json(self) -> None:
        matrix = filled(LOWER)
        again = AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
        assert again == matrix
        again.record("birds", "birds", 0.51)
        assert again != matrix
        assert matrix != "matrix"

    @pytest.mark.parametrize(
        "content",
        [
            {},
            {"tasks": ["a"]},
            {"tasks": ["a"], "values": "x"},
            {"tasks": ["a"], "values": [[0.1, 0.2]]},
            {"tasks": ["a"], "values": [[0.1]], "baseline": [0.1, 0.2]},
            {"tasks": ["a", "a"], "values": [[0.1, 0.2], [0.1, 0.2]]},
            {"tasks": ["a"], "values": [["x"]]},
            {"tasks": ["a"], "values": [[float("inf")]]},
            {"tasks": [1], "values": [[0.1]]},
        ],
    )
    def test_does_not_come_from_something_else(self, content: dict[str, Any]) -> None:
        with pytest.raises(RecastSequenceError):
            AccuracyMatrix.from_dict(content)

    @pytest.mark.parametrize("tasks", [[], ["a", "a"], "flowers", [1, 2], 3])
    def test_needs_names(self, tasks: Any) -> None:
        with pytest.raises(RecastSequenceError, match="names that differ"):
            AccuracyMatrix(tasks)

    def test_refuses_what_cannot_be_recorded(self) -> None:
        matrix = filled()
        with pytest.raises(RecastSequenceError, match="planes"):
            matrix.record("planes", "cars", 0.5)
        for wrong in (nan, None, "high", [0.5, 0.5]):
            with pytest.raises(RecastSequenceError, match="a finite number is expected"):
                matrix.record("cars", "cars", wrong)  # type: ignore[arg-type]

    def test_is_drawn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib")
        axes = filled(LOWER).plot(str(tmp_path / "matrix.png"))
        before = (tmp_path / "matrix.png").read_bytes()

        def broken(figure: Any, path: str | Path, **options: Any) -> None:
            Path(path).write_bytes(b"half of a pict")
            raise OSError("disk full")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
        with pytest.raises(OSError, match="disk full"):
            filled(LOWER).plot(tmp_path / "matrix.png")
        assert [path.name for path in tmp_path.iterdir()] == ["matrix.png"]
        with pytest.raises(RecastConfigError, match=r"is a folder; expected the name of a file, such as matrix\.png"):
            filled(LOWER).plot(tmp_path)
        with pytest.raises(RecastConfigError, match="digits='x': expected a whole number"):
            filled(LOWER).plot(digits="x")  # type: ignore[arg-type]
        assert (tmp_path / "matrix.png").read_bytes() == before
        assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(text.get_text() for text in axes.texts) == ["0.50", "0.80", "0.80", "0.90", "0.90", "0.90"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["flowers", "cars", "birds"]
        first = next(text for text in axes.texts if text.get_text() == "0.50")
        assert first.get_position() == (2, 2)
