"""The composition is plain arithmetic, and its gradients are those of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recast_peft.composition.compose import average_sets, compose_weight, composition_dtype, template_inner_products

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def draw_tensors(seed: int, count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


class TestComposition:
    @given(st.integers(0, 2**16), st.integers(1, 6), shapes, st.booleans())
    def test_is_the_weighted_sum_of_the_templates(self, seed: int, count: int, shape: tuple[int, ...], anchored: bool) -> None:
        anchor, *templates = draw_tensors(seed, count + 1, shape)
        coefficients = draw_tensors(seed + 1, 1, (count,))[0]
        expected = torch.tensordot(coefficients, torch.stack(templates), dims=1)
        if anchored:
            expected = expected + anchor
        result = compose_weight(anchor if anchored else None, templates, coefficients)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", FLOATS)
    @given(seed=st.integers(0, 2**16), count=st.integers(1, 6), shape=shapes)
    def test_of_zeros_is_the_anchor_to_the_last_bit(
        self, dtype: torch.dtype, seed: int, count: int, shape: tuple[int, ...]
    ) -> None:
        anchor, *templates = draw_tensors(seed, count + 1, shape, dtype)
        result = compose_weight(anchor, templates, torch.zeros(count))
        assert result.dtype == dtype
        assert torch.equal(result, anchor)

    @given(st.integers(0, 2**16), shapes)
    def test_is_linear_in_the_coefficients(self, seed: int, shape: tuple[int, ...]) -> None:
        anchor, *templates = draw_tensors(seed, 4, shape)
        a, b = draw_tensors(seed + 1, 2, (3,))
        together = compose_weight(anchor, templates, a + b)
        one_by_one = compose_weight(compose_weight(anchor, templates, a), templates, b)
        torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounds_low_precision_once_at_the_end(self, dtype: torch.dtype) -> None:
        anchor, *templates = draw_tensors(3, 9, (16, 16), dtype)
        coefficients = torch.randn(8)
        exact = anchor.double() + sum(c * t.double() for c, t in zip(coefficients.double(), templates, strict=True))
        result = compose_weight(anchor, templates, coefficients)
        # one rounding is at most half a unit in the last place; a rounding a template would be several
        unit = torch.finfo(dtype).eps * exact.abs()
        assert ((result.double() - exact).abs() <= 0.5 * unit + 1e-5).all()

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_is_one_operation_a_template(self, dtype: torch.dtype, count: int) -> None:
        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                operations.append(func.overloadpacket)
                return func(*args, **(kwargs or {}))

        operations: list[Any] = []
        anchor, *templates = draw_tensors(0, count + 1, (4, 4), dtype)
        coefficients = torch.randn(count, dtype=composition_dtype(dtype))
        aten = torch.ops.aten
        with Counter():
            compose_weight(anchor, templates, coefficients)
        views = (aten.unbind, aten.unsqueeze, aten.empty_like)
        assert [one for one in operations if one not in views] == [aten.addcmul] * count

    def test_does_not_write_to_its_arguments(self) -> None:
        anchor, *templates = draw_tensors(0, 3, (4, 4), torch.float32)
        before = [t.clone() for t in (anchor, *templates)]
        compose_weight(anchor, [anchor, *templates], torch.ones(3))
        assert all(map(torch.equal, (anchor, *templates), before))

    def test_returns_a_tensor_of_its_own_even_for_zeros(self) -> None:
        anchor = torch.randn(3, 3)
        assert compose_weight(anchor, [anchor], torch.zeros(1)).data_ptr() != anchor.data_ptr()

    @pytest.mark.parametrize("trained", [False, True])
    def test_without_templates_is_a_copy_of_the_anchor(self, trained: bool) -> None:
        anchor = torch.randn(3, 3, requires_grad=trained)
        weight = compose_weight(anchor, [], torch.zeros(0))
        assert torch.equal(weight, anchor)
        assert weight.data_ptr() != anchor.data_ptr()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_gives_the_dtype_that_is_asked_for(self, dtype: torch.dtype) -> None:
        assert compose_weight(None, [torch.ones(2, 2)], torch.ones(1), dtype=dtype).dtype == dtype

    def test_refuses_another_number_of_coefficients_than_templates(self) -> None:
        with pytest.raises(ValueError, match=r"one coefficient for each template(?s:.*)\(3,\)(?s:.*)2"):
            compose_weight(None, [torch.ones(2), torch.ones(2)], torch.ones(3))

    def test_refuses_coefficients_that_are_not_averaged(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 2\)"):
            compose_weight(None, [torch.ones(2), torch.ones(2)], torch.ones(1, 2))

    def test_refuses_to_compose_nothing(self) -> None:
        with pytest.raises(ValueError, match="nothing to compose"):
            compose_weight(None, [], torch.ones(0))


class TestGradients:
    @pytest.mark.parametrize("count", [1, 2, 5])
    @pytest.mark.parametrize("anchored", [True, False])
    def test_are_those_of_autograd(self, count: int, anchored: bool) -> None:
        anchor, *templates = draw_tensors(5, count + 1, (3, 2))
        inputs = [t.requires_grad_() for t in (torch.randn(count, dtype=torch.float64), anchor, *templates)]

        def compose(coefficients: Tensor, anchor: Tensor, *templates: Tensor) -> Tensor:
            return compose_weight(anchor if anchored else None, templates, coefficients)

        assert torch.autograd.gradcheck(compose, inputs)
        assert torch.autograd.gradgradcheck(compose, inputs)

    def test_are_those_of_autograd_where_the_anchor_is_a_template(self) -> None:
        first, second = (t.requires_grad_() for t in draw_tensors(5, 2, (3, 2)))
        coefficients = torch.randn(3, dtype=torch.float64, requires_grad=True)

        def compose(coefficients: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return compose_weight(first, [second, first, second], coefficients)

        expected = first + coefficients[0] * second + coefficients[1] * first + coefficients[2] * second
        torch.testing.assert_close(compose(coefficients, first, second), expected)
        assert torch.autograd.gradcheck(compose, (coefficients, first, second))
        assert torch.autograd.gradgradcheck(compose, (coefficients, first, second))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_of_coefficients_are_inner_products_in_float32(self, dtype: torch.dtype) -> None:
        anchor, *templates = draw_tensors(6, 4, (32, 32), dtype)
        upstream = draw_tensors(7, 1, (32, 32), dtype)[0]
        coefficients = torch.zeros(3, requires_grad=True)
        compose_weight(anchor, templates, coefficients).backward(upstream)
        expected = torch.stack([(upstream.double() * t.double()).sum() for t in templates])
        assert coefficients.grad is not None
        assert coefficients.grad.dtype == torch.float32
        torch.testing.assert_close(coefficients.grad.double(), expected, rtol=1e-4, atol=1e-4)

    def test_reach_templates_only_where_they_are_asked_for(self) -> None:
        first, second = torch.randn(2, 2), torch.randn(2, 2, requires_grad=True)
        compose_weight(None, [first, second], torch.tensor([2.0, 3.0])).sum().backward()
        assert first.grad is None
        assert torch.equal(second.grad, torch.full((2, 2), 3.0))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16,), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
    ],
)
def test_composition_is_float32_unless_something_is_float64(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    assert composition_dtype(*dtypes) == expected


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 5))
def test_many_sets_describe_what_their_mean_does(seed: int, sets: int, count: int) -> None:
    templates = draw_tensors(seed, count, (3, 3))
    coefficients = draw_tensors(seed + 1, 1, (sets, count))[0]
    averaged = compose_weight(None, templates, average_sets(coefficients))
    mean_of_weights = torch.stack([compose_weight(None, templates, row) for row in coefficients]).mean(dim=0)
    torch.testing.assert_close(averaged, mean_of_weights, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**16), st.integers(1, 5), shapes)
def test_inner_products_are_sums_of_products(seed: int, count: int, shape: tuple[int, ...]) -> None:
    gradient, *templates = draw_tensors(seed, count + 1, shape)
    expected = torch.stack([(gradient * t).sum() for t in templates])
    torch.testing.assert_close(template_inner_products(gradient, templates), expected, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_of_an_embedding_give_those_of_dense_ones() -> None:
    *templates, like = draw_tensors(3, 4, (6, 3))
    words = torch.tensor([1, 4, 4])
    found = []
    for sparse in (True, False):
        coefficients = torch.tensor([0.1, -0.2], dtype=like.dtype, requires_grad=True)
        anchor = templates[0].clone().requires_grad_()
        weight = compose_weight(anchor, templates[1:], coefficients)
        (F.embedding(words, weight, sparse=sparse) * like[:3]).sum().backward()
        assert coefficients.grad is not None
        assert anchor.grad is not None
        found.append((coefficients.grad, anchor.grad))
    torch.testing.assert_close(found[0], found[1])
