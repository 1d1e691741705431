"""Calls that compose their weight again in the backward pass: autograd's gradients, no weight kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Chain, converted, layers_of, randomise, seeded, vit_input
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft import RecastConfig, get_recast_model
from recast_peft.layer import DIRECT_CALLS
from recast_peft.recomposed import _GRADIENTS, call_recomposed, can_recompose

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 5), (2, 4, 3)),
    "linear, one row": (lambda: nn.Linear(3, 5, bias=False), (3,)),
    "transposed": (lambda: Conv1D(5, 3), (2, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, dilation=2, groups=2), (2, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, bias=False), (1, 1, 3, 3, 3)),
}
cases = pytest.mark.parametrize("case", CASES)


def build(case: str, anchored: bool = True) -> tuple[nn.Module, Tensor, Tensor | None, list[Tensor], Tensor]:
    """A module in float64, its input, and two templates with their coefficients, the first of them the anchor itself."""
    make, shape = CASES[case]
    module = seeded(make).double().requires_grad_(False)
    if getattr(module, "bias", None) is not None:
        module.bias.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = module.weight.data
    other = draw(weight.shape)
    return module, draw(shape).requires_grad_(), weight if anchored else None, [weight, other], draw(2).requires_grad_()


def recomposed(module: nn.Module, x: Tensor, *terms: Any) -> Tensor:
    assert can_recompose(module, x, *terms)
    return call_recomposed(module, DIRECT_CALLS[type(module).forward], x, *terms)


@cases
@pytest.mark.parametrize("anchored", [True, False])
def test_gradients_are_those_of_plain_autograd(case: str, anchored: bool) -> None:
    module, x, anchor, templates, coefficients = build(case, anchored)
    trained = [x, coefficients, *module.parameters()]
    trained = [p for p in trained if p.requires_grad]
    weight = sum(c * t for c, t in zip(coefficients, templates, strict=True)) + (0 if anchor is None else anchor)
    expected = torch.func.functional_call(module, {"weight": weight}, (x,))
    actual = recomposed(module, x, anchor, templates, coefficients)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((actual * probe).sum(), trained)
    for own, plain in zip(gradients, torch.autograd.grad((expected * probe).sum(), trained), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-11)


@cases
def test_gradients_hold_to_first_and_second_order(case: str) -> None:
    module, x, anchor, templates, coefficients = build(case)
    function = lambda x, c: recomposed(module, x, anchor, templates, c)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, coefficients))
    assert torch.autograd.gradgradcheck(function, (x, coefficients))


def test_every_gradient_belongs_to_a_direct_call() -> None:
    assert set(_GRADIENTS) <= set(DIRECT_CALLS)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps beside what is there already: parameters and input."""
    own = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("templates", [None, 1])
@pytest.mark.parametrize(
    ("build_layer", "shape"),
    [(lambda: nn.Linear(64, 64), (1, 64)), (lambda: nn.Conv2d(16, 16, 3, padding=1), (1, 16, 2, 2))],
)
def test_no_composed_weight_is_kept(
    build_layer: Callable[[], nn.Module], shape: tuple[int, ...], templates: int | None
) -> None:
    plain = seeded(lambda: Chain([build_layer(), build_layer()]))
    model = get_recast_model(plain, RecastConfig(target_modules=["0", "1"], num_templates=templates))
    randomise(model)
    x = torch.randn(shape)
    # two outputs of 64 numbers, and coefficients; one weight has 9 kB and more
    assert kept_bytes(model, x) <= 2 * 4 * 64 + 200


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [layer.recast_coefficients["default"].grad.clone() for layer in layers_of(model).values()]


def test_a_task_written_between_forward_and_backward_changes_no_gradient() -> None:
    model = converted(depth=2)
    randomise(model)
    expected = trained(model, vit_input())
    model.zero_grad()
    loss = model(vit_input()).square().sum()
    for layer in layers_of(model).values():
        layer.recast_coefficients["default"].data.fill_(3)
    loss.backward()
    for layer, gradient in zip(layers_of(model).values(), expected, strict=True):
        assert torch.equal(layer.recast_coefficients["default"].grad, gradient)


def test_a_merge_between_forward_and_backward_changes_no_gradient() -> None:
    model = converted(depth=2)
    randomise(model)
    expected = trained(model, vit_input())
    model.zero_grad()
    loss = model(vit_input()).square().sum()
    model.merge_adapter()
    loss.backward()
    for layer, gradient in zip(layers_of(model).values(), expected, strict=True):
        assert torch.equal(layer.recast_coefficients["default"].grad, gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    model = get_recast_model(plain, RecastConfig(target_modules=["0", "2"]))
    randomise(model)
    x = torch.randn(4, 6).requires_grad_()
    expected = trained(model, x)
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for layer, gradient in zip(layers_of(model).values(), expected, strict=True):
        torch.testing.assert_close(layer.recast_coefficients["default"].grad, gradient)


def test_autocast_keeps_the_narrow_input_and_gives_gradients_near_the_wide_ones() -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model = get_recast_model(plain, RecastConfig(target_modules=["0", "1"]))
    randomise(model)
    x = torch.randn(32, 64).requires_grad_()
    wide = trained(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert kept_bytes(model, x) <= 2 * (2 * 32 * 64) + 200
        narrow = trained(model, x)
    for own, reference in zip(narrow, wide, strict=True):
        torch.testing.assert_close(own, reference, rtol=0.05, atol=0.05 * reference.abs().max().item())
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_what_cannot_be_composed_again_takes_the_ordinary_call() -> None:
    module, x, anchor, templates, coefficients = build("conv2d")
    assert can_recompose(module, x, anchor, templates, coefficients)
    assert not can_recompose(module, x[0], anchor, templates, coefficients)
    assert not can_recompose(module, x, anchor, [t.clone().requires_grad_() for t in templates], coefficients)
    assert not can_recompose(module, x.detach(), anchor, templates, coefficients.detach())
    padded = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
    assert not can_recompose(padded, x, anchor, templates, coefficients)
    assert not can_recompose(nn.Conv2d(2, 4, 3, padding="same"), x, anchor, templates, coefficients)
    with torch.no_grad():
        assert not can_recompose(module, x, anchor, templates, coefficients)
