"""Gradients of coefficients from products in bfloat16: near the exact ones, and exact where nothing is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Chain, layers_of, randomise, seeded
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft import RecastConfig, RecastConfigError, get_recast_model
from recast_peft.composition import coefficient_gradients
from recast_peft.composition.coefficient_gradients import with_known_sum
from recast_peft.composition.recomposed import call_recomposed

ROWS = 64

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
    case: str, way: str, anchor: str | None, templates: int, dtype: torch.dtype = torch.float64
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
    y = call_recomposed(module, x, anchors[anchor], weights, coefficients, way)
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
def test_bfloat16_products_are_near_the_exact_ones(case: str, anchor: str | None, templates: int) -> None:
    grad_x, exact, _, _ = gradients(case, "exact", anchor, templates, torch.float32)
    own_x, own, _, _ = gradients(case, "bfloat16", anchor, templates, torch.float32)
    torch.testing.assert_close(own_x, grad_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
    assert not torch.equal(own, exact)


def test_in_float64_bfloat16_is_not_asked_for() -> None:
    for own, exact in zip(gradients("linear", "bfloat16", None, 2), gradients("linear", "exact", None, 2), strict=True):
        assert torch.equal(own, exact)


@pytest.mark.parametrize("anchor", ["template", None])
def test_one_template_has_its_exact_gradient(anchor: str | None) -> None:
    for own, exact in zip(gradients("linear", "bfloat16", anchor, 1), gradients("linear", "exact", anchor, 1), strict=True):
        assert torch.equal(own, exact)


def linear_call(x: Tensor, way: str) -> tuple[Tensor, Tensor]:
    module = seeded(lambda: nn.Linear(8, 16)).requires_grad_(False)
    other = torch.randn(16, 8, generator=torch.Generator().manual_seed(4))
    coefficients = torch.tensor([0.0, 0.0], requires_grad=True)
    weight = module.weight.data
    y = call_recomposed(module, x, weight, [weight, other], coefficients, way)
    return y, coefficients


def test_without_a_gradient_of_the_input_and_differentiated_again_it_is_exact() -> None:
    for needs_x, options in ((False, {}), (True, {"create_graph": True})):
        x = torch.randn((ROWS, 8), generator=torch.Generator().manual_seed(5)).requires_grad_(needs_x)
        found = []
        for way in ("exact", "bfloat16"):
            y, coefficients = linear_call(x, way)
            found.append(torch.autograd.grad(y.square().sum(), coefficients, **options)[0])
        assert torch.equal(found[0], found[1]), needs_x


# ---- tasks ----


def chain(coefficient_gradient: str = "exact", adapter: str = "default", **fields: Any) -> PeftModel:
    plain = seeded(lambda: Chain([nn.Linear(8, 8) for _ in range(4)]))
    config = RecastConfig(target_modules=["0", "1", "2", "3"], coefficient_gradient=coefficient_gradient, **fields)
    model = get_recast_model(plain, config, adapter)
    randomise(model, adapter)
    return model


def trained(model: PeftModel, adapter: str = "default") -> Tensor:
    model.zero_grad()
    model(torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(7))).square().sum().backward()
    return torch.cat([layer.recast_coefficients[adapter].grad.flatten() for layer in layers_of(model).values()])


def test_bfloat16_is_near_and_differs() -> None:
    exact, narrow = trained(chain()), trained(chain("bfloat16"))
    assert not torch.equal(exact, narrow)
    torch.testing.assert_close(narrow, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


def test_tasks_that_ask_for_different_gradients_get_exact_ones_together() -> None:
    models = []
    for choice in ("exact", "bfloat16"):
        model = chain(choice, "first")
        model.add_adapter("second", RecastConfig(target_modules=["0", "1", "2", "3"]))
        model.base_model.set_adapter(["first", "second"])
        models.append(trained(model, "first"))
    assert torch.equal(models[0], models[1])


def test_it_is_stored_with_the_task_and_gone_with_it(tmp_path: Any) -> None:
    model = chain("bfloat16", "first")
    model.save_pretrained(tmp_path)
    loaded = RecastConfig.from_pretrained(tmp_path / "first")
    assert loaded.coefficient_gradient == "bfloat16"
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
    with pytest.raises(RecastConfigError, match=r"coefficient_gradient=.*auto.*exact.*bfloat16"):
        RecastConfig(coefficient_gradient=value)


def test_a_task_that_an_earlier_version_trained_on_a_share_of_the_tokens_still_loads(tmp_path: Any) -> None:
    chain("exact").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "coefficient_gradient": 0.25}))
    with pytest.warns(UserWarning, match="a share of the tokens"):
        assert RecastConfig.from_pretrained(tmp_path).coefficient_gradient == "auto"
