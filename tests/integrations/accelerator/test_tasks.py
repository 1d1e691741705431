"""The same answers on an accelerator: a fresh task, merging, what lies where."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from accelerator import (
    CASES,
    CLOSE,
    DEVICE,
    FLOATS,
    cases,
    is_here,
    needs_device,
    on_cuda,
    plain_of,
    run,
    small,
    storages,
    task_of,
)
from models import composed_weights, layers_of, randomise
from peft import PeftModel
from torch import nn

from recast_peft import RecastConfig, get_recast_model

pytestmark = needs_device


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
