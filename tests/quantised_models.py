"""Chains of three layers whose weights are quantised, by every library that is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Chain, seeded
from torch import nn

from recast_peft.composition.quantised import dequantised, quantised_by

WIDTH = 64


def bitsandbytes_4(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def made(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = old.bias
        return new.to("cpu")

    return replaced(model, made)


def bitsandbytes_8(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def made(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        return new.to("cpu")

    return replaced(model, made)


def hqq(model: nn.Module) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    make = lambda old: quantize.HQQLinear(old, settings, compute_dtype=torch.float32, device="cpu")  # noqa: E731
    return replaced(model, make)


def quanto(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def torchao(model: nn.Module, bits: int) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    chosen = quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(torch.int4)
    quantization.quantize_(model, chosen)
    return model


def torchao_float(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    return model


def gptqmodel(model: nn.Module, method: str) -> nn.Module:
    pytest.importorskip("gptqmodel")
    if method == "gptq":
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear as Packed
    else:
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear as Packed
    settings = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "register_buffers": True}

    def made(old: nn.Linear) -> nn.Module:
        new = Packed(**settings, in_features=WIDTH, out_features=WIDTH, bias=True)
        grouped = old.weight.data.view(WIDTH, -1, 32)  # (out, groups, 32)
        scales = (grouped.amax(-1) - grouped.amin(-1)) / 14
        zeros = (-grouped.amin(-1) / scales).round()
        with torch.no_grad():
            new.pack(old, scales, zeros, torch.arange(WIDTH) // 32)
        return new.eval()

    return replaced(model, made)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes, 8 bits": bitsandbytes_8,
    "bitsandbytes, 4 bits": bitsandbytes_4,
    "HQQ": hqq,
    "quanto": quanto,
    "torchao, 8 bits": lambda model: torchao(model, 8),
    "torchao, 4 bits": lambda model: torchao(model, 4),
    "torchao, float8": torchao_float,
    "GPTQ": lambda model: gptqmodel(model, "gptq"),
    "AWQ": lambda model: gptqmodel(model, "awq"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def plain() -> nn.Module:
    return seeded(lambda: Chain([nn.Linear(WIDTH, WIDTH) for _ in range(3)])).eval()


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model.layers = nn.ModuleList(make(layer) for layer in model.layers)
    return model


def quantised(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = KINDS[kind](plain())
    if all(quantised_by(layer) is None for layer in model.layers):
        pytest.skip("the library left the layers as they were")
    return model


def expanded(model: nn.Module) -> nn.Module:
    """The model in float32 that the quantised one stands for."""
    twin = plain()
    for layer, old in zip(twin.layers, model.layers, strict=True):
        layer.weight = nn.Parameter(dequantised(old).float().reshape(WIDTH, WIDTH), requires_grad=False)
    return twin


X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
# 8-bit products of bitsandbytes round the input too, and AWQ computes in half precision
close: dict[str, dict[str, float]] = {"bitsandbytes, 8 bits": {"rtol": 0.05, "atol": 0.1}, "AWQ": {"rtol": 5e-3, "atol": 5e-3}}


def near(kind: str) -> dict[str, float]:
    return close.get(kind, {"rtol": 1e-3, "atol": 1e-3})


def near_without_gradients(kind: str) -> dict[str, float]:
    """bitsandbytes packs 4 bits otherwise then, where a CPU has a product of bfloat16 for it."""
    return {"rtol": 0.02, "atol": 0.02} if kind == "bitsandbytes, 4 bits" else near(kind)


NAMES = ["task", "__base__", "other", "task", "other"]  # of the five samples


@torch.no_grad()
def alone_by_sample(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What each sample's own task gives, and what each task gives for all samples; the task ``"task"`` is active afterwards."""
    alone = {}
    for name in ("other", "task"):
        model.set_adapter(name)
        alone[name] = model(X)
    with model.disable_adapter():
        alone["__base__"] = model(X)
    return torch.stack([alone[name][i] for i, name in enumerate(NAMES)]), alone
