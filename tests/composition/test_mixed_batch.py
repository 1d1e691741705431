"""Which task each sample of a batch belongs to: rows, beams, and in which thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recast_peft import RecastConfigError
from recast_peft.composition.mixed_batch import MixedBatch, current_batch, mixed_batch


class TestRows:
    def test_are_gathered_by_task_in_the_order_of_their_first_appearance(self) -> None:
        rows = MixedBatch(("b", "a", "b")).rows(3)
        assert list(rows.items()) == [("b", [0, 2]), ("a", [1])]

    def test_a_beam_after_the_other_belongs_to_its_sample(self) -> None:
        rows = MixedBatch(("b", "a", "b"), beams=2).rows(6)
        assert list(rows.items()) == [("b", [0, 1, 4, 5]), ("a", [2, 3])]
        assert MixedBatch(("b", "a"), beams=2).rows(2) == {"b": [0], "a": [1]}  # the encoder sees no beams

    def test_tasks_of_a_pool_go_by_number(self) -> None:
        ids = torch.tensor([7, -1, 7])
        assert MixedBatch(task_ids=ids).rows(3) == {7: [0, 2], -1: [1]}
        assert MixedBatch(task_ids=ids, keys=(4, 4, 5)).rows(3) == {4: [0, 1], 5: [2]}  # what was read once is not read again

    @pytest.mark.parametrize(
        ("batch", "given"),
        [(MixedBatch(("a", "b"), beams=2), "adapter_names"), (MixedBatch(task_ids=torch.tensor([0, 1])), "task_ids")],
    )
    def test_of_another_length_are_refused(self, batch: MixedBatch, given: str) -> None:
        with pytest.raises(RecastConfigError, match=rf"`{given}` should be .* but got 2 and 3 respectively"):
            batch.rows(3)

    def test_some_rows_are_a_batch_of_their_own(self) -> None:
        batch = MixedBatch(("b", "a", "c"), beams=2)
        assert batch.of_rows([5, 0, 1], 6).names == ("c", "b", "b")
        assert batch.of_rows([2, 0], 3).names == ("c", "b")  # the encoder sees no beams
        assert batch.of_rows([5, 0], 6).rows(2) == {"c": [0], "b": [1]}
        table = torch.tensor([[1.0], [2.0], [3.0]])
        numbered = MixedBatch(task_ids=torch.tensor([7, -1, 9]), keys=(7, -1, 9), coefficients=table).of_rows([2, 0], 3)
        assert numbered.task_ids is not None
        assert numbered.coefficients is not None
        assert (numbered.task_ids.tolist(), numbered.keys, numbered.coefficients.tolist()) == ([9, 7], (9, 7), [[3.0], [1.0]])


class TestSamples:
    @pytest.mark.parametrize(
        ("samples", "place"), [([2, 3, 4], slice(2, 5)), ([1], slice(1, 2)), ([2, 4], None), ([3, 2], None)]
    )
    def test_lie_side_by_side_or_do_not(self, samples: list[int], place: slice | None) -> None:
        assert MixedBatch.side_by_side(samples) == place
        x = torch.arange(12.0).reshape(6, 2)
        taken = MixedBatch(("a",) * 6).taken(x, samples)
        assert taken.tolist() == [x[i].tolist() for i in samples]
        assert (taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == (place is not None)

    def test_have_the_columns_of_a_module_once_a_beam(self) -> None:
        pool: Any = SimpleNamespace(slices={"qkv": slice(1, 3)})
        gathered = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
        batch = MixedBatch(task_ids=torch.tensor([8, 9]), pool=pool, coefficients=gathered, beams=2)
        assert batch.offsets("qkv", 2).tolist() == [[1, 2], [4, 5]]
        assert batch.offsets("qkv", 4).tolist() == [[1, 2], [1, 2], [4, 5], [4, 5]]
        assert batch.offsets("other", 2) is None


class TestCurrent:
    def test_is_the_innermost_of_this_thread_until_its_block_ends(self) -> None:
        outer, inner = MixedBatch(("a",)), MixedBatch(("b",))
        with ThreadPoolExecutor(1) as executor:
            with mixed_batch(outer):
                with pytest.raises(ZeroDivisionError), mixed_batch(inner):
                    assert current_batch() is inner
                    assert executor.submit(current_batch).result() is None
                    raise ZeroDivisionError
                assert current_batch() is outer
            assert current_batch() is None

    def test_a_block_that_ends_elsewhere_is_over_where_it_began(self) -> None:
        outer, inner = mixed_batch(MixedBatch(("a",))), mixed_batch(MixedBatch(("b",)))
        outer.__enter__()
        inner.__enter__()
        with ThreadPoolExecutor(1) as executor:
            executor.submit(inner.__exit__, None, None, None).result()
        assert current_batch().names == ("a",)
        outer.__exit__(None, None, None)
        assert current_batch() is None
