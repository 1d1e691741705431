"""Reading a weight's dtype or device composes nothing; any other use is a use of the composed weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import converted, layers_of, randomise, seeded
from torch import Tensor, nn
from transformers import T5Config, T5Model

from recast_peft import RecastConfig, RecastLayer, get_recast_model
from recast_peft.composition import compose
from recast_peft.composition.lazy_weight import model_reads


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every composition of a weight."""
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(1)
        return weighted_sum(*args, **kwargs)

    weighted_sum = compose._weighted_sum
    monkeypatch.setattr(compose, "_weighted_sum", counted)
    return made


def read() -> tuple[RecastLayer, Tensor, Tensor]:
    """A layer, its weight composed without a wrapper, and the weight as a reader gets it."""
    model = converted(depth=2).eval()
    randomise(model)
    layer = next(iter(layers_of(model).values()))
    with model_reads():
        return layer, layer.compose(["default"]), layer.weight


@torch.no_grad()
def test_what_is_known_is_told_without_composing(compositions: list[int]) -> None:
    _, expected, weight = read()
    compositions.clear()
    assert (weight.dtype, weight.device, weight.shape) == (expected.dtype, expected.device, expected.shape)
    assert (weight.ndim, weight.dim(), weight.size(0), weight.numel()) == (2, 2, expected.shape[0], expected.numel())
    assert isinstance(weight, Tensor)
    assert weight.is_floating_point()
    assert not compositions
    assert torch.equal(weight, expected)
    assert torch.equal(weight * 2, expected * 2)
    assert len(compositions) == 1


USES: dict[str, Callable[[Tensor], Any]] = {
    "a product": lambda w: F.linear(torch.ones(2, w.shape[1]), w),
    "a method": lambda w: w.sum(dim=0),
    "data": lambda w: w.data,
    "an index": lambda w: w[0],
    "a list": lambda w: torch.stack([w, w]),
    "another dtype": lambda w: w.to(torch.bfloat16),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "a copy": copy.deepcopy,
    "a pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "the source of a copy": lambda w: torch.empty(w.shape).copy_(w),
    "C++": lambda w: torch.ops.aten.mm.default(w.t(), w),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use", USES)
def test_a_use_is_one_of_the_composed_weight(use: str, mode: Callable) -> None:
    with mode():
        _, expected, weight = read()
        found = USES[use](weight)
        assert type(found) in (Tensor, nn.Parameter)
        assert torch.equal(found, USES[use](expected))
        assert weight.data_ptr() == weight.data_ptr() != 0


@torch.no_grad()
def test_what_changes_after_reading_does_not_count() -> None:
    layer, expected, weight = read()
    layer.recast_coefficients["default"].data.add_(1)
    with model_reads():
        later = layer.weight
    layer.merge()
    assert torch.equal(weight, expected)
    assert not torch.equal(later, expected)
    assert torch.equal(later, layer.weight)


@torch.no_grad()
def test_others_than_the_model_get_an_ordinary_tensor() -> None:
    layer, expected, _ = read()
    assert type(layer.weight) is Tensor
    assert torch.equal(nn.Parameter(layer.weight), expected)


def test_where_gradients_are_recorded_the_weight_is_an_ordinary_tensor_with_one() -> None:
    layer, _, weight = read()
    assert type(weight) is Tensor
    weight.sum().backward()
    assert layer.recast_coefficients["default"].grad.abs().sum() > 0


@torch.no_grad()
def test_t5_reads_a_dtype_and_pays_one_composition_a_call(compositions: list[int]) -> None:
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )
    model = get_recast_model(seeded(lambda: T5Model(config)), RecastConfig(target_modules=["wo"])).eval()
    randomise(model)
    tokens = torch.arange(6)[None]
    compositions.clear()
    model(input_ids=tokens, decoder_input_ids=tokens)
    assert len(compositions) == len(layers_of(model)) == 4
