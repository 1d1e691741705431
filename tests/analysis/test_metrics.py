"""Measures against matrices worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recast_peft import RecastSequenceError
from recast_peft.analysis.metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)

# Rows are states after tasks 1, 2, 3; columns are tasks. By hand, from the papers' formulas:
#   ACC  = (0.70 + 0.60 + 0.80) / 3                                   = 0.70
#   BWT  = ((0.70 - 0.90) + (0.60 - 0.80)) / 2                        = -0.20
#   FWT  = ((0.30 - 0.10) + (0.45 - 0.20)) / 2                        = 0.225
#   F    = ((max(0.90, 0.95) - 0.70) + (max(0.30, 0.80) - 0.60)) / 2  = (0.25 + 0.20) / 2 = 0.225
FORGETFUL = [[0.90, 0.30, 0.20], [0.95, 0.80, 0.45], [0.70, 0.60, 0.80]]
BASELINE = [0.05, 0.10, 0.20]
# after the second task: ACC (0.95 + 0.80) / 2 = 0.875; BWT 0.95 - 0.90 = 0.05; F 0.90 - 0.95 = -0.05; FWT 0.30 - 0.10 = 0.20
nan = float("nan")
LOWER = [[0.9, nan, nan], [0.9, 0.8, nan], [0.9, 0.8, 0.5]]


class TestTheMeasures:
    def test_are_those_worked_out_by_hand(self) -> None:
        assert average_accuracy(FORGETFUL) == pytest.approx(0.70)
        assert average_incremental_accuracy(FORGETFUL) == pytest.approx((0.90 + 0.875 + 0.70) / 3)
        assert backward_transfer(FORGETFUL) == pytest.approx(-0.20)
        assert forward_transfer(FORGETFUL, BASELINE) == pytest.approx(0.225)
        assert forgetting(FORGETFUL) == pytest.approx(0.225)

    def test_are_those_worked_out_by_hand_after_two_tasks(self) -> None:
        assert average_accuracy(FORGETFUL, after=1) == pytest.approx(0.875)
        assert average_incremental_accuracy(FORGETFUL, after=1) == pytest.approx((0.90 + 0.875) / 2)
        assert backward_transfer(FORGETFUL, after=1) == pytest.approx(0.05)
        assert forward_transfer(FORGETFUL, BASELINE, after=1) == pytest.approx(0.20)
        assert forgetting(FORGETFUL, after=1) == pytest.approx(-0.05)

    def test_take_the_best_earlier_state_even_before_the_task_was_learned(self) -> None:
        # Chaudhry et al. let the maximum go over all earlier states: max(0.7, 0.6) - 0.5 on the second task, 0 on the first
        assert forgetting([[0.4, 0.7, nan], [0.4, 0.6, nan], [0.4, 0.5, 0.9]]) == pytest.approx((0.0 + 0.2) / 2)

    def test_of_what_is_never_forgotten_are_zero(self) -> None:
        assert average_accuracy(LOWER) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
        assert backward_transfer(LOWER) == 0.0
        assert forgetting(LOWER) == 0.0

    @given(st.integers(2, 6), st.integers(0, 2**16))
    def test_tell_forgetting_from_backward_transfer_only_by_the_best_state(self, count: int, seed: int) -> None:
        R = np.random.default_rng(seed).random((count, count))
        R[np.triu_indices(count, 1)] = nan
        assert forgetting(R) >= -backward_transfer(R) - 1e-12

    @given(st.integers(2, 6), st.integers(0, 2**16), st.floats(-5, 5))
    def test_of_differences_ignore_a_common_shift(self, count: int, seed: int, shift: float) -> None:
        R = np.random.default_rng(seed).random((count, count))
        b = np.random.default_rng(seed + 1).random(count)
        assert backward_transfer(R + shift) == pytest.approx(backward_transfer(R))
        assert forgetting(R + shift) == pytest.approx(forgetting(R))
        assert forward_transfer(R + shift, b + shift) == pytest.approx(forward_transfer(R, b))
        assert average_accuracy(R + shift) == pytest.approx(average_accuracy(R) + shift)

    @pytest.mark.parametrize("matrix", [[], [0.5], [[0.5, 0.6]], [[[0.5]]]])
    def test_refuse_what_is_no_matrix(self, matrix: Any) -> None:
        with pytest.raises(RecastSequenceError, match="square"):
            average_accuracy(matrix)

    @pytest.mark.parametrize("matrix", [[["a"]], [[0.5, 0.6], [0.5]], "half"])
    def test_refuse_what_are_no_numbers(self, matrix: Any) -> None:
        with pytest.raises(RecastSequenceError, match="no number, or rows of unequal length"):
            average_accuracy(matrix)

    def test_of_tensors_in_training_and_in_half_precision(self) -> None:
        R = torch.tensor(FORGETFUL, requires_grad=True)
        assert forgetting(R) == pytest.approx(forgetting(FORGETFUL))
        assert forward_transfer(R.bfloat16(), torch.tensor(BASELINE).bfloat16()) == pytest.approx(
            forward_transfer(FORGETFUL, BASELINE), abs=0.01
        )

    @pytest.mark.parametrize("after", [-1, 3, 1.0])
    def test_refuse_a_task_that_is_not_there(self, after: Any) -> None:
        with pytest.raises(RecastSequenceError, match="0 to 2"):
            average_accuracy(FORGETFUL, after=after)

    @pytest.mark.parametrize("measure", [backward_transfer, forgetting, lambda R: forward_transfer(R, [0.1])])
    def test_of_one_task_are_refused(self, measure: Any) -> None:
        assert average_accuracy([[0.5]]) == 0.5
        with pytest.raises(RecastSequenceError, match="2 tasks"):
            measure([[0.5]])

    def test_name_the_entry_that_is_missing(self) -> None:
        with pytest.raises(RecastSequenceError, match=r"R\[0, 1\], R\[1, 2\]"):
            forward_transfer(LOWER, BASELINE)
        with pytest.raises(RecastSequenceError, match=r"R\[2, 0\]"):
            average_accuracy([[0.9, nan, nan], [0.9, 0.8, nan], [nan, 0.8, 0.5]])
        with pytest.raises(RecastSequenceError, match=r"R\[1, 1\]"):
            forgetting([[0.9, 0.1, nan], [0.9, nan, nan], [0.9, 0.8, 0.5]])

    @pytest.mark.parametrize(("baseline", "message"), [([0.1, 0.2], "another length"), ([0.1, 0.2, nan], "task 2")])
    def test_name_what_is_wrong_with_the_baseline(self, baseline: list[float], message: str) -> None:
        with pytest.raises(RecastSequenceError, match=message):
            forward_transfer(FORGETFUL, baseline)
