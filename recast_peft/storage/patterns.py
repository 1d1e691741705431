"""Regular expressions from files: only those that end soon on any name."""

from __future__ import annotations

import re
from typing import Any

from ..errors import RecastConfigError

try:
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as codes  # type: ignore[no-redef]
    import sre_parse as parser  # type: ignore[no-redef]

LONGEST = 1000  # characters of one that repeats
LONGEST_LIST = 100_000  # characters of one that repeats nothing, such as a list of names
MOST_REPEATS = 3  # open ones; each multiplies the steps of a search by the length of a name
REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, getattr(codes, "POSSESSIVE_REPEAT", codes.MAX_REPEAT))
FEW = 16  # a repeat of up to so many is not open


def check_pattern(pattern: str, what: str) -> None:
    """Refuse a regular expression that may take for ever: open repeats within each other, or many of them.

    Raises:
        RecastConfigError: if it is too long, no regular expression, or may take long.
    """
    most = LONGEST if any(sign in pattern for sign in "*+?{") else LONGEST_LIST
    cause = f"it has more than {most} characters"
    if len(pattern) <= most:
        try:
            re.compile(pattern)
            cause = _danger(parser.parse(pattern))
        except (re.error, RecursionError, OverflowError) as reason:
            cause = f"it is none ({reason})"
    if cause:
        raise RecastConfigError(f"{what} is the regular expression {pattern[:80]!r}, which is not run from a file: {cause}")


def _danger(parsed: Any) -> str:
    depths = list(_open_repeats(parsed, 0))
    if any(depth > 0 for depth in depths):
        return "it repeats what repeats"
    return f"it has more than {MOST_REPEATS} open repeats" if len(depths) > MOST_REPEATS else ""


def _open_repeats(item: Any, depth: int) -> Any:
    """For every open repeat, in how many others it stands."""
    if isinstance(item, (parser.SubPattern, list)):
        for part in item:
            yield from _open_repeats(part, depth)
    elif isinstance(item, tuple) and item and item[0] in REPEATS:
        _, (_, most, inside) = item
        is_open = most == codes.MAXREPEAT or most > FEW
        if is_open:
            yield depth
        yield from _open_repeats(inside, depth + is_open)
    elif isinstance(item, tuple):
        for part in item:
            yield from _open_repeats(part, depth)
    elif item is codes.GROUPREF:
        yield 1  # what was matched before is matched again: of unknown length
