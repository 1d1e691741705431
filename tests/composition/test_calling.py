"""A call in every way there is: no memory stays behind, and transforms of functions and tracers see plain operations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from models import Chain, converted, layers_of, randomise, seeded, vit_input
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from recast_peft import RecastConfig, TaskPool, get_recast_model
from recast_peft.errors import RecastBankError

WIDTH = 256


def wide(**config: Any) -> Any:
    """Three linear layers of 256 kB each, with a task."""
    plain = seeded(lambda: Chain([nn.Linear(WIDTH, WIDTH) for _ in range(3)]))
    model = get_recast_model(plain, RecastConfig(target_modules=["0", "1", "2"], group_size=3, **config), "task").eval()
    randomise(model, "task")
    return model


def pooled() -> Any:
    model = wide()
    pool = TaskPool(model)
    for name in ("a", "b"):
        pool.add(name)
        pool.table.data[pool.row(name)] += 0.01
    return model


def merged() -> Any:
    model = wide()
    model.merge_adapter()
    return model


WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
    "live": (wide, lambda model: {}),
    "one template": (lambda: wide(num_templates=1), lambda model: {}),
    "merged": (merged, lambda model: {}),
    "mixed by name": (wide, lambda model: {"adapter_names": ["task", "__base__", "task", "__base__"]}),
    "a pool": (pooled, lambda model: {"task_ids": model.base_model.pool_in_use().ids(["a", "b", None, "a"])}),
}


@contextmanager
def bytes_in_use() -> Iterator[list[int]]:
    """What the allocations and releases of a block leave, by torch's own count."""
    left: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield left
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    left.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [None, True, False], ids=["plain", "autocast, cached", "autocast"])
def test_many_calls_leave_nothing_behind(way: str, mode: Any, autocast: bool | None) -> None:
    make, options = WAYS[way]
    model, x = make(), torch.randn(4, WIDTH)
    cast = nullcontext() if autocast is None else torch.autocast("cpu", torch.bfloat16, cache_enabled=autocast)
    with mode(), cast:
        model(x, **options(model))  # what is kept once
        with bytes_in_use() as left:
            for _ in range(12):
                model(x, **options(model))
    assert left[0] < WIDTH * WIDTH  # a quarter of one weight


def test_the_count_of_bytes_counts() -> None:
    with bytes_in_use() as left:
        kept = torch.ones(1000)
    assert left[0] >= kept.numel() * 4


TRANSFORMED: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "two templates": lambda: (converted(depth=2), vit_input()),
    "one template": lambda: (converted(depth=2, group_size=1), vit_input()),
    "compressed": lambda: (converted(depth=2, num_templates=1), vit_input()),
    "convolutions": lambda: (
        get_recast_model(seeded(lambda: Chain([nn.Conv2d(2, 2, 3, padding=1) for _ in range(2)])), RecastConfig()),
        torch.randn(2, 2, 5, 5),
    ),
}


@pytest.mark.parametrize("case", TRANSFORMED)
def test_gradients_by_sample_are_those_of_single_samples(case: str) -> None:
    model, x = TRANSFORMED[case]()
    randomise(model)
    model.eval()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(own, x)
    for i in range(len(x)):
        wanted = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(own.values()))
        for name, gradient in zip(own, wanted, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-4)


def test_jacobians_of_both_modes_agree() -> None:
    model = seeded(lambda: Chain([nn.Linear(4, 4) for _ in range(2)]))
    model = get_recast_model(model, RecastConfig(target_modules=["0", "1"])).eval()
    randomise(model)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    function = lambda parameters: functional_call(model, parameters, (torch.ones(1, 4),))  # noqa: E731
    backward, forward = jacrev(function)(own), jacfwd(function)(own)
    for name in own:
        torch.testing.assert_close(backward[name], forward[name])
        assert backward[name].any()


@pytest.mark.parametrize("templates", [None, 1])
def test_can_be_traced(templates: int | None) -> None:
    model = converted(depth=2, num_templates=templates)
    randomise(model)
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), vit_input())
        torch.testing.assert_close(traced(vit_input()), model(vit_input()))


@pytest.mark.parametrize("templates", [None, 1])
def test_every_attribute_can_be_asked_for(templates: int | None) -> None:
    for layer in layers_of(converted(depth=2, num_templates=templates)).values():
        for name in dir(layer):
            hasattr(layer, name)
    if templates:
        with pytest.raises(RecastBankError, match="was released"):
            _ = layer.pretrained_weight
        assert not hasattr(layer, "pretrained_weight")


def test_threads_exchange_weights_one_after_the_other() -> None:
    """A module of no known kind is called with its weight exchanged, which another thread must not take for its own."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    plain = seeded(lambda: Chain([Own(8, 8) for _ in range(2)]))
    model = get_recast_model(plain, RecastConfig(target_modules=["0", "1"]), "task").eval()
    randomise(model, "task")
    x, before = torch.randn(2, 8), [layer.pretrained_weight for layer in layers_of(model).values()]
    wrong: list[float] = []
    with torch.no_grad():
        right = model(x)

    @torch.no_grad()
    def serve() -> None:
        wrong.extend(d for _ in range(150) if (d := float((model(x) - right).abs().max())) > 0)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(layer.base_layer.weight is w for layer, w in zip(layers_of(model).values(), before, strict=True))


def test_float16_trains_with_a_scaler() -> None:
    with ExitStack() as stack:
        model = wide().half().train()
        own = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in own)
        optimizer, scaler = torch.optim.SGD(own, lr=1e-4), torch.amp.GradScaler("cpu", init_scale=64.0)
        x = torch.randn(4, WIDTH).half()
        stack.enter_context(torch.autocast("cpu", torch.float16))
        losses = []
        for _ in range(4):
            loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
