"""Files that earlier versions wrote load and give what they gave then; what is saved of them now says the same."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_peft import BiasConfig, RecastBankError, RecastConfig, TaskPool, get_recast_model, load_bank

FIXTURES = Path(__file__).parent / "fixtures"
OUTPUTS = load_file(FIXTURES / "outputs.safetensors")
ALONE = ("plain", "headed", "lorap", "partners", "sets", "norms", "proto")
ON_BANKS = ("grown", "onbias")
X = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(9))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0).eval()


def handed(name: str, banks: Path = FIXTURES) -> RecastConfig:
    """The config of a task, with its bank where that is stored."""
    config = RecastConfig.from_pretrained(str(FIXTURES / name))
    if name == "grown":
        config.bank = load_bank(banks / "gbank")
    if name == "onbias":
        config.partners = [BiasConfig(bank=load_bank(banks / "bbank"))]
    return config


@cache
def loaded(name: str) -> PeftModel:
    return PeftModel.from_pretrained(backbone(), str(FIXTURES / name), name, config=handed(name)).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("name", [*ALONE, *ON_BANKS])
def test_a_task_gives_what_it_gave(name: str) -> None:
    torch.testing.assert_close(output(loaded(name)), OUTPUTS[name], rtol=1e-4, atol=1e-5)
    assert (output(backbone())[:, :1] - OUTPUTS[name][:, :1]).abs().max() > 0.01  # and that is no plain model's


@pytest.mark.parametrize("name", [*ALONE, *ON_BANKS])
def test_a_task_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    loaded(name).save_pretrained(tmp_path)
    before, after = (json.loads((folder / name / "adapter_config.json").read_text()) for folder in (FIXTURES, tmp_path))
    for key in before.keys() | after.keys():
        if key == "bank" or (key == "partners" and name == "onbias"):
            continue  # they name the folder that the bank was read from
        assert after.get(key) == before.get(key), key
    old, new = (load_file(folder / name / "adapter_model.safetensors") for folder in (FIXTURES, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("name", ON_BANKS)
def test_a_bank_lies_beside_the_tasks_folder(name: str, tmp_path: Path) -> None:
    for folder in (name, "gbank", "bbank"):
        shutil.copytree(FIXTURES / folder, tmp_path / folder)
    banks = {"grown": "gbank", "onbias": "bbank"}
    shutil.move(str(tmp_path / banks[name]), tmp_path / name / banks[name])
    model = PeftModel.from_pretrained(backbone(), str(tmp_path / name), name).eval()
    torch.testing.assert_close(output(model), OUTPUTS[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("grown", {"bank": "bbank"}),
        ("onbias", {"bank": "gbank"}),
        ("plain", {"bank": "gbank"}),
        ("plain", {"partner": "bbank"}),
    ],
)
def test_a_task_is_not_put_on_another_bank(name: str, fields: dict[str, str]) -> None:
    config = handed(name)
    for field, folder in fields.items():
        bank: Any = load_bank(FIXTURES / folder)
        if field == "bank":
            config.bank = bank
        else:
            config.partners = [BiasConfig(bank=bank)]
    model = backbone()
    with pytest.raises(RecastBankError, match="bank of the task"):
        PeftModel.from_pretrained(model, str(FIXTURES / name), name, config=config)
    assert torch.equal(output(model), output(backbone()))
    assert not any("recast" in key for key in model.state_dict())


def test_a_pool_gives_what_it_gave() -> None:
    model = get_recast_model(backbone(), RecastConfig(target_modules=["qkv"], num_classes=3), "alpha").eval()
    pool = TaskPool(model)
    pool.load(FIXTURES / "pool.safetensors")
    assert pool.names == ["a", "b", "c", "t0", "t1", "t2", "t3", "t4"]
    for name in ("a", "c"):
        pool.activate(name)
        torch.testing.assert_close(output(model), OUTPUTS[f"pool.{name}"], rtol=1e-4, atol=1e-5)
