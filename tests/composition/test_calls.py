"""Calls of a model beside verbs that change it, and whom an open block is for."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from recast_peft import RecastConfigError
from recast_peft.composition.calls import Calls
from recast_peft.composition.mixed_batch import MixedBatch, mixed_batch

LONG = 60  # seconds after which a test has failed


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function returns, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result(LONG)


class TestVerbs:
    def test_calls_run_beside_each_other(self) -> None:
        calls, both = Calls(), threading.Barrier(2)

        def call() -> None:
            with calls.call():
                both.wait(LONG)  # broken unless both are inside at once

        with ThreadPoolExecutor(2) as executor:
            for future in [executor.submit(call) for _ in range(2)]:
                future.result(LONG)

    def test_a_verb_waits_for_a_call_and_the_next_call_for_the_verb(self) -> None:
        calls, happened = Calls(), []
        inside, end, waits = threading.Event(), threading.Event(), threading.Event()

        def first() -> None:
            with calls.call():
                inside.set()
                assert end.wait(LONG)
                happened.append("first call ends")

        def verb() -> None:
            waits.set()
            with calls.change():
                happened.append("verb")

        def second() -> None:
            with calls.call():
                happened.append("second call")

        with ThreadPoolExecutor(3) as executor:
            futures = [executor.submit(first)]
            assert inside.wait(LONG)
            futures.append(executor.submit(verb))
            assert waits.wait(LONG)
            while not calls._waiting and not futures[1].done():
                time.sleep(0.01)
            futures.append(executor.submit(second))
            while not calls._calls_waiting and not futures[2].done():
                time.sleep(0.01)
            end.set()
            for future in futures:
                future.result(LONG)
        assert happened == ["first call ends", "verb", "second call"]

    def test_calls_and_verbs_may_be_nested_in_one_thread(self) -> None:
        calls = Calls()
        with calls.call(), calls.call(), calls.change(), calls.change(), calls.call():
            pass

        def verb_and_call() -> str:
            with calls.change(), calls.call():
                return "done"

        assert elsewhere(verb_and_call) == "done"  # all of it was put back

    def test_a_verb_inside_a_call_is_refused_while_others_compute(self) -> None:
        calls, inside, end = Calls(), threading.Event(), threading.Event()

        def other() -> None:
            with calls.call():
                inside.set()
                assert end.wait(LONG)

        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(other)
            assert inside.wait(LONG)
            with calls.call(), pytest.raises(RecastConfigError, match="from inside one of its calls"), calls.change():
                pass
            end.set()
            future.result(LONG)
        with calls.call(), calls.change():
            pass

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda calls: pickle.loads(pickle.dumps(calls))])
    def test_a_copy_begins_afresh(self, copier: Callable[[Calls], Calls]) -> None:
        calls = Calls()
        with calls.change(), calls.block():
            twin = copier(calls)
            with twin.change():
                twin.check_no_block_elsewhere()


class TestBlocks:
    def test_a_call_that_names_no_task_is_refused_while_one_is_open(self) -> None:
        calls, other = Calls(), Calls()
        calls.check_no_block_elsewhere()
        with calls.block():
            with pytest.raises(RecastConfigError, match="whom is it for"):
                calls.check_no_block_elsewhere()
            with mixed_batch(MixedBatch(("a",))):
                calls.check_no_block_elsewhere()
            for said in (calls.of_the_active_task, calls.switched_off):
                with said():
                    calls.check_no_block_elsewhere()
                    with pytest.raises(RecastConfigError, match="whom is it for"):
                        elsewhere(calls.check_no_block_elsewhere)  # another thread said nothing of the kind
            other.check_no_block_elsewhere()  # another model
        calls.check_no_block_elsewhere()

    def test_switching_tasks_off_concerns_the_thread_that_did(self) -> None:
        calls = Calls()
        assert not calls.is_off(disabled=False)
        assert calls.is_off(disabled=True)  # for everybody, by the model's own switch
        with calls.switched_off():
            assert calls.is_off(disabled=False)
            assert not elsewhere(lambda: calls.is_off(disabled=True))  # it is off for this thread's block alone
        assert not calls.is_off(disabled=False)
        assert elsewhere(lambda: calls.is_off(disabled=True))
