"""Damaged files of every kind: each is refused with an error of this library within a second, and the model is as it was.

A file may also be read where the damage changed nothing that counts (a space, a label), or with a warning: without one the
outputs are the same.
"""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import outputs, randomise, tiny_vit, vit_input
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from recast_peft import (
    AdaptFormerConfig,
    RecastConfig,
    RecastError,
    TaskPool,
    get_recast_model,
    load_bank,
    load_compressed_model,
    random_bank,
    save_compressed_model,
)

X = vit_input()
SECONDS = 1.0
FACTOR = 3  # of a slow machine
EACH = 20  # damaged files of a kind and a way
CONFIG, NUMBERS = "adapter_config.json", "adapter_model.safetensors"


# ---------------------------------------------------------------- ways of damage


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def overwrite(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 64))
    content[start:end] = rng.randbytes(end - start)
    file.write_bytes(content)


def other_value(file: Path, rng: random.Random) -> None:
    """A value of the JSON becomes one of another kind, or another size."""
    content = json.loads(file.read_text())
    parent: Any = content
    for _ in range(8):
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = rng.choice(list(keys))
        child = parent[key]
        if not (isinstance(child, (dict, list)) and child) or rng.random() < 0.3:
            break
        parent = child
    wrong = [None, True, -1, 10**12, 1e308, float("nan"), "", "x" * 100, "\ud800", [], {}, [[]], {"": None}]
    parent[key] = rng.choice(wrong)
    file.write_text(json.dumps(content))


def other_top(file: Path, rng: random.Random) -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    tops = ["[]", "null", "1", '"a"', "", "{}", "[" * 100_000, deep, "\x00", '{"a": 1, "a": 2}', "NaN"]
    raw = [b"\xff\xfe{}", b'{"a": "\xc3\x28"}', *(top.encode() for top in tops)]
    file.write_bytes(rng.choice(raw))


def other_tensors(file: Path, rng: random.Random) -> None:
    """Other numbers, kinds of numbers, shapes and names, in a file that is whole and has no checksum."""
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    tensor = tensors[key].float()
    ways: list[Callable[[], Any]] = [
        lambda: tensors.update({key: tensor * float("nan")}),
        lambda: tensors.update({key: tensor + float("inf")}),
        lambda: tensors.update({key: tensor.to(rng.choice([torch.int8, torch.int64, torch.bool, torch.complex64]))}),
        lambda: tensors.update({key: tensor.to(rng.choice([torch.float8_e5m2, torch.float8_e4m3fn]))}),
        lambda: tensors.update({key: torch.cat([tensor.reshape(-1)] * 2)}),
        lambda: tensors.update({key: tensor.reshape(-1)[:1].reshape([1] * 7)}),
        lambda: tensors.update({key: tensor[None]}),
        lambda: tensors.pop(key),
        lambda: tensors.update({f"{key}.more": tensor}),
        lambda: tensors.update({key[::-1]: tensors.pop(key)}),
        lambda: tensors.clear(),
    ]
    rng.choice(ways)()
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)


BYTES = [flip, cut, overwrite]


# ---------------------------------------------------------------- kinds of files


def learned(config: RecastConfig, name: str = "task") -> PeftModel:
    model = get_recast_model(tiny_vit(), config, name).eval()
    randomise(model)
    return model


def make(folder: Path) -> dict[str, torch.Tensor]:
    """One of each kind of file, and what the models compute."""
    bank = random_bank(tiny_vit(), RecastConfig(target_modules=["qkv"]), num_templates=2).save(folder / "bank")
    small = learned(RecastConfig(target_modules=["qkv"], num_templates=1))
    save_compressed_model(small, folder / "model")
    small.save_pretrained(str(folder / "small"))
    tasks = {
        "plain": learned(RecastConfig(target_modules=["qkv"], num_classes=3)),
        "partners": learned(RecastConfig(target_modules=["fc1"], partners=[AdaptFormerConfig(bottleneck=2)])),
        "on_bank": learned(RecastConfig(bank=bank)),
    }
    for name, model in tasks.items():
        model.save_pretrained(str(folder / name), selected_adapters=["task"])
    pool = TaskPool(learned(RecastConfig(target_modules=["qkv"], num_classes=3), "first"))
    pool.add("first", "first")
    pool.add("second")
    pool.save(folder / "pool.safetensors")
    expected = {name: outputs(model, X) for name, model in tasks.items()}
    pool.activate("first")
    return {**expected, "model": outputs(small, X), "pool": outputs(pool.model, X)}


def load_task(name: str) -> Callable[[Path, nn.Module], torch.Tensor]:
    def load(folder: Path, plain: nn.Module) -> torch.Tensor:
        config = RecastConfig.from_pretrained(str(folder / name / "task"))
        model = PeftModel.from_pretrained(plain, folder / name / "task", "task", config=config)
        return outputs(model.eval(), X)

    return load


def load_model(folder: Path, plain: nn.Module) -> torch.Tensor:
    model = load_compressed_model(plain, folder / "model", adapter_name="first")
    model.load_adapter(str(folder / "small" / "task"), "task")
    model.set_adapter("task")
    return outputs(model.eval(), X)


def load_pool(folder: Path, plain: nn.Module) -> torch.Tensor:
    pool = TaskPool(plain)
    pool.load(folder / "pool.safetensors")
    pool.activate("first")
    result = outputs(pool.model, X)
    pool.deactivate()
    return result


def load_stored_bank(folder: Path, plain: nn.Module) -> torch.Tensor:
    load_bank(folder / "bank")
    return load_task("on_bank")(folder, plain)


KINDS: dict[str, tuple[str, list[Callable], Callable[[Path, nn.Module], torch.Tensor], str]] = {
    "config of a task": (f"plain/task/{CONFIG}", [*BYTES, other_value, other_top], load_task("plain"), "plain"),
    "config with partners": (f"partners/task/{CONFIG}", [other_value], load_task("partners"), "partners"),
    "config on a bank": (f"on_bank/task/{CONFIG}", [other_value], load_task("on_bank"), "on_bank"),
    "numbers of a task": (f"plain/task/{NUMBERS}", [*BYTES, other_tensors], load_task("plain"), "plain"),
    "header of a bank": ("bank/recast_bank.json", [*BYTES, other_value, other_top], load_stored_bank, "on_bank"),
    "tensors of a bank": ("bank/recast_bank.safetensors", [*BYTES, other_tensors], load_stored_bank, "on_bank"),
    "rest of a model": ("model/recast_backbone.safetensors", [*BYTES, other_tensors], load_model, "model"),
    "packed pool": ("pool.safetensors", [*BYTES, other_tensors], load_pool, "pool"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("good")
    return folder, make(folder)


def signature(model: nn.Module) -> list[tuple]:
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    held = [*model.named_parameters(), *model.named_buffers()]
    return [*modules, *((name, id(t), t.requires_grad, t.detach().clone().numpy().tobytes()) for name, t in held)]


def fresh(kind: str) -> nn.Module:
    if kind != "packed pool":
        return tiny_vit()
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_classes=3), "first").eval()
    return TaskPool(model).model


def damaged(kind: str, folder: Path) -> Iterator[tuple[str, Path]]:
    file, ways, _, _ = KINDS[kind]
    content = (folder / file).read_bytes()
    for way in ways:
        for number in range(EACH):
            (folder / file).write_bytes(content)
            way(folder / file, random.Random(f"{kind} {way.__name__} {number}"))
            if (folder / file).read_bytes() != content:
                yield f"{way.__name__} {number}", folder / file
    (folder / file).write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_and_nothing_is_changed(
    kind: str, good: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(good[0], folder)
    _, _, load, name = KINDS[kind]
    wrong: list[str] = []
    refused = 0
    for what, _file in damaged(kind, folder):
        plain = fresh(kind)
        before = signature(plain)
        begun = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                result = load(folder, plain)
            except RecastError:
                refused += 1
                if signature(plain) != before:
                    wrong.append(f"{what}: the model was changed")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
            else:
                if not torch.equal(result, good[1][name]) and not said:
                    wrong.append(f"{what}: loaded without a word, and computes something else")
        if time.perf_counter() - begun > SECONDS * FACTOR:
            wrong.append(f"{what}: took {time.perf_counter() - begun:.1f} s")
    assert not wrong, "\n".join(wrong)
    assert refused > 10


def test_the_good_files_load(good: tuple[Path, dict[str, torch.Tensor]]) -> None:
    for kind, (_, _, load, name) in KINDS.items():
        assert torch.equal(load(good[0], fresh(kind)), good[1][name]), kind
