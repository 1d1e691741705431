"""Linear layers and convolutions whose weight is composed in the forward pass and again in the backward pass.

An ordinary call keeps the composed weight for the gradient of its input: one tensor of the weight's size for every layer until
the backward pass reaches it. Here the input, the few coefficients and references to the templates are kept. Two tensors of the
weight's size, or as many of the input's, live for a moment in the backward pass, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..placement.sharded import SHARD, whole
from .coefficient_gradients import AUTO, EXACT, is_faster_in_bfloat16, with_known_sum
from .compose import (
    compose_weight,
    composition_dtype,
    in_dtype,
    is_cast,
    marked,
    needs_plain_operations,
    template_inner_products,
)
from .kinds import Gradients, LayerKind, bias_of, kind_of

_PLAIN = (Tensor, nn.Parameter)

SMALL_INPUT = 1.5  # times the weight's numbers; up to there two products by template are the cheaper way, measured on a CPU


def can_recompose(module: nn.Module, x: Any, anchor: Tensor | None, templates: Sequence[Tensor], coefficients: Tensor) -> bool:
    """Whether a call can compose its weight again in the backward pass, and has anything to gain from it.

    A compiler decides by itself what it computes again. Templates that are trained themselves, tensors of other classes, and
    convolutions that pad or unsqueeze before they convolve take the ordinary call.
    """
    if not torch.is_grad_enabled() or needs_plain_operations():
        return False
    kind = kind_of(module)
    if kind is None or kind.gradients is None or x.is_nested:
        return False
    weights = templates if anchor is None else [anchor, *templates]
    if type(x) not in _PLAIN or any([type(weight) not in _PLAIN or weight.requires_grad for weight in weights]):
        return False
    return kind.gradients.fits(module, x) and (x.requires_grad or coefficients.requires_grad)


def product_of_one(
    module: nn.Module, x: Tensor, anchor: Tensor | None, templates: Sequence[Tensor], coefficients: Tensor
) -> Tensor | None:
    """What a module computes where its weight is its only template, times a number; zero coefficients change no bit.

    A linear layer's product on a CPU takes the number along at no cost. Others get a scaled input, where that is smaller than
    the weight.

    Returns:
        the module's output, without gradients; None where composing the weight is the better way, or the only one.
    """
    if x.is_nested or anchor is None or len(templates) != 1 or templates[0] is not anchor:
        return None
    kind = kind_of(module)
    assert kind is not None
    assert kind.call is not None
    if kind.call_scaled is not None and _takes_a_number(x, anchor):
        return kind.call_scaled(module, anchor.detach(), x, 1 + float(coefficients))
    if x.numel() >= anchor.numel():
        return None
    scaled = compose_weight(x, [x], coefficients)
    if scaled.stride() != x.stride():  # another product would do it
        return None
    return kind.call(module, marked(anchor.detach()), scaled)


def _takes_a_number(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with a number is the very operation that torch chooses for one without; an accelerator would wait."""
    is_plain = type(x) in _PLAIN and type(weight) in _PLAIN and x.dtype == weight.dtype and x.dtype.itemsize >= 4
    return is_plain and x.device.type == "cpu" and x.is_contiguous() and not (needs_plain_operations() or is_cast(weight))


def call_recomposed(
    module: nn.Module,
    x: Tensor,
    anchor: Tensor | None,
    templates: Sequence[Tensor],
    coefficients: Tensor,
    way: str = EXACT,
) -> Tensor:
    """What a module, for which ``can_recompose`` holds, computes with ``anchor + sum_i coefficients[i] * templates[i]``.

    ``way`` is how the gradient of the coefficients is formed, as ``RecastConfig.coefficient_gradient`` says. The output is
    differentiable in the input, the coefficients and the module's bias.
    """
    # as the product sees it: what is kept has half the size under autocast
    x = _cast_for_autocast(x)
    # a copy: another task may be written into the coefficients before the backward pass comes
    coefficients = coefficients.clone()
    kind, bias = kind_of(module), bias_of(module)
    others = [weight for weight in templates if weight is not anchor]
    # what was gathered from other processes is gathered again in the backward pass, as sharded models do with their weights
    shards = [getattr(weight, SHARD, None) for weight in others]
    weights = [weight.detach() for weight in others]
    # which of the templates is the anchor itself: nothing is kept twice
    places = [place for place, template in enumerate(templates) if template is anchor]
    anchor = None if anchor is None else anchor.detach()
    return _Recomposed.apply(module, kind, places, way, shards, x, bias, coefficients, anchor, *weights)


class _Recomposed(torch.autograd.Function):
    """The call and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        kind: LayerKind,
        places: list[int],
        way: str,
        shards: list[Tensor | None],
        x: Tensor,
        bias: Tensor | None,
        coefficients: Tensor,
        anchor: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.module, ctx.kind, ctx.places, ctx.way, ctx.shards, ctx.x_shape = module, kind, places, way, shards, x.shape
        kept = [weight if shard is None else None for weight, shard in zip(weights, shards, strict=True)]
        ctx.save_for_backward(x if ctx.needs_input_grad[7] else None, coefficients, anchor, *kept)
        terms = _templates(anchor, weights, places)
        y = product_of_one(module, x, anchor, terms, coefficients)
        if y is None:
            assert kind.call is not None
            weight = compose_weight(anchor, terms, coefficients)
            y = kind.call(module, weight if is_cast(weight) else weight.requires_grad_(), x)  # see ``marked``
        # a product over several dimensions may come as a view of the one over two, which nobody could then change in place
        return y.data if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, coefficients, anchor, *kept = ctx.saved_tensors
        weights = [weight if shard is None else whole(shard).detach() for weight, shard in zip(kept, ctx.shards, strict=True)]
        templates = _templates(anchor, weights, ctx.places)
        needs_x, needs_bias, needs_coefficients = ctx.needs_input_grad[5:8]
        grad_bias = None
        if needs_bias:
            channels = ctx.kind.channels % grad.ndim
            grad_bias = grad.sum([d for d in range(grad.ndim) if d != channels]).to(ctx.module.bias.dtype)
        layer = _Layer(ctx.module, ctx.kind.gradients, ctx.kind.channels, templates, coefficients, anchor, ctx.places)
        if not torch.is_grad_enabled():  # an estimate is not differentiated again
            layer.way = ctx.way
        rows = _rows_with_gradient(ctx.kind.gradients, grad)
        if rows is None:
            grad_x, grad_coefficients = layer.gradients(grad, x, ctx.x_shape, needs_x, needs_coefficients)
        else:
            few = None if x is None else x.reshape(-1, ctx.x_shape[-1])[rows]
            shape = torch.Size((len(rows), ctx.x_shape[-1]))
            part = grad.reshape(-1, grad.shape[-1])[rows]
            grad_x, grad_coefficients = layer.gradients(part, few, shape, needs_x, needs_coefficients)
            if grad_x is not None:
                grad_x = grad_x.new_zeros(ctx.x_shape.numel() // shape[1], shape[1]).index_copy_(0, rows, grad_x)
                grad_x = grad_x.view(ctx.x_shape)
        if grad_coefficients is not None:
            grad_coefficients = in_dtype(coefficients.dtype, grad_coefficients)
        return None, None, None, None, None, grad_x, grad_bias, grad_coefficients, None, *[None] * len(weights)


@dataclass
class _Layer:
    """A layer in its backward pass: y is linear in the weight, and the weight is ``anchor + sum_i coefficients[i] T_i``."""

    module: nn.Module
    rules: Gradients
    channels: int  # the dimension of the output's features
    templates: list[Tensor]
    coefficients: Tensor
    anchor: Tensor | None
    places: Sequence[int]  # of the anchor among the templates
    way: str = EXACT

    def gradients(
        self, grad: Tensor, x: Tensor | None, x_shape: torch.Size, needs_x: bool, needs_coefficients: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the input and of the coefficients, where they are needed."""
        if needs_x and needs_coefficients and x is not None:
            if self._can_estimate(grad, x):
                return self._estimated(grad, x)
            if self._product_by_template(grad, x):
                return self._by_template(grad, x)
        grad_x = self._of_input(grad, x_shape) if needs_x else None
        if not needs_coefficients or x is None:
            return grad_x, None
        grad_weight = self.rules.of_weight(self.module, grad, x, self.templates[0].shape)
        return grad_x, template_inner_products(grad_weight, self.templates)

    def _of_input(self, grad: Tensor, shape: torch.Size) -> Tensor:
        weight = compose_weight(self.anchor, self.templates, self.coefficients, grad.dtype)
        return self.rules.of_input(self.module, grad, weight, shape)

    def _can_estimate(self, grad: Tensor, x: Tensor) -> bool:
        """Whether the estimate that is asked for saves anything: one template needs no product of its own."""
        if self.way == EXACT or (len(self.templates) == 1 and (self.anchor is None or bool(self.places))):
            return False
        return grad.dtype == x.dtype == torch.float32 and (self.way != AUTO or self._is_faster(grad))

    def _is_faster(self, grad: Tensor) -> bool:
        weight = self.templates[0]
        if getattr(self.module, "groups", 1) != 1:
            return False
        rows = grad.numel() // grad.shape[self.channels]
        return is_faster_in_bfloat16(grad.device, rows, rows * weight.numel())

    def _estimated(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The exact gradient of the input, and an estimate of the coefficients' that agrees with it."""
        grad_x = self._of_input(grad, x.shape)
        total = template_inner_products(grad_x, [x])[0]
        terms, factors = list(self.templates), self._factors()
        if self.anchor is not None and not self.places:
            terms, factors = [*terms, self.anchor], torch.cat([factors, torch.ones_like(factors[:1])])
        grad_weight = self.rules.of_weight(self.module, grad.bfloat16(), x.bfloat16(), self.templates[0].shape)
        found = with_known_sum(template_inner_products(grad_weight, terms), factors, total)
        return grad_x, found[: len(self.templates)]

    def _factors(self) -> Tensor:
        """What every template is multiplied by in the composed weight, ``(n,)``."""
        scale = self.coefficients.to(composition_dtype(self.coefficients.dtype, *(t.dtype for t in self.templates)))
        if not self.places:
            return scale
        if len(self.places) == len(self.templates):
            return scale + 1
        scale = scale.clone()
        for place in self.places:  # one by one: a list of places would be a tensor that an accelerator has to wait for
            scale[place].add_(1)
        return scale

    def _product_by_template(self, grad: Tensor, x: Tensor) -> bool:
        """Whether the weight is a sum of so few templates that a product with each gives both gradients at less cost.

        With u_i the gradient of the input as template i alone gives it, that of the input is the sum of c_i u_i and that of
        c_i is <u_i, x>. One template needs one product instead of two; where an accelerator multiplies in less than 32 bits,
        that product costs less than reading a large input once more in 32 bits. Two need two, but neither a composed weight
        nor a gradient of the weight's size; that pays on a CPU, in linear layers with inputs no larger than the weight, and
        sums in less than 32 bits are left to the composition.
        """
        if self.anchor is not None and not self.places:
            return False
        small = x.numel() <= SMALL_INPUT * self.templates[0].numel()
        on_cpu, is_wide = grad.device.type == "cpu", grad.dtype.itemsize >= 4
        if len(self.templates) == 1:
            return on_cpu or is_wide or small
        return len(self.templates) == 2 and small and self.rules.by_row and is_wide and on_cpu

    def _by_template(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self._factors()
        total, inner = None, []
        for i, template in enumerate(self.templates):
            part = self.rules.of_input(self.module, grad, in_dtype(grad.dtype, template), x.shape)
            inner.append(template_inner_products(part, [x]))
            total = part * scale[i] if total is None else total.addcmul_(part, scale[i])
            del part
        assert total is not None
        return total, inner[0] if len(inner) == 1 else torch.cat(inner)


def _rows_with_gradient(rules: Gradients, grad: Tensor) -> Tensor | None:
    """Which rows of a linear layer's input have a gradient, if it is so few that it pays to leave the others out.

    A class token that alone reaches the head leaves all other tokens of the last block without one, and so do padded
    sequences. A glance at one column tells at next to no cost that there is nothing to gain. On an accelerator the host
    would have to wait for the answer; and a gradient that is differentiated again needs every row.
    """
    if not rules.by_row or grad.device.type != "cpu" or torch.is_grad_enabled():
        return None
    flat = grad.reshape(-1, grad.shape[-1])
    limit = len(flat) // 2
    if int(flat[:, 0].count_nonzero()) > limit:
        return None
    rows = flat.any(dim=1).nonzero().squeeze(1)
    return rows if len(rows) <= limit else None


def _templates(anchor: Tensor | None, weights: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    templates = list(weights)
    for place in places:
        assert anchor is not None
        templates.insert(place, anchor)
    return templates


def _cast_for_autocast(x: Tensor) -> Tensor:
    is_cast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if not is_cast or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
