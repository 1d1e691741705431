"""The LoRA part of a task on quantised layers: what it would be beside the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import move, randomise
from peft import LoraConfig, PeftModel
from quantised_models import NAMES, X, alone_by_sample, expanded, kinds, near, near_without_gradients, quantised
from torch import nn

from recast_peft import RecastBankError, RecastConfig, RecastTargetError, get_recast_model

# beside coefficients, and alone
PLACES = {"on targets": (["0", "1", "2"], ["0", "1"]), "beside targets": (["0"], ["1", "2"])}
places = pytest.mark.parametrize("place", PLACES)


def config(place: str, **lora: Any) -> RecastConfig:
    targets, of_lora = PLACES[place]
    return RecastConfig(
        target_modules=targets, group_size=len(targets), lora_config=LoraConfig(r=2, target_modules=of_lora, **lora)
    )


def with_part(base: nn.Module, place: str, names: tuple[str, ...] = ("task",)) -> PeftModel:
    """A model with tasks whose numbers are not zero, the same for every base."""
    model = get_recast_model(base, config(place), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(place))
    for name in names:
        randomise(model, name, size=0.1)
    move(model, "lora_", size=0.2)
    return model.eval()


@kinds
@places
def test_output_and_gradients(kind: str, place: str) -> None:
    outputs, gradients = [], []
    for base in (quantised(kind), expanded(quantised(kind))):
        model = with_part(base, place).train()
        y = model(X)
        y.square().sum().backward()
        outputs.append(y.detach())
        trained = [p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name]
        gradients.append(torch.cat(trained))
    torch.testing.assert_close(*outputs, **near(kind))
    size = gradients[1].norm()
    torch.testing.assert_close(gradients[0] / size, gradients[1] / size, rtol=0.05, atol=0.02)


@kinds
def test_a_fresh_part_changes_nothing(kind: str) -> None:
    base = quantised(kind)
    before = base(X)
    assert torch.equal(get_recast_model(base, config("beside targets"), "task")(X), before)


@kinds
@places
def test_saving_and_loading_keep_every_number(kind: str, place: str, tmp_path: Path) -> None:
    model = with_part(quantised(kind), place)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(kind), tmp_path / "task", "task", is_trainable=True)
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    after = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert {name.partition(".")[2] for name in before} == {name.partition(".")[2] for name in after}
    assert any("lora_B" in name for name in before)
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]), name


@kinds
@places
def test_a_task_for_each_sample(kind: str, place: str) -> None:
    model = with_part(quantised(kind), place, ("task", "other"))
    with torch.no_grad():
        expected, alone = alone_by_sample(model)
        assert not torch.allclose(expected, alone["task"], rtol=0.05, atol=0.05)
        torch.testing.assert_close(model(X, adapter_names=NAMES), expected, **near_without_gradients(kind))


@kinds
@places
def test_merging_is_refused_and_changes_nothing(kind: str, place: str) -> None:
    model = with_part(quantised(kind), place)
    with torch.no_grad():
        before = model(X)
        with pytest.raises(RecastBankError, match=r"a LoRA part on layers\.\d, whose weight is quantised by"):
            model.merge_adapter()
        for layer in [m for m in model.modules() if hasattr(m, "lora_A")]:
            with pytest.raises(RecastBankError, match="is quantised by"):
                layer.merge()
        assert torch.equal(model(X), before)


@kinds
@pytest.mark.parametrize("asks", [{"use_dora": True}, {"init_lora_weights": "mica"}])
def test_what_reads_the_weight_is_refused(kind: str, asks: dict[str, Any]) -> None:
    base = quantised(kind)
    with pytest.raises(RecastTargetError, match=r"layers\.1 .* is quantised by .*cannot read its weight"):
        get_recast_model(base, config("beside targets", **asks), "task")
    assert type(base.layers[0]).__name__ != "RecastLayer"


@kinds
def test_a_budget_is_spent(kind: str) -> None:
    model = get_recast_model(quantised(kind), RecastConfig(target_modules=["0", "1", "2"], max_coefficients=300), "task")
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 200 < numbers <= 300
