"""What a model has beside a task's targets: another running statistic is warned of, another dtype is not."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from torch import nn

from recast_peft import RecastConfig, TaskPool, get_recast_model
from recast_peft.tasks.surroundings import surroundings_fingerprint


def backbone(num_classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=num_classes).train()
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def shift_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var *= 1.2
            module.running_mean += 0.1
    return model


def shift_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += torch.randn(module.bias.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    return model


def loads_with(model: nn.Module, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, str(folder))
    return [str(entry.message) for entry in seen if "other weights, norms" in str(entry.message)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_recast_model(backbone(), RecastConfig(exclude_modules=["conv_stem"])).save_pretrained(tmp_path)
    return tmp_path


def test_a_pool_warns_too(folder: Path, tmp_path: Path) -> None:
    changed = TaskPool(get_recast_model(shift_statistics(backbone()), RecastConfig(exclude_modules=["conv_stem"])))
    same = TaskPool(get_recast_model(backbone(), RecastConfig(exclude_modules=["conv_stem"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.add("task", folder)
        same.save(tmp_path / "pool.safetensors")
        same.remove("task")
        same.load(tmp_path / "pool.safetensors")
    with pytest.warns(UserWarning, match="the task at '.*' was learned on, but other weights, norms"):
        changed.add("task", folder)
    changed.remove("task")
    with pytest.warns(UserWarning, match=r"the file of tasks .*pool.safetensors was learned on, but other weights, norms"):
        changed.load(tmp_path / "pool.safetensors")


def scale_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data *= 1.01
    return model


def times(factor: float) -> Callable[[nn.Module], nn.Module]:
    def scale_one(model: nn.Module) -> nn.Module:
        model.conv_stem.weight.data *= factor  # left out of the targets
        return model

    return scale_one


@pytest.mark.parametrize("change", [shift_statistics, shift_norms, scale_norms, *map(times, (0.5, 1.1, 2, 32, 255))])
def test_other_norms_are_warned_of(change: Callable[[nn.Module], nn.Module], folder: Path) -> None:
    changed = change(backbone())
    assert len(loads_with(changed, folder)) == 1
    recorded = RecastConfig.from_pretrained(str(folder)).surroundings_fingerprint
    assert changed.peft_config["default"].surroundings_fingerprint == recorded  # what it was learned on stays known


def test_the_same_model_is_not(folder: Path) -> None:
    assert loads_with(backbone(), folder) == []
    assert loads_with(backbone(7), folder) == []  # a classifier is no part of it
    assert loads_with(backbone().to(torch.bfloat16), folder) == []


def test_targets_classifiers_and_what_no_file_holds_are_no_part_of_it() -> None:
    model = backbone()
    alone = surroundings_fingerprint(model, ["conv_stem"])
    assert alone != surroundings_fingerprint(model, [])
    model.conv_stem.weight.data.normal_()
    model.register_buffer("positions", torch.randn(100), persistent=False)
    model.reset_classifier(7)
    assert surroundings_fingerprint(model, ["conv_stem"]) == alone


def test_a_file_without_the_fingerprint_is_taken(folder: Path) -> None:
    config = RecastConfig.from_pretrained(str(folder))
    assert config.surroundings_fingerprint is not None
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace(f'"{config.surroundings_fingerprint}"', "null"))
    assert loads_with(shift_statistics(backbone()), folder) == []


def test_tasks_on_a_model_do_not_change_it() -> None:
    model = backbone()
    plain = surroundings_fingerprint(model, [])
    targets = get_recast_model(copy.deepcopy(model), RecastConfig(train_norms=True, num_classes=3, partners=["bias"]), "task")
    assert surroundings_fingerprint(targets.get_base_model(), []) == plain
    targets.merge_adapter()
    assert surroundings_fingerprint(targets.get_base_model(), []) is None


def test_does_not_depend_on_where_the_library_was_imported() -> None:
    code = """
import sys, torch
device, dtype = sys.argv[1:]
torch.set_default_dtype(getattr(torch, dtype))
with torch.device(device):
    import recast_peft.tasks.surroundings as surroundings
norm = torch.nn.LayerNorm(4, device="cpu", dtype=torch.float32)
print(surroundings.surroundings_fingerprint(norm, []))
"""
    found = [
        subprocess.run([sys.executable, "-c", code, *how], check=True, capture_output=True, text=True).stdout
        for how in (("cpu", "float32"), ("meta", "float64"))
    ]
    assert found[0] == found[1]
