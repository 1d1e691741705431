"""What the tests on an accelerator share: where they run, models with inputs and targets, and how near is near.

The tests run where CUDA is there, and are skipped elsewhere. ``RECAST_TEST_DEVICE=cpu`` runs them on the CPU (those that need
CUDA by nature stay out). Expected values come from the plain model on the same device, or from float64 on the CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from models import layers_of, randomise, seeded, small_transformer, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import RecastConfig, TaskPool, get_recast_model

CHOSEN = os.environ.get("RECAST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
DEVICE = torch.device(CHOSEN or "cpu")

needs_device = pytest.mark.skipif(
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


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every storage that parameters, buffers and templates lie in, by address."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in layers_of(model).values():
        for bank in layer.recast_bank.values():
            tensors += bank.get_templates(layer.weight_device)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def loss_of(y: Tensor) -> Tensor:
    """Weighs every number of the output by itself."""
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(
        y.device, torch.promote_types(y.dtype, torch.float32)
    )
    return (y * probe).sum()


# Sums of some thousand float32 terms that come and go through up to eight layers: 6e-8 times the root of the number of
# roundings, times what terms of both signs cancel. (In TF32, with ten bits, it would be 1e-3.)
GRADIENT_ERROR = 1e-5


def pool_of(tasks: int = 3, **fields: Any) -> tuple[PeftModel, TaskPool]:
    """A model on the device with a pool of random tasks."""
    model = small("first", seed=None, **fields)
    pool = TaskPool(model)
    for i in range(tasks):
        pool.add(f"task{i}")
        values = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(i)) * 0.3
        pool.table.data[pool.row(f"task{i}")] = values.to(DEVICE)
    return model, pool
