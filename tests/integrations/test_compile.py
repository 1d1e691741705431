"""torch.compile takes a model with tasks as one graph."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import KINDS, converted, layers_of, outputs, randomise, seeded, vit_input
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap

from recast_peft import RecastConfig, TaskPool, get_recast_model

CORES = {"num_directions": 2}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "eager", **options: Any) -> Callable:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


# one for each way in which a module is called; torch's own encoder breaks the graph in its fast path
IN_ONE_GRAPH = [
    "linear",
    "conv2d padded by reflection",
    "transformers Conv1D",
    "linear subclass",
    "weight-standardised conv2d",
    "bilinear weight reader",
    "embedding",
    "multi-head attention, batch first",
]


@pytest.mark.parametrize("kind", IN_ONE_GRAPH)
def test_every_kind_of_module_is_one_graph(kind: str) -> None:
    row = KINDS[kind]
    model = get_recast_model(seeded(row.build), RecastConfig(target_modules=row.targets)).eval()
    randomise(model)
    expected = outputs(model, row.inputs())
    torch.testing.assert_close(outputs(compiled(model), row.inputs()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"num_coefficient_sets": 2}, {"num_coefficient_sets": 2, "num_templates": 1}, CORES])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_gives_the_gradients_of_eager(backend: str, fields: dict[str, Any]) -> None:
    model = converted(target_modules=["qkv", "fc1"], depth=2, **fields)
    randomise(model)
    model(vit_input()).square().sum().backward()
    expected = [layer.recast_coefficients["default"].grad.clone() for layer in layers_of(model).values()]
    model.zero_grad()
    compiled(model, backend)(vit_input()).square().sum().backward()
    for layer, gradient in zip(layers_of(model).values(), expected, strict=True):
        torch.testing.assert_close(layer.recast_coefficients["default"].grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_one_graph(dtype: torch.dtype) -> None:
    model = converted(depth=2).to(dtype)
    randomise(model)
    inputs = vit_input().to(dtype)
    torch.testing.assert_close(outputs(compiled(model, "aot_eager"), inputs), outputs(model, inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("fields", [{}, CORES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_one_graph(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    model = converted(depth=2, **fields)
    randomise(model)
    exact = outputs(model, vit_input())
    function = compiled(model, "aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        found = outputs(model, vit_input())
        torch.testing.assert_close(outputs(function, vit_input()), found, rtol=0.02, atol=0.02)
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("merged", [True, False])
def test_merged_and_disabled_models_are_one_graph(merged: bool) -> None:
    model = converted(depth=2)
    randomise(model)
    if merged:
        model.merge_adapter()
    with nullcontext() if merged else model.disable_adapter():
        expected = outputs(model, vit_input())
        torch.testing.assert_close(outputs(compiled(model), vit_input()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, CORES])
def test_other_coefficients_need_no_other_graph(fields: dict[str, Any]) -> None:
    model = converted(depth=2, **fields)
    count = CompileCounter()
    function = torch.compile(model, backend=count, fullgraph=True)
    for seed in range(4):
        randomise(model, seed=seed)
        torch.testing.assert_close(outputs(function, vit_input()), outputs(model, vit_input()), rtol=1e-5, atol=1e-6)
    assert count.frame_count == 1


def test_a_pools_cores_are_swapped_and_mixed_in_one_graph_each() -> None:
    pool = TaskPool(converted("slot", depth=2, **CORES))
    for name in ("a", "b", "c"):
        pool.add(name)
    pool.table.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    count = CompileCounter()
    function = torch.compile(pool.model.get_base_model(), backend=count, fullgraph=True)
    for name in ("a", "b", "c"):
        pool.activate(name)
        torch.testing.assert_close(outputs(function, vit_input()), outputs(pool.model, vit_input()), rtol=1e-5, atol=1e-6)
    assert count.frame_count == 1
    for names in (["a", "b"], ["b", "c"], ["c", None]):
        with pool.batch(pool.ids(names)):
            found = outputs(function, vit_input())
        torch.testing.assert_close(found, outputs(pool.model, vit_input(), task_ids=pool.ids(names)), rtol=1e-5, atol=1e-6)
    assert count.frame_count == 2


def test_gradients_of_each_sample_and_many_cores_at_once() -> None:
    model = converted(depth=2, target_modules=["qkv", "fc1"], **CORES)
    randomise(model)
    cores = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = vit_input()

    def loss(cores: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, cores, (x,)).square().sum()

    model(x).square().sum().backward()
    of_each = vmap(grad(loss), (None, 0))({**cores}, x[:, None])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(of_each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)
    many = {name: torch.stack([core, 0 * core]) for name, core in cores.items()}
    found = vmap(lambda cores: functional_call(model, cores, (x,)))(many)
    torch.testing.assert_close(found[0], outputs(model, x), rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(found[1], outputs(model, x), rtol=1e-5, atol=1e-6)


def test_switching_tasks_gives_the_task_that_was_switched_to() -> None:
    model = converted("cars", depth=2)
    model.add_adapter("birds", RecastConfig(target_modules=["qkv"]))
    for seed, name in enumerate(("cars", "birds")):
        randomise(model, name, seed)
    function = compiled(model)
    for name in ("cars", "birds", "cars"):
        model.set_adapter(name)
        torch.testing.assert_close(outputs(function, vit_input()), outputs(model, vit_input()), rtol=1e-5, atol=1e-6)


def test_a_task_with_a_classifier_is_compiled_without_a_word() -> None:
    model = converted(depth=2, num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the compiler warns of cached functions, which it traces without their cache
        outputs(compiled(model), vit_input())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same() -> None:
    model = get_recast_model(seeded(lambda: nn.Sequential(nn.Linear(4, 4))), RecastConfig(target_modules=["0"]))
    randomise(model)
    x = torch.ones(1, 4)
    torch.testing.assert_close(outputs(torch.compile(model, fullgraph=True), x), outputs(model, x), rtol=1e-4, atol=1e-5)
