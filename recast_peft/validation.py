"""Checks of single values, and the one look-up of options by name: for whatever a user or a downloaded file gives.

A check returns the value as it is kept, or raises :class:`Unexpected` with what was expected; whoever knows the name of the
argument makes the error of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import RecastConfigError

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 4, 120, 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 10


class Unexpected(ValueError):
    """A value that cannot be meant; the message says what was expected instead."""


def shown(value: Any) -> str:
    """A value as an error message shows it: never long, and never an error itself, however deep the value is nested."""
    try:
        return _SHORT.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_int(value) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def checked_count(name: str, value: Any, most: int | None = None) -> int:
    """A whole number of at least 1.

    Args:
        name: the argument's name, for the error.
        value: what was given.
        most: the largest that is allowed.

    Raises:
        RecastConfigError: naming the argument and its value.
    """
    if not is_count(value) or (most is not None and value > most):
        between = "of at least 1" if most is None else f"from 1 to {most:,}"
        raise RecastConfigError(f"{name}={shown(value)}: expected a whole number {between}")
    return int(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known one that is closest to it, if one is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def resolve_options(field: str, given: Any, kind: type[T], known: Mapping[str, type[T]]) -> T:
    """The options object that a config means.

    Args:
        field: the config's field, for errors.
        given: the object itself, its name, or ``{"method": name, option: value, ...}``.
        kind: the class that the objects have in common.
        known: the classes that there are, by name; each is a dataclass whose fields are its options.

    Raises:
        RecastConfigError: if there is no such name or option, or a value cannot be used.
    """
    if isinstance(given, kind):
        return given
    options = {"method": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or not isinstance(options.get("method"), str):
        raise RecastConfigError(
            f"{field}={shown(given)}: expected a name, a dictionary with a 'method' and its options, or an options object; "
            f"names: {', '.join(known)}"
        )
    name = options["method"]
    if name not in known:
        raise RecastConfigError(f"{field}={shown(name)}: expected one of {', '.join(known)}{did_you_mean(name, known)}")
    of_kind: Any = known[name]
    options = {key: value for key, value in options.items() if key != "method"}
    own = [f.name for f in dataclasses.fields(of_kind) if f.init]
    unknown = [shown(key) for key in options if key not in own]
    if unknown:
        raise RecastConfigError(
            f"{field} {name} has no option {', '.join(unknown[:5])}; its options: {', '.join(own) or 'none'}"
        )
    try:
        return of_kind(**options)
    except TypeError as error:
        raise RecastConfigError(f"{field}={shown(given)}: an option is of the wrong type ({error})") from error
