"""The one reader of JSON that did not come from this process: configs of tasks, headers of banks, pools and compressed models.

Bounded in size and depth, UTF-8 throughout, no key twice, an object at the top; whatever is wrong is one error that says where.
:class:`Fields` then gives values of the kind that is expected, or the same error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import RecastError, RecastLoadError
from ..validation import a_path, check_arguments, is_int, is_number, shown

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
_ABSENT: Any = object()


def read_json(path: str | os.PathLike, what: str | None = None, *, error: type[RecastError] = RecastLoadError) -> Fields:
    """Read a file that holds a JSON object.

    Args:
        path: path of the file.
        what: it is called in messages; None is its path.
        error: what is raised.

    Raises:
        RecastLoadError: (or ``error``) if the file cannot be read, is too large, or is no JSON object as described above.
    """
    check_arguments(a_path, path=path)
    what = what or str(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as reason:
        raise error(f"{what} cannot be read: {reason.strerror or reason}") from reason
    return parse_json(content, what, error=error)


def parse_json(content: bytes | str, what: str, *, error: type[RecastError] = RecastLoadError) -> Fields:
    """Read a JSON object from memory; see :func:`read_json`."""
    value = parse_value(content, what, error=error)
    if not isinstance(value, dict):
        raise error(f"{what} holds {_kind(value)} where a JSON object is expected. Fetch it again.")
    return Fields(value, what, error)


def parse_value(content: bytes | str, what: str, *, error: type[RecastError] = RecastLoadError) -> Any:
    """Read any JSON value from memory; see :func:`read_json`."""
    if len(content) > MAX_BYTES:
        raise error(f"{what} is larger than {MAX_BYTES:,} bytes, the most that is read of a JSON text")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as reason:
        cause = "it is nested too deeply" if isinstance(reason, RecursionError) else reason
        raise error(f"{what} is not valid JSON: {cause}. Fetch it again.") from reason
    _check(value, what, error)
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        latest = {name: place for place, name in enumerate(names)}
        place = next(place for place, name in enumerate(names) if latest[name] != place)
        raise ValueError(f"of an object's {len(names)} keys, number {place + 1} stands in it twice")  # it may be a secret
    return content


def _check(value: Any, what: str, error: type[RecastError]) -> None:
    """Refuse what is nested too deeply, and texts that UTF-8 cannot hold (half a pair of surrogates)."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str) and not item.isascii():
                try:
                    item.encode("utf-8")
                except UnicodeEncodeError as reason:
                    raise error(f"{what} is not valid JSON: a text in it is not UTF-8 ({reason.reason})") from reason
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
        if not level:
            return
    raise error(f"{what} is not valid JSON: lists and objects stand in each other more than {MAX_DEPTH} deep")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


class Fields(Mapping[str, Any]):
    """A JSON object whose values are asked for by kind; a mapping like any other beside."""

    def __init__(self, content: Mapping[str, Any], what: str, error: type[RecastError] = RecastLoadError) -> None:
        self.content, self.what, self.error = content, what, error

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def text(self, key: str, default: Any = _ABSENT) -> str:
        """A text."""
        return self._get(key, "a text", _of(str), default)

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        """True or False."""
        return self._get(key, "true or false", _of(bool), default)

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number within bounds."""
        return self._get(key, f"a whole number from {low:,} to {high:,}", _within(low, high))

    def number(self, key: str) -> float:
        """A finite number."""
        return self._get(key, "a finite number", is_number)

    def numbers(self, key: str, default: Any = _ABSENT) -> list[float]:
        """A list of finite numbers."""
        return self._get(key, "a list of finite numbers", _list_of(is_number), default)

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """A list of whole numbers within bounds."""
        return self._get(key, f"a list of whole numbers from {low:,} to {high:,}", _list_of(_within(low, high)))

    def texts(self, key: str, default: Any = _ABSENT) -> list[str]:
        """A list of texts."""
        return self._get(key, "a list of texts", _list_of(_of(str)), default)

    def text_by_name(self, key: str) -> dict[str, str]:
        """An object whose values are texts."""
        inside = self.object(key)
        return {name: inside.text(name) for name in inside}

    def object(self, key: str, default: Any = _ABSENT) -> Fields:
        """An object."""
        value = self._get(key, "an object", _of(dict), default)
        return Fields(value, f"{key!r} of {self.what}", self.error) if isinstance(value, dict) else value

    def objects(self, key: str, default: Any = _ABSENT) -> list[Fields]:
        """A list of objects."""
        values = self._get(key, "a list of objects", _list_of(_of(dict)), default)
        return [Fields(value, f"{key}[{place}] of {self.what}", self.error) for place, value in enumerate(values)]

    def object_by_name(self, key: str, default: Any = _ABSENT) -> dict[str, Fields]:
        """An object whose values are objects."""
        inside = self.object(key, default)
        return {name: inside.object(name) for name in inside}

    def _get(self, key: str, expected: str, fits: Callable[[Any], bool], default: Any = _ABSENT) -> Any:
        value = self.content.get(key, _ABSENT)
        if value is _ABSENT and default is not _ABSENT:
            return default
        if value is _ABSENT:
            raise self.error(f"{self.what} has no {key!r}; expected {expected}. Fetch it again.")
        if not fits(value):
            if value is None and default is None:
                return None
            raise self.error(f"{key!r} of {self.what} is {shown(value)}; expected {expected}. Fetch it again.")
        return value


def _of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _within(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: is_int(value) and low <= value <= high


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))
