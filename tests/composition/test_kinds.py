"""Every row of the table of kinds says the truth about the modules that it names."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft.composition.kinds import (
    CONVOLUTION,
    KINDS,
    LINEAR,
    QUANTISED_LINEAR,
    LayerKind,
    add_bias,
    family_of,
    in_and_out_features,
    is_lazily_readable,
    kind_of,
    positions_of,
    rows_of,
)

MADE: dict[str, Any] = {
    "Linear": (lambda: nn.Linear(3, 5), (2, 4, 3)),
    "Conv1D": (lambda: Conv1D(5, 3), (2, 4, 3)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 7)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, dilation=2, groups=2), (2, 2, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3)),
}
CALLED = [(kind, cls) for kind in KINDS if kind.call is not None for cls in kind.classes]
called = pytest.mark.parametrize(("kind", "cls"), CALLED, ids=lambda value: getattr(value, "__name__", None))


def make(cls: type) -> tuple[Any, Tensor]:
    build, shape = MADE[cls.__name__]
    torch.manual_seed(0)
    module = build()
    nn.init.uniform_(module.bias, 0.5, 1.5)
    return module, torch.randn(shape)


@called
def test_a_call_is_what_the_module_computes(kind: LayerKind, cls: type) -> None:
    module, x = make(cls)
    assert kind_of(module) is family_of(module) is kind
    assert torch.equal(kind.call(module, module.weight, x), module(x))
    other = torch.randn_like(module.weight)
    swapped = torch.func.functional_call(module, {"weight": other}, (x,))
    torch.testing.assert_close(kind.call(module, other, x), swapped)
    torch.testing.assert_close(add_bias(kind.call(module, other, x, False), module), swapped)


@called
def test_widths_and_positions_are_counted_along_the_channels(kind: LayerKind, cls: type) -> None:
    module, x = make(cls)
    y = module(x)
    assert in_and_out_features(module, tuple(module.weight.shape)) == (x.shape[kind.channels], y.shape[kind.channels])
    assert positions_of(module, x) == x.numel() / x.shape[kind.channels]


@called
def test_gradients_are_those_of_autograd(kind: LayerKind, cls: type) -> None:
    module, x = make(cls)
    assert kind.gradients.fits(module, x)
    y = module(x.requires_grad_())
    grad = torch.randn_like(y)
    by_input, by_weight = torch.autograd.grad(y, [x, module.weight], grad)
    torch.testing.assert_close(kind.gradients.of_input(module, grad, module.weight, x.shape), by_input)
    torch.testing.assert_close(kind.gradients.of_weight(module, grad, x, module.weight.shape), by_weight)


@called
def test_rows_give_the_product(kind: LayerKind, cls: type) -> None:
    module, x = make(cls)
    columns = rows_of(module)
    if cls is nn.Conv3d:
        assert columns is None
        return
    if getattr(module, "groups", 1) > 1:  # the patches of the groups, one after the other
        module = nn.Conv2d(2, 4, 3, padding=1, dilation=2)
    weight = kind.as_matrix(module.weight.flatten(1))
    y = module(x).movedim(kind.channels, -1).reshape(-1, module.bias.numel())
    torch.testing.assert_close(columns(module, x) @ weight.T + module.bias, y)


def built(name: str, width: int) -> nn.Module:
    path, _, cls = name.rpartition(".")
    if cls == "SyncBatchNormAct":
        pytest.skip("made by timm's conversion alone, and needs an accelerator")
    options: dict[str, Any] = {"num_groups": 2} if cls.startswith("GroupNorm") and "1" not in cls else {}
    if "Act" in cls:
        options |= {"act_layer": nn.SiLU, "inplace": False}
    return getattr(importlib.import_module(path), cls)(width, **options).eval()


BIASED = [
    *((kind, name) for kind in KINDS if "norm" in kind.name for name in kind.names),
    *((kind, f"{cls.__module__}.{cls.__name__}") for kind in KINDS if "norm" in kind.name for cls in kind.classes),
]


@pytest.mark.parametrize(("kind", "name"), BIASED, ids=lambda value: value if isinstance(value, str) else "")
def test_the_bias_lies_where_the_table_says(kind: LayerKind, name: str) -> None:
    torch.manual_seed(0)
    if name.endswith("torch.nn.modules.normalization.GroupNorm"):
        module: Any = nn.GroupNorm(2, 6)
    else:
        module = built(name, 6)
    x = torch.randn(2, 6, 3, 6)
    x = x[:, :, 0] if isinstance(module, nn.BatchNorm1d) else x
    assert kind_of(module) is kind
    change = torch.randn(6)
    moved = copy.deepcopy(module)
    with torch.no_grad():
        moved.bias += change
    sums: list[Tensor] = []
    if kind.reads_sum is None:
        y = module(x) + kind.along_channels(change, x)
    else:
        child = module.get_submodule(kind.reads_sum)
        handle = child.register_forward_pre_hook(
            lambda m, args: sums.append(args[0]) or (args[0] + kind.along_channels(change, x),)
        )
        y = module(x)
        handle.remove()
        assert len(sums) == 1
    torch.testing.assert_close(y, moved(x))
    assert not torch.allclose(y, module(x), atol=1e-3)


def test_a_forward_of_ones_own_is_no_known_kind_but_of_the_family() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    module = Standardised(2, 3, 1)
    assert kind_of(module) is None
    assert family_of(module) is CONVOLUTION
    assert in_and_out_features(module, (3, 2, 1, 1)) == (2, 3)
    assert not is_lazily_readable(module)


def test_a_subclass_that_computes_the_same_is_of_the_kind_but_not_read_lazily() -> None:
    class Own(nn.Linear):
        pass

    assert kind_of(Own(2, 3)) is LINEAR
    assert not is_lazily_readable(Own(2, 3))
    assert is_lazily_readable(nn.Linear(2, 3))


def test_a_quantised_layer_takes_its_bias_in_the_precision_of_the_input() -> None:
    module, x = make(nn.Linear)
    weight, bias = module.weight.detach(), module.half().bias.detach().float()
    torch.testing.assert_close(QUANTISED_LINEAR.call(module, weight, x), x @ weight.T + bias)


def test_of_a_container_nothing_is_known() -> None:
    assert kind_of(nn.Sequential()) is family_of(nn.Sequential()) is rows_of(nn.Sequential()) is None


def test_transposed_convolutions_have_widths_but_no_rows() -> None:
    module = nn.ConvTranspose2d(2, 5, 3)
    assert in_and_out_features(module, tuple(module.weight.shape)) == (2, 5)
    assert kind_of(module) is None
    assert rows_of(module) is None
