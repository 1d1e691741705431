"""Compilers and captured graphs on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerator import (
    CLOSE,
    DEVICE,
    GRADIENT_ERROR,
    loss_of,
    needs_compiler,
    needs_device,
    on_cuda,
    pool_of,
    relative,
    small,
    vit_x,
)
from models import KINDS, TinyVit, captured, layers_of, outputs, randomise, seeded, tiny_vit
from torch import Tensor

from recast_peft import RecastConfig, get_recast_model
from recast_peft.composition import mixing

pytestmark = needs_device


@pytest.fixture
def _compiler() -> Iterator[None]:
    """A compiler without a past, and without worker processes of its own."""
    import torch._inductor.config

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


COMPILED = {
    "vision transformer": replace(KINDS["vision transformer"], build=lambda: TinyVit(depth=2)),
    "conv2d": KINDS["conv2d"],
    "transformers Conv1D": KINDS["transformers Conv1D"],
}


class Inductor:
    """torch.compile's own backend, which counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs)


@needs_compiler
@pytest.mark.usefixtures("_compiler")
class TestCompiled:
    @pytest.mark.parametrize("kind", COMPILED)
    def test_it_computes_the_same_for_all_coefficients_and_is_compiled_once(self, kind: str) -> None:
        row = COMPILED[kind]
        model = get_recast_model(seeded(row.build).to(DEVICE), RecastConfig(target_modules=row.targets)).eval()
        x = row.inputs().to(DEVICE)
        backend = Inductor()
        fast = torch.compile(model, backend=backend, fullgraph=True)
        seen = []
        for seed in range(3):
            randomise(model, seed=seed)
            seen.append(outputs(fast, x))
            torch.testing.assert_close(seen[-1], outputs(model, x), **CLOSE[torch.float32])
        assert not torch.allclose(seen[0], seen[1], atol=1e-3)
        assert backend.graphs == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_another_task_needs_no_other_graph(self, dtype: torch.dtype) -> None:
        model, pool = pool_of(depth=2)
        model.to(dtype)
        x = vit_x(dtype=dtype)
        backend = Inductor()
        fast = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)
        seen = []
        for name in ("task0", "task1", "task2", "task0"):
            pool.activate(name)
            seen.append(outputs(fast, x))
            torch.testing.assert_close(seen[-1], outputs(model, x), **CLOSE[dtype])
        assert backend.graphs == 1
        assert torch.equal(seen[0], seen[3])
        assert not torch.allclose(seen[0], seen[1], atol=1e-2)

    def test_any_mixture_of_tasks_needs_no_other_graph(self) -> None:
        model, pool = pool_of(depth=2)
        x = vit_x()
        backend = Inductor()
        fast = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)
        for names in (["task0", "task1", None] * 2, ["task2"] * 6, [None, "task1"] * 3):
            with pool.batch(names):
                mixed = outputs(fast, x)
            for i, name in enumerate(names):
                pool.deactivate() if name is None else pool.activate(name)
                torch.testing.assert_close(mixed[i], outputs(model, x)[i], **CLOSE[torch.float32])
        assert backend.graphs == 1

    @pytest.mark.parametrize("kind", ["vision transformer", "conv2d"])
    @pytest.mark.parametrize("templates", [None, 1])
    def test_a_training_step_gives_the_gradients_of_eager(self, kind: str, templates: int | None) -> None:
        row = COMPILED[kind]
        config = RecastConfig(target_modules=row.targets, num_templates=templates)
        model = get_recast_model(seeded(row.build).to(DEVICE), config)
        randomise(model)
        x = row.inputs().to(DEVICE)
        found = []
        for function in (model, torch.compile(model, fullgraph=True)):
            model.zero_grad()
            loss_of(function(x)).backward()
            found.append(torch.cat([c.recast_coefficients["default"].grad.flatten() for c in layers_of(model).values()]))
        assert found[0].abs().max() > 1e-2
        assert relative(found[1], found[0]) < GRADIENT_ERROR

    @on_cuda
    def test_captured_by_the_compiler_it_computes_with_the_task_that_is_in_force(self) -> None:
        model, pool = pool_of(depth=2)
        x = vit_x()
        fast = torch.compile(model.get_base_model(), mode="reduce-overhead", fullgraph=True)
        seen: dict[str, list[Tensor]] = {}
        for name in ("task0", "task1", "task2") * 3:  # the first calls warm up and capture
            pool.activate(name)
            torch.compiler.cudagraph_mark_step_begin()
            seen.setdefault(name, []).append(outputs(fast, x).clone())
            torch.testing.assert_close(seen[name][-1], outputs(model, x), **CLOSE[torch.float32])
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert not torch.allclose(seen["task0"][-1], seen["task1"][-1], atol=1e-3)
        pool.deactivate()
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(outputs(fast, x), outputs(tiny_vit(depth=2).to(DEVICE), x), **CLOSE[torch.float32])


@on_cuda
@pytest.mark.parametrize("products", [False, True], ids=["composed for each task", "products of the whole batch"])
def test_a_captured_mixed_batch_computes_with_other_inputs(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "products_are_cheaper", lambda *args: products)
    model, pool = pool_of()
    names = ["task0", "task2", None, "task1", "task0", None]
    static = vit_x().clone()
    with torch.no_grad(), pool.batch(names):
        graph, out = captured(model, static)
        for shift in (0.0, 1.0):  # inside the block: the graph reads the batch's coefficients
            static.copy_(vit_x() + shift)
            graph.replay()
            torch.testing.assert_close(out, model(static), **CLOSE[torch.float32])


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_the_host_never_waits(precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    trained = small("cars", dtype=dtype).train()
    model, pool = pool_of()
    model.to(dtype)
    x = vit_x(dtype=dtype)

    def training_step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "autocast"):
            trained(x).square().sum().backward()

    def tasks() -> None:
        with torch.no_grad():
            for name in ("task0", "task1"):
                pool.activate(name)
                model(x)
                pool.activate(name, merge=True)
                model(x)
            pool.deactivate()
            model(x)

    for work in (training_step, tasks):
        work()  # libraries are loaded at their first use
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
