"""What is written down of a backbone with a task; hub/backbone.py builds it again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
from models import small_transformer, tiny_vit
from peft import get_peft_model
from torch import nn

from recast_peft import RecastConfig, get_recast_model
from recast_peft.tasks.backbone import describe_backbone


def vit(**arguments: Any) -> nn.Module:
    return timm.create_model("test_vit", **{"num_classes": 5, "img_size": 32, **arguments})


class TestOfTimm:
    def test_is_what_the_model_was_built_with(self) -> None:
        description = describe_backbone(vit())
        assert description is not None
        assert {key: description[key] for key in ("library", "architecture", "class", "num_classes", "input_size")} == {
            "library": "timm",
            "architecture": "test_vit",
            "class": "VisionTransformer",
            "num_classes": 5,
            "input_size": [3, 32, 32],
        }
        assert description["arguments"] == {"img_size": 32, "num_classes": 5}
        assert description["name"] == f"test_vit.{description['tag']}"
        assert "arguments_left_out" not in description

    def test_names_the_repository_at_a_revision_and_the_license(self) -> None:
        model = vit()
        model.pretrained_cfg |= {"source": "hf-hub", "hf_hub_id": "me/my-vit@v1", "license": "mit"}
        description = describe_backbone(model)
        wanted = {"name": "hf-hub:me/my-vit", "repository": "me/my-vit", "revision": "v1", "license": "mit"}
        assert {key: description[key] for key in wanted} == wanted

    @pytest.mark.parametrize(
        ("arguments", "size"),
        [({"img_size": (32, 48)}, [3, 32, 48]), ({"in_chans": 1}, [1, 32, 32]), ({"img_size": 160}, [3, 160, 160])],
    )
    def test_has_the_size_of_its_pictures(self, arguments: dict[str, Any], size: list[int]) -> None:
        assert describe_backbone(vit(**arguments))["input_size"] == size

    def test_follows_a_classifier_that_was_exchanged_and_no_task(self) -> None:
        model = vit()
        model.reset_classifier(4)
        assert describe_backbone(model)["arguments"]["num_classes"] == 4
        get_recast_model(model, RecastConfig(num_classes=3))
        assert model.num_classes == 3  # of the active task
        description = describe_backbone(model)
        assert (description["num_classes"], description["arguments"]["num_classes"]) == (4, 4)

    def test_leaves_out_where_weights_came_from_and_names_what_json_cannot_hold(self) -> None:
        model = vit(act_layer=nn.ReLU)
        model._model_args["checkpoint_path"] = "/somewhere"
        description = describe_backbone(model)
        assert description["arguments"] == {"img_size": 32, "num_classes": 5}
        assert description["arguments_left_out"] == ["act_layer"]
        json.dumps(description)


class TestOfTransformers:
    def test_is_the_class_and_where_it_came_from(self) -> None:
        model = small_transformer("bert")
        model.name_or_path = "ada/bert"
        assert describe_backbone(model, "v1") == {
            "library": "transformers",
            "name": "ada/bert",
            "revision": "v1",
            "class": "BertForSequenceClassification",
            "num_classes": 2,
        }

    def test_has_the_size_of_its_pictures_and_the_models_own_classes(self) -> None:
        model = small_transformer("vit")
        get_recast_model(model, RecastConfig(num_classes=6, target_modules="all-attention"))
        assert model.config.num_labels == 6
        description = describe_backbone(nn.DataParallel(model))  # what wraps it changes nothing
        assert (description["input_size"], description["num_classes"], description["name"]) == ([3, 8, 8], 3, None)


def test_of_another_kind_there_is_nothing_to_write_down() -> None:
    assert describe_backbone(tiny_vit()) is None


class TestTheDescription:
    def test_is_of_the_backbone_whatever_task_is_active(self) -> None:
        model = get_recast_model(vit(), RecastConfig(num_classes=3), "first")
        model.add_adapter("second", RecastConfig(num_classes=4))
        model.set_adapter("second")
        assert model.get_base_model().num_classes == 4
        assert model.peft_config["second"].backbone["num_classes"] == 5
        assert describe_backbone(model.get_base_model())["num_classes"] == 5

    def test_follows_a_config_that_is_used_again(self) -> None:
        config = RecastConfig(target_modules="all-linear")
        get_peft_model(vit(), config)
        assert config.backbone["library"] == "timm"
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), config)
        assert config.backbone is None

    def test_that_was_given_stays(self) -> None:
        given = {"library": "timm", "name": "mine", "class": "X"}
        model = get_recast_model(vit(), RecastConfig(backbone=given))
        assert model.peft_config["default"].backbone == given
