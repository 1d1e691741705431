"""Tasks on quantised bases: computed from outputs, equal to the weights that the quantised modules stand for."""

from __future__ import annotations

import inspect
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Chain, layers_of, randomise
from peft import PeftModel
from quantised_models import (
    KINDS,
    NAMES,
    WIDTH,
    X,
    alone_by_sample,
    expanded,
    kinds,
    near,
    near_without_gradients,
    plain,
    quantised,
)
from torch import nn

from recast_peft import RecastBankError, RecastConfig, RecastTargetError, get_recast_model
from recast_peft.composition.quantised import _unpacked, dequantised, quantised_by, restore_class

sizes = pytest.mark.parametrize("group_size", [1, 2, 3, None])  # None: cores between main directions


def converted(model: nn.Module, group_size: int | None = 2) -> Any:
    size: dict[str, Any] = {"group_size": group_size} if group_size else {"num_directions": 2}
    return get_recast_model(model, RecastConfig(target_modules=["0", "1", "2"], **size), "task")


@kinds
@sizes
def test_forward_and_gradients_are_those_of_the_weights_that_it_stands_for(kind: str, group_size: int | None) -> None:
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


@kinds
def test_a_task_for_each_sample_and_calls_by_keyword(kind: str) -> None:
    model = converted(quantised(kind), 3)
    model.add_adapter("other", RecastConfig(target_modules=["0", "1", "2"], group_size=3))
    for name in ("task", "other"):
        randomise(model, name, size=0.1)
    model.eval()
    with torch.no_grad():
        expected, alone = alone_by_sample(model)
        assert not torch.allclose(expected, alone["__base__"], rtol=0.05, atol=0.05)
        torch.testing.assert_close(model(X, adapter_names=NAMES), expected, **near_without_gradients(kind))
        layer = layers_of(model)["layers.0"]
        first, *_ = inspect.signature(layer.get_base_layer().forward).parameters
        name = "x" if first == "args" else first
        torch.testing.assert_close(layer(**{name: X}), layer(X), rtol=0, atol=0)
        layer.get_base_layer().register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(X), alone["task"], **near_without_gradients(kind))
        if kind.startswith("torchao"):  # of torch's own class, which computes with what is put in the weight's place
            torch.testing.assert_close(model(X, adapter_names=NAMES), expected, **near(kind))
        else:
            with pytest.raises(RecastBankError, match="has hooks"):
                model(X, adapter_names=NAMES)


@kinds
def test_a_mask_is_of_the_weight_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    config = RecastConfig(target_modules=["0", "1", "2"], group_size=3, partners=["piggyback"])
    outputs = []
    for base in (quantised(kind), expanded(quantised(kind))):
        model = get_recast_model(base, config, "task").eval()
        randomise(model, "task", size=0.1)
        draw = torch.Generator().manual_seed(1)
        for layer in layers_of(model).values():
            scores = layer.recast_masks["task"].scores
            assert scores.shape == (WIDTH, WIDTH)
            scores.data = torch.where(torch.rand(scores.shape, generator=draw) > 0.3, 0.01, 0.0).to(scores)
        with torch.no_grad():
            outputs.append(model(X))
        if len(outputs) == 1:
            model.save_pretrained(tmp_path)
    torch.testing.assert_close(*outputs, **near(kind))
    loaded = PeftModel.from_pretrained(quantised(kind), tmp_path / "task", "task").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), outputs[0], **near(kind))


@kinds
@pytest.mark.parametrize("is_called", [False, True])
def test_a_pickled_model_computes_the_same(kind: str, is_called: bool) -> None:
    model = get_recast_model(quantised(kind), RecastConfig(target_modules=["0", "1", "2"], group_size=3), "task").eval()
    randomise(model, "task", size=0.1)
    with torch.no_grad():
        if is_called:
            model(X)
        try:
            loaded = pickle.loads(pickle.dumps(model))
        except (AttributeError, TypeError, NotImplementedError) as error:
            pytest.skip(f"the library's own weights cannot be pickled: {error}")
        torch.testing.assert_close(loaded(X), model(X), **near(kind))


@kinds
def test_quantised_layers_beside_plain_ones(kind: str) -> None:
    outputs = []
    for middle in (quantised(kind), expanded(quantised(kind))):
        model = plain()
        model.layers[1] = middle.layers[1]
        model = get_recast_model(model, RecastConfig(target_modules=["0", "1", "2"], group_size=1), "task")
        randomise(model, "task", size=0.1)
        with torch.no_grad():
            outputs.append(model(X))
    torch.testing.assert_close(*outputs, **near(kind))


@kinds
def test_layers_that_are_no_targets(kind: str, tmp_path: Path) -> None:
    config = RecastConfig(target_modules=["1"], group_size=1)
    outputs = []
    for base in (quantised(kind), expanded(quantised(kind))):
        model = get_recast_model(base, config, "task").eval()
        randomise(model, "task", size=0.1)
        with torch.no_grad():
            outputs.append(model(X))
        if len(outputs) == 1:
            model.save_pretrained(tmp_path)
    torch.testing.assert_close(*outputs, **near_without_gradients(kind))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # it is the same model
        warnings.filterwarnings("default", module="(torch|torchao|gptqmodel|bitsandbytes|hqq)")
        loaded = PeftModel.from_pretrained(quantised(kind), tmp_path / "task", "task").eval()
        torch.testing.assert_close(loaded(X), outputs[0], **near_without_gradients(kind))


class WithoutGradients(nn.Module):
    """A packed layer, marked as HQQ's are, whose kernel is not differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False), None

    def dequantize(self) -> torch.Tensor:
        return self.W_q

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_q.T).detach()


def test_a_kernel_without_gradients_is_not_trained_in_silence() -> None:
    model = converted(Chain([WithoutGradients() for _ in range(3)]), 3)
    with pytest.raises(RecastBankError, match=r"layers\.0 cannot be trained: WithoutGradients gives no gradient"):
        model(X)
    with torch.no_grad():
        assert model(X).shape == X.shape


@pytest.mark.parametrize("is_buffer", [False, True])
def test_what_a_layer_makes_of_unit_vectors_is_its_weight_without_the_bias(is_buffer: bool) -> None:
    layer = nn.Linear(5, 3)
    bias = layer.bias
    if is_buffer:  # as layers of GPTQ hold theirs
        del layer.bias
        layer.register_buffer("bias", bias.detach())
    with torch.no_grad():
        assert torch.equal(_unpacked(layer, torch.float32), layer.weight)
    assert torch.equal(layer.bias, bias)


def test_packed_embeddings_are_no_linear_layers() -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantEmbeddings

    settings = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "register_buffers": True}
    model = nn.Sequential(TorchQuantEmbeddings(**settings, in_features=WIDTH, out_features=WIDTH))
    with pytest.raises(RecastTargetError, match=r"TorchQuantEmbeddings is quantized \(it has a qweight\)"):
        get_recast_model(model, RecastConfig(target_modules=["0"]))


def test_a_weight_in_float_is_not_quantised() -> None:
    assert quantised_by(nn.Linear(2, 2)) is None
    assert quantised_by(nn.Sequential()) is None


class Int8Params(nn.Parameter):
    """Called as bitsandbytes calls its own."""


class Packed(nn.Linear):
    """Defined beside the class of its weight."""


class Further(Packed):
    """Of somebody else."""


@pytest.mark.parametrize("kind", [Packed, Further])
def test_what_pickle_forgets_of_a_packed_weight_comes_back(kind: type[nn.Linear]) -> None:
    module = kind(3, 2)
    restore_class(module)
    assert type(module.weight) is nn.Parameter
    module.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    module.weight.SCB = torch.ones(2)
    restore_class(module)
    assert type(module.weight) is Int8Params
    assert quantised_by(module) == "bitsandbytes"


@pytest.mark.parametrize("is_called", [False, True])
def test_scales_of_eight_bits_are_found_before_and_after_the_first_call(is_called: bool) -> None:
    module, scales = Packed(3, 2), torch.tensor([2.0, 127.0])
    module.weight = Int8Params(torch.tensor([[127, 0, -127], [1, 2, 3]], dtype=torch.int8), requires_grad=False)
    module.weight.SCB, module.state = (None if is_called else scales), SimpleNamespace(SCB=scales if is_called else None)
    assert dequantised(module).tolist() == [[2.0, 0.0, -2.0], [1.0, 2.0, 3.0]]


@sizes
@pytest.mark.filterwarnings("ignore")
def test_what_is_quantised_after_the_conversion_is_told_once_the_weight_is_needed(group_size: int | None) -> None:
    model = converted(plain(), group_size).eval()
    randomise(model, "task")
    expected = model(X)
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(RecastBankError, match=r"torch.ao.nn.quantized.*Linear stands where tasks had a module with a weight"):
        packed(X)
    model.merge_adapter()
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    merged = packed(X)
    torch.testing.assert_close(merged, expected, atol=0.1, rtol=0.1)
    for verb in (packed.unmerge_adapter, packed.base_model.disable_adapter_layers):
        with pytest.raises(RecastBankError, match="was quantised after the conversion"):
            verb()  # its calls would go on with the task
    assert torch.equal(packed(X), merged)
