"""Threads: no call ever gets another task's answer, or the base's, whatever the others do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import random
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from models import run_at_once, small_vit
from peft import PeftModel
from torch import Tensor

from recast_peft import RecastConfig, RecastConfigError, RecastLayer, TaskPool, get_recast_model

SECONDS = 5.0


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def make() -> tuple[PeftModel, TaskPool]:
    model = get_recast_model(small_vit(depth=3), RecastConfig(target_modules=["qkv", "fc1"]), "first").eval()
    return model, TaskPool(model)


def put(pool: TaskPool, name: str, seed: int, classes: int | None = None) -> None:
    """A task with random coefficients and maybe a random classifier, both following from the seed."""
    values = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(seed)) * 0.4
    if classes is not None:
        pool.add(name, RecastConfig(num_classes=classes, seed=seed))
        pool.table[pool.row(name)] = values
        return
    layers = [module.module_name for module in pool.model.modules() if isinstance(module, RecastLayer)]
    pool.add(name, {f"base_model.model.{layer}.recast_coefficients": values[pool.part_of(layer)][None] for layer in layers})


class TestWhatACallHolds:
    def test_a_row_that_is_used_again_during_a_call(self, images):
        model, pool = make()
        put(pool, "a", 1, classes=3)
        right = model(images, task_ids=pool.ids(["a", "a"]))
        with pool.batch(["a", "a"]):
            pool.remove("a")
            put(pool, "b", 2, classes=5)
            assert pool.row("b") == 0
            assert torch.equal(model(images), right)
        assert model(images, task_ids=pool.ids(["b", "b"])).shape == (2, 5)

    def test_the_number_of_a_removed_task_is_refused(self, images):
        model, pool = make()
        put(pool, "a", 1)
        kept = pool.ids(["a", None])
        pool.remove("a")
        with pytest.raises(RecastConfigError, match="has been removed"):
            model(images, task_ids=kept)
        for seed in range(3):
            put(pool, "b", seed)
            with pytest.raises(RecastConfigError, match="has been removed"):
                model(images, task_ids=kept)
            pool.remove("b")

    def test_a_row_is_left_for_good_before_its_numbers_come_again(self, monkeypatch):
        monkeypatch.setattr("recast_peft.pool.table.LAST_USE", 2)
        _, pool = make()
        numbers = []
        for _ in range(6):
            pool.add("a")
            numbers.append(int(pool.ids(["a"])))
            pool.remove("a")
        assert len({*numbers}) == 6
        assert max(number & 0xFFFFFFFF for number in numbers) == 1

    def test_a_compiled_call_gives_nan_for_a_removed_task(self, images):
        model, pool = make()
        put(pool, "a", 1)
        put(pool, "b", 2)
        kept = pool.ids(["a", "b"])
        pool.remove("a")
        put(pool, "c", 3)
        torch._dynamo.reset()  # after many compilations torch gives up and calls eagerly
        out = torch.compile(model, backend="eager")(images, task_ids=kept)
        assert out[0].isnan().all()
        torch.testing.assert_close(out[1], model(images, task_ids=pool.ids([None, "b"]))[1])

    def test_numbers_of_another_pool(self, images):
        model, pool = make()
        put(pool, "a", 1)
        second = TaskPool(model, slot="second")
        put(second, "b", 2)
        first, other = (model(images, task_ids=p.ids([n, n])) for p, n in ((pool, "a"), (second, "b")))
        assert not torch.allclose(first, other, atol=1e-3)
        model.delete_adapter("second")  # does not stand in the way of the older pool
        assert torch.equal(model(images, task_ids=pool.ids(["a", "a"])), first)
        assert torch.equal(model(images, task_ids=["a", "a"]), first)
        with pytest.raises(RecastConfigError, match="this model has no more"):
            model(images, task_ids=second.ids(["b", "b"]))
        third = TaskPool(model)
        with pytest.raises(RecastConfigError, match="this model has no more"):
            model(images, task_ids=pool.ids(["a", "a"]))
        with pytest.raises(RecastConfigError, match="another TaskPool has been made"):
            pool.activate("a")
        put(third, "c", 3)
        with pytest.raises(RecastConfigError, match="several pools"):
            model(images, task_ids=torch.cat([pool.ids(["a"]), third.ids(["c"])]))

    @pytest.mark.parametrize("copied", [False, True])
    def test_a_second_pool_begins_with_the_pretrained_model(self, copied, images):
        model, pool = make()
        base = small_vit(depth=3)(images)
        put(pool, "cats", 1, classes=3)
        pool.activate("cats")
        assert model(images).shape == (2, 3)
        model = copy.deepcopy(model) if copied else model
        pool = TaskPool(model)
        assert torch.equal(model(images), base)
        put(pool, "plain", 2)
        pool.activate("plain")
        assert model(images).shape == base.shape
        pool.deactivate()
        assert torch.equal(model(images), base)


class TestBlocks:
    def test_a_call_in_another_thread_is_refused_while_a_block_is_open(self, images):
        model, pool = make()
        put(pool, "a", 1)
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            with pool.batch(["a", "a"]):
                right = model(images)
                for call in (model, model.base_model, model.get_base_model()):
                    with pytest.raises(RecastConfigError, match="block with pool.batch"):
                        executor.submit(call, images).result()
                ids = pool.ids(["a", "a"])
                assert torch.equal(executor.submit(model, images, task_ids=ids).result(), right)

                def active() -> Tensor:
                    with torch.no_grad(), pool.batch(None):
                        return model(images)

                base = executor.submit(active).result()
            assert torch.equal(model(images), base)
        assert not torch.allclose(base, right, atol=1e-3)

    def test_asyncio_takes_the_block_along_where_it_can(self, images):
        model, pool = make()
        put(pool, "a", 1)
        put(pool, "b", 2)
        right = {name: model(images, task_ids=[name, name]) for name in "ab"}

        async def handler(name: str) -> bool:
            with pool.batch([name, name]):
                await asyncio.sleep(0.01)
                return torch.equal(await asyncio.to_thread(torch.no_grad()(model), images), right[name])

        async def forgotten() -> None:
            with pool.batch(["a", "a"]):
                await asyncio.get_running_loop().run_in_executor(None, model, images)

        async def serve() -> list[bool]:
            return await asyncio.gather(*(handler(name) for name in "abab"))

        assert asyncio.run(serve()) == [True] * 4
        with pytest.raises(RecastConfigError, match="block with pool.batch"):
            asyncio.run(forgotten())

    def test_a_generator_that_is_run_in_threads(self, images):
        model, pool = make()
        put(pool, "a", 1)
        right = model(images, task_ids=["a", "a"])

        def stream(how: str):
            if how == "by call":
                for _ in range(3):
                    yield model(images, task_ids=pool.ids(["a", "a"]))
                return
            with pool.batch(["a", "a"]):
                for _ in range(3):
                    yield model(images)

        async def serve(how: str) -> list[Tensor]:
            parts, generator, done = [], stream(how), object()
            while (part := await asyncio.to_thread(next, generator, done)) is not done:
                parts.append(part)
            return parts

        assert all(torch.allclose(part, right) for part in asyncio.run(serve("by call")))
        with pytest.raises(RecastConfigError, match="block with pool.batch"):
            asyncio.run(serve("by block"))
        model(images)  # nothing is left of the block

    def test_a_block_that_ends_in_another_thread_leaves_nothing_where_it_began(self, images):
        model, pool = make()
        put(pool, "a", 1)
        base = model(images)

        def stream():
            with pool.batch(["a", "a"]):
                yield

        with (
            concurrent.futures.ThreadPoolExecutor(1) as first,
            concurrent.futures.ThreadPoolExecutor(1) as second,
        ):
            generator = stream()
            first.submit(next, generator).result()
            second.submit(next, generator, None).result()
            assert torch.allclose(first.submit(model, images).result(), base)


class TestDisabling:
    def test_in_one_thread_leaves_the_mixed_batches_of_others_alone(self, images):
        model, pool = make()
        put(pool, "a", 1)
        base, right = model(images), model(images, task_ids=["a", "a"])
        inside, leave = threading.Event(), threading.Event()

        def plain() -> bool:
            with torch.no_grad(), model.disable_adapter():
                inside.set()
                leave.wait(10)
                return torch.equal(model(images, task_ids=["a", "a"]), base)  # its own block switches its own batch off

        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            future = executor.submit(plain)
            assert inside.wait(10)
            assert torch.equal(model(images, task_ids=["a", "a"]), right)
            assert torch.equal(model.base_model(images, task_ids=["a", "a"]), right)
            leave.set()
            assert future.result()
        assert torch.equal(model(images, task_ids=["a", "a"]), right)


class TestFeatures:
    def test_are_those_of_the_call_that_asked(self, images):
        model, pool = make()
        put(pool, "a", 1)
        put(pool, "b", 2)
        right = pool.base_features(images)
        stop = threading.Event()

        def serve() -> None:
            with torch.no_grad():
                while not stop.is_set():
                    model(images * 2, task_ids=pool.ids(["a", "b"]))

        def ask() -> None:
            try:
                for _ in range(100):
                    assert torch.allclose(pool.base_features(images), right, atol=1e-5)
            finally:
                stop.set()

        run_at_once([ask, serve, serve])

    def test_leave_every_module_in_the_mode_that_it_was_in(self, images):
        model, pool = make()
        model.train()
        model.get_base_model().blocks[1].eval()
        before = {name: module.training for name, module in model.named_modules()}
        pool.base_features(images)
        assert {name: module.training for name, module in model.named_modules()} == before


class Stress:
    """Calls, guests that come and go, and verbs, in as many threads as are wanted, until a moment."""

    def __init__(self, seed: int, seconds: float, images: Tensor) -> None:
        self.model, self.pool = make()
        self.seed, self.images = seed, images
        for i in range(6):
            put(self.pool, f"t{i}", i, None if i % 2 else 3 + i)
        self.pool.deactivate()
        self.base = self.model(images)
        self.right: dict[str | None, Tensor] = {name: self.model(images, task_ids=[name, name]) for name in self.pool}
        self.lasting = list(self.pool)
        self.right[None] = self.base
        self.deadline = time.monotonic() + seconds
        self.wrong: list[str] = []
        self.answers = 0

    def until_the_end(self, number: int) -> Iterator[random.Random]:
        rng = random.Random(self.seed * 100 + number)
        with torch.no_grad():
            while time.monotonic() < self.deadline:
                yield rng

    def check(self, names: list[str | None], out: Tensor, how: str) -> None:
        for name, row, x in zip(names, out, range(len(names)), strict=True):
            expected = self.right[name][x]
            answer, padding = row[: len(expected)], row[len(expected) :]
            if not torch.allclose(answer, expected, atol=1e-4) or not torch.isinf(padding).all():
                self.wrong.append(f"{how} {name}")
        self.answers += 1

    def call(self, number: int) -> None:
        model = self.model
        inside = {"block": model, "base block": model.base_model, "inner": model.get_base_model()}
        for rng in self.until_the_end(number):
            names = [rng.choice([*self.lasting, None]) for _ in range(2)]
            how = rng.choice(["ids", "names", *inside])
            if how in inside:
                with self.pool.batch(names):
                    self.check(names, inside[how](self.images), how)
            else:
                ids = self.pool.ids(names) if how == "ids" else names
                self.check(names, model(self.images, task_ids=ids), how)

    def come_and_go(self, number: int) -> None:
        name = f"guest{number}"
        for rng in self.until_the_end(50 + number):
            put(self.pool, name, rng.randrange(1000, 2000), rng.choice([None, 2, 9]))
            kept = self.pool.ids([name, name])
            self.model(self.images, task_ids=kept)
            self.pool.remove(name)
            with pytest.raises(RecastConfigError, match="has been removed"):
                self.model(self.images, task_ids=kept)

    def change(self, number: int) -> None:
        for rng in self.until_the_end(80 + number):
            verb = rng.choice(["activate", "merge", "adapter", "deactivate", "disable"])
            if verb in ("activate", "merge"):
                self.pool.activate(rng.choice(self.lasting), merge=verb == "merge")
            elif verb == "adapter":
                self.model.set_adapter("first")
            elif verb == "deactivate":
                self.pool.deactivate()
            else:
                with self.model.disable_adapter():
                    time.sleep(0.002)
            time.sleep(0.001)


class TestStress:
    """Eight threads of calls beside every verb: each answer is compared with the task's own."""

    def test_no_answer_is_another_tasks_or_the_bases(self, images):
        stress = Stress(0, SECONDS, images)
        assert len({round(float(out.sum()), 3) for out in stress.right.values()}) == len(stress.right)
        callers = [partial(stress.call, i) for i in range(8)]
        run_at_once([*callers, *(partial(stress.come_and_go, i) for i in range(2)), partial(stress.change, 0)])
        assert not stress.wrong, stress.wrong[:5]
        assert stress.answers > 100
        stress.pool.deactivate()
        assert torch.equal(stress.model(images), stress.base)

    def test_a_plain_call_sees_a_whole_task(self, images):
        model, pool = make()
        for i in range(3):
            put(pool, f"t{i}", i, 3 + i)
        right = []
        for name in pool:
            pool.activate(name)
            right.append(model(images))
        deadline = time.monotonic() + SECONDS / 4

        def change() -> None:
            rng = random.Random(0)
            while time.monotonic() < deadline:
                pool.activate(f"t{rng.randrange(3)}", merge=rng.random() < 0.5)

        def call() -> None:
            with torch.no_grad():
                while time.monotonic() < deadline:
                    out = model(images)
                    assert any(out.shape == y.shape and torch.allclose(out, y, atol=1e-4) for y in right)

        run_at_once([change, call, call])
