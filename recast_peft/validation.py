"""Checks of single values, and the one look-up of options by name: for whatever a user or a downloaded file gives.

A check returns the value as it is kept, or raises :class:`Unexpected` with what was expected; whoever knows the name of the
argument makes the error of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from .errors import RecastConfigError

T = TypeVar("T")

MOST_NAMES = 200_000
LONGEST_NAME = 2_000
DEEPEST = 12  # of dictionaries and lists in each other

Check = Callable[[Any], Any]


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


def listed(names: Collection[str], most: int = 3) -> str:
    """The first of several names, as a message shows them."""
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_int(value) and value >= 1


def is_whole(value: Any) -> bool:
    """Whether a value is a tensor of whole numbers."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_matrix(value: Any, rows: int, columns: int) -> bool:
    """Whether a value is a list of rows of finite numbers."""
    if not isinstance(value, list) or len(value) != rows:
        return False
    return all(isinstance(row, list) and len(row) == columns and all(map(is_number, row)) for row in value)


def plain_number(value: Any) -> Any:
    """One number of NumPy or torch as one of Python; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def checked_names(argument: str, given: Any, once: bool = False) -> list[str]:
    """The names of tasks that a verb was given: one, or several in a list.

    Args:
        argument: name of the verb's argument.
        given: its value.
        once: whether what is named twice would act twice.

    Raises:
        RecastConfigError: naming the argument and its value.
    """
    is_one = isinstance(given, (str, bytes)) or not isinstance(given, Iterable)
    found = [given] if is_one else list(given)
    wrong = [name for name in found if not isinstance(name, str)]
    if wrong:
        where = "" if is_one else f" in {shown(found)}"
        raise RecastConfigError(f"{argument}: expected the name of a task, or a list of names, got {shown(wrong[0])}{where}")
    if once and len(set(found)) < len(found):
        raise RecastConfigError(f"{argument}={shown(found)}: a task is named twice, and would act twice: name each once")
    return found


def checked(check: Check, name: str, value: Any, of: str = "") -> Any:
    """A value as a check gives it, or a ``RecastConfigError`` that names it: as an argument, or as a field ``of`` a class."""
    try:
        return check(value)
    except Unexpected as error:
        given = f"{name}={shown(value)}"
        raise RecastConfigError(f"{f'{of}({given})' if of else given}: expected {error}") from None


def check_arguments(check: Check, **given: Any) -> None:
    """Hold arguments of a function against what they may be (``RecastConfigError``)."""
    for name, value in given.items():
        checked(check, name, value)


class Options:
    """Options of one kind of thing, as an object that a config is given; a subclass checks them when it is made."""

    def check(self, check: Check, *options: str) -> None:
        """Hold options against what they may be (``RecastConfigError``)."""
        for option in options:
            value = plain_number(getattr(self, option))
            checked(check, option, value, type(self).__name__)
            object.__setattr__(self, option, value)


def check_is_task(name: Any, known: Iterable[str]) -> None:
    """Refuse what is not the name of a task that a model has (``RecastConfigError``)."""
    names_ = list(known)
    if name not in names_:
        raise RecastConfigError(f"the model has no RECAST task {shown(name)}; its tasks: {', '.join(names_) or 'none'}")


def check_is_module(model: Any) -> None:
    """Refuse what is no model (``RecastConfigError``)."""
    if not isinstance(model, nn.Module):
        raise RecastConfigError(f"model is a {type(model).__name__}; an nn.Module is expected")


def check_is_device(torch_device: Any) -> None:
    """Refuse a device that this machine does not have, or that holds no numbers; None is any (``RecastConfigError``)."""
    try:
        if torch_device is not None and torch.empty(0, device=torch_device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has a kind for each reason
        said = str(error).partition("\n")[0]
        raise RecastConfigError(f"torch_device={shown(torch_device)}: expected a device that is here ({said})") from error


def check_is_no_folder(path: Any, example: str) -> None:
    """Refuse a folder where the name of a file is meant (``RecastConfigError``)."""
    check_arguments(a_path, path=path)
    if Path(path).is_dir():
        raise RecastConfigError(f"path={str(path)!r} is a folder; expected the name of a file, such as {example}")


def check_is_peft_model(model: Any) -> None:
    """Refuse a plain model where one with tasks is meant (``RecastConfigError``)."""
    if not isinstance(model, PeftModel):
        raise RecastConfigError(
            f"model is a {type(model).__name__}: expected one with RECAST tasks, as get_recast_model(model, config) returns it"
        )


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


def optional(check: Check) -> Check:
    """A check that lets None pass."""
    return lambda value: None if value is None else check(value)


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise Unexpected("True or False")
    return value


def text(value: Any) -> str:
    """A text that is no document."""
    if not isinstance(value, str) or not value or len(value) > LONGEST_NAME:
        raise Unexpected(f"a text of 1 to {LONGEST_NAME:,} characters")
    return value


def a_path(value: Any) -> Any:
    """What names a file or a folder."""
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise Unexpected("a path, as a text or a pathlib.Path")
    return value


def whole_number(least: int, most: int = 2**31 - 1) -> Check:
    """A whole number within bounds."""

    def check(value: Any) -> int:
        if not is_int(value) or not least <= value <= most:
            is_usual = most == 2**31 - 1 and not (is_int(value) and value > most)  # a bound that nobody comes near
            raise Unexpected(f"a whole number of at least {least}" + ("" if is_usual else f" and at most {most:,}"))
        return value

    return check


COUNT = whole_number(1)
SEED = whole_number(-(2**63), 2**63 - 1)


def one_of(*choices: Any) -> Check:
    """One of a few values."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise Unexpected(f"one of {', '.join(map(repr, choices))}")
        return value

    return check


def names(value: Any) -> list[str]:
    """A list of names, as a new list whose order does not come from a set."""
    if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > MOST_NAMES:
        raise Unexpected(f"a list of at most {MOST_NAMES:,} names, or None")
    if not all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in value):
        raise Unexpected(f"a list of names of at most {LONGEST_NAME:,} characters")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def patterns(value: Any) -> list[str] | str:
    """A regular expression, or a list of them."""
    return names_or_pattern(value) if isinstance(value, str) else [str(names_or_pattern(one)) for one in names(value)]


def names_or_pattern(value: Any) -> list[str] | str:
    """A list of names, or a regular expression."""
    if not isinstance(value, str):
        return names(value)
    try:
        re.compile(text(value))
    except (re.error, RecursionError, OverflowError) as error:
        raise Unexpected(f"names in a list, or a regular expression, which this is not: {error}") from error
    return value


def targets(value: Any) -> list[str] | str:
    """Like ``names_or_pattern``, but no empty list."""
    checked = names_or_pattern(value)
    if not checked:
        raise Unexpected("at least one name; None chooses by itself")
    return checked


def indices(value: Any) -> list[int] | int:
    """A layer index, or a list of them."""
    listed: Any = [value] if is_int(value) else value
    is_listed = isinstance(listed, (list, tuple, range)) and len(listed) <= MOST_NAMES
    if not is_listed or not all(is_int(index) and index >= 0 for index in listed):
        raise Unexpected("a layer index, or a list of them, counted from 0")
    return value if isinstance(value, int) else list(listed)


def number(value: Any) -> float:
    """A finite number."""
    if not is_number(value):
        raise Unexpected("a finite number")
    return value


def number_above(least: float, itself: bool = False, most: float = math.inf) -> Check:
    """A finite number above another one, or that one itself too, and at most a third."""

    def check(value: Any) -> float:
        if not is_number(value) or not least <= value <= most or (value == least and not itself):
            raise Unexpected(f"a number {'from' if itself else 'above'} {least}" + (f" to {most}" if most < math.inf else ""))
        return value

    return check


def of_type(kind: type) -> Check:
    """An object of a class."""

    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise Unexpected(f"an instance of {kind.__name__}")
        return value

    return check


def function(value: Any) -> Any:
    """What can be called."""
    if not callable(value):
        raise Unexpected("a function")
    return value


def share(value: Any) -> float:
    """A number from 0 to below 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise Unexpected("a number from 0 to below 1")
    return value


def plain(value: Any, depth: int = DEEPEST) -> Any:
    """A value that JSON can hold, as a copy; one number of NumPy or torch becomes a plain one."""
    value = plain_number(value)
    if isinstance(value, Mapping) and depth:
        if not all(isinstance(key, str) for key in value):
            raise Unexpected("texts as the keys of dictionaries")
        return {key: plain(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and depth:
        return [plain(inner, depth - 1) for inner in value]
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise Unexpected(f"what JSON can hold, at most {DEEPEST} levels deep, not a {type(value).__name__} in it")
    if isinstance(value, float) and not is_number(value):
        raise Unexpected(f"finite numbers alone, since JSON holds no {value}")
    return value
