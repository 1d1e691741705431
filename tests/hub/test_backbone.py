"""A backbone is built from what is written down of it, or from what the caller gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_backbones import make_timm
from hub_tasks import make_backbone
from torch import nn
from transformers import ViTConfig, ViTModel

from recast_peft import RecastConfigError, RecastLoadError
from recast_peft.hub.backbone import build_backbone
from recast_peft.tasks.backbone import describe_backbone


class TestWhatIsGiven:
    def test_a_model_is_used_as_it_is(self) -> None:
        model = nn.Linear(2, 2)
        assert build_backbone({"library": "jax"}, model) == (model, [])

    @pytest.mark.parametrize("given", [3, ["a"], True])
    def test_anything_else_is_refused_by_name(self, given: Any) -> None:
        with pytest.raises(RecastConfigError, match="expected a model, a dictionary of keyword arguments, or the path"):
            build_backbone({"library": "timm"}, given)

    @pytest.mark.parametrize("description", [None, {}])
    def test_without_a_description_there_is_nothing_to_build(self, description: Any) -> None:
        with pytest.raises(RecastLoadError, match="does not say which backbone"):
            build_backbone(description, {"num_labels": 2})


class TestTransformers:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        make_backbone().save_pretrained(tmp_path)  # with five classes
        return tmp_path

    @pytest.mark.parametrize(("classes", "new"), [(5, []), (7, ["classifier.bias", "classifier.weight"]), (None, [])])
    def test_a_classifier_that_comes_from_no_checkpoint_is_named(
        self, folder: Path, classes: int | None, new: list[str]
    ) -> None:
        description = {"library": "transformers", "class": "ViTForImageClassification", "name": "ada/vit"}
        description |= {} if classes is None else {"num_classes": classes}
        model, names = build_backbone(description, folder)
        assert names == new
        assert len(model.classifier.bias) == (classes or 5)
        weight = "vit.layers.0.mlp.fc1.weight"
        assert torch.equal(model.get_parameter(weight), make_backbone().get_parameter(weight))

    def test_a_path_that_is_no_folder_is_refused(self, folder: Path) -> None:
        description = {"library": "transformers", "class": "ViTForImageClassification", "name": "ada/vit"}
        with pytest.raises(RecastLoadError, match=r"is not a folder, as a transformers checkpoint is\nPass backbone="):
            build_backbone(description, folder / "model.safetensors")


class TestTimm:
    def test_a_checkpoint_with_a_classifier_goes_into_a_model_without_one(self, tmp_path: Path) -> None:
        source = make_timm(seed=3)
        torch.save(source.state_dict(), tmp_path / "model.pth")
        built, new = build_backbone(describe_backbone(make_timm(num_classes=0)), tmp_path / "model.pth")
        assert new == []
        state = built.state_dict()
        assert not any(key.startswith("head.") for key in state)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in state.items())

    def test_a_checkpoint_of_another_model_is_not_loaded_in_part(self, tmp_path: Path) -> None:
        state = make_timm().state_dict()
        del state["norm.weight"]
        torch.save(state, tmp_path / "model.pth")
        with pytest.raises(RecastLoadError, match=r"of another model: it lacks or has besides norm\.weight"):
            build_backbone(describe_backbone(make_timm(num_classes=0)), tmp_path / "model.pth")
        with pytest.raises(RecastLoadError, match="there is no checkpoint at"):
            build_backbone(describe_backbone(make_timm(num_classes=0)), tmp_path / "missing.pth")


class TestTheDescription:
    def test_that_json_cannot_hold_is_said(self) -> None:
        model = make_timm(act_layer=nn.ReLU)
        description = describe_backbone(model)
        assert description["arguments_left_out"] == ["act_layer"]
        json.dumps(description)
        with pytest.raises(RecastLoadError, match="act_layer"):
            build_backbone(description)
        built, _ = build_backbone(description, {"pretrained": False, "act_layer": nn.ReLU})
        assert any(isinstance(module, nn.ReLU) for module in built.modules())

    def test_that_says_where_weights_come_from_is_not_followed(self, tmp_path: Path) -> None:
        torch.save(make_timm(seed=1).state_dict(), tmp_path / "other.pth")
        description = describe_backbone(make_timm())
        description["arguments"]["checkpoint_path"] = str(tmp_path / "other.pth")
        torch.manual_seed(0)
        built, _ = build_backbone(description, {"pretrained": False})
        assert torch.equal(built.cls_token, make_timm().cls_token)

    def test_builds_the_same_architecture(self) -> None:
        model = make_timm(in_chans=1, img_size=48, global_pool="avg", num_classes=2)
        description = describe_backbone(model)
        assert description["input_size"] == [1, 48, 48]
        built, _ = build_backbone(json.loads(json.dumps(description)), {"pretrained": False})
        assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert built.global_pool == "avg"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"library": "jax"}, "library 'jax'"),
            ({"class": "ResNet"}, "another class"),
            ({"name": "no_such_model", "architecture": "no_such_model"}, "cannot be built"),
        ],
    )
    def test_that_nothing_can_be_built_from_is_refused(self, change: dict[str, str], message: str) -> None:
        with pytest.raises(RecastLoadError, match=message):
            build_backbone({**describe_backbone(make_timm()), **change}, {"pretrained": False})

    @pytest.mark.parametrize("name", ["Trainer", "torch", "NoSuchModel", "pipeline"])
    def test_builds_no_class_but_a_transformers_model(self, name: str, tmp_path: Path) -> None:
        description = {"library": "transformers", "name": str(tmp_path), "class": name}
        with pytest.raises(RecastLoadError, match="not one of transformers' own"):
            build_backbone(description)

    def test_of_a_model_from_a_configuration_has_no_weights(self) -> None:
        description = describe_backbone(ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
        with pytest.raises(RecastLoadError, match="without pretrained weights"):
            build_backbone(description)
