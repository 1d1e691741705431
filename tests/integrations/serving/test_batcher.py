"""Requests of many tasks at once: each gets its own task's answer, and fails alone."""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import small_transformer
from served import CLASSES, alone, packed

from recast_peft import RecastConfig, RecastConfigError, TaskPool, get_recast_model
from recast_peft.integrations.serving import Answer, ServerBusyError, TaskServer, TaskServerError


class TestServer:
    def test_requests_of_many_tasks_share_batches(self, store, image):
        right = {task: alone(store.pool, task, image) for task in [*CLASSES, None]}
        with TaskServer(store.pool, wait=0.05, max_batch=8) as server:
            futures = [(task, server.submit(task, image)) for _ in range(4) for task in right]
            for task, future in futures:
                answer = future.result(30)
                torch.testing.assert_close(answer.output, right[task], atol=1e-5, rtol=1e-4)
                if task in ("cats", "dogs"):
                    assert answer.label == CLASSES[task][int(right[task].argmax())]
            stats = server.stats()
        assert stats["answered"] == 16
        assert stats["batches"] == 2
        assert [len(right[task]) for task in right] == [3, 2, 4, 4]

    def test_no_class_is_the_most_likely_one_of_no_numbers(self, store, image):
        with TaskServer(store.pool, wait=0.05) as server:
            answers = [server.submit("cats", sample) for sample in (image, image * float("nan"))]
            assert [answer.result(30).label is None for answer in answers] == [False, True]

    def test_what_is_wrong_with_one_request_is_said_to_it_alone(self, store, image):
        with TaskServer(store.pool, wait=0.05) as server:
            with pytest.raises(RecastConfigError, match="no task 'birds'"):
                server.submit("birds", image)
            with pytest.raises(RecastConfigError, match="expected a tensor"):
                server.submit("cats", [1.0])
            good, bad = server.submit("cats", image), server.submit("cats", torch.zeros(3, 7, 9))
            same_shape = server.submit("dogs", torch.zeros(3, 7, 9))
            assert isinstance(good.result(30), Answer)
            for future in (bad, same_shape):
                with pytest.raises(TaskServerError, match=r"the model refused the sample \(sample \(3, 7, 9\)"):
                    future.result(30)

    @pytest.mark.parametrize("name", ["task_ids", "adapter_names", ""])
    def test_a_sample_does_not_say_of_which_task_it_is(self, store, image, name):
        with TaskServer(store.pool) as server:
            sample = {"x": image, name: store.pool.ids(["dogs"])[0]}
            with pytest.raises(RecastConfigError, match=f"a tensor called '{name}'"):
                server("cats", sample)

    def test_numbers_are_taken_in_the_model_s_own_kind(self, store, image):
        store.pool.model.bfloat16()
        right = alone(store.pool, "cats", image.bfloat16())
        with TaskServer(store.pool, wait=0.05) as server:
            futures = [server.submit("cats", sample) for sample in (image, image.double(), image.bfloat16())]
            for future in futures:
                torch.testing.assert_close(future.result(30).output, right.float(), atol=0.05, rtol=0.05)
                assert future.result(30).batch == 3

    def test_whole_numbers_stay_what_they_are_where_a_model_reads_ids(self):
        model = get_recast_model(small_transformer("bert"), RecastConfig(target_modules=["query"]), "texts").eval()
        pool = TaskPool(model)
        pool.add("cats", RecastConfig())
        ids = torch.arange(3, 9)
        with torch.no_grad():
            expected = model.get_base_model()(ids[None]).logits[0]
        with TaskServer(pool) as server:
            for sample in (ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
                torch.testing.assert_close(server("cats", sample).output, expected, atol=1e-5, rtol=1e-4)

    def test_an_error_of_whatever_kind_fails_its_request_alone(self, store, image):
        def leave(out):
            raise SystemExit("a library that leaves")

        with TaskServer(store.pool, output_of=leave) as server:
            for _ in range(2):
                with pytest.raises(TaskServerError, match="SystemExit: a library that leaves"):
                    server.submit("cats", image).result(5)
            assert server.is_alive

    def test_a_task_that_is_removed_while_its_request_waits(self, store, image):
        with TaskServer(store.pool, wait=0.3) as server:
            lost, kept = server.submit("cats", image), server.submit("dogs", image)
            store.pool.remove("cats")
            assert kept.result(30).task == "dogs"
            with pytest.raises(RecastConfigError, match="was removed while"):
                lost.result(30)

    def test_a_task_that_is_removed_right_before_its_batch_names_no_other(self, store, image, monkeypatch):
        with TaskServer(store.pool, wait=0.3) as server:

            def is_removed_next(request):
                may_run = TaskServer._may_run(server, request)
                if request.task == "cats":
                    store.pool.remove("cats")
                return may_run

            monkeypatch.setattr(server, "_may_run", is_removed_next)
            lost, kept = server.submit("cats", image), server.submit("dogs", image)
            assert kept.result(30).task == "dogs"
            for ask in (lambda: lost.result(30), lambda: server.submit("cats", image), lambda: server.submit(["cats"], image)):
                with pytest.raises(RecastConfigError, match="task 'cats' was removed while|has no task .*cats") as said:
                    ask()
                assert "dogs" not in str(said.value)

    def test_a_full_queue_a_deadline_and_a_cancelled_request(self, store, image):
        server = TaskServer(store.pool, wait=0.2, max_queue=3)
        late, gone, good = (
            server.submit("cats", image, timeout=0.01),
            server.submit("cats", image),
            server.submit("dogs", image),
        )
        assert gone.cancel()
        with pytest.raises(ServerBusyError, match="3 requests waiting"):
            server.submit("cats", image)
        assert good.result(30).task == "dogs"
        with pytest.raises(TimeoutError):
            late.result(30)
        server.close()
        with pytest.raises(ServerBusyError, match="is closed"):
            server.submit("cats", image)
        assert server.stats()["timed_out"] == 1

    def test_closing_answers_what_waits(self, store, image):
        server = TaskServer(store.pool, wait=10)
        futures = [server.submit("cats", image) for _ in range(3)]
        server.close()
        assert all(future.result(0).batch == 3 for future in futures)

    def test_asyncio(self, store, image):
        async def ask() -> list[Answer]:
            return await asyncio.gather(*(server.answer(task, image) for task in CLASSES))

        with TaskServer(store.pool, wait=0.05) as server:
            assert [answer.task for answer in asyncio.run(ask())] == list(CLASSES)

    def test_bad_arguments(self, store):
        zero = ({"max_batch": 0}, {"max_queue": 0}, {"wait": -1}, {"timeout": 0})
        for bad in (*zero, {"max_batch": 2.5}, {"max_queue": None}, {"wait": float("nan")}, {"timeout": "1"}):
            with pytest.raises(RecastConfigError, match=rf"{next(iter(bad))}=.*: expected"):
                TaskServer(store.pool, **bad)


class TestStress:
    def test_clients_beside_uploads_and_rollbacks(self, store, saved, image):
        pool = store.pool
        right = {task: [alone(pool, task, image)] for task in CLASSES}
        for task in ("cats", "dogs"):
            store.upload(task, packed(saved / "second" / task))
            right[task].append(alone(pool, task, image))
        deadline = time.monotonic() + 4
        wrong: list[str] = []

        def client(seed: int) -> int:
            rng, asked = random.Random(seed), 0
            while time.monotonic() < deadline:
                task = rng.choice(list(right))
                output = server(task, image).output
                asked += 1
                if not any(len(output) == len(y) and torch.allclose(output, y, atol=1e-4) for y in right[task]):
                    wrong.append(task)
            return asked

        def change() -> None:
            rng = random.Random(0)
            while time.monotonic() < deadline:
                task = rng.choice(["cats", "dogs"])
                if rng.random() < 0.5:
                    store.rollback(task)
                else:
                    store.upload(task, packed(saved / "second" / task))
                pool.add("guest", RecastConfig(num_classes=5))
                pool.remove("guest")

        with TaskServer(pool) as server, ThreadPoolExecutor(9) as executor:
            changing = executor.submit(change)
            asked = sum(executor.map(client, range(8)))
            changing.result(60)
        assert not wrong
        assert asked > 50
