"""The tensor mathematics of RECAST alone: no modules, no state.

Notation: a group of layers shares templates T_1..T_n, each shaped like the layers' weight. The weight of layer l is
W_l = sum_i c[l, i] * T_i (paper, section 3.1). Where the templates are the pretrained weights themselves the same weight
is written W_l = anchor_l + sum_i d[l, i] * T_i with the trained offsets d, so that d = 0 gives the anchor to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Terms = tuple[Tensor | None, Sequence[Tensor], Tensor]
"""Anchor, templates and coefficients of a weight."""


def needs_plain_operations() -> bool:
    """Whether only operations that torch itself differentiates may be used: for compilers, tracers, function transforms
    (``torch.func``) and forward-mode autograd.
    """
    is_made_into_graph = torch.compiler.is_compiling() or torch._C._is_tracing()
    return is_made_into_graph or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def composition_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which weights are composed: float32, or float64 as soon as one of ``dtypes`` is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_cast(weight: Tensor) -> bool:
    """Whether autocast would change a tensor's dtype for a product."""
    is_any = weight.dtype == torch.float32 and torch._C._is_any_autocast_enabled()
    return is_any and torch.is_autocast_enabled(weight.device.type)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, a product has the dtype of its factors, whatever autocast is around; also a decorator.

    What is made once and stays, such as templates and fingerprints, would else be another one for who makes it under autocast.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def made_to_stay() -> Iterator[None]:
    """Inside, what is made can be trained, also within ``inference_mode``, and is not rounded by autocast; also a decorator."""
    with torch.inference_mode(False), without_autocast():
        yield


def marked(weight: Tensor) -> Tensor:
    """A composed weight, marked like a pretrained one where no gradient is recorded.

    torch chooses among matrix products by whether the weight requires a gradient, also where none is recorded: only marked so
    does the composed weight give the unconverted model's output to the last bit. Under autocast the product gets a copy that is
    never marked, and of a marked weight autocast would keep that copy until its block ends.
    """
    if torch.is_grad_enabled() or type(weight) is nn.Parameter or needs_plain_operations() or is_cast(weight):
        return weight
    return weight.requires_grad_()


def average_sets(coefficients: Tensor) -> Tensor:
    """Mean over the coefficient sets ``(sets, templates)`` (paper, section 3.1: the mean of K reconstructions of the weight).

    The composition is linear, so this mean, ``(templates,)``, describes the same weight as all the sets do.
    """
    return coefficients.squeeze(0) if coefficients.shape[0] == 1 else coefficients.mean(dim=0)


def compose_weight(
    anchor: Tensor | None, templates: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Compose one weight: ``anchor + sum_i coefficients[i] * templates[i]``.

    Args:
        anchor: the tensor that zero coefficients give, shaped like the weight, or None for zero.
        templates: n tensors shaped like the weight, in any floating dtype.
        coefficients: ``(n,)``.
        dtype: dtype of the result; None means that of the anchor (or of the first template).

    Returns:
        The composed weight. Sums are formed in float32 (float64 if an argument is), whatever the dtype of the weights.
        It is differentiable in ``coefficients``, ``anchor`` and ``templates``; the gradient of coefficient i is the inner
        product of the weight's gradient with template i.

    Raises:
        ValueError: if there is nothing to compose, or the number of coefficients is not the number of templates.
    """
    if coefficients.ndim != 1 or coefficients.shape[0] != len(templates):
        raise ValueError(
            f"one coefficient for each template is needed\n  coefficients: {tuple(coefficients.shape)}\n"
            f"  templates:    {len(templates)}"
        )
    if anchor is None and not templates:
        raise ValueError("nothing to compose: neither an anchor nor a template was given")
    if dtype is None:
        dtype = templates[0].dtype if anchor is None else anchor.dtype
    tensors = templates if anchor is None else [anchor, *templates]
    recorded = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (coefficients, *tensors)])
    if not recorded or needs_plain_operations():  # a compiler forms the inner products by itself
        return _composed(coefficients, dtype, anchor is not None, tensors)
    return _Compose.apply(coefficients, dtype, anchor is not None, *tensors)


def _composed(coefficients: Tensor, dtype: torch.dtype, anchored: bool, tensors: Sequence[Tensor]) -> Tensor:
    """The weight in ``dtype``; of the tensors the first is the anchor if there is one, the others are templates."""
    anchor, templates = (tensors[0], tensors[1:]) if anchored else (None, tensors)
    if not templates:
        return tensors[0].to(dtype, copy=True)
    scale = in_dtype(composition_dtype(coefficients.dtype, *[t.dtype for t in tensors]), coefficients)
    if scale.dtype == dtype or needs_plain_operations():
        return in_dtype(dtype, _weighted_sum(anchor, templates, scale))
    return _weighted_sum(anchor, templates, scale, torch.empty_like(templates[0], dtype=dtype))


def in_dtype(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """A tensor in a dtype; where it is that already, without torch's own look, which takes ten times as long."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def compose_into(out: Tensor, anchor: Tensor | None, templates: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``compose_weight`` into a tensor that is there already; nothing is differentiated, and the bits are the same."""
    work = composition_dtype(coefficients.dtype, *(t.dtype for t in templates))
    return _weighted_sum(anchor, templates, in_dtype(work, coefficients), out)


def _weighted_sum(anchor: Tensor | None, templates: Sequence[Tensor], scale: Tensor, out: Tensor | None = None) -> Tensor:
    """``anchor + sum_i scale[i] * templates[i]``, in the dtype of ``scale`` up to the last step: one operation a template.

    Narrower tensors are widened as they are read, and a narrower ``out`` is rounded to as it is written: an accelerator needs
    no pass of its own for either.
    """
    first = templates[0] if anchor is None else anchor
    # a number without a dimension would be rounded to the dtype of what is narrower
    factors = scale.unbind() if first.dtype == scale.dtype else scale.unsqueeze(0).unbind(1)
    return weighted_sum(anchor, templates, factors, out)


def weighted_sum(
    anchor: Tensor | None, templates: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor | None = None
) -> Tensor:
    """The sum of templates with factors ``(1,)`` in the composition's dtype."""
    # which may give the factors a dimension that the sum has not got yet
    apart = out is None and len(factors) > 1 and needs_plain_operations()
    total, into, last = anchor, out if out is not None and out.dtype == factors[0].dtype else None, len(factors) - 1
    for i, template in enumerate(templates):
        into = out if i == last and out is not None else into
        if total is None:
            total = torch.mul(template, factors[i], out=into)
        else:
            total = torch.addcmul(total, template, factors[i], out=into)
        into = None if apart else total
    assert total is not None
    return total


class _Compose(torch.autograd.Function):
    """The composition with a backward pass that forms inner products instead of weight-sized gradients."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, dtype: torch.dtype, anchored: bool, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, *tensors)
        ctx.anchored = anchored
        return _composed(coefficients, dtype, anchored, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *tensors = ctx.saved_tensors
        grad = grad.to_dense() if grad.is_sparse else grad  # of an embedding that is asked for such gradients
        need_coefficients, _, _, *needed = ctx.needs_input_grad
        templates = tensors[1:] if ctx.anchored else tensors
        grad_coefficients = None
        if need_coefficients:
            grad_coefficients = template_inner_products(grad, templates).to(coefficients.dtype)
        factors: list[Tensor | None] = [*([None] if ctx.anchored else []), *coefficients.unbind()]
        grads = [
            None if not need else (grad if factor is None else grad * factor).to(tensor.dtype)
            for tensor, factor, need in zip(tensors, factors, needed, strict=True)
        ]
        return grad_coefficients, None, None, *grads


def template_inner_products(gradient: Tensor, templates: Sequence[Tensor]) -> Tensor:
    """Inner product of one tensor with each of n templates of its shape: the gradient of the coefficients.

    Returns:
        ``(n,)`` in float32 (float64 if an argument is).
    """
    work = composition_dtype(gradient.dtype, *[t.dtype for t in templates])
    flat = in_dtype(work, gradient).reshape(-1)
    products = [torch.dot(flat, in_dtype(work, template).reshape(-1)) for template in templates]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def mix_by_sample(product: Callable[[Any], Tensor], templates: Sequence[Any], coefficients: Tensor) -> Tensor:
    """Give every sample a weight of its own: ``y_s = sum_i coefficients[s, i] * product(templates[i])[s]``.

    n products serve any number of tasks. It holds for whatever is linear in the weight (linear layers, convolutions).

    Args:
        product: what the layer computes with a given weight, without its bias; samples lie along the first dimension.
        templates: n tensors shaped like the weight, or whatever else ``product`` takes for one.
        coefficients: ``(samples, n)``.

    Returns:
        shaped like the products and in their dtype; the sum is formed in float32 (float64 if an argument is).
    """
    total = None
    for i, template in enumerate(templates):
        part = product(template)
        work = composition_dtype(part.dtype, coefficients.dtype)
        scale = coefficients[:, i].to(work).view(-1, *[1] * (part.ndim - 1))
        total = part * scale if total is None else torch.addcmul(total, part, scale)
    assert total is not None
    return total.to(part.dtype)
