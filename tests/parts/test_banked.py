"""What tasks share of a stored bank, wherever the model goes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from grown_biases import grown, on
from models import outputs, tiny_vit, vit_input
from peft import PeftModel
from torch import nn

from recast_peft import ReadoutConfig, RecastConfig, get_recast_model, readout_bank


def on_biases(seed: int, scales: bool) -> PeftModel:
    return on(grown(scales=scales), seed=seed)


def on_readout(seed: int) -> PeftModel:
    bank = readout_bank(tiny_vit(), vit_input(8), progress=False)
    usual = {"target_modules": ["qkv"], "num_classes": 3, "init_weights": False}
    return get_recast_model(tiny_vit(), RecastConfig(partners=[ReadoutConfig(bank=bank)], seed=seed, **usual)).eval()


BUILDERS = {"biases": partial(on_biases, scales=False), "scales": partial(on_biases, scales=True), "readout": on_readout}
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "from meta": lambda model: model.to("meta").to_empty(device="cpu"),
    "copied on meta": lambda model: copy.deepcopy(model.to("meta")).to_empty(device="cpu"),
    "pickled on meta": lambda model: pickle.loads(pickle.dumps(model.to("meta"))).to_empty(device="cpu"),
}


@pytest.fixture(autouse=True)
def memory_without_numbers() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:the state dict has other weights")  # than memory without numbers
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_templates_that_no_state_dict_holds_come_from_the_bank(build: Callable, way: Callable) -> None:
    model, other = build(1), way(build(2))
    assert not torch.equal(outputs(build(2), vit_input()), outputs(model, vit_input()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, vit_input()), outputs(model, vit_input()))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.filterwarnings("ignore")  # accelerate's, on the one file
def test_accelerate_loads_a_checkpoint_into_a_model_on_meta(build: Callable, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build(1)
    accelerate.Accelerator().save_model(model, tmp_path)
    other = accelerate.load_checkpoint_and_dispatch(build(2).to("meta"), tmp_path, device_map={"": "cpu"})
    assert torch.equal(outputs(other, vit_input()), outputs(model, vit_input()))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.filterwarnings("ignore")  # accelerate's, on what it moves
def test_an_offloaded_model_computes_with_a_bank_at_every_call(build: Callable) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build(1)
    wanted = outputs(model, vit_input())
    accelerate.cpu_offload(model.get_base_model(), execution_device="cpu")
    for _ in range(2):  # the first call takes from memory what it brought
        torch.testing.assert_close(outputs(model, vit_input()), wanted)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_templates_keep_their_precision_whatever_the_weights_go_through(build: Callable) -> None:
    model = build(1)
    wanted = {name: values.clone() for name, values in model.named_buffers()}
    assert wanted
    for name, values in model.half().float().named_buffers():
        assert torch.equal(values, wanted[name])
