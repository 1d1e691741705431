"""Blocks in which something is other than it is, and is put back at their end, also after errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


@contextmanager
def with_attribute(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """A block in which an attribute of some objects has another value."""
    before = [(one, getattr(one, name)) for one in objects]
    try:
        for one, _ in before:
            setattr(one, name, value)
        yield
    finally:
        for one, was in before:
            setattr(one, name, was)


@contextmanager
def with_variable(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """A block in which a context variable has another value; a generator's block may end in another context."""
    before = variable.get()
    variable.set(value)
    try:
        yield
    finally:
        variable.set(before)
