"""Modules that compute with a task that is given to the call, in the stead of our layers, biases, classifiers and norms.

A target computes in one of two ways:

    weight   the weight is composed in each call; what that costs does not depend on the input
    output   y = sum_i c_i T_i(x), n products; every sample can have a task of its own
    output with one template: (1 + d) scales the input or the output, whichever is smaller, and costs next to nothing

A core between main directions is added where less is to be added to: to the output, or before a linear layer to its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...banks.core_product import CoreProduct
from ...banks.directions_bank import directions_before
from ...banks.grown_templates import LowRankSum
from ...composition.compose import compose_weight
from ...composition.kinds import CONVOLUTION, LINEAR, add_bias, composes_cheaply, kind_of, positions_of, takes_core
from ...errors import RecastBankError
from ...layer import RecastLayer
from ...names import StandIn
from ...parts.bias import share_of
from ...parts.bias_part import TaskBiases
from ...parts.precision import HALF

Call = Callable[..., Tensor]
WEIGHT, OUTPUT, AUTO = WAYS = "weight", "output", "auto"

# Positions of the input, times (n - 1), below which n products cost less than composing the weight; measured in ONNX Runtime
# on a CPU (examples/benchmarks/export.py shows both ways at 197 positions).
PRODUCT_LIMIT = 16

PROPORTIONAL = ("Conv2dSame",)  # of no kind that is known, but without a bias they scale what they are given


class Given:
    """The task of the call that is on its way; no part of the graph, only how its modules find their inputs."""

    row: Tensor  # coefficients ``(1, numbers per task)``, or one row a sample
    factors: dict[str, Tensor]  # by target or bias, what its templates are multiplied by, ``(1, n)`` or ``(samples, n)``
    owned: dict[str, Tensor]  # tensors of the modules that the task owns
    rows: Tensor | None = None  # ``(samples,)`` rows of a table; None where one task is given

    def check_samples(self, place: str, x: Tensor) -> None:
        """Refuse a tensor ``(rows, ...)`` whose rows are no samples, where every sample has its own task."""
        if self.rows is not None and x.shape[0] != self.row.shape[0]:
            raise RecastBankError(
                f"{place} is called with {x.shape[0]} rows for {self.row.shape[0]} samples, so it cannot have another task "
                "for each sample: export the model with tasks='input'"
            )

    def check_one_task(self, place: str) -> None:
        """Refuse to give a weight, where every sample has its own task."""
        if self.rows is not None:
            raise RecastBankError(
                f"the weight of {place} is read, or its module is no product with it, so it cannot have another task for "
                "each sample: export the model with tasks='input'"
            )


class TemplateStack(nn.Module):
    """The templates of one bank in one tensor, so that a runtime composes a weight by one product.

    Shapes:
        ``templates`` ``(1, n, numbers)``; with a dimension more than a matrix, since runtimes repack constant matrices for
        products with many rows. Those of linear layers lie transposed, as the product wants them.
    """

    templates: Tensor

    def __init__(self, terms: list[Tensor], transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        flat = [(term.detach().T if transposed else term.detach()).reshape(-1) for term in terms]
        self.shape = tuple(terms[0].shape[::-1] if transposed else terms[0].shape)
        self.register_buffer("templates", torch.stack(flat)[None], persistent=True)

    def weight(self, scale: Tensor) -> Tensor:
        """The weight for coefficients ``(1, n)``."""
        return torch.matmul(scale.to(self.templates.dtype), self.templates).view(self.shape)


class AroundBase(StandIn):
    """Takes the place of a module, ``base``, and has its attributes; for its weight the given task's is shown."""

    base: nn.Module
    weight_name: str

    def stands_for(self) -> nn.Module | None:
        """The module; None before it is known."""
        return self.__dict__.get("_modules", {}).get("base")

    def effective_weight(self) -> Tensor:
        """The weight of the given task, for modules that read it.

        Raises:
            RecastBankError: where every sample has its own task.
        """
        raise AttributeError(f"{type(self).__name__} has no weight")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.stands_for()
            if base is None or name.startswith("__"):
                raise
            return self.effective_weight() if name == self.__dict__.get("weight_name") else getattr(base, name)


class TaskedLayer(AroundBase):
    """A target that computes with the coefficients of the given task.

    Args:
        layer: the layer whose place it takes.
        bank: of the task.
        columns: its columns of a row.
        given: holds the row.
        way: ``"weight"`` or ``"output"``; ``"auto"`` chooses by the first input. A lone template is always a scale.
    """

    def __init__(self, layer: RecastLayer, bank: Any, columns: slice, given: Given, way: str) -> None:
        super().__init__()
        self.base = layer.get_base_layer()
        self.name, self.weight_name = layer.module_name, layer.weight_name
        self.columns, self.way = columns, way
        self.scales_input: bool | None = None
        self.before: tuple[Tensor, ...] = ()  # where a core is added to the input
        self.stack: tuple[TemplateStack, ...] = ()
        self._held = (layer, bank, given)  # in a tuple: no children
        size = columns.stop - columns.start
        self.base_factors = _factors_of(*self._terms(torch.zeros(1, size)))
        steps = _factors_of(*self._terms(torch.arange(1.0, size + 1)[None])) - self.base_factors
        # which column of the task's row, counted from one, comes to a factor; zero for none
        self.followed = torch.where(steps == 0, 0, steps.round().long() + columns.start)

    def _terms(self, offsets: Tensor) -> tuple[list[Tensor], Tensor | None, LowRankSum | CoreProduct | None]:
        layer, bank, _ = self._held
        return bank.product_terms(self.name, offsets.to(layer.weight_device), layer.weight_device)

    def effective_weight(self) -> Tensor:
        layer, bank, given = self._held
        given.check_one_task(self.name)
        offsets = given.row[0, self.columns]
        return bank.added_to(layer.pretrained_weight, offsets)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = kind_of(self.base)
        if type(self.base).__name__ in PROPORTIONAL and self.base.bias is None and len(self.base_factors) == 1:
            return self.base(args[0] * _along(self._held[2].factors[self.name], args[0]), *args[1:], **kwargs)
        by_product = takes_core(self.base) and (self._held[2].rows is not None or not composes_cheaply(self.base))
        is_by_weight = self._held[1].is_factored and not by_product
        if kind is None or kind.call is None or len(args) != 1 or kwargs or is_by_weight:
            return torch.func.functional_call(self.base, {self.weight_name: self.effective_weight()}, args, kwargs)
        x, given = args[0], self._held[2]
        terms, scale, pairs = self._terms(torch.zeros(1, self.columns.stop - self.columns.start))
        given.check_samples(self.name, x)
        factors = given.factors[self.name]
        if self.scales_input is None:
            self._choose(kind.call, x, terms, isinstance(pairs, CoreProduct))
        if isinstance(pairs, CoreProduct):
            core = pairs.scaled_by(factors)
            if self.before:
                return kind.call(self.base, terms[0], replace(core, wide=self.before[0]).add_to(x, x))
            return core.add_to(kind.call(self.base, terms[0], x), x)
        y = self._product(kind.call, x, terms, None if scale is None else factors[:, : len(terms)])
        if pairs is None:
            return y
        narrow = (x @ pairs.first.to(x.dtype)) * _along(factors[:, -pairs.scale.shape[1] :], x)
        return y + (narrow @ pairs.second.to(x.dtype)).to(y.dtype)

    def _choose(self, call: Call, x: Tensor, terms: list[Tensor], has_core: bool) -> None:
        """Which way costs less for inputs like this one."""
        by_sample = self._held[2].rows is not None
        if len(terms) == 1 or by_sample or (self.way == AUTO and positions_of(self.base, x) * (len(terms) - 1) < PRODUCT_LIMIT):
            self.way = OUTPUT
        elif self.way == AUTO:
            self.way = WEIGHT
        # a norm behind a convolution can be folded into it only where nothing stands between the two
        is_convolution = kind_of(self.base) is CONVOLUTION
        self.scales_input = is_convolution or x[:1].numel() <= call(self.base, terms[0], x[:1], False).numel()
        if has_core and self.scales_input and kind_of(self.base) is LINEAR:
            before = directions_before(terms[0], self._held[1].num_directions)
            self.before = (before.to(terms[0].device, terms[0].dtype),)

    def stack_templates(self, stacks: dict[tuple, TemplateStack]) -> None:
        """Let the templates lie in one tensor if the weight is composed; the layers of a bank share it."""
        if self.way != WEIGHT or self.scales_input is None:
            return
        terms = self._terms(torch.zeros(1, self.columns.stop - self.columns.start))[0]
        transposed = kind_of(self.base) is LINEAR
        key = (transposed, *(term.data_ptr() for term in terms))
        if key not in stacks:
            stacks[key] = TemplateStack(terms, transposed)
        self.stack = (stacks[key],)

    def _scaled(self, call: Call, x: Tensor, term: Tensor, factor: Tensor) -> Tensor:
        """A product with one template, times its coefficient."""
        return call(self.base, term, x * factor, False) if self.scales_input else call(self.base, term, x, False) * factor

    def _product(self, call: Call, x: Tensor, terms: list[Tensor], scale: Tensor | None) -> Tensor:
        if scale is None:
            return call(self.base, terms[0], x)
        if self.way == OUTPUT:
            if len(terms) == 1 and self.scales_input:
                return call(self.base, terms[0], x * _along(scale, x))
            factors = [_along(factor, x) for factor in ([scale] if len(terms) == 1 else scale.split(1, dim=1))]
            first, *others = (self._scaled(call, x, t, factor) for t, factor in zip(terms, factors, strict=True))
            return add_bias(sum(others, first), self.base)
        if self.stack and self.stack[0].transposed:
            return add_bias(torch.matmul(x, self.stack[0].weight(scale)), self.base)
        weight = self.stack[0].weight(scale) if self.stack else compose_weight(None, terms, scale[0])
        return call(self.base, weight, x)


def _along(values: Tensor, x: Tensor, channels_first: bool = False) -> Tensor:
    """Values ``(1 or samples, numbers)`` so that they can be added to ``x`` or multiplied with it."""
    ones = [1] * (x.ndim - 2)
    if channels_first:
        return values.view(values.shape[0], -1, *ones).to(x.dtype)
    return (values if values.shape[0] == 1 else values.view(-1, *ones, values.shape[1])).to(x.dtype)  # one row fits as it is


def _factors_of(terms: list[Tensor], scale: Tensor | None, pairs: LowRankSum | CoreProduct | None) -> Tensor:
    """Everything that a layer's templates are multiplied by, ``(n,)``."""
    found = [part[0].detach().cpu().float() for part in (scale, None if pairs is None else pairs.scale) if part is not None]
    return torch.cat(found) if found else torch.zeros(0)


class TaskedBias(nn.Module):
    """What the given task adds to one bias, and to the scale of a norm.

    Args:
        holder: of the coefficients of all tasks at this bias.
        task: one that has some here, whose templates these are.
        slices: columns of a row, by the names of coefficients.
        given: holds the row.
    """

    name: str
    base_factors: Tensor
    followed: Tensor
    templates: Tensor
    bias: Tensor | None
    shares: Tensor | None

    def __init__(self, holder: TaskBiases, task: str, slices: Mapping[str, slice], given: Given) -> None:
        super().__init__()
        module, bias = holder._coefficient(task), holder.pretrained().detach()
        self.name, self.place, self.channels = holder.key_of(task), holder.place, module.channels
        self.followed = torch.arange(slices[self.name].start, slices[self.name].stop) + 1
        self.base_factors = torch.zeros(len(self.followed))
        scales = module.scale_templates()
        self.register_buffer("templates", module.templates(bias).detach().float())
        self.register_buffer("bias", None if scales is None else bias[None])
        shares = None if scales is None else share_of(scales.float(), holder.pretrained("weight").detach().float())
        self.register_buffer("shares", shares)
        self._held = (given,)

    def attach(self, host: nn.Module, visible: nn.Module) -> None:
        """Hang behind what stands for the module, or before the child of it that gets the output with the bias in it."""
        kind = kind_of(host)
        if kind is None or kind.reads_sum is None:
            visible.register_forward_hook(lambda _, args, y: self(y))
        else:
            host.get_submodule(kind.reads_sum).register_forward_pre_hook(lambda _, args: (self(args[0]), *args[1:]))

    def forward(self, y: Tensor) -> Tensor:
        given = self._held[0]
        given.check_samples(self.place, y)
        factors, is_first = given.factors[self.name], self.channels > 0
        changed = y + _along(_mixed(factors, self.templates), y, is_first)
        if self.bias is None or self.shares is None:
            return changed
        return changed + (y - _along(self.bias, y, is_first)) * _along(_mixed(factors, self.shares), y, is_first)


def _mixed(factors: Tensor, templates: Tensor) -> Tensor:
    """Templates ``(n, channels)`` times factors ``(1 or samples, n)``; no product that a quantised graph would have in int8."""
    return factors * templates if len(templates) == 1 else (factors[:, :, None] * templates).sum(1)


class TaskedModule(AroundBase):
    """A module that the given task owns whole: its tensors are inputs of the graph.

    Args:
        place: its name in the plain model.
        module: like the task's.
        given: holds the tensors.
        has_classes: whether it is a linear classifier, of which another task may have more classes or fewer.
    """

    def __init__(self, place: str, module: nn.Module, given: Given, has_classes: bool) -> None:
        super().__init__()
        self.has_classes = has_classes
        self.dtypes = {key: value.dtype for key, value in module.state_dict().items() if value.is_floating_point()}
        self.place, self._held = place, (module, given)  # in a tuple: its numbers are no part of the graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module, given = self._held
        start = f"{self.place}."
        own = {key: given.owned[f"{start}{key}"].to(dtype) for key, dtype in self.dtypes.items()}
        if not args or args[0].dtype not in HALF or torch.float32 not in self.dtypes.values():
            return torch.func.functional_call(module, own, args, kwargs)
        # a classifier in float32 behind a model in half precision
        return torch.func.functional_call(module, own, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)

    def stands_for(self) -> nn.Module | None:
        return self.__dict__.get("_held", (None,))[0]


class ClassifierTable(nn.Module):
    """The linear classifiers of many tasks; every sample is given its own one's logits.

    Args:
        weights: ``(rows, classes, features)``.
        biases: ``(rows, classes)``; minus infinity where a task has fewer classes.
        given: holds the row of each sample.
    """

    weights: Tensor
    biases: Tensor

    def __init__(self, weights: Tensor, biases: Tensor, given: Given) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.register_buffer("biases", biases)
        self._held = (given,)

    def forward(self, x: Tensor) -> Tensor:
        rows = self._held[0].rows
        assert rows is not None
        flat = x.reshape(x.shape[0], -1, x.shape[-1])  # (samples, positions, features)
        logits = torch.matmul(flat.to(self.weights.dtype), self.weights[rows].transpose(1, 2)) + self.biases[rows][:, None]
        return logits.reshape(*x.shape[:-1], -1).to(x.dtype)
