"""The same answers on an accelerator: bits, gradients, low precision, compilers, captured graphs, pools, banks, files.

The tests run where CUDA is there, and are skipped elsewhere. ``RECAST_TEST_DEVICE=cpu`` runs them on the CPU (those that need
CUDA by nature stay out). Expected values come from the plain model on the same device, or from float64 on the CPU.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    KINDS,
    TinyVit,
    captured,
    composed_weights,
    layers_of,
    outputs,
    randomise,
    reference_model,
    seeded,
    small_transformer,
    tiny_vit,
    vit_input,
)
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft import (
    BiasConfig,
    RecastBaseMismatchError,
    RecastConfig,
    StoredBank,
    TaskPool,
    fit_bank,
    fit_discriminant_head,
    get_recast_model,
    grow_bank,
    grow_bias_bank,
)
from recast_peft.composition import mixing
from recast_peft.mimicry import DataAware, Gradient

CHOSEN = os.environ.get("RECAST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
DEVICE = torch.device(CHOSEN or "cpu")

pytestmark = pytest.mark.skipif(
    CHOSEN is None, reason="no accelerator is there (RECAST_TEST_DEVICE=cpu runs these tests on the CPU)"
)
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++" if DEVICE.type == "cpu" else "gcc") is None, reason="inductor needs a compiler"
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Two ways to form the same products of a few hundred terms in float32 differ by rounding alone, a few units of 1e-7 in each
# layer; the models here have up to eight of them, of outputs around 1.
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    # one rounding is 2^-9 of a value; a residual stream gathers those of some ten layers
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Products of float32 in float32: TF32 keeps ten bits."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


# ---- models ----


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return seeded(lambda: timm.create_model("test_vit", num_classes=10))


def timm_resnet() -> nn.Module:
    """With layers of the same role and shape, which timm's own test model lacks."""
    resnet = pytest.importorskip("timm.models.resnet")
    sizes = {"channels": (16, 32, 32, 32), "stem_width": 16, "num_classes": 10}
    return seeded(lambda: resnet.ResNet(resnet.BasicBlock, [3, 3, 1, 1], **sizes))


llama = partial(small_transformer, "llama", scale=2, initializer_range=0.2)
gpt2 = partial(small_transformer, "gpt2", scale=2, initializer_range=0.2, n_layer=4)
t5 = partial(small_transformer, "t5", scale=2)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 160, 160, generator=torch.Generator().manual_seed(3))


def ids() -> Tensor:
    return torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """A model with its input and targets."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Any


CASES: dict[str, Case] = {
    "vision transformer": Case(timm_vit, images, ["qkv", "proj", "fc1", "fc2"]),
    "convolutions": Case(timm_resnet, images, "all-conv"),
    "GPT-2": Case(gpt2, ids, ["c_attn", "c_proj", "c_fc"]),
    "Llama": Case(llama, ids, ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]),
    "T5": Case(t5, ids, ["q", "v", "wi", "wo"]),
}
cases = pytest.mark.parametrize("case", CASES)


def run(model: nn.Module, case: str, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """The output for a case's input on the device; token ids keep their dtype."""
    x = CASES[case].inputs().to(DEVICE)
    with torch.set_grad_enabled(grad):
        if x.is_floating_point():
            return model(x.to(dtype)).detach()
        extra = {"decoder_input_ids": x.flip(0)} if case == "T5" else {}
        return model(input_ids=x, **extra).logits.detach()


def plain_of(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return CASES[case].build().to(DEVICE, dtype)


def task_of(case: str, adapter: str = "default", dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    """A case's model, converted on the device, with a fresh task."""
    given = {"target_modules": CASES[case].targets, **fields}
    return get_recast_model(plain_of(case, dtype), RecastConfig(**given), adapter).eval()


def small(
    adapter: str = "default", dtype: torch.dtype = torch.float32, seed: int | None = 1, depth: int = 4, **fields: Any
) -> PeftModel:
    """A tiny vision transformer on the device, with one task."""
    given = {"target_modules": ["qkv", "fc1"], **fields}
    model = get_recast_model(tiny_vit(depth=depth).to(DEVICE, dtype), RecastConfig(**given), adapter).eval()
    if seed is not None:
        randomise(model, adapter, seed)
    return model


def vit_x(batch: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return vit_input(batch).to(DEVICE, dtype)


def is_here(tensor: Tensor) -> bool:
    return tensor.device.type == DEVICE.type


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference in units of the wanted one's norm, in float64 on the CPU."""
    wanted = wanted.detach().double().cpu()
    return float((found.detach().double().cpu() - wanted).norm() / wanted.norm())


# ---- a fresh task ----


def convert_here(case: str, dtype: torch.dtype) -> PeftModel:
    return task_of(case, dtype=dtype)


def convert_on_cpu(case: str, dtype: torch.dtype) -> PeftModel:
    plain = CASES[case].build().to(dtype)
    return get_recast_model(plain, RecastConfig(target_modules=CASES[case].targets)).eval().to(DEVICE)


def convert_in_float32_on_cpu(case: str, dtype: torch.dtype) -> PeftModel:
    model = get_recast_model(CASES[case].build(), RecastConfig(target_modules=CASES[case].targets)).eval()
    return model.to(dtype).to(DEVICE)


@cases
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("convert", [convert_here, convert_on_cpu, convert_in_float32_on_cpu])
def test_a_fresh_task_changes_nothing(case: str, dtype: torch.dtype, convert: Callable) -> None:
    plain, model = plain_of(case, dtype), convert(case, dtype)
    expected = run(plain, case, dtype)
    assert is_here(expected)
    assert torch.equal(run(model, case, dtype), expected)
    # torch chooses among matrix products by what requires a gradient: here as there the targets do, and nothing else
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in layers_of(model))
    assert torch.equal(run(model, case, dtype, grad=True), run(plain, case, dtype, grad=True))
    randomise(model)
    assert not torch.allclose(run(model, case, dtype), expected, rtol=1e-2, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(run(model, case, dtype), expected)


# ---- merging ----


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_the_exact_way_back(case: str, dtype: torch.dtype) -> None:
    plain, model = plain_of(case, dtype), task_of(case, dtype=dtype)
    randomise(model, size=0.1)
    addresses = {name: layer.pretrained_weight.data_ptr() for name, layer in layers_of(model).items()}
    live = run(model, case, dtype)
    wide = copy.deepcopy(plain).cpu().double()
    with torch.no_grad():
        wanted = composed_weights(wide, copy.deepcopy(model).cpu().double())
    model.merge_adapter()
    merged = run(model, case, dtype)
    for name, layer in layers_of(model).items():
        weight = layer.get_base_layer().weight
        # one rounding to the dtype (half a unit in the last place), after up to three in float32
        unit = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
        largest = wanted[f"{name}.weight"].abs().max().item()
        assert (weight.double().cpu() - wanted[f"{name}.weight"]).abs().max() <= 1.01 * unit * largest
        assert torch.equal(layer.pretrained_weight, plain.get_parameter(f"{name}.weight"))
    scale = float(live.abs().max())
    close = CLOSE[dtype]
    torch.testing.assert_close(merged, live, rtol=close["rtol"], atol=close["atol"] * max(1.0, scale))
    model.unmerge_adapter()
    for name, layer in layers_of(model).items():
        weight = layer.get_base_layer().weight
        assert weight.data_ptr() == addresses[name]
        assert torch.equal(weight, plain.get_parameter(f"{name}.weight"))
    assert torch.equal(run(model, case, dtype), live)
    unloaded = model.unload()
    assert torch.equal(run(unloaded, case, dtype), run(plain, case, dtype))


# ---- what lies where ----


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every storage that parameters, buffers and templates lie in, by address."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in layers_of(model).values():
        for bank in layer.recast_bank.values():
            tensors += bank.get_templates(layer.weight_device)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


MOVES: dict[str, Callable[[PeftModel], PeftModel]] = {
    "converted there": lambda model: model,
    "to the CPU": lambda model: model.cpu(),
    "to the CPU and back": lambda model: model.cpu().to(DEVICE),
    "half": lambda model: model.half(),
    "bfloat16 by the CPU": lambda model: model.cpu().to(torch.bfloat16).to(DEVICE),
    "a copy": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", ["vision transformer", "convolutions"])
def test_moves_keep_templates_shared_and_coefficients_in_float32(case: str, merged: bool, move: str) -> None:
    model = task_of(case)
    randomise(model)
    before = {name: layer.recast_coefficients["default"].detach().cpu() for name, layer in layers_of(model).items()}
    if merged:
        model.merge_adapter()
    model = MOVES[move](model)
    if merged:
        model.unmerge_adapter()
    device = "cpu" if move == "to the CPU" else DEVICE.type
    coefficients = 0
    layers = layers_of(model)
    for name, layer in layers.items():
        own = layer.recast_coefficients["default"]
        coefficients += own.numel() * 4
        assert (own.dtype, own.device.type) == (torch.float32, device)
        assert torch.equal(own.detach().cpu(), before[name])
        bank = layer.recast_bank["default"]
        addresses = [template.data_ptr() for template in bank.get_templates(layer.weight_device)]
        assert addresses == [layers[member].get_base_layer().weight.data_ptr() for member in bank.members]
    plain = CASES[case].build().to(layer.weight_dtype)
    assert sum(storages(model).values()) == sum(storages(plain).values()) + coefficients


@on_cuda
def test_a_converted_model_takes_no_more_memory() -> None:
    def allocated(build: Callable[[], nn.Module]) -> int:
        model = build()
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = model.to(DEVICE)
        return torch.cuda.memory_allocated() - before

    build = CASES["vision transformer"].build
    config = RecastConfig(target_modules=CASES["vision transformer"].targets)
    plain = allocated(build)
    converted = get_recast_model(build(), config)
    count = len(layers_of(converted))
    # the allocator gives every coefficient a block of 512 bytes
    assert 0 < allocated(lambda: converted) - plain <= 512 * count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_composes_in_float32(dtype: torch.dtype) -> None:
    """Offsets too small for the dtype of the weights still add up."""
    model = small(dtype=dtype, seed=None)
    for layer in layers_of(model).values():
        layer.recast_coefficients["default"].data.fill_(0.3).add_(1e-4)
        assert layer.weight.dtype == dtype
        bank = layer.recast_bank["default"]
        templates = [t.double().cpu() for t in bank.get_templates(DEVICE)]
        wanted = layer.pretrained_weight.double().cpu() + sum(float(torch.tensor(0.3) + 1e-4) * t for t in templates)
        # the composed weight is the rounded sum, and float32's own error moves it over a tie at most
        error = (layer.weight.detach().double().cpu() - wanted).abs()
        largest = sum(t.abs() for t in templates) + layer.pretrained_weight.double().cpu().abs()
        half = torch.finfo(dtype).eps / 2 * wanted.abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert (error <= half * 1.0001 + 4 * torch.finfo(torch.float32).eps * largest).all()


# ---- gradients ----

WIDTH = 64


class Layers(nn.Module):
    """Layers of one kind with a bounded step between them."""

    def __init__(self, layer: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def transposed() -> nn.Module:
    layer = Conv1D(WIDTH, WIDTH)
    nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    return layer


GRADIENT_CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (4, 32, WIDTH)),
    "linear, few tokens": (lambda: nn.Linear(WIDTH, WIDTH), (2, 16, WIDTH)),
    "transposed": (transposed, (4, 32, WIDTH)),
    "conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 16, 10, 10)),
    "conv1d in groups": (lambda: nn.Conv1d(16, 16, 3, padding=1, groups=2), (32, 16, 20)),
}
gradient_cases = pytest.mark.parametrize("case", GRADIENT_CASES)


def layers_with_task(case: str, templates: int = 2, **fields: Any) -> tuple[nn.Module, PeftModel]:
    """The plain layers on the CPU, and the converted ones on the device."""
    plain = seeded(lambda: Layers(GRADIENT_CASES[case][0], 2 * templates))
    targets = [str(i) for i in range(2 * templates)]
    config = RecastConfig(target_modules=targets, group_size=templates, **fields)
    model = get_recast_model(copy.deepcopy(plain).to(DEVICE), config)
    randomise(model)
    return plain, model


def gradient_input(case: str) -> Tensor:
    return torch.randn(GRADIENT_CASES[case][1], generator=torch.Generator().manual_seed(7))


def loss_of(y: Tensor) -> Tensor:
    """Weighs every number of the output by itself."""
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(
        y.device, torch.promote_types(y.dtype, torch.float32)
    )
    return (y * probe).sum()


def exact_gradients(plain: nn.Module, model: PeftModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of coefficients and input, by autograd in float64 on the CPU, with weights that are composed by plain operations."""
    wide = copy.deepcopy(plain).double().requires_grad_(False)
    x = x.double().requires_grad_()
    offsets = {
        name: layer.recast_coefficients["default"].detach().double().cpu().mean(0).requires_grad_()
        for name, layer in layers_of(model).items()
    }
    weights = {}
    for members in model.peft_config["default"].groups.values():
        pretrained = [wide.get_parameter(f"{member}.weight") for member in members]
        for member in members:
            own = wide.get_parameter(f"{member}.weight")
            weights[f"{member}.weight"] = own + sum(c * t for c, t in zip(offsets[member], pretrained, strict=True))
    loss_of(torch.func.functional_call(wide, weights, (x,))).backward()
    return torch.cat([offset.grad for offset in offsets.values()]), x.grad


def own_gradients(model: PeftModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of coefficients and input on the device."""
    model.zero_grad()
    x = x.detach().clone().to(DEVICE).requires_grad_()
    loss_of(model(x)).backward()
    coefficients = [layer.recast_coefficients["default"].grad for layer in layers_of(model).values()]
    assert all(is_here(g) and g.dtype == torch.float32 for g in coefficients)
    return torch.cat([g.flatten() for g in coefficients]).cpu(), x.grad


# Sums of some thousand float32 terms that come and go through up to eight layers: 6e-8 times the root of the number of
# roundings, times what terms of both signs cancel. (In TF32, with ten bits, it would be 1e-3.)
GRADIENT_ERROR = 1e-5


@gradient_cases
@pytest.mark.parametrize("templates", [1, 2, 3])
def test_gradients_are_those_of_float64(case: str, templates: int) -> None:
    plain, model = layers_with_task(case, templates)
    x = gradient_input(case)
    wanted, wanted_x = exact_gradients(plain, model, x)
    found, found_x = own_gradients(model, x)
    assert relative(found, wanted) < GRADIENT_ERROR
    assert relative(found_x, wanted_x) < GRADIENT_ERROR


@gradient_cases
@pytest.mark.parametrize("templates", [2, 3])
def test_bfloat16_products_are_near_the_exact_gradient(case: str, templates: int) -> None:
    plain, model = layers_with_task(case, templates, coefficient_gradient="bfloat16")
    x = gradient_input(case)
    wanted, wanted_x = exact_gradients(plain, model, x)
    found, found_x = own_gradients(model, x)
    # two factors, each off by at most 2^-9 of itself and by a third of that on average, and errors of both signs
    assert GRADIENT_ERROR < relative(found, wanted) < 1e-2
    assert relative(found_x, wanted_x) < GRADIENT_ERROR


@gradient_cases
def test_gradients_under_autocast_are_near_those_of_float64(case: str) -> None:
    plain, model = layers_with_task(case)
    x = gradient_input(case)
    wanted, wanted_x = exact_gradients(plain, model, x)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found, found_x = own_gradients(model, x)
    # bfloat16 keeps eight bits: each of the four layers puts 2^-9 at most on its output, and again on what comes back
    assert relative(found, wanted) < 2e-2
    assert relative(found_x, wanted_x) < 2e-2
    assert relative(found_x, wanted_x) > GRADIENT_ERROR


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["Llama", "GPT-2"])
def test_gradient_checkpointing_gives_the_same_gradients(case: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = task_of(case)
        randomise(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        x = CASES[case].inputs().to(DEVICE)
        model(input_ids=x, labels=x).loss.backward()
        gradients.append(torch.cat([g.recast_coefficients["default"].grad.flatten() for g in layers_of(model).values()]))
    assert gradients[0].abs().min() > 0
    # the same operations in the same order, but scatter-adds of an embedding's gradient have no order on an accelerator
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


# ---- training in mixed precision ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_fits_what_another_task_computes(dtype: torch.dtype) -> None:
    x = vit_x(64)
    with torch.no_grad():
        wanted = small(seed=2)(x)
    model = small(seed=None).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16, init_scale=2.0**10)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.mse_loss(model(x).float(), wanted)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[0] > 1e-3
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() and is_here(p) for p in trained)


# ---- torch.compile ----


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


def pool_of(tasks: int = 3, **fields: Any) -> tuple[PeftModel, TaskPool]:
    """A model on the device with a pool of random tasks."""
    model = small("first", seed=None, **fields)
    pool = TaskPool(model)
    for i in range(tasks):
        pool.add(f"task{i}")
        values = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(i)) * 0.3
        pool.table.data[pool.row(f"task{i}")] = values.to(DEVICE)
    return model, pool


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


# ---- captured graphs ----


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


# ---- pools ----


class TestPool:
    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_activated_tasks_and_the_exact_way_back(self, merge: bool, dtype: torch.dtype) -> None:
        model, pool = pool_of()
        model.to(dtype)
        assert is_here(pool.table)
        assert pool.table.dtype == torch.float32
        plain, x = tiny_vit().to(DEVICE, dtype), vit_x(dtype=dtype)
        expected = outputs(plain, x)
        seen = []
        for name in ("task0", "task1", "task0"):
            pool.activate(name, merge=merge)
            seen.append(outputs(model, x))
            alone = small(seed=None)
            for module, layer in layers_of(alone).items():
                layer.recast_coefficients["default"].data.copy_(pool.coefficients(name)[module])
            # composed in float32 and rounded, as the library says; the products are then the same
            wide = reference_model(tiny_vit().to(DEVICE, dtype).float(), alone)
            torch.testing.assert_close(seen[-1], outputs(wide.to(dtype), x), **CLOSE[dtype])
        assert torch.equal(seen[0], seen[2])
        assert not torch.allclose(seen[0], seen[1], atol=2e-2)
        pool.deactivate()
        assert torch.equal(outputs(model, x), expected)
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.get_base_layer().weight, plain.get_parameter(f"{name}.weight"))

    def test_it_follows_the_model(self) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "first").eval()
        pool = TaskPool(model)
        for i in range(20):  # beyond the first capacity
            pool.add(f"task{i}")
        pool.table.data[:20] = torch.randn(20, pool.numbers_per_task, generator=torch.Generator().manual_seed(0)) * 0.3
        values = pool.table.detach().clone()
        pool.activate("task7")
        there = outputs(model, vit_input())
        model.to(DEVICE)
        assert is_here(pool.table)
        assert torch.equal(pool.table.cpu(), values)
        torch.testing.assert_close(outputs(model, vit_x(2)).cpu(), there, **CLOSE[torch.float32])
        pool.add("late")
        assert is_here(pool.table)
        assert is_here(pool.ids(["late", None]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("products", [False, True], ids=["composed for each task", "products of the whole batch"])
    def test_every_sample_gets_its_own_task(self, products: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mixing, "products_are_cheaper", lambda *args: products)
        model, pool = pool_of()
        model.to(dtype)
        x = vit_x(dtype=dtype)
        names = ["task1", "task0", None, "task2", "task1", None]
        for numbers in (pool.ids(names), pool.ids(names).cpu()):
            mixed = outputs(model, x, task_ids=numbers)
            assert is_here(mixed)
            alone = {}
            for name in dict.fromkeys(names):
                pool.deactivate() if name is None else pool.activate(name)
                alone[name] = outputs(model, x)
            for i, name in enumerate(names):
                torch.testing.assert_close(mixed[i], alone[name][i], **CLOSE[dtype])
        assert not torch.allclose(alone["task0"], alone["task1"], atol=2e-2)

    @pytest.mark.parametrize("kind", ["conv2d", "transformers Conv1D", "embedding"])
    def test_adapter_names_of_other_layers(self, kind: str) -> None:
        row = KINDS[kind]
        config = RecastConfig(target_modules=row.targets)
        model = get_recast_model(seeded(row.build).to(DEVICE), config, "red").eval()
        model.add_adapter("blue", RecastConfig(target_modules=row.targets))
        for seed, name in enumerate(("red", "blue")):
            randomise(model, name, seed)
        x = torch.cat([row.inputs()] * 2)[:3].to(DEVICE)
        names = ["blue", "__base__", "red"]
        mixed = outputs(model, x, adapter_names=names)
        for i, name in enumerate(names):
            adapters = [] if name == "__base__" else [name]
            alone = reference_model(seeded(row.build).to(DEVICE), model, adapters)
            torch.testing.assert_close(mixed[i], outputs(alone, x)[i], **CLOSE[torch.float32])
        assert not torch.allclose(mixed[0], mixed[2], atol=1e-3)

    def test_one_batch_trains_many_tasks(self) -> None:
        model, pool = pool_of()
        pool.requires_grad_()
        names = ["task0", "task2", "task0"]
        x = vit_x(3)
        loss_of(model(x, task_ids=pool.ids(names))).backward()
        together = pool.table.grad.clone()
        assert is_here(together)
        assert not together[pool.row("task1")].any()
        for name in ("task0", "task2"):
            # the same loss of the same rows, each with a batch of one task
            pool.table.grad = None
            keep = torch.tensor([n == name for n in names], device=DEVICE)
            y = model(x, task_ids=pool.ids([name] * 3))
            loss_of(torch.where(keep[:, None], y, y.detach())).backward()
            assert relative(together[pool.row(name)], pool.table.grad[pool.row(name)]) < GRADIENT_ERROR

    def test_a_packed_file_is_the_same_everywhere(self, tmp_path: Path) -> None:
        _, pool = pool_of()
        pool.save(tmp_path / "pool")
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv", "fc1"]), "first").eval()
        there = TaskPool(model)
        there.load(tmp_path / "pool")
        assert there.table.device.type == "cpu"
        assert torch.equal(there.table[:3], pool.table[:3].cpu())


# ---- banks ----


def moved(seed: int, part: str, size: float = 0.1) -> dict[str, Tensor]:
    """A fine-tuned form of the tiny model: every parameter whose name ends so is moved at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + (size * torch.randn(p.shape, generator=generator) if name.endswith(part) else 0.0)
        for name, p in tiny_vit().named_parameters()
    }


WEIGHTS = {"target_modules": ["qkv", "fc1"], "group_size": 1}


def weight_bank(device: torch.device = DEVICE, **fields: Any) -> StoredBank:
    return grow_bank(tiny_vit().to(device), [moved(i, "weight") for i in range(3)], RecastConfig(**WEIGHTS), **fields)


def bias_bank(device: torch.device = DEVICE) -> StoredBank:
    return grow_bias_bank(tiny_vit().to(device), [moved(i, "bias", 0.3) for i in range(3)])


GROWN: dict[str, Callable[[], RecastConfig]] = {
    "dense": lambda: RecastConfig(bank=weight_bank()),
    "of low rank": lambda: RecastConfig(bank=weight_bank(rank=2)),
    "of biases": lambda: RecastConfig(**WEIGHTS, partners=[BiasConfig(bank=bias_bank())]),
    "a coefficient for each bias": lambda: RecastConfig(**WEIGHTS, partners=["bias"]),
}


class TestGrownBanks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", GROWN)
    def test_fresh_merged_and_mixed(self, kind: str, dtype: torch.dtype) -> None:
        plain, x = tiny_vit().to(DEVICE, dtype), vit_x(dtype=dtype)
        expected = outputs(plain, x)
        model = get_recast_model(tiny_vit().to(DEVICE, dtype), GROWN[kind](), "first").eval()
        assert torch.equal(outputs(model, x), expected)
        pool = TaskPool(model)
        for seed, name in enumerate(("one", "two")):
            row = pool.add(name)
            values = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(seed)) * 0.3
            pool.table.data[row] = values.to(DEVICE)
        live = {}
        for name in ("one", "two"):
            pool.activate(name)
            live[name] = outputs(model, x)
            model.merge_adapter()
            torch.testing.assert_close(outputs(model, x), live[name], **CLOSE[dtype])
            model.unmerge_adapter()
            assert torch.equal(outputs(model, x), live[name])
            pool.activate(name, merge=True)
            torch.testing.assert_close(outputs(model, x), live[name], **CLOSE[dtype])
        assert not torch.allclose(live["one"], live["two"], atol=0.1)
        pool.deactivate()
        assert torch.equal(outputs(model, x), expected)
        live[None] = expected
        names = ["two", None, "one", "one", None, "two"]
        mixed = outputs(model, x, task_ids=pool.ids(names))
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], live[name][i], **CLOSE[dtype])
        for name, parameter in plain.named_parameters():
            if name.endswith("bias") and "blocks" in name:
                module, _, _ = name.rpartition(".")
                assert torch.equal(model.get_base_model().get_submodule(module).bias, parameter)

    @pytest.mark.parametrize("make", [weight_bank, bias_bank])
    def test_they_are_those_of_the_cpu(self, make: Callable[..., StoredBank]) -> None:
        """Principal components of the same moves, up to their signs."""
        here, there = make(), make(torch.device("cpu"))
        assert list(here.groups) == list(there.groups)
        for name, group in here.groups.items():
            for own, wanted in zip(group.grown.tensors, there.groups[name].grown.tensors, strict=True):
                own, wanted = own.cpu().flatten(1), wanted.flatten(1)
                signs = (own * wanted).sum(1, keepdim=True).sign()
                torch.testing.assert_close(signs * own, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
            assert group.grown.energy == pytest.approx(there.groups[name].grown.energy, rel=1e-4)

    def test_a_task_on_a_bank_moves_between_devices(self) -> None:
        config = RecastConfig(bank=weight_bank(), partners=[BiasConfig(bank=bias_bank())])
        model = get_recast_model(tiny_vit().to(DEVICE), config).eval()
        generator = torch.Generator().manual_seed(5)
        for p in model.parameters():
            if p.requires_grad:
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        here = outputs(model, vit_x())
        assert not torch.allclose(here, outputs(tiny_vit().to(DEVICE), vit_x()), atol=0.1)
        torch.testing.assert_close(outputs(model.cpu(), vit_input(6)), here.cpu(), **CLOSE[torch.float32])
        assert torch.equal(outputs(model.to(DEVICE), vit_x()), here)


# ---- compressed banks ----


class TestCompressedBanks:
    @pytest.mark.parametrize(
        ("case", "size", "templates"), [*((case, 2, 1) for case in CASES), ("convolutions", 3, 2), ("GPT-2", 4, 2)]
    )
    def test_they_are_those_of_the_cpu(self, case: str, size: int, templates: int) -> None:
        fields = {"group_size": size, "num_templates": templates}
        here = task_of(case, **fields)
        config = RecastConfig(target_modules=CASES[case].targets, **fields)
        there = get_recast_model(CASES[case].build(), config).eval()
        plain = CASES[case].build()
        changed = 0
        for (name, own), other in zip(layers_of(here).items(), layers_of(there).values(), strict=True):
            with torch.no_grad():
                weight, wanted = own.compose([]), other.compose([])
            assert is_here(weight)
            assert relative(weight, wanted) < 1e-5
            changed += not torch.allclose(wanted, plain.get_parameter(f"{name}.weight"), atol=1e-3)
        assert changed
        assert run(here, case).isfinite().all()

    @pytest.mark.parametrize("keep", [False, True])
    def test_pretrained_weights_are_released(self, keep: bool) -> None:
        plain = plain_of("vision transformer")
        x = images().to(DEVICE)
        expected = outputs(plain, x)
        before = sum(storages(plain).values())
        config = RecastConfig(target_modules=["fc1", "fc2"], num_templates=1, keep_base_weights=keep)
        model = get_recast_model(plain, config).eval()
        targets = sum(torch.Size(layer.weight_shape).numel() * 4 for layer in layers_of(model).values())
        after = sum(storages(model).values())
        assert all(layer.is_released == (not keep) for layer in layers_of(model).values())
        assert abs(after - before - (targets / 2 if keep else -targets / 2)) < 2000  # coefficients, base coefficients
        if keep:
            with model.disable_adapter():
                assert torch.equal(outputs(model, x), expected)
        else:
            assert all(layer.get_base_layer().weight is None for layer in layers_of(model).values())
        assert not torch.allclose(outputs(model, x), expected, atol=1e-3)

    @on_cuda
    def test_the_memory_is_given_back(self) -> None:
        plain = plain_of("vision transformer")
        targets = [p for name, p in plain.named_parameters() if name.endswith(("fc1.weight", "fc2.weight"))]
        expected = sum(p.numel() for p in targets) * 4 / 2
        del targets
        config = RecastConfig(target_modules=["fc1", "fc2"], num_templates=1)
        get_recast_model(plain_of("vision transformer"), config)  # the first products take work space that stays
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = get_recast_model(plain, config)
        gc.collect()
        released = before - torch.cuda.memory_allocated()
        assert released > 0.8 * expected  # less what coefficients and base coefficients take, in blocks of 512 bytes
        assert layers_of(model)

    def test_merging_and_a_mixed_batch(self) -> None:
        model, pool = pool_of(2, num_templates=1)
        x = vit_x()
        live = {}
        for name in ("task0", "task1"):
            pool.activate(name)
            live[name] = outputs(model, x)
            pool.activate(name, merge=True)
            torch.testing.assert_close(outputs(model, x), live[name], **CLOSE[torch.float32])
        pool.deactivate()
        names = ["task0", "task1"] * 3
        mixed = outputs(model, x, task_ids=pool.ids(names))
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], live[name][i], **CLOSE[torch.float32])


# ---- files ----


class TestFiles:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_model_on_the_cpu_has_its_task_there(self, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        # PEFT reads files to the accelerator of the machine, whether the model is there or not
        config = RecastConfig(
            target_modules=["qkv"],
            coefficient_sharing="all",
            num_classes=3,
            train_norms=True,
            partners=["bias", "adaptformer", "piggyback"],
        )
        model = get_recast_model(tiny_vit(), config, "cars").eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(
            tiny_vit(), tmp_path / "cars", "cars", low_cpu_mem_usage=low_cpu_mem_usage, torch_device=DEVICE.type
        ).eval()
        assert {p.device.type for p in again.parameters()} == {"cpu"}
        assert not any(p.requires_grad for p in again.parameters())
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
        assert torch.equal(outputs(again, vit_input()), outputs(model, vit_input()))

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("there", [False, True], ids=["to the CPU", "from the CPU"])
    def test_tasks_move_by_file(self, case: str, there: bool, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=CASES[case].targets)
        plain = CASES[case].build()
        model = get_recast_model(plain if there else plain.to(DEVICE), config).eval()
        randomise(model, size=0.1)
        model.save_pretrained(tmp_path)
        target = torch.device("cpu") if not there else DEVICE
        loaded = PeftModel.from_pretrained(CASES[case].build().to(target), tmp_path).eval()
        for own, other in zip(layers_of(model).values(), layers_of(loaded).values(), strict=True):
            values = other.recast_coefficients["default"]
            assert values.device.type == target.type
            assert torch.equal(values.detach().cpu(), own.recast_coefficients["default"].detach().cpu())
        here = run(model.to(DEVICE), case)
        assert torch.equal(run(loaded.to(DEVICE), case), here)
        # sums in another order alone, in units of the largest number
        assert relative(cpu_run(loaded, case), here) < 1e-4

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_fingerprint_knows_the_weights_everywhere(self, dtype: torch.dtype, tmp_path: Path) -> None:
        for case in ("vision transformer", "convolutions"):
            folder = tmp_path / case
            model = get_recast_model(CASES[case].build(), RecastConfig(target_modules=CASES[case].targets))
            randomise(model)
            model.save_pretrained(folder)
            PeftModel.from_pretrained(plain_of(case, dtype), folder)
            other = plain_of(case, dtype)
            name = next(iter(layers_of(model)))
            other.get_parameter(f"{name}.weight").data.mul_(1.1)
            with pytest.raises(RecastBaseMismatchError, match=name):
                PeftModel.from_pretrained(other, folder)

    def test_a_fingerprint_made_here_is_known_on_the_cpu(self, tmp_path: Path) -> None:
        model = small(dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        for own, other in zip(layers_of(model).values(), layers_of(loaded).values(), strict=True):
            assert torch.equal(other.recast_coefficients["default"], own.recast_coefficients["default"].cpu())

    def test_a_compressed_task_is_rebuilt_from_its_recipe(self, tmp_path: Path) -> None:
        model = small(num_templates=1)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        torch.testing.assert_close(outputs(loaded, vit_input(6)), outputs(model, vit_x()).cpu(), **CLOSE[torch.float32])


def cpu_run(model: nn.Module, case: str) -> Tensor:
    x = CASES[case].inputs()
    model = model.cpu()
    with torch.no_grad():
        if x.is_floating_point():
            return model(x)
        extra = {"decoder_input_ids": x.flip(0)} if case == "T5" else {}
        return model(input_ids=x, **extra).logits


# ---- banks that are fitted and learned ----


def wide_vit() -> TinyVit:
    return tiny_vit(depth=2, width=16)


class TestFitting:
    def test_gradient_mimicry_comes_to_the_optimum_as_on_the_cpu(self) -> None:
        """Random starts differ from device to device; the least-squares optimum, by singular values, does not."""
        method = Gradient(steps=400, decay_every=100, progress=False)
        optimum = []
        for part in ("attn.qkv", "mlp.fc1"):
            rows = [wide_vit().get_parameter(f"blocks.{i}.{part}.weight").detach().double().flatten() for i in range(2)]
            u, sizes, v = torch.linalg.svd(torch.stack(rows), full_matrices=False)
            optimum += [relative(sizes[0] * u[i, 0] * v[0], row) for i, row in enumerate(rows)]
        for device in (torch.device("cpu"), DEVICE):
            plain = wide_vit().to(device)
            config = RecastConfig(target_modules=["qkv", "fc1"], num_templates=1, mimicry=method)
            model = get_recast_model(copy.deepcopy(plain), config)
            found = []
            for name, layer in layers_of(model).items():
                bank = layer.recast_bank["default"]
                assert bank.templates.device.type == bank.base_coefficients.device.type == device.type
                with torch.no_grad():
                    found.append(relative(layer.compose([]), plain.get_parameter(f"{name}.weight")))
            # two equal weights are shared out between the members in many ways, of one sum of squares
            assert sum(e * e for e in found) < 1.03 * sum(e * e for e in optimum)

    def test_data_aware_mimicry_fits_as_well_as_on_the_cpu(self) -> None:
        batches = [vit_input(32) * scale for scale in (0.5, 1.0, 2.0)]
        config = RecastConfig(
            target_modules=["qkv", "fc1"], num_templates=1, mimicry=DataAware(distill_steps=20, progress=False)
        )
        changes = {}
        for device in (torch.device("cpu"), DEVICE):
            plain = tiny_vit().to(device)
            x = vit_input(64).to(device)
            bank = fit_bank(plain, config, batches)
            model = get_recast_model(tiny_vit().to(device), RecastConfig(bank=bank)).eval()
            assert all(b.templates.device.type == device.type for b in banks_of(model))
            changes[device.type] = relative(outputs(model, x), outputs(plain, x))
        assert changes["cpu"] < 0.9
        assert changes[DEVICE.type] < 1.1 * changes["cpu"]


def banks_of(model: nn.Module) -> list[Any]:
    return [bank for layer in layers_of(model).values() for bank in layer.recast_bank.values()]


# ---- heads ----


def test_a_classifier_in_closed_form_is_that_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    x = torch.randn(30, 5, 8, generator=generator) + 2 * torch.randn(3, 1, 8, generator=generator)[labels]
    heads = {}
    for device in (torch.device("cpu"), DEVICE):
        model = get_recast_model(tiny_vit().to(device), RecastConfig(target_modules=["qkv"], num_classes=3))
        randomise(model)
        # batches may lie on the CPU
        head = fit_discriminant_head(model, [(x[:16], labels[:16]), (x[16:], labels[16:])])
        assert head.weight.device.type == device.type
        found = outputs(model.eval(), x.to(device)).argmax(1).cpu()
        assert (found == labels).float().mean() > 0.9
        heads[device.type] = head
    # float32 features, whose rounding the inverse of their covariance makes larger
    assert relative(heads[DEVICE.type].weight, heads["cpu"].weight) < 1e-3


def test_heads_of_tasks_in_a_mixed_batch() -> None:
    model = get_recast_model(tiny_vit().to(DEVICE), RecastConfig(target_modules=["qkv"], num_classes=5), "first").eval()
    pool = TaskPool(model)
    for name, classes in (("five", 5), ("two", 2)):
        pool.add(name, RecastConfig(num_classes=classes))
        pool.table.data[pool.row(name)] += 0.2
    x = vit_x(4)
    names = ["two", "five", "two", None]
    mixed = outputs(model, x, task_ids=pool.ids(names))
    assert is_here(mixed)
    for i, name in enumerate(names[:3]):
        pool.activate(name)
        alone = outputs(model, x)[i]
        torch.testing.assert_close(mixed[i, : len(alone)], alone, **CLOSE[torch.float32])
        assert mixed[i, len(alone) :].isinf().all()
