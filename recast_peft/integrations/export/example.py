"""The example that a model is exported with: its tensors by name, and the dimensions that may differ from call to call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RecastConfigError
from ...holders import unwrapped_module
from ...validation import shown
from .tasks import COEFFICIENTS

ROWS = "rows"  # the input of a table


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as arguments of a call; a lone sample is there twice, since a size of one would be taken for fixed.

    Raises:
        RecastConfigError: if it is no tensor, tuple or dictionary.
    """
    if isinstance(example, Tensor):
        return (_two(example),), {}
    if isinstance(example, (tuple, list)):
        return tuple(_two(value) for value in example), {}
    if isinstance(example, Mapping):
        return (), {str(name): _two(value) for name, value in example.items()}
    raise RecastConfigError(
        f"example is a {type(example).__name__}: expected a tensor, a tuple of them, or a dictionary by the model's arguments"
    )


def _two(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and len(value) == 1 else value


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives, by the names of the model's arguments, in their order.

    Raises:
        RecastConfigError: if there is none, one holds several tensors or has the name of a task's tensor, or the model does not
            take it.
    """
    signature = inspect.signature(unwrapped_module(model).forward)
    try:
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise RecastConfigError(
            f"the example does not fit what {type(unwrapped_module(model)).__name__} takes: {error}"
        ) from error
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat.update({f"{name}_{place}": part for place, part in enumerate(value)})
        else:
            flat[name] = value
    _check_arguments(flat)
    return flat


def _check_arguments(flat: Mapping[str, Any]) -> None:
    nested = [name for name, value in flat.items() if isinstance(value, (list, tuple, dict))]
    if nested:
        raise RecastConfigError(
            f"the argument {nested[0]!r} of the example is a {type(flat[nested[0]]).__name__}: "
            "a graph takes one tensor in each argument"
        )
    tensors = [name for name, value in flat.items() if isinstance(value, Tensor)]
    if not tensors or {"task", ROWS, COEFFICIENTS} & set(flat):
        raise RecastConfigError(
            f"the example's tensors are called {', '.join(tensors) or 'nothing'}: expected at least one, and none that has "
            f"the name task, {ROWS} or {COEFFICIENTS}"
        )
    empty = [name for name in tensors if 0 in flat[name].shape[:1]]
    if empty:
        raise RecastConfigError(
            f"the example has no samples ({empty[0]}: {tuple(flat[empty[0]].shape)}): expected at least one"
        )


def dynamic_dimensions(inputs: Mapping[str, Tensor], given: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, str]]:
    """The dimensions of all inputs that may differ from call to call, by their names.

    Where none are given: the samples, and of token ids and masks the positions.

    Raises:
        RecastConfigError: if what is given is no names by input and dimension.
    """
    if not isinstance(given, Mapping) or not all(isinstance(dims, Mapping) for dims in given.values()):
        raise RecastConfigError(
            f"dynamic_shapes={shown(given)}: expected names by input and dimension, {{'x': {{0: 'batch'}}}}"
        )
    for name, dims in given.items():
        if name not in inputs:
            raise RecastConfigError(f"dynamic_shapes names {name!r}; the example has {', '.join(inputs)}")
        for dim, called in dims.items():
            if dim not in range(inputs[name].ndim) or not isinstance(called, str) or not called.isidentifier():
                raise RecastConfigError(
                    f"dynamic_shapes: {{{dim!r}: {shown(called)}}} of {name!r}: expected a dimension from 0 to "
                    f"{inputs[name].ndim - 1}, and a name"
                )
    found = {name: {0: "batch"} if value.ndim else {} for name, value in inputs.items()}
    # the positions of token ids and masks
    texts = {name: value.shape[1] for name, value in inputs.items() if value.ndim == 2 and not value.is_floating_point()}
    first = next(iter(texts.values()), 0)  # what has another length than the first, as of a decoder, is another text
    for name, size in texts.items():
        found[name][1] = "sequence" if size == first else f"{name}_sequence"
    return {**found, **{name: dict(dims) for name, dims in given.items()}}


def described(inputs: Mapping[str, Tensor]) -> str:
    """The shapes and dtypes of inputs, for messages."""
    shapes = (f"{name}: {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}" for name, value in inputs.items())
    return ", ".join(shapes)
