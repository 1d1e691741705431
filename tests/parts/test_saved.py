"""Norms of a task, and running statistics of the pretrained model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from recast_peft import RecastConfig, get_recast_model
from recast_peft.parts.saved import find_norms


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "test_byobnet"])
def test_all_norms_are_found_with_and_without_an_activation(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))}
    assert set(find_norms(model)) == norms
    trained = get_recast_model(model, RecastConfig(train_norms=True, train_coefficients=False))
    assert sum(p.requires_grad for p in trained.parameters()) == 2 * len(norms)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("way", ["model.train", "base.train", "outer.train", "update_bn", "update_bn of a model around"])
def test_running_statistics_stay_those_of_the_pretrained_model(way: str) -> None:
    backbone = timm.create_model("test_resnet", num_classes=0).train()
    for _ in range(3):
        backbone(torch.randn(4, 3, 32, 32))
    plain = copy.deepcopy(backbone).eval()
    model = get_recast_model(backbone, RecastConfig())
    x = torch.randn(4, 3, 32, 32)
    if way == "update_bn":
        update_bn([x], model)
    elif way == "update_bn of a model around":
        update_bn([x], Outer(model.get_base_model()))
    else:
        module = {"model.train": model, "base.train": model.get_base_model(), "outer.train": Outer(model.get_base_model())}[way]
        module.train()
        module(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
    left = model.unload()
    assert not any(m._forward_pre_hooks for m in left.modules())
