"""A backbone is built from what is written down of it, or from what the caller gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_tasks import make_backbone
from torch import nn

from recast_peft import RecastConfigError, RecastLoadError
from recast_peft.hub.backbone import build_backbone
from recast_peft.tasks.backbone import describe_backbone


def make_timm(classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", img_size=32, num_classes=classes)


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
        source = make_timm(5, seed=3)
        torch.save(source.state_dict(), tmp_path / "model.pth")
        built, new = build_backbone(describe_backbone(make_timm(0)), tmp_path / "model.pth")
        assert new == []
        state = built.state_dict()
        assert not any(key.startswith("head.") for key in state)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in state.items())

    def test_a_checkpoint_of_another_model_is_not_loaded_in_part(self, tmp_path: Path) -> None:
        state = make_timm(5).state_dict()
        del state["norm.weight"]
        torch.save(state, tmp_path / "model.pth")
        with pytest.raises(RecastLoadError, match=r"of another model: it lacks or has besides norm\.weight"):
            build_backbone(describe_backbone(make_timm(0)), tmp_path / "model.pth")
        with pytest.raises(RecastLoadError, match="there is no checkpoint at"):
            build_backbone(describe_backbone(make_timm(0)), tmp_path / "missing.pth")
