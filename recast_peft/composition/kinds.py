"""Kinds of modules: how each computes with a weight, where its bias lies, and all else that depends on the kind.

This is the one place that lists them. A kind is one row in ``KINDS``; whoever needs to know something about a module asks
``kind_of`` (the module computes exactly as the kind does) or ``family_of`` (its weight lies as the kind's does, whatever the
module does with it). A module of no kind can still be a target: it is called as it is, with its weight exchanged for the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .quantised import quantised_by

# ---------------------------------------------------------------- products with a given weight


def bias_of(module: Any) -> Tensor | None:
    """``module.bias``; torch's own look-up of a parameter takes ten times as long."""
    held = module._parameters
    return held["bias"] if "bias" in held and "bias" not in module.__dict__ else module.bias


def _linear(module: nn.Module, weight: Tensor, x: Tensor, bias: bool = True) -> Tensor:
    return F.linear(x, weight, bias_of(module) if bias else None)


def _quantised_linear(module: nn.Module, weight: Tensor, x: Tensor, bias: bool = True) -> Tensor:
    held = module.bias if bias else None  # it may be in half precision where inputs are not
    return F.linear(x, weight.to(x.dtype), None if held is None else held.to(x.dtype))  # type: ignore[arg-type]


def _linear_into(module: nn.Module, weight: Tensor, x: Tensor, out: Tensor) -> None:
    rows, product = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if module.bias is None:
        torch.mm(rows, weight.T, out=product)
    else:
        torch.addmm(module.bias, rows, weight.T, out=product)  # type: ignore[arg-type]


def _scaled_linear(module: nn.Module, weight: Tensor, x: Tensor, factor: float) -> Tensor:
    return _scaled_product(module, weight.T, x, factor)


def _scaled_product(module: nn.Module, matrix: Tensor, x: Tensor, factor: float) -> Tensor:
    rows, bias = x.reshape(-1, x.shape[-1]), bias_of(module)
    none = x.new_empty(1) if bias is None else bias  # not read at a beta of zero
    product = torch.addmm(none, rows, matrix, beta=0 if bias is None else 1, alpha=factor)
    return product.view((*x.shape[:-1], matrix.shape[1]))


def _transposed_linear(module: nn.Module, weight: Tensor, x: Tensor, bias: bool = True) -> Tensor:
    flat = x.view(-1, x.shape[-1])
    product = torch.addmm(module.bias, flat, weight) if bias else flat @ weight  # type: ignore[arg-type]
    return product.view((*x.shape[:-1], weight.shape[1]))


CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight


def _convolution(module: nn.Module, weight: Tensor, x: Tensor, bias: bool = True) -> Tensor:
    return module._conv_forward(x, weight, module.bias if bias else None)  # type: ignore[operator]


# ---------------------------------------------------------------- gradients of these products


class Gradients(ABC):
    """Gradients of a product by its input and by its weight."""

    by_row = True  # whether every position along the leading dimensions is computed alone

    def fits(self, module: Any, x: Tensor) -> bool:
        """Whether the rules hold for this module and input."""
        return True

    @abstractmethod
    def of_input(self, module: Any, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of the given shape."""

    @abstractmethod
    def of_weight(self, module: Any, grad: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        """The gradient of the weight."""


class _LinearGradients(Gradients):
    """Of ``y = x W^T``; x ``(..., in)``, W ``(out, in)``."""

    def of_input(self, module: Any, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return grad @ weight

    def of_weight(self, module: Any, grad: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


class _TransposedLinearGradients(Gradients):
    """Of ``y = x W``; x ``(..., in)``, W ``(in, out)``."""

    def of_input(self, module: Any, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return grad @ weight.T

    def of_weight(self, module: Any, grad: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        return x.reshape(-1, x.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])


class _ConvolutionGradients(Gradients):
    """Of a convolution of samples in a batch, padded with zeros, of any number of dimensions."""

    by_row = False

    def fits(self, module: Any, x: Tensor) -> bool:
        is_batch = x.ndim == len(module.kernel_size) + 2
        return is_batch and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def of_input(self, module: Any, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        x = grad.new_empty(1).expand(shape)  # only its shape counts
        return _convolution_backward(module, grad, x, weight, (True, False, False))[0]

    def of_weight(self, module: Any, grad: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
        weight = grad.new_empty(1).expand(weight_shape)  # only its shape counts
        return _convolution_backward(module, grad, x, weight, (False, True, False))[1]


def _convolution_backward(module: Any, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> Any:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, module.stride, module.padding, module.dilation, False, module.output_padding, module.groups, mask
    )


# ---------------------------------------------------------------- rows that a weight is multiplied with


def _rows_of_linear(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows_of_convolution(module: Any, x: Tensor) -> Tensor:
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (batch, channels * kernel, places)
    size = patches.shape[1] // module.groups
    return patches.transpose(1, 2).reshape(-1, size)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class LayerKind:
    """What is known about a kind of module.

    Attributes:
        name: name of the kind.
        classes: modules whose forward is that of one of these compute exactly as the kind does.
        names: such classes by module and name, for libraries that are not imported for it.
        family: modules that are instances of one of these hold their weight as the kind does; empty: ``classes``.
        channels: the dimension of the output (and the input) along which features, and so the bias, lie.
        widths: what it calls the numbers of its in and out features; where it has no such attributes its weight's shape tells.
        call: what it computes with a given weight, ``call(module, weight, x, bias=True)``; None: it is called as it is.
        call_into: the same into memory that is there, ``call_into(module, weight, x, out)``, without gradients; None: no way.
        call_scaled: the same with the product times a number, ``call_scaled(module, weight, x, number)``, without gradients and
            at the cost of the product alone; None: no way.
        gradients: gradients of that product; None leaves them to autograd.
        rows: what its weight is multiplied with, ``rows(module, x)`` ``(places, fan in)``; None: not known.
        is_transposed: whether the weight is ``(in, out)`` and not ``(out, in)``.
        takes_low_rank: whether a low-rank pair beside it is two small products.
        takes_lora: whether PEFT's LoRA beside it gives what it would give in the weight; ``takes_lora(module)``.
        is_read_lazily: whether its readers may get a weight that is composed at its first use.
        reads_sum: the child that gets the sum of output and bias, where something follows on it inside of the module.
    """

    name: str
    classes: tuple[type[nn.Module], ...] = ()
    names: tuple[str, ...] = ()
    family: tuple[type[nn.Module], ...] = ()
    channels: int = -1
    widths: tuple[str, str] = ("in_features", "out_features")
    call: Callable[..., Tensor] | None = None
    call_into: Callable[[nn.Module, Tensor, Tensor, Tensor], None] | None = None
    call_scaled: Callable[[nn.Module, Tensor, Tensor, float], Tensor] | None = None
    gradients: Gradients | None = None
    rows: Callable[[nn.Module, Tensor], Tensor] | None = None
    is_transposed: bool = False
    takes_low_rank: bool = False
    takes_lora: Callable[[Any], bool] = lambda module: False
    is_read_lazily: bool = False
    reads_sum: str | None = None

    def features(self, module: Any, shape: tuple[int, ...]) -> tuple[int, int]:
        """In and out features of a module whose weight has a shape: channels of a convolution."""
        if all(hasattr(module, name) for name in self.widths):
            return getattr(module, self.widths[0]), getattr(module, self.widths[1])
        return (shape[0], shape[1]) if self.is_transposed else (shape[1], shape[0])

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight with its outputs first."""
        return weight.T if self.is_transposed else weight

    def along_channels(self, values: Tensor, y: Tensor) -> Tensor:
        """Values ``(channels,)`` shaped so that they can be added to an output."""
        return values.view(-1, *[1] * (y.ndim - 2)) if self.channels > 0 and y.ndim > 2 else values


LINEAR = LayerKind(
    name="linear",
    classes=(nn.Linear,),
    call=_linear,
    call_into=_linear_into,
    call_scaled=_scaled_linear,
    gradients=_LinearGradients(),
    rows=_rows_of_linear,
    takes_low_rank=True,
    takes_lora=lambda module: True,
    is_read_lazily=True,
)

TRANSPOSED_LINEAR = replace(
    LINEAR,
    name="transposed linear",
    classes=(Conv1D,),
    widths=("nx", "nf"),
    call=_transposed_linear,
    call_into=None,
    call_scaled=_scaled_product,
    gradients=_TransposedLinearGradients(),
    is_transposed=True,
)

CONVOLUTION = LayerKind(
    name="convolution",
    classes=(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    family=(_ConvNd,),
    channels=1,
    widths=("in_channels", "out_channels"),
    call=_convolution,
    gradients=_ConvolutionGradients(),
    rows=_rows_of_convolution,
    # PEFT's LoRA of a convolution knows neither dilation nor padding with other values than zeros
    takes_lora=lambda module: module.padding_mode == "zeros" and set(module.dilation) == {1},
    is_read_lazily=True,
)

QUANTISED_LINEAR = LayerKind(
    name="quantised linear",
    names=(
        "bitsandbytes.nn.modules.Linear4bit",
        "bitsandbytes.nn.modules.Linear8bitLt",
        "hqq.core.quantize.HQQLinear",
        "optimum.quanto.nn.qlinear.QLinear",
    ),
    call=_quantised_linear,
    rows=_rows_of_linear,
    takes_low_rank=True,
    takes_lora=lambda module: True,
)

KINDS: list[LayerKind] = [
    LINEAR,
    TRANSPOSED_LINEAR,
    CONVOLUTION,
    QUANTISED_LINEAR,
    LayerKind(name="embedding", classes=(nn.Embedding,), takes_lora=lambda module: True),
    LayerKind(name="attention", family=(nn.MultiheadAttention,), rows=_rows_of_linear),
    LayerKind(
        name="norm of the last dimension",
        classes=(nn.LayerNorm,),
        names=("timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32"),
    ),
    LayerKind(
        name="norm of channels",
        classes=(nn.GroupNorm, nn.BatchNorm1d),  # the forward of every batch norm is that of the first
        names=(
            "timm.layers.norm.LayerNorm2d",
            "timm.layers.norm.LayerNorm2dFp32",
            "timm.layers.norm.LayerNormExp2d",
            "timm.layers.norm.GroupNorm",
            "timm.layers.norm.GroupNorm1",
        ),
        channels=1,
    ),
    LayerKind(
        name="norm of the last dimension, with an activation",
        names=("timm.layers.norm_act.LayerNormAct", "timm.layers.norm_act.LayerNormActFp32"),
        reads_sum="drop",
    ),
    LayerKind(
        name="norm of channels, with an activation",
        names=(
            "timm.layers.norm_act.BatchNormAct2d",
            "timm.layers.norm_act.SyncBatchNormAct",
            "timm.layers.norm_act.GroupNormAct",
            "timm.layers.norm_act.GroupNorm1Act",
            "timm.layers.norm_act.LayerNormAct2d",
            "timm.layers.norm_act.LayerNormAct2dFp32",
        ),
        channels=1,
        reads_sum="drop",
    ),
]
"""Row for row a kind of module."""

_BY_FORWARD: dict[Callable, LayerKind | None] = {cls.forward: kind for kind in KINDS for cls in kind.classes}
_BY_NAME = {name: kind for kind in KINDS for name in kind.names}


def register_kind(kind: LayerKind) -> None:
    """Make a kind of module known that is not listed above, such as one of a model of your own."""
    KINDS.append(kind)
    _BY_FORWARD.update({cls.forward: kind for cls in kind.classes})
    _BY_NAME.update({name: kind for name in kind.names})


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind that a module computes as: its forward is that of the kind, whatever its class; None if there is none."""
    forward = type(module).forward
    if forward not in _BY_FORWARD:
        origin = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), type(module))
        known = _BY_NAME.get(f"{origin.__module__}.{origin.__qualname__}")
        if known is None and quantised_by(module) == "gptqmodel":  # a class for each of its many kernels
            known = QUANTISED_LINEAR
        _BY_FORWARD[forward] = known
    return _BY_FORWARD[forward]


def takes_core(module: Any) -> bool:
    """Whether a module's product with a weight of low rank is two narrow products, between which a core can stand."""
    kind = kind_of(module)
    return kind is not None and (kind.takes_low_rank or kind is CONVOLUTION)


def composes_cheaply(module: Any) -> bool:
    """Whether a weight is so small beside the output that to compose it costs less than narrow products beside the module's."""
    return kind_of(module) is CONVOLUTION and module.groups > 1


def family_of(module: nn.Module) -> LayerKind | None:
    """The kind whose weights lie as a module's weight does, whatever the module does with it; None if there is none."""
    known = (kind for kind in KINDS if isinstance(module, kind.family or kind.classes))
    return next(known, None)


def is_lazily_readable(module: nn.Module) -> bool:
    """Whether readers of a module's weight may get one that is composed at its first use.

    Exactly the plain classes: torch's own fast paths read the weight of others, and refuse such tensors.
    """
    kind = kind_of(module)
    return kind is not None and kind.is_read_lazily and type(module) in kind.classes


def add_bias(y: Tensor, module: nn.Module) -> Tensor:
    """A product, with the bias of its module."""
    bias = module.bias
    if bias is None:
        return y
    kind = kind_of(module)
    return y + (bias if kind is None else kind.along_channels(bias, y)).to(y.dtype)  # type: ignore[operator, arg-type]


def in_and_out_features(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """How wide a module's input and output are; ``shape`` is its weight's."""
    return (family_of(module) or LINEAR).features(module, shape)


def rows_of(module: Any) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What reads the rows that a module's weight is multiplied with off its input, ``(places, fan in)``; None: not known."""
    kind = family_of(module)
    if kind is CONVOLUTION and (module.transposed or len(module.kernel_size) > 2):
        return None
    return None if kind is None else kind.rows


def positions_of(module: nn.Module, x: Tensor) -> float:
    """How many vectors of an input a module's weight is multiplied with, by its size alone."""
    return x.numel() / max(1, x.shape[(family_of(module) or LINEAR).channels])
