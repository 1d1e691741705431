"""Cheaper gradients of coefficients: unbiased, in agreement with the input's gradient, and exact where nothing is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Chain, layers_of, randomise, seeded
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from recast_peft import RecastConfig, RecastConfigError, get_recast_model
from recast_peft.composition import coefficient_gradients
from recast_peft.composition.coefficient_gradients import GOLDEN, Estimate, draw_rows, estimate_of, with_known_sum
from recast_peft.composition.kinds import LINEAR, kind_of
from recast_peft.composition.recomposed import call_recomposed

ROWS = 64
QUARTERS = [0.125, 0.375, 0.625, 0.875]  # with equal chances of 1/4 each row is drawn at exactly one of these starts


# ---- the draw ----


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1, 20), min_size=3, max_size=30),
    st.integers(1, 8),
)
def test_every_row_stands_for_itself_in_the_mean_over_starts(importance: list[float], count: int) -> None:
    values = torch.tensor(importance, dtype=torch.float64)
    count = min(count, len(importance) - 1)
    starts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    mean, largest = torch.zeros_like(values), torch.ones_like(values)
    for start in starts.tolist():
        rows, weights = draw_rows(values, count, start)
        assert rows.shape == weights.shape == (count,)
        mean.index_add_(0, rows, weights / len(starts))
        largest[rows] = torch.maximum(largest[rows], weights)
    # a row is hit by an interval of starts, whose length the grid knows to one step at either end
    assert ((mean - 1).abs() <= 2.1 * largest / len(starts)).all()


def test_rows_of_most_importance_are_certain_and_count_once() -> None:
    importance = torch.tensor([1.0, 1.0, 100.0, 1.0, 1.0, 50.0])
    for start in QUARTERS:
        rows, weights = draw_rows(importance, 4, start)
        assert rows.tolist() == sorted(set(rows.tolist()))
        found = dict(zip(rows.tolist(), weights.tolist(), strict=True))
        assert found[2] == found[5] == 1
        assert all(found[row] == pytest.approx(2) for row in found if row not in (2, 5))


def test_rows_without_importance_are_never_drawn() -> None:
    rows, weights = draw_rows(torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0]), 3, 0.4)
    assert {row for row, weight in zip(rows.tolist(), weights.tolist(), strict=True) if weight} == {1, 3}
    assert weights.sum() == 2
    _, none = draw_rows(torch.zeros(5), 3, 0.4)
    assert none.tolist() == [0, 0, 0]


def test_successive_starts_are_spread_and_differ_by_layer() -> None:
    starts = [estimate_of(0.25, 0.3, call).start for call in range(21)]  # type: ignore[union-attr]
    assert starts[0] == 0.3
    gaps = torch.tensor(sorted(starts)).diff()
    assert gaps.max() < 3 / 21
    assert starts[1] == pytest.approx((0.3 + GOLDEN) % 1)
    assert estimate_of("exact", 0.3, 1) is None
    assert estimate_of("bfloat16", 0.3, 1) == Estimate(None)


# ---- what is known exactly ----


def test_the_nearest_numbers_with_a_known_sum() -> None:
    factors = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    estimates = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)  # the sum is 6
    # 9 more are needed; the factors' square is 9, so once the factors themselves
    assert with_known_sum(estimates, factors, torch.tensor(15.0, dtype=torch.float64)).tolist() == [5.0, 3.0, 2.0]
    assert torch.equal(with_known_sum(estimates, factors, torch.tensor(6.0, dtype=torch.float64)), estimates)
    assert torch.equal(with_known_sum(estimates, 0 * factors, torch.tensor(0.0, dtype=torch.float64)), estimates)


# ---- gradients of a layer ----

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (4, ROWS // 4, 4), (4, ROWS // 4, 6)),
    "transposed": (lambda: Conv1D(6, 4), (4, ROWS // 4, 4), (4, ROWS // 4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (ROWS, 2, 4, 4), (ROWS, 3, 2, 2)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2), (ROWS, 2, 4), (ROWS, 3, 2)),
}


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers; in float64 their signs alone, so that all rows have one norm."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values.sign() if dtype == torch.float64 else values


def gradients(
    case: str, estimate: Estimate | None, anchor: str | None, templates: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input and coefficients, the input, and what the templates are multiplied by."""
    make, shape, out = CASES[case]
    module = seeded(make).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    weight = module.weight.data
    weights = [weight, *(draw(weight.shape) for _ in range(templates - 1))]
    anchors = {"template": weight, "other": draw(weight.shape), None: None}
    coefficients = draw(templates).requires_grad_()
    x = drawn(shape, 2, dtype).requires_grad_()
    y = call_recomposed(module, kind_of(module).call, x, anchors[anchor], weights, coefficients, estimate)
    found = torch.autograd.grad((y * drawn(out, 3, dtype)).sum(), [x, coefficients])
    own = torch.zeros(templates, dtype=dtype)
    own[0] = anchor == "template"
    return (*found, x.detach(), coefficients.detach() + own)


estimated_cases = pytest.mark.parametrize(
    ("case", "anchor", "templates"),
    [
        *((case, anchor, 2) for case in CASES for anchor in ("template", None)),
        ("linear", "other", 1),
        ("linear", "other", 3),
        ("linear", "template", 3),
        ("conv2d", None, 3),
    ],
)


@estimated_cases
def test_estimates_from_drawn_rows_have_the_exact_gradient_for_their_mean(
    case: str, anchor: str | None, templates: int
) -> None:
    grad_x, exact, x, factors = gradients(case, None, anchor, templates)
    found = []
    for start in QUARTERS:
        own_x, own, _, _ = gradients(case, Estimate(0.25, start), anchor, templates)
        torch.testing.assert_close(own_x, grad_x, rtol=1e-12, atol=1e-12)
        found.append(own)
        if anchor != "other":  # the coefficients' part along themselves is known from the gradient of the input
            torch.testing.assert_close(torch.dot(own, factors), (x * grad_x).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(found).mean(0), exact, rtol=1e-11, atol=1e-11)
    assert any((own - exact).abs().max() > 1e-3 * exact.abs().max() for own in found)


@estimated_cases
def test_bfloat16_products_are_near_the_exact_ones(case: str, anchor: str | None, templates: int) -> None:
    grad_x, exact, _, _ = gradients(case, None, anchor, templates, torch.float32)
    own_x, own, _, _ = gradients(case, Estimate(None), anchor, templates, torch.float32)
    torch.testing.assert_close(own_x, grad_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
    assert not torch.equal(own, exact)


def test_in_float64_bfloat16_is_not_asked_for() -> None:
    for own, exact in zip(gradients("linear", Estimate(None), None, 2), gradients("linear", None, None, 2), strict=True):
        assert torch.equal(own, exact)


@pytest.mark.parametrize("anchor", ["template", None])
def test_one_template_has_its_exact_gradient(anchor: str | None) -> None:
    for own, exact in zip(
        gradients("linear", Estimate(0.25, 0.1), anchor, 1), gradients("linear", None, anchor, 1), strict=True
    ):
        assert torch.equal(own, exact)


def linear_call(x: Tensor, estimate: Estimate | None) -> tuple[Tensor, Tensor]:
    module = seeded(lambda: nn.Linear(8, 16)).requires_grad_(False)
    other = torch.randn(16, 8, generator=torch.Generator().manual_seed(4))
    coefficients = torch.tensor([0.0, 0.0], requires_grad=True)
    weight = module.weight.data
    y = call_recomposed(module, LINEAR.call, x, weight, [weight, other], coefficients, estimate)
    return y, coefficients


def test_a_fresh_tasks_own_template_has_its_exact_gradient() -> None:
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    found = []
    for estimate in (None, Estimate(0.25, 0.3)):
        y, coefficients = linear_call(x, estimate)
        y.square().sum().backward()
        found.append(coefficients.grad)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    assert (found[0][1] - found[1][1]).abs() > 1e-3


def test_products_of_the_backward_pass() -> None:
    product = 2 * ROWS * 8 * 16
    for estimate, expected in ((None, 2 * product), (Estimate(0.25, 0.3), product + product // 4)):
        y, _ = linear_call(torch.randn(ROWS, 8, requires_grad=True), estimate)
        with FlopCounterMode(display=False) as counter:
            y.square().sum().backward()
        assert counter.get_total_flops() == expected


@pytest.mark.parametrize("estimate", [Estimate(0.25, 0.3), Estimate(None)])
def test_few_rows_an_input_without_gradient_and_a_second_differentiation_are_exact(estimate: Estimate) -> None:
    exact_calls: dict[str, tuple[tuple[int, ...], bool, dict[str, Any]]] = {
        "no gradient of the input": ((ROWS, 8), False, {}),
        "differentiated again": ((ROWS, 8), True, {"create_graph": True}),
    }
    if estimate.share is not None:
        exact_calls["few rows"] = ((5, 8), True, {})
    for name, (shape, needs_x, options) in exact_calls.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_(needs_x)
        found = []
        for each in (None, estimate):
            y, coefficients = linear_call(x, each)
            found.append(torch.autograd.grad(y.square().sum(), coefficients, **options)[0])
        assert torch.equal(found[0], found[1]), name


# ---- tasks ----


def chain(coefficient_gradient: str | float = "exact", adapter: str = "default", **fields: Any) -> PeftModel:
    plain = seeded(lambda: Chain([nn.Linear(8, 8) for _ in range(4)]))
    config = RecastConfig(target_modules=["0", "1", "2", "3"], coefficient_gradient=coefficient_gradient, **fields)
    model = get_recast_model(plain, config, adapter)
    randomise(model, adapter)
    return model


def trained(model: PeftModel, adapter: str = "default") -> Tensor:
    model.zero_grad()
    model(torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(7))).square().sum().backward()
    return torch.cat([layer.recast_coefficients[adapter].grad.flatten() for layer in layers_of(model).values()])


def test_a_task_is_trained_by_estimates_whose_mean_over_steps_is_its_gradient() -> None:
    exact, model = trained(chain()), chain(0.5)
    steps = torch.stack([trained(model) for _ in range(200)])
    assert (steps[0] - steps[1]).abs().max() > 1e-3 * exact.abs().max()
    # the error of a mean of evenly spread starts falls faster than the root of their number
    single = (steps - exact).norm(dim=1).mean()
    assert (steps.mean(0) - exact).norm() < 0.1 * single
    # the first layer's input has no gradient: its estimate would save nothing
    torch.testing.assert_close(steps[0][:2], exact[:2], rtol=1e-4, atol=1e-4)


def test_the_same_training_gives_the_same_numbers() -> None:
    for first, second in zip([trained(m) for m in (chain(0.5), chain(0.5))], [trained(chain(0.5))] * 2, strict=True):
        assert torch.equal(first, second)


def test_bfloat16_is_near_and_differs() -> None:
    exact, narrow = trained(chain()), trained(chain("bfloat16"))
    assert not torch.equal(exact, narrow)
    torch.testing.assert_close(narrow, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


def test_tasks_that_ask_for_different_gradients_get_exact_ones_together() -> None:
    models = []
    for choice in ("exact", 0.5):
        model = chain(choice, "first")
        model.add_adapter("second", RecastConfig(target_modules=["0", "1", "2", "3"]))
        model.base_model.set_adapter(["first", "second"])
        models.append(trained(model, "first"))
    assert torch.equal(models[0], models[1])


def test_it_is_stored_with_the_task_and_gone_with_it(tmp_path: Any) -> None:
    model = chain(0.25, "first")
    model.save_pretrained(tmp_path)
    loaded = RecastConfig.from_pretrained(tmp_path / "first")
    assert loaded.coefficient_gradient == 0.25
    model.add_adapter("second", RecastConfig(target_modules=["0", "1", "2", "3"]))
    model.delete_adapter("first")
    assert all(layer.coefficient_gradients == {"second": "auto"} for layer in layers_of(model).values())


class TestAuto:
    """The default: products in bfloat16 for large layers in float32 on a processor that has them, else exact ones."""

    @pytest.mark.parametrize(
        ("device", "has_products", "rows", "multiplications", "expected"),
        [
            ("cpu", True, 128, 16_000_000, True),
            ("cpu", True, 127, 16_000_000, False),
            ("cpu", True, 128, 15_999_999, False),
            ("cpu", False, 4096, 10**9, False),
            ("cuda", True, 4096, 10**9, False),
        ],
    )
    def test_where_it_is_faster(
        self, device: str, has_products: bool, rows: int, multiplications: int, expected: bool, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(coefficient_gradients, "processor_multiplies_bfloat16", lambda: has_products)
        assert coefficient_gradients.is_faster_in_bfloat16(torch.device(device), rows, multiplications) is expected

    def test_it_is_the_default_and_small_layers_are_exact(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(coefficient_gradients, "processor_multiplies_bfloat16", lambda: True)
        assert RecastConfig().coefficient_gradient == "auto"
        assert torch.equal(trained(chain("auto")), trained(chain("exact")))

    @pytest.mark.parametrize(
        ("module", "shape", "multiplications"),
        [
            (lambda: nn.Linear(6, 5), (4, 8, 6), 4 * 8 * 6 * 5),
            (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 2 * 4 * 4 * 6 * 4 * 9),
        ],
    )
    def test_it_counts_what_the_product_multiplies(
        self, module: Any, shape: tuple[int, ...], multiplications: int, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(coefficient_gradients, "processor_multiplies_bfloat16", lambda: True)
        monkeypatch.setattr(coefficient_gradients, "FASTER_ROWS", 1)
        found = {}
        for name, way, limit in (
            ("exact", "exact", 1),
            ("bfloat16", "bfloat16", 1),
            ("from here on", "auto", multiplications),
            ("below", "auto", multiplications + 1),
        ):
            monkeypatch.setattr(coefficient_gradients, "FASTER_MULTIPLICATIONS", limit)
            plain = seeded(lambda: Chain([module(), module()]))
            model = get_recast_model(plain, RecastConfig(target_modules=["0", "1"], coefficient_gradient=way))
            randomise(model)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
            layer = next(iter(layers_of(model).values()))
            layer(x).square().sum().backward()
            found[name] = layer.recast_coefficients["default"].grad
        assert not torch.equal(found["exact"], found["bfloat16"])
        assert torch.equal(found["from here on"], found["bfloat16"])
        assert torch.equal(found["below"], found["exact"])

    def test_grouped_convolutions_and_float64_are_exact(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(coefficient_gradients, "processor_multiplies_bfloat16", lambda: True)
        monkeypatch.setattr(coefficient_gradients, "FASTER_ROWS", 1)
        monkeypatch.setattr(coefficient_gradients, "FASTER_MULTIPLICATIONS", 1)
        for module, shape, dtype in (
            (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6), torch.float32),
            (lambda: nn.Linear(6, 5), (32, 6), torch.float64),
        ):
            gradients_by_way = []
            for way in ("exact", "auto"):
                plain = seeded(lambda module=module: Chain([module(), module()])).to(dtype)
                model = get_recast_model(plain, RecastConfig(target_modules=["0", "1"], coefficient_gradient=way))
                randomise(model)
                x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype, requires_grad=True)
                layer = next(iter(layers_of(model).values()))
                layer(x).square().sum().backward()
                gradients_by_way.append(layer.recast_coefficients["default"].grad)
            assert torch.equal(*gradients_by_way)


@pytest.mark.parametrize("value", ["half", 0.0, 1.0, 1, -0.5, float("nan"), True, None])
def test_what_is_no_way_to_form_a_gradient_is_refused(value: Any) -> None:
    with pytest.raises(
        RecastConfigError, match=r"coefficient_gradient=.*'auto', 'exact', 'bfloat16', or a share above 0 and below 1"
    ):
        RecastConfig(coefficient_gradient=value)
