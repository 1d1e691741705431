"""Gradients on an accelerator against float64 on the CPU, and training in mixed precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerator import CASES, DEVICE, GRADIENT_ERROR, is_here, loss_of, needs_device, relative, small, task_of, vit_x
from models import layers_of, randomise, seeded
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft import RecastConfig, get_recast_model

pytestmark = needs_device

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
