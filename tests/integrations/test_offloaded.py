"""Models whose weights accelerate keeps elsewhere between their calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import IDS, converted, llama, logits, train
from models import layers_of, randomise
from peft import PeftModel
from torch import nn

from recast_peft import RecastBankError, RecastConfig, get_recast_model, random_bank


@pytest.fixture(params=["cpu", "disk"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], None]:
    accelerate = pytest.importorskip("accelerate")
    warnings.simplefilter("ignore")
    if request.param == "cpu":
        return lambda model: accelerate.cpu_offload(model, execution_device="cpu")
    return lambda model: accelerate.disk_offload(model, str(tmp_path / "offloaded"), execution_device="cpu")


@pytest.mark.parametrize("sizes", [{"group_size": 1}, {"group_size": 2}, {"group_size": None, "num_directions": 2}])
def test_offloaded_weights_compute_as_those_in_memory(offload: Callable[[nn.Module], None], sizes: dict[str, Any]) -> None:
    expected, model = converted(**sizes), converted(**sizes)
    offload(model.get_base_model())
    layer = next(iter(layers_of(model).values()))
    assert layer.base_layer.weight.is_meta
    torch.testing.assert_close(logits(model), logits(expected))
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(logits(model), logits(expected))
    with pytest.raises(RecastBankError, match=r"nothing can be merged into .*offloaded"):
        model.merge_adapter()


def test_what_needs_the_weight_in_a_call_is_refused(offload: Callable[[nn.Module], None]) -> None:
    bank = random_bank(llama(), RecastConfig(target_modules="all-mlp", group_size=1), num_templates=2)
    plain = llama()
    offload(plain)
    model = get_recast_model(plain, RecastConfig(bank=bank, init_weights=False), "task")
    with pytest.raises(RecastBankError, match=r"gate_proj .* is offloaded, and what its task has there needs the weight"):
        logits(model)


@pytest.mark.parametrize("when", ["before the conversion", "after it"])
def test_tasks_are_trained_saved_and_loaded_while_weights_are_offloaded(
    offload: Callable[[nn.Module], None], when: str, tmp_path: Path
) -> None:
    expected = converted()
    start = logits(expected)
    if when == "after it":
        model = converted()
        offload(model)
    else:
        plain = llama()
        offload(plain)
        model = get_recast_model(plain, RecastConfig(target_modules="all-mlp", group_size=2), "task")
        randomise(model, "task", size=0.1)
    assert train(model, IDS) == pytest.approx(train(expected, IDS), rel=1e-5)
    trained = logits(expected)
    assert not torch.allclose(trained, start, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "task", "task")), trained)
    randomise(model, "task", size=0.1)
    assert not torch.allclose(logits(model), trained, atol=1e-4)
    for name in ("task", "again"):  # into the task that is there, and beside it
        model.load_adapter(tmp_path / "task", name)
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), trained)
