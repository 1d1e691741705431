"""Heads are no targets unless they are named, wherever a model keeps them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
from models import Repeated, seeded, tiny_vit
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastTargetError, get_recast_model, plan_recast
from recast_peft.parts.head import TaskHead
from recast_peft.planning.heads import head_names


def nested(name: str, module: nn.Module) -> nn.Module:
    """A backbone of two layers, and a module under a name that may have several parts."""
    for part in reversed(name.split(".")[1:]):
        module = nn.Sequential(OrderedDict({part: module}))
    body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    return nn.Sequential(OrderedDict({"body": body, name.partition(".")[0]: module}))


ELSEWHERE = (
    "segmentation_head bbox_head.cls roi_heads.box_predictor.cls_score rpn.conv decoder.head class_embed keypoint_head head "
    "class_labels_classifier bbox_predictor classifier fc head1 cls_head2.conv"
)


@pytest.mark.parametrize("name", ELSEWHERE.split())
def test_heads_of_models_from_elsewhere_are_no_targets(name: str) -> None:
    model = nested(name, nn.Conv2d(4, 4, 3))
    for targets in (None, "all-conv"):
        plan = plan_recast(model, RecastConfig(target_modules=targets))
        assert plan.targets == ("body.0", "body.1")
        assert "head" in plan.skipped[name]
    assert name in plan_recast(model, RecastConfig(target_modules=[name])).targets  # it was asked for


class PointHead(nn.Sequential):
    """A head by its class, whatever it is called."""


class SelfAttentionHead(nn.Sequential):
    """A part of an attention."""


def test_a_class_that_is_called_a_head_is_one() -> None:
    model = nested("points", PointHead(nn.Conv2d(4, 4, 3)))
    model.mixer = SelfAttentionHead(nn.Conv2d(4, 4, 3))
    model.stages = nn.ModuleList([PointHead(nn.Conv2d(4, 4, 3))])
    plan = plan_recast(model, RecastConfig(target_modules="all-conv"))
    assert plan.targets == ("body.0", "body.1", "mixer.0", "stages.0.0")
    assert "'points'" in plan.skipped["points.0"]


@pytest.mark.parametrize("name", ["ahead", "body.heads_up", "rpn_free", "blocks.0.head"])
def test_what_only_sounds_like_a_head_is_a_target(name: str) -> None:
    model = nested(name, nn.Conv2d(4, 4, 3))
    assert name in plan_recast(model, RecastConfig()).targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.judge = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.body(x))


@pytest.mark.parametrize("targets", [None, "all-linear", ["0", "1", "2"], r".*\d"])
@pytest.mark.parametrize("head", ["judge", "judge.1"])
def test_the_module_that_was_named_as_the_head_is_no_target(targets: list[str] | str | None, head: str) -> None:
    config = RecastConfig(target_modules=targets, head_module=head, num_classes=3)
    plan = plan_recast(Net(), config)
    assert not [name for name in plan.targets if name.startswith(head)]
    assert {"body.0", "body.2"} <= set(plan.targets)
    assert "judge.1" in plan.skipped
    model = get_recast_model(Net(), config)
    assert model.get_base_model().judge is not None


def test_names_of_heads_are_those_of_the_plain_model_after_a_conversion() -> None:
    assert head_names(tiny_vit()) == {"head"}
    model = get_recast_model(tiny_vit(), RecastConfig(num_classes=2)).get_base_model()
    assert "head" in head_names(model)
    assert (
        plan_recast(model, RecastConfig(target_modules="all-linear")).targets
        == plan_recast(tiny_vit(), RecastConfig(target_modules="all-linear")).targets
    )


def test_a_head_is_found_by_the_models_own_word_also_inside_of_what_a_task_owns() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.last = nn.Sequential(OrderedDict({"norm": nn.LayerNorm(4), "out": nn.Linear(4, 4)}))

        def get_classifier(self) -> nn.Module:
            return self.last.out

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(x))

    assert head_names(Own()) == {"last.out"}
    model = get_recast_model(Own(), RecastConfig(target_modules=["body.0"], modules_to_save=["last"]))
    assert model.get_base_model().get_classifier() is not model.get_base_model().last.original_module.out
    assert head_names(model.get_base_model()) == {"last.out"}


def test_a_classifier_that_the_model_does_not_have_is_refused_without_classes_too() -> None:
    with pytest.raises(RecastTargetError, match="head_module='hed': the model has no such module; top level: blocks, head"):
        get_recast_model(tiny_vit(), RecastConfig(head_module="hed"))


@pytest.mark.parametrize("targets", ["all-linear", ["first", "own"], r"again|own"])
def test_a_classifier_at_several_places_is_known_by_each_of_its_names(targets: list[str] | str) -> None:
    plans = [plan_recast(Repeated(), RecastConfig(target_modules=targets, head_module=n)).targets for n in ("first", "again")]
    assert plans[0] == plans[1]
    assert "first" not in plans[0]
    config = RecastConfig(target_modules=["own"], head_module="again", num_classes=4)
    model = get_recast_model(Repeated(), config).get_base_model()
    assert isinstance(model.first, TaskHead)
    assert model.first is model.again


def test_a_classifier_of_any_name_is_no_head_of_the_plain_model(tmp_path: Path) -> None:
    """Our own class is called one: a task that is loaded beside another would warn of other surroundings."""
    config = RecastConfig(target_modules=["0"], head_module="judge", num_classes=3)
    model = get_recast_model(seeded(Net), config)
    assert head_names(model.get_base_model()) == head_names(Net()) == set()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "again")
