"""Saved tasks for tests, changes to their files, and what a refused one must leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted, outputs, randomise, state, tiny_vit, vit_input
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from recast_peft import RecastError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(folder: Path, randomised: bool = True, **config: Any) -> PeftModel:
    model = converted(**config)
    if randomised:
        randomise(model)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1
    model.save_pretrained(folder)
    return model


def copied(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for name in (WEIGHTS, CONFIG):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    entries = load_file(folder / WEIGHTS)
    entries = change(entries) or entries
    save_file(entries, folder / WEIGHTS)
    return folder


def rewrite_config(folder: Path, **fields: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def refused(
    folder: Path, error: type[Exception] | tuple[type[Exception], ...] = RecastError, match: str | None = None
) -> Exception:
    """Loading into a plain model, and beside another task, fails with ``error`` and changes nothing."""
    plain = tiny_vit()
    before, start = state(plain), outputs(plain, vit_input())
    with pytest.raises(error, match=match) as first:
        PeftModel.from_pretrained(plain, folder)
    assert state(plain) == before
    assert torch.equal(outputs(plain, vit_input()), start)
    model = converted()
    randomise(model, seed=9)
    before, live = state(model), outputs(model, vit_input())
    with pytest.raises(error, match=match):
        model.load_adapter(folder, "second")
    assert state(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(outputs(model, vit_input()), live)
    return first.value
