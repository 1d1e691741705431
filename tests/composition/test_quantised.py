"""Tasks on quantised bases: computed from outputs, equal to the weights that the quantised modules stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Chain, layers_of, randomise, seeded
from peft import PeftModel
from torch import nn

from recast_peft import RecastBankError, RecastConfig, get_recast_model
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


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes, 8 bits": bitsandbytes_8,
    "bitsandbytes, 4 bits": bitsandbytes_4,
    "HQQ": hqq,
    "quanto": quanto,
    "torchao, 8 bits": lambda model: torchao(model, 8),
    "torchao, 4 bits": lambda model: torchao(model, 4),
}
kinds = pytest.mark.parametrize("kind", KINDS)
sizes = pytest.mark.parametrize("group_size", [1, 2, 3])


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


def converted(model: nn.Module, group_size: int = 2) -> Any:
    return get_recast_model(model, RecastConfig(target_modules=["0", "1", "2"], group_size=group_size), "task")


def expanded(model: nn.Module) -> nn.Module:
    """The model in float32 that the quantised one stands for."""
    twin = plain()
    for layer, old in zip(twin.layers, model.layers, strict=True):
        layer.weight = nn.Parameter(dequantised(old).float().reshape(WIDTH, WIDTH), requires_grad=False)
    return twin


X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
# 8-bit products of bitsandbytes round the input too
close: dict[str, dict[str, float]] = {"bitsandbytes, 8 bits": {"rtol": 0.05, "atol": 0.1}}


def near(kind: str) -> dict[str, float]:
    return close.get(kind, {"rtol": 1e-3, "atol": 1e-3})


@kinds
@sizes
def test_forward_and_gradients_are_those_of_the_weights_that_it_stands_for(kind: str, group_size: int) -> None:
    base = quantised(kind)
    start = base(X)
    model = converted(base, group_size)
    assert torch.equal(model(X), start)  # a fresh task changes nothing
    twin = converted(expanded(quantised(kind)), group_size)
    for each in (model, twin):
        randomise(each, "task", size=0.1)
    torch.testing.assert_close(model(X), twin(X), **near(kind))
    grads = []
    for each in (model, twin):
        each(X).square().sum().backward()
        grads.append(torch.cat([layer.recast_coefficients["task"].grad.flatten() for layer in layers_of(each).values()]))
    torch.testing.assert_close(grads[0] / grads[1].norm(), grads[1] / grads[1].norm(), rtol=0.05, atol=0.02)


@kinds
def test_trains_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model = converted(quantised(kind))
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(own, lr=1e-4), []
    for _ in range(4):
        loss = (model(X) - 1).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    randomise(model, "task", size=0.1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(quantised(kind), tmp_path / "task", "task")
        torch.testing.assert_close(loaded(X), model(X), rtol=0.02, atol=0.02)  # some choose kernels by what was called before


@kinds
def test_a_task_of_the_float_base_loads_with_a_warning(kind: str, tmp_path: Path) -> None:
    float_model = converted(plain())
    randomise(float_model, "task", size=0.1)
    float_model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(quantised(kind), tmp_path / "task", "task")
    assert kind.endswith("8 bits") or kind == "quanto" or any("quantised otherwise" in str(w.message) for w in said)
    torch.testing.assert_close(loaded(X), float_model(X), rtol=0.3, atol=0.3)
    with pytest.raises(ValueError, match="other pretrained weights"):
        torch.manual_seed(9)
        other = KINDS[kind](Chain([nn.Linear(WIDTH, WIDTH) for _ in range(3)]))
        PeftModel.from_pretrained(other, tmp_path / "task", "task")


@kinds
def test_merging_is_refused_and_changes_nothing(kind: str) -> None:
    model = converted(quantised(kind))
    randomise(model, "task", size=0.1)
    before = model(X)
    with pytest.raises(RecastBankError, match=r"nothing can be merged into .*quantised by"):
        model.merge_adapter()
    assert torch.equal(model(X), before)
    with model.disable_adapter():
        assert torch.equal(model(X), quantised(kind)(X))


def test_a_weight_in_float_is_not_quantised() -> None:
    assert quantised_by(nn.Linear(2, 2)) is None
    assert quantised_by(nn.Sequential()) is None
