"""A fingerprint stays when the dtype changes and differs when the weights do."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recast_peft import RecastLoadError
from recast_peft.composition.fingerprint import BLOCK, PROJECTIONS, same_weight, sign_patterns, weight_fingerprint

shapes = st.sampled_from([(8, 8), (24, 8), (1, 7), (64, 64), (4, 4, 3, 3), (65, 129), (5000, 3)])


def draw_weight(seed: int, shape: tuple[int, ...] = (32, 32), size: float = 0.05) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


class TestTheSameWeight:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @given(seed=st.integers(0, 2**16), shape=shapes)
    def test_is_known_in_another_dtype(self, dtype: torch.dtype, seed: int, shape: tuple[int, ...]) -> None:
        weight = draw_weight(seed, shape)
        assert same_weight(weight_fingerprint(weight), weight_fingerprint(weight.to(dtype)))

    @given(st.integers(0, 2**16))
    def test_is_known_through_two_low_precisions(self, seed: int) -> None:
        weight = draw_weight(seed)
        assert same_weight(weight_fingerprint(weight.bfloat16()), weight_fingerprint(weight.half()))

    def test_has_one_fingerprint_however_it_lies_in_memory(self) -> None:
        weight = draw_weight(0, (16, 8, 3, 3))
        assert weight_fingerprint(weight) == weight_fingerprint(weight.contiguous(memory_format=torch.channels_last))

    def test_has_one_fingerprint_on_every_machine(self) -> None:
        # the definition, written out: signs of element k are pattern[k % BLOCK] * pattern'[k // BLOCK]
        weight = draw_weight(1, (3, 3000))
        flat = weight.double().reshape(-1)
        index = torch.arange(flat.numel())
        signs = sign_patterns(BLOCK, PROJECTIONS)[index % BLOCK] * sign_patterns(3, PROJECTIONS)[index // BLOCK]
        projections = (flat[:, None] * signs).sum(dim=0) / flat.norm()
        raw = base64.b64decode(weight_fingerprint(weight) + "==")
        stored = np.frombuffer(raw, dtype="<i2")[1:] / 4096.0
        assert np.abs(stored - projections.numpy()).max() < 1 / 4096

    def test_is_summed_in_parts_without_a_change(self) -> None:
        long = draw_weight(2, (4097 * BLOCK,))  # longer than what is read at once
        halves = long.reshape(2, -1)
        assert weight_fingerprint(long) == weight_fingerprint(halves)
        changed = long.clone()
        changed[-BLOCK:] *= 40
        assert not same_weight(weight_fingerprint(long), weight_fingerprint(changed))

    def test_of_zeros_has_a_fingerprint(self) -> None:
        zero = weight_fingerprint(torch.zeros(4, 4))
        assert same_weight(zero, weight_fingerprint(torch.zeros(4, 4, dtype=torch.bfloat16)))
        assert not same_weight(zero, weight_fingerprint(draw_weight(0, (4, 4))))


class TestAnotherWeight:
    @given(st.integers(0, 2**16), shapes)
    def test_of_the_same_size_differs(self, seed: int, shape: tuple[int, ...]) -> None:
        assert not same_weight(weight_fingerprint(draw_weight(seed, shape)), weight_fingerprint(draw_weight(seed + 1, shape)))

    @given(st.integers(0, 2**16))
    def test_with_rows_in_another_order_differs(self, seed: int) -> None:
        weight = draw_weight(seed)
        assert not same_weight(weight_fingerprint(weight), weight_fingerprint(weight.flip(0)))

    @pytest.mark.parametrize("change", [lambda w: -w, lambda w: 1.01 * w, lambda w: w / 1.01, lambda w: w.T])
    def test_that_was_derived_from_it_differs(self, change) -> None:
        weight = draw_weight(4)
        assert not same_weight(weight_fingerprint(weight), weight_fingerprint(change(weight).contiguous()))

    def test_after_a_fine_tuning_differs(self) -> None:
        weight = draw_weight(5, (256, 256))
        assert not same_weight(weight_fingerprint(weight), weight_fingerprint(weight + 0.1 * draw_weight(6, (256, 256))))


def test_a_fingerprint_is_short() -> None:
    assert len(weight_fingerprint(draw_weight(0))) == 14


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(number: float) -> None:
    weight = draw_weight(0)
    weight[3, 3] = number
    with pytest.raises(RecastLoadError, match="infinite or undefined"):
        weight_fingerprint(weight)


@pytest.mark.parametrize("text", ["", "abc", "not base64 at all", "äöü", "AAAA", "A" * 40, "=" * 14])
def test_what_is_not_a_fingerprint_is_refused_by_name(text: str) -> None:
    with pytest.raises(RecastLoadError, match="is not a fingerprint"):
        same_weight(weight_fingerprint(draw_weight(0)), text)


def test_sign_patterns_are_balanced_and_do_not_depend_on_where_one_starts() -> None:
    whole = sign_patterns(2 * BLOCK, PROJECTIONS)
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(whole[BLOCK:], sign_patterns(BLOCK, PROJECTIONS, first=BLOCK))
    assert whole.mean(dim=0).abs().max() < 0.05  # about 4.5 standard deviations
    correlation = whole.T @ whole / len(whole)
    assert (correlation - torch.eye(PROJECTIONS)).abs().max() < 0.05


def test_autocast_around_it_does_not_matter() -> None:
    weight = draw_weight(0)
    wanted = weight_fingerprint(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weight_fingerprint(weight) == wanted
