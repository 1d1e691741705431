"""How large a model is that somebody's file describes, looked at before its memory is taken."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .trusted import NotBuilt

MOST_TENSORS = 200_000  # of a model; the largest in use have a quarter of it
QUARTER, HALF, SINGLE = 0.5, 2, 4  # bytes of a number
MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange}


class Bounded(TorchFunctionMode):
    """A block in which no model is made of more numbers, or tensors, than a bound: it stops before it takes them.

    Args:
        most: numbers.

    Raises:
        NotBuilt: in the block.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.numbers, self.tensors = most, 0, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in MAKERS and "out" not in kwargs:
            self.numbers += function(*args, **{**kwargs, "device": "meta"}).numel()
            self.tensors += 1
            if self.numbers > self.most:
                raise NotBuilt(
                    f"its config describes a model of {self.numbers:,} numbers or more, beyond the {int(self.most):,} that "
                    "this machine's memory holds"
                )
            if self.tensors > MOST_TENSORS:
                raise NotBuilt(f"its config describes a model of more than {MOST_TENSORS:,} tensors, as no known model has")
        return function(*args, **kwargs)


def on_meta(build: Callable[[], nn.Module], most: float = math.inf) -> nn.Module:
    """A model on the meta device, of at most so many numbers.

    Raises:
        NotBuilt: if it would have more, or too many tensors.
        NotImplementedError, RuntimeError: if it computes something while it is built.
    """
    with torch.device("meta"), Bounded(most):
        return build()


@contextmanager
def told_in_advance() -> Iterator[None]:
    """A block that measures models on the meta device, and refuses one that computes something while it is built.

    Raises:
        NotBuilt: if one does.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:  # torch's errors for what needs numbers
        raise NotBuilt(f"its size cannot be told before its memory is taken ({type(error).__name__}: {error})") from error


def without_numbers(build: Callable[[], nn.Module]) -> nn.Module:
    """A model on the meta device; where it computes something while it is built, with weights of any value.

    Raises:
        NotBuilt: if it would have too many tensors, or weights that this machine's memory could not hold.
    """
    try:
        return on_meta(build)
    except (NotImplementedError, RuntimeError):  # torch's errors for what needs numbers
        with Bounded(most_numbers(SINGLE)):
            return build()


def most_numbers(bytes_each: float) -> float:
    """How many numbers this machine's memory holds; no bound where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / bytes_each
    except (AttributeError, ValueError, OSError):
        return math.inf
