"""Calls that compose their weight again in the backward pass: autograd's gradients, no weight kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Chain, converted, layers_of, randomise, seeded, vit_input
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from recast_peft import RecastConfig, get_recast_model
from recast_peft.composition.recomposed import _Layer, call_recomposed, can_recompose

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 5), (2, 4, 3)),
    "linear, one row": (lambda: nn.Linear(3, 5, bias=False), (3,)),
    "linear, many rows": (lambda: nn.Linear(3, 5), (4, 5, 3)),
    "transposed": (lambda: Conv1D(5, 3), (2, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, dilation=2, groups=2), (2, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, bias=False), (1, 1, 3, 3, 3)),
}
cases = pytest.mark.parametrize("case", CASES)


def build(
    case: str, anchor: str | None = "template", num_templates: int = 2
) -> tuple[nn.Module, Tensor, Tensor | None, list[Tensor], Tensor]:
    """A module in float64, its input, the anchor (one of the templates, another tensor or none), templates, coefficients."""
    make, shape = CASES[case]
    module = seeded(make).double().requires_grad_(False)
    if getattr(module, "bias", None) is not None:
        module.bias.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = module.weight.data
    templates = [*(draw(weight.shape) for _ in range(num_templates - 1)), weight]
    anchors = {"template": weight, "other": draw(weight.shape), None: None}
    return module, draw(shape).requires_grad_(), anchors[anchor], templates, draw(num_templates).requires_grad_()


def recomposed(module: nn.Module, x: Tensor, *terms: Any) -> Tensor:
    assert can_recompose(module, x, *terms)
    return call_recomposed(module, x, *terms)


def plain_call(module: nn.Module, x: Tensor, anchor: Tensor | None, templates: list[Tensor], coefficients: Tensor) -> Tensor:
    weight = sum(c * t for c, t in zip(coefficients, templates, strict=True)) + (0 if anchor is None else anchor)
    return torch.func.functional_call(module, {"weight": weight}, (x,))


@cases
@pytest.mark.parametrize("anchor", ["template", "other", None])
@pytest.mark.parametrize("num_templates", [1, 2, 3])
def test_gradients_are_those_of_plain_autograd(case: str, anchor: str | None, num_templates: int) -> None:
    module, x, anchor, templates, coefficients = build(case, anchor, num_templates)
    trained = [x, coefficients, *module.parameters()]
    trained = [p for p in trained if p.requires_grad]
    expected = plain_call(module, x, anchor, templates, coefficients)
    actual = recomposed(module, x, anchor, templates, coefficients)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((actual * probe).sum(), trained)
    for own, plain in zip(gradients, torch.autograd.grad((expected * probe).sum(), trained), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-11)


@cases
@pytest.mark.parametrize("num_templates", [1, 2])
def test_an_accelerators_way_gives_the_same_gradients(case: str, num_templates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # where products are cheap the gradient of the weight is formed, also for one template
    monkeypatch.setattr(_Layer, "_product_by_template", lambda *args: False)
    module, x, *terms = build(case, "template", num_templates)
    leaves = [x, terms[2]]
    expected = torch.autograd.grad(plain_call(module, x, *terms).pow(3).sum(), leaves)
    for own, wanted in zip(torch.autograd.grad(recomposed(module, x, *terms).pow(3).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(own, wanted)


@cases
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_changed_in_place(case: str, bias: bool) -> None:
    module, x, *terms = build(case)
    if not bias and getattr(module, "bias", None) is not None and not isinstance(module, Conv1D):
        module.bias = None
    y = recomposed(module, x, *terms)
    assert not y._is_view()
    y += 1
    y.mul_(2).sum().backward()
    plain = torch.autograd.grad((2 * (plain_call(module, x, *terms) + 1)).sum(), [x, terms[-1]])
    for own, expected in zip((x.grad, terms[-1].grad), plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


@cases
@pytest.mark.parametrize("num_templates", [1, 2])
def test_gradients_hold_to_first_and_second_order(case: str, num_templates: int) -> None:
    module, x, anchor, templates, coefficients = build(case, num_templates=num_templates)
    function = lambda x, c: recomposed(module, x, anchor, templates, c)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, coefficients))
    assert torch.autograd.gradgradcheck(function, (x, coefficients))


@pytest.mark.parametrize("case", ["linear, many rows", "transposed"])
@pytest.mark.parametrize("used", [0, 1, 3, 7])
def test_rows_without_a_gradient_change_nothing(case: str, used: int) -> None:
    module, x, *terms = build(case)
    rows = CASES[case][1][:-1]
    # the first column of the gradient is zero everywhere: it alone does not say which rows have one
    probe = torch.zeros(*rows, 5, dtype=torch.float64)
    probe.view(-1, 5)[:used, 1:] = torch.randn(used, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    trained = [x, terms[-1], module.bias]
    gradients = torch.autograd.grad((recomposed(module, x, *terms) * probe).sum(), trained)
    for own, plain in zip(gradients, torch.autograd.grad((plain_call(module, x, *terms) * probe).sum(), trained), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-11)


def test_rows_without_a_gradient_count_when_it_is_differentiated_again() -> None:
    module, x, *terms = build("linear, many rows")
    probe = torch.zeros(4, 5, 5, dtype=torch.float64)
    probe[0, 0] = 1
    probe.requires_grad_()
    second = []
    for call in (recomposed, plain_call):
        (first,) = torch.autograd.grad((call(module, x, *terms) * probe).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum() + first.sum(), [probe, terms[-1]]))
    for own, plain in zip(*second, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-11)


def backward_flops(num_templates: int, used_rows: int = 32) -> int:
    """Floating-point operations of the products in the backward pass of a linear layer 8 -> 64 on 32 rows."""
    weight, *others = (torch.randn(64, 8) for _ in range(num_templates))
    module = nn.Linear(8, 64).requires_grad_(False)
    coefficients = torch.randn(num_templates, requires_grad=True)
    y = recomposed(module, torch.randn(32, 8, requires_grad=True), None, [weight, *others], coefficients)
    with FlopCounterMode(display=False) as counter:
        y[:used_rows].sum().backward()
    return counter.get_total_flops()


def test_products_of_the_backward_pass() -> None:
    product = 2 * 32 * 8 * 64
    assert backward_flops(1) == product  # the gradient of the input, and that of the coefficient follows from it
    assert backward_flops(2) == 2 * product
    assert backward_flops(3) == 2 * product
    assert backward_flops(2, used_rows=8) == 2 * product // 4


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


def has_the_gradients_of_its_forward_pass(change: Callable[[Any], Any]) -> None:
    """Whatever is done between forward and backward pass."""
    model = converted(depth=2)
    randomise(model)
    expected = trained(model, vit_input())
    model.zero_grad()
    loss = model(vit_input()).square().sum()
    change(model)
    loss.backward()
    for layer, gradient in zip(layers_of(model).values(), expected, strict=True):
        assert torch.equal(layer.recast_coefficients["default"].grad, gradient)


def test_a_task_written_between_forward_and_backward_changes_no_gradient() -> None:
    def write(model: Any) -> None:
        for layer in layers_of(model).values():
            layer.recast_coefficients["default"].data.fill_(3)

    has_the_gradients_of_its_forward_pass(write)


def test_a_merge_between_forward_and_backward_changes_no_gradient() -> None:
    has_the_gradients_of_its_forward_pass(lambda model: model.merge_adapter())


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


ONE_TEMPLATE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(64, 96), lambda: torch.randn(2, 5, 64)),
    "linear, no bias": (lambda: nn.Linear(64, 96, bias=False), lambda: torch.randn(2, 5, 64)),
    "linear, many rows": (lambda: nn.Linear(8, 8), lambda: torch.randn(100, 8)),
    "linear, one vector": (lambda: nn.Linear(64, 96), lambda: torch.randn(64)),
    "linear, no rows": (lambda: nn.Linear(64, 96), lambda: torch.randn(3, 0, 64)),
    "linear, every other number": (lambda: nn.Linear(64, 256), lambda: torch.randn(6, 40, 128)[..., ::2]),
    "transposed": (lambda: Conv1D(96, 64), lambda: torch.randn(2, 5, 64)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3), lambda: torch.randn(1, 16, 6, 6)),
    "conv2d, channels last": (
        lambda: nn.Conv2d(16, 24, 3),
        lambda: torch.randn(1, 16, 6, 6).to(memory_format=torch.channels_last),
    ),
}
one_template = pytest.mark.parametrize("case", ONE_TEMPLATE)


def one(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """A module, one with a template of its own in its place, and an input."""
    build_module, build_input = ONE_TEMPLATE[case]
    plain = seeded(build_module).to(dtype)
    model = get_recast_model(nn.Sequential(copy.deepcopy(plain)), RecastConfig(target_modules=["0"], group_size=1))
    return plain, model, build_input().to(dtype)


@one_template
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recorded", [False, True])
def test_one_template_without_a_task_changes_no_bit(case: str, dtype: torch.dtype, recorded: bool) -> None:
    plain, model, x = one(case, dtype)
    with torch.set_grad_enabled(recorded):
        assert torch.equal(model(x), plain(x))


@one_template
@pytest.mark.parametrize("factor", [-1.0, 0.7])
@pytest.mark.parametrize("recorded", [False, True])
def test_one_template_is_the_weight_times_a_number(case: str, factor: float, recorded: bool) -> None:
    plain, model, x = one(case, torch.float64)
    (layer,) = layers_of(model).values()
    layer.recast_coefficients["default"].data.fill_(factor)
    with torch.set_grad_enabled(recorded):
        actual = model(x)
    expected = torch.func.functional_call(
        plain, {"weight": plain.weight * (1 + layer.recast_coefficients["default"].double()[0, 0])}, (x,)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Touched(TorchDispatchMode):
    """The memory that operations gave tensors of more than a few numbers in."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > 8:
            self.memory.add(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("case", ["linear", "linear, no bias", "linear, many rows", "transposed"])
def test_the_product_of_one_template_takes_the_number_along(case: str) -> None:
    _, model, x = one(case)
    randomise(model)
    with torch.no_grad(), Touched() as touched:
        y = model(x)
    (layer,) = layers_of(model).values()
    assert touched.memory - {t.data_ptr() for t in (x, layer.pretrained_weight)} == {y.data_ptr()}
