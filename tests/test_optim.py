"""The optimiser trains coefficients and all else with learning rates of their own."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from models import converted, layers_of, randomise, tiny_vit, vit_input
from torch import nn

from recast_peft import (
    BiasConfig,
    RecastConfig,
    RecastConfigError,
    create_recast_optimizer,
    find_coefficient_lr,
    get_recast_model,
)
from recast_peft.optim import default_coefficient_lr


def test_every_trained_parameter_is_in_one_group_and_coefficients_do_not_decay() -> None:
    model = converted(depth=2, num_classes=3)
    optimizer = create_recast_optimizer(model, lr=1e-3, coefficient_lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    first, second = optimizer.param_groups
    coefficients = [layer.recast_coefficients["default"] for layer in layers_of(model).values()]
    assert {id(p) for p in first["params"]} == {id(p) for p in coefficients}
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.0)
    assert (second["lr"], second["weight_decay"], second["betas"]) == (1e-3, 0.5, (0.8, 0.9))
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(trained)


def test_a_step_of_sgd_moves_coefficients_by_their_own_rate() -> None:
    model = converted(depth=2)
    optimizer = create_recast_optimizer(model, torch.optim.SGD, lr=1.0, coefficient_lr=0.01)
    model(vit_input()).square().sum().backward()
    optimizer.step()
    for layer in layers_of(model).values():
        coefficients = layer.recast_coefficients["default"]
        assert coefficients.grad is not None
        torch.testing.assert_close(coefficients.detach(), -0.01 * coefficients.grad)
        assert coefficients.abs().sum() > 0


def test_a_model_without_coefficients_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="trains no RECAST coefficients"):
        create_recast_optimizer(nn.Linear(2, 2), lr=0.1)


@pytest.mark.parametrize("trained", [{"train_norms": True}, {"modules_to_save": ["blocks.0.mlp.fc1"]}, {"bias": "all"}])
def test_a_task_that_trains_what_has_no_group_of_its_own(trained: dict[str, Any]) -> None:
    model = converted(depth=2, train_coefficients=False, **trained)
    (group,) = create_recast_optimizer(model, lr=0.1).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert group["params"]
    model.add_adapter("other", RecastConfig(train_coefficients=False))
    model.set_adapter("other")
    with pytest.raises(RecastConfigError, match="nothing else of a task"):
        create_recast_optimizer(model, lr=0.1)


def test_a_task_that_trains_its_classifier_alone() -> None:
    model = converted(num_classes=3, train_coefficients=False)
    (group,) = create_recast_optimizer(model, lr=0.1).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for n, p in model.named_parameters() if ".head." in n and p.requires_grad}


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": "1e-2"},
        {"lr": None},
        {"lr": 0.1, "coefficient_lr": float("nan")},
        {"lr": 0.1, "partner_lr": -1},
        {"lr": 0.1, "coefficient_lr": torch.tensor([0.1, 0.2])},
        {"lr": 0.1, "lora_lr": torch.tensor(float("nan"))},
    ],
)
def test_a_rate_that_is_no_number_from_0_is_refused(arguments: dict[str, Any]) -> None:
    name, value = list(arguments.items())[-1]
    with pytest.raises(RecastConfigError, match=f"{name}={re.escape(repr(value))}: expected a number from 0"):
        create_recast_optimizer(converted(depth=2, num_classes=3), **arguments)
    create_recast_optimizer(converted(depth=2, num_classes=3), lr=torch.tensor(0.1))  # as capturable optimisers take it
    create_recast_optimizer(converted(depth=2, num_classes=3), lr=np.float32(0.1), coefficient_lr=np.int64(1))


def test_an_optimiser_in_place_of_its_class_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="optimizer_cls='adamw': expected a class"):
        create_recast_optimizer(converted(depth=2), "adamw", lr=0.1)  # type: ignore[arg-type]


def test_parameters_of_the_pretrained_model_are_not_trained_in_silence() -> None:
    model = converted(depth=2, num_classes=3, bias="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a task has is its own
        create_recast_optimizer(model, lr=0.1)
    model.get_base_model().blocks[1].norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 parameters of the pretrained model.*blocks\.1\.norm\.weight"):
        create_recast_optimizer(model, lr=0.1)


# ---------------------------------------------------------------- rates


class Convs(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("model", "config", "rate"),
    [
        (lambda: tiny_vit(depth=4), {}, 0.05),  # 16 numbers: 0.13 / (0.5 * 4) = 0.065 is above the most
        (lambda: tiny_vit(depth=24), {}, 0.13 / (0.5 * 48**0.5)),  # groups of 1
        (lambda: tiny_vit(depth=48), {}, 0.13 / (0.5 * 2 * 48**0.5)),  # two layers share each number
        (lambda: tiny_vit(depth=24), {"num_coefficient_sets": 2, "group_size": 1}, 0.13 / (0.5 * 48**0.5)),  # sets are averaged
        (lambda: Convs(16), {"group_size": 1}, 0.13 / (1.5 * 4)),
        (lambda: Convs(16), {"group_size": 4}, 0.13 / (1.5 * 8)),
        (lambda: Convs(16), {"num_directions": 1}, 0.13 / (0.2 * 4)),
        (lambda: Convs(16), {"num_directions": 3}, 0.13 / (0.2 * 3 * 4)),
        (lambda: tiny_vit(), {"train_coefficients": False, "partners": [BiasConfig()]}, 0.05),
    ],
)
def test_the_default_rate_falls_with_what_the_coefficients_move(
    model: Callable[[], nn.Module], config: dict[str, Any], rate: float
) -> None:
    converted_model = get_recast_model(model(), RecastConfig(**config))
    assert default_coefficient_lr(converted_model) == pytest.approx(rate)
    assert create_recast_optimizer(converted_model, lr=1.0).param_groups[0]["lr"] == pytest.approx(rate)


def test_a_rate_that_was_found_moves_the_features_as_far_as_was_asked() -> None:
    model = get_recast_model(tiny_vit(depth=6), RecastConfig(num_classes=3))
    randomise(model, size=0.02)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mode = model.training
    for batch in (vit_input(8), (vit_input(8), torch.zeros(8))):
        rate = find_coefficient_lr(model, batch, change=0.01)
    assert model.training == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    features = []
    model.get_base_model().blocks[-1].register_forward_hook(lambda module, args, output: features.append(output.detach()))
    generator = torch.Generator().manual_seed(5)
    model.eval()(vit_input(8))
    changes = []
    for _ in range(10):
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.requires_grad and "recast_coefficients" in name:
                    signs = torch.randint(0, 2, value.shape, generator=generator) * 2.0 - 1.0
                    value.copy_(before[name] + rate * signs)
        model(vit_input(8))
        changes.append(float((features[-1] - features[0]).norm() / features[0].norm()))
    assert sum(changes) / 10 == pytest.approx(0.01, rel=0.5)


class TwoLayers(nn.Module):
    """Two layers that are no numbered blocks, and a third that no call reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("targets", [["second"], ["first", "second", "unused"]])
def test_a_rate_is_found_by_what_the_last_layer_called_gives(targets: list[str]) -> None:
    """Layers that are blocks of their own: what counts is what the layer gives, and not what it wraps."""
    x, model = torch.randn(16, 8), get_recast_model(TwoLayers(), RecastConfig(target_modules=targets, group_size=1))
    for name, layer in layers_of(model).items():
        layer.recast_coefficients["default"].requires_grad_(name == "second")
    plain = TwoLayers()
    scaled = plain.second(plain.first(x).tanh()) - plain.second.bias  # what a coefficient of 1 adds
    rate = find_coefficient_lr(model, x, change=0.01)
    assert rate == pytest.approx(0.01 * float(plain(x).norm() / scaled.norm()), rel=1e-3)


@pytest.mark.parametrize(
    "around",
    [
        lambda model: nn.Sequential(model, nn.ReLU()),
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.base_model,
    ],
    ids=["a larger model", "a wrapper", "compiled", "the tuner"],
)
def test_a_rate_is_found_whatever_is_around_the_model(around: Callable[[nn.Module], nn.Module]) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(num_classes=3))
    wanted, inside = find_coefficient_lr(model, vit_input()), around(model)
    inside(vit_input())  # compiled before it is looked at
    assert find_coefficient_lr(inside, vit_input()) == wanted


def test_a_model_that_calls_none_of_its_layers_is_refused() -> None:
    model = get_recast_model(TwoLayers(), RecastConfig(target_modules=["unused"]))
    with pytest.raises(RecastConfigError, match="calls none of its RECAST layers"):
        find_coefficient_lr(model, torch.randn(2, 8))


def test_no_rate_is_found_where_nothing_is_trained() -> None:
    with pytest.raises(RecastConfigError, match="trains no RECAST coefficients"):
        find_coefficient_lr(nn.Linear(2, 2), torch.zeros(1, 2))
    model = converted(depth=2)
    with pytest.raises(RecastConfigError, match="change=0: expected a number above 0"):
        find_coefficient_lr(model, vit_input(), change=0)
    model.merge_adapter()
    with pytest.raises(RecastConfigError, match="a task is merged"):
        find_coefficient_lr(model, vit_input())


# ---------------------------------------------------------------- what goes wrong in silence


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(vit_input()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_task_that_is_activated_later_is_missed() -> None:
    model = converted("one", depth=2, num_classes=3)
    optimizer = create_recast_optimizer(model, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_a_step(model, optimizer)
    model.add_adapter("two", RecastConfig(target_modules=["qkv"], num_classes=3))
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="2 trainable parameters of coefficients.*after set_adapter"):
        train_a_step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        train_a_step(model, optimizer)


def test_a_merged_task_is_not_trained_in_silence() -> None:
    model = converted(depth=2, num_classes=3)
    optimizer = create_recast_optimizer(model, lr=0.1)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged into 2 layers.*unmerge_adapter"):
        train_a_step(model, optimizer)


def test_each_of_several_models_in_one_module_is_looked_at() -> None:
    towers = nn.ModuleList([converted(depth=2, num_classes=3), converted(depth=2, num_classes=3)])
    first, second = towers
    optimizer = create_recast_optimizer(towers, lr=0.1)
    train_a_step(first, optimizer)
    second.merge_adapter()
    with pytest.warns(UserWarning, match="merged into 2 layers"):
        train_a_step(second, optimizer)


def test_a_headless_backbone_without_classes_says_so() -> None:
    timm = pytest.importorskip("timm")
    model = get_recast_model(timm.create_model("test_vit", num_classes=0), RecastConfig())
    with pytest.warns(UserWarning, match="has no classifier.*num_classes"):
        create_recast_optimizer(model, lr=0.1)
    outer = nn.Sequential(model, nn.Linear(64, 2))
    with_classes = get_recast_model(timm.create_model("test_vit", num_classes=0), RecastConfig(num_classes=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_recast_optimizer(with_classes, lr=0.1)
        create_recast_optimizer(outer, lr=0.1)


def test_the_check_costs_no_walk_over_the_model_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(depth=2, num_classes=3)
    optimizer = create_recast_optimizer(model, lr=0.1)
    train_a_step(model, optimizer)
    monkeypatch.setattr("recast_peft.optim.modules_of", None)  # a walk would fail
    train_a_step(model, optimizer)
    copy.deepcopy(optimizer).step()


def test_what_is_offloaded_is_in_an_optimizer_that_is_made_before_train_is_called() -> None:
    model = converted(num_classes=3)
    cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters() if parameter.requires_grad)
    optimizer = create_recast_optimizer(model, lr=0.1)
    trained = {id(parameter) for parameter in model.train().parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
