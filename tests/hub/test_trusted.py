"""A backbone that a task's file names by a path, an address or arguments of its own choice is not built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_backbones import BASE, serve_timm, serve_transformers
from hub_server import HubServer
from torch import nn
from transformers import ViTForImageClassification, ViTModel

from recast_peft import RecastLoadError
from recast_peft.hub.backbone import build_backbone
from recast_peft.hub.sizes import without_numbers
from recast_peft.hub.trusted import NotBuilt
from recast_peft.tasks.backbone import describe_backbone


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def description() -> dict[str, Any]:
    return describe_backbone(timm.create_model("test_vit", num_classes=0))


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in ("weights.bin", "pytorch_model.bin"):
        torch.save(Evil(tmp_path / "executed"), folder / name)
    (folder / "config.json").write_text('{"architecture": "test_vit", "pretrained_cfg": {}}')
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"file": "FOLDER/weights.bin"},
        {"name": "local-dir:FOLDER", "repository": None},
        {"name": "local-dir:FOLDER"},
        {"name": "FOLDER", "repository": None},
        {"name": "https://example.com/weights.bin"},
        {"name": "hf-hub:../downloaded"},
        {"name": "hf-hub:FOLDER"},
        {"repository": "FOLDER"},
        {"repository": "../downloaded"},
        {"repository": ["FOLDER", "weights.bin"]},
        {"architecture": "local-dir:FOLDER", "name": "local-dir:FOLDER"},
        {"library": "transformers", "class": "ViTModel", "name": "FOLDER"},
        {"library": "transformers", "class": "ViTModel", "name": "../downloaded"},
        {"library": "transformers", "class": "ViTModel", "name": "downloaded"},
        {"library": "transformers", "class": "ViTModel", "name": "file://FOLDER"},
        {"library": "transformers", "class": "ViTModel", "name": ["FOLDER"]},
    ],
)
@pytest.mark.parametrize("given", [None, {"drop_rate": 0.0}, {"cache_dir": None}])
def test_a_path_or_an_address_is_not_followed(
    change: dict[str, Any], given: dict | None, evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evil.parent)
    filled = {
        key: [v.replace("FOLDER", str(evil)) for v in value]
        if isinstance(value, list)
        else value.replace("FOLDER", str(evil))
        if isinstance(value, str)
        else value
        for key, value in change.items()
    }
    recorded, asked = {**description(), **filled}, []

    def asking(build: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            asked.append(repr((args, kwargs)))
            return build(*args, **kwargs)

        return ask

    monkeypatch.setattr(timm, "create_model", asking(timm.create_model))
    monkeypatch.setattr(ViTModel, "from_pretrained", asking(ViTModel.from_pretrained))
    said = "not followed to paths|no name on the Hub|timm knows no model" if "file" not in change else ""
    with pytest.raises(RecastLoadError, match=rf"(?s)({said}).*backbone="):
        build_backbone(recorded, given)
    assert not [call for call in asked if "downloaded" in call or "example.com" in call]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 100_000},
        {"embed_dim": 1 << 30},
        {"num_classes": 10**12},
        {"num_classes": float("nan")},
        {"img_size": [10**9, 10**9]},
        {"img_size": [16] * 100},
        {"act_layer": "os.system('x')"},
        {"custom": 1},
        {"global_pool": "x" * 1000},
        {"global_pool": {"a": 1}},
        [],
        "text",
    ],
)
def test_arguments_that_are_not_a_files_to_choose_are_refused(arguments: Any) -> None:
    with pytest.raises(RecastLoadError, match="arguments are no dictionary|may not choose") as caught:
        build_backbone({**description(), "arguments": arguments or [1]}, {"pretrained": False})
    assert len(str(caught.value)) < 3000


def test_the_caller_may_choose_what_a_file_may_not() -> None:
    recorded = {**description(), "arguments": {"num_classes": 0, "depth": 2}}
    model, _ = build_backbone(recorded, {"pretrained": False, "depth": 2})
    assert isinstance(model, nn.Module)
    assert len(model.blocks) == 2


def test_a_folder_to_write_to_is_passed_over(tmp_path: Path) -> None:
    recorded = description()
    recorded["arguments"]["cache_dir"] = str(tmp_path / "chosen")
    build_backbone(recorded, {"pretrained": False})
    with pytest.raises(RecastLoadError):
        build_backbone(recorded, None, local_files_only=True, cache_dir=tmp_path / "mine")
    assert not (tmp_path / "chosen").exists()


@pytest.mark.parametrize("classes", [-1, 10**12, "3", [3]])
def test_a_number_of_classes_that_no_model_has_is_refused(classes: Any) -> None:
    with pytest.raises(RecastLoadError, match="num_classes"):
        build_backbone({"library": "transformers", "class": "ViTModel", "name": "google/vit", "num_classes": classes})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"img_size": 4096, "patch_size": 1}),  # 12 GiB of positions
        ("swin_tiny_patch4_window7_224", {"img_size": 4096, "window_size": 256}),
        ("beit_base_patch16_224", {"img_size": 4096}),  # 384 GiB of relative positions
    ],
)
def test_sizes_that_together_take_all_memory_are_refused_before_the_model_is_built(name: str, arguments: dict) -> None:
    recorded = {"library": "timm", "name": name, "architecture": name, "arguments": arguments}
    with pytest.raises(RecastLoadError, match=r"chose img_size=4096.* makes a model of [\d,.]+ GiB, where .* has 0\.\d GiB"):
        build_backbone(recorded, {"pretrained": False})


def test_sizes_that_the_caller_gives_or_that_are_small_are_taken() -> None:
    recorded: dict[str, Any] = {"library": "timm", "name": "test_vit", "architecture": "test_vit"}
    recorded["arguments"] = {"img_size": 320, "patch_size": 8}
    model, _ = build_backbone(recorded, {"pretrained": False})
    assert model.pos_embed.shape[1] == 40 * 40 + 1
    recorded["arguments"] = {"img_size": 4096, "patch_size": 1}
    model, _ = build_backbone(recorded, {"pretrained": False, "img_size": 32, "patch_size": 16})
    assert model.pos_embed.shape[1] == 2 * 2 + 1


class TestWhatARepositorysConfigAsksFor:
    """A small file may describe a model of any size; nothing of it is made."""

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"hidden_size": 1 << 20}, r"[\d,]+ numbers or more, beyond the"),
            ({"num_hidden_layers": 10**9, "hidden_size": 2, "intermediate_size": 1}, "more than 200,000 tensors"),
        ],
    )
    def test_of_transformers(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], message: str
    ) -> None:
        serve_transformers(hub, tmp_path)
        recorded = {"library": "transformers", "name": BASE, "class": "ViTForImageClassification", "num_classes": 5}
        before = torch.get_rng_state()
        assert build_backbone(recorded)[1] == []
        assert torch.equal(torch.get_rng_state(), before)
        config = json.loads(hub.repositories[BASE].find("main").files["config.json"])
        hub.add(BASE, {"config.json": json.dumps({**config, **sizes}).encode()})
        monkeypatch.setattr("recast_peft.hub.sizes.MOST_TENSORS", 2_000)
        monkeypatch.setattr(ViTForImageClassification, "from_pretrained", lambda *a, **k: pytest.fail("it is built"))
        with pytest.raises(RecastLoadError, match=message.replace("200,000", "2,000")):
            build_backbone(recorded)

    def test_of_timm(self, hub: HubServer, tmp_path: Path) -> None:
        name = f"hf-hub:{BASE}"
        serve_timm(hub, tmp_path)
        recorded = {"library": "timm", "name": name, "architecture": "test_vit", "repository": BASE, "arguments": {}}
        assert build_backbone(recorded, cache_dir=tmp_path / "mine")[1] == []
        config = json.loads(hub.repositories[BASE].find("main").files["config.json"])
        config["model_args"] = {**config["model_args"], "embed_dim": 1 << 20}
        hub.add(BASE, {"config.json": json.dumps(config).encode()})
        with pytest.raises(RecastLoadError, match=r"[\d,]+ numbers or more, beyond the"):
            build_backbone(recorded, cache_dir=tmp_path / "mine")

    def test_is_refused_where_it_cannot_be_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = timm.create_model

        def computes(*args: Any, **kwargs: Any) -> nn.Module:
            torch.ones(1).item()  # which no meta tensor has
            return create(*args, **kwargs)

        monkeypatch.setattr(timm, "create_model", computes)
        recorded = {"library": "timm", "name": "test_vit", "architecture": "test_vit", "arguments": {"img_size": 320}}
        with pytest.raises(RecastLoadError, match="size cannot be told before its memory is taken"):
            build_backbone(recorded, {"pretrained": False})

    def test_a_model_of_transformers_is_refused_there_too(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        serve_transformers(hub, tmp_path)
        init = ViTForImageClassification.__init__
        monkeypatch.setattr(ViTForImageClassification, "__init__", lambda *a, **k: (torch.ones(1).item(), init(*a, **k))[1])
        monkeypatch.setattr(ViTForImageClassification, "from_pretrained", lambda *a, **k: pytest.fail("it is built"))
        recorded = {"library": "transformers", "name": BASE, "class": "ViTForImageClassification", "num_classes": 5}
        with pytest.raises(RecastLoadError, match="size cannot be told before its memory is taken"):
            build_backbone(recorded)


def test_a_model_that_computes_while_it_is_built_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        torch.ones(1).item()
        return nn.Linear(1000, 1000)

    assert not without_numbers(build).weight.is_meta
    monkeypatch.setattr("recast_peft.hub.sizes.most_numbers", lambda bytes_each: 1_000_000)
    with pytest.raises(NotBuilt, match="1,000,001 numbers or more, beyond the 1,000,000"):
        without_numbers(build)
