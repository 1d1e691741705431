"""Regular expressions from files: only those that end soon on any name.

A search that fails has tried every way in which the parts of an expression can match. How many there are is bounded here:
parts one after the other multiply, alternatives add, and a repeat of what can match in two ways has no bound.
"""

from __future__ import annotations

import math
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
LENGTH = 100  # of a name
MOST_WAYS = 1e7  # three repeats without an end on one name, and some alternatives beside them
REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, getattr(codes, "POSSESSIVE_REPEAT", codes.MAX_REPEAT))
FEW = 16  # times that the ways of what is repeated are counted out for


def check_pattern(pattern: str, what: str) -> None:
    """Refuse a regular expression that may take for ever.

    Raises:
        RecastConfigError: if it is too long, no regular expression, or can match in too many ways.
    """
    most = LONGEST if any(sign in pattern for sign in "*+?{") else LONGEST_LIST
    cause = f"it has more than {most} characters"
    if len(pattern) <= most:
        try:
            re.compile(pattern)
            cause = "there are too many ways in which it may match" if _ways(parser.parse(pattern)) > MOST_WAYS else ""
        except (re.error, RecursionError, OverflowError) as reason:
            cause = f"it is none ({reason})"
    if cause:
        raise RecastConfigError(f"{what} is the regular expression {pattern[:80]!r}, which is not run from a file: {cause}")


def _ways(parsed: Any) -> float:
    """In how many ways a parsed expression may match from one place of a name, at most."""
    return math.prod(_ways_of(code, value) for code, value in parsed)


def _ways_of(code: Any, value: Any) -> float:
    if code is codes.GROUPREF:
        return math.inf  # what was matched before is matched again: of unknown length
    if code is codes.BRANCH:
        return _ways_of_branches(value[1])
    if code in REPEATS:
        least, most, inside = value
        ways = _ways(inside)
        if most <= FEW:
            return sum(min(ways, MOST_WAYS) ** times for times in range(least, most + 1))
        return math.inf if ways > 1 else 1 if least == most else LENGTH
    parts = value if isinstance(value, tuple) else (value,)
    return math.prod(_ways(part) for part in parts if isinstance(part, parser.SubPattern))


def _ways_of_branches(branches: list[Any]) -> float:
    """The ways of alternatives, of which those that begin with different letters never match at the same place."""
    ways: dict[str, float] = {"": 0}  # by the first letter, as far as it is known
    for branch in branches:
        code, letter = branch[0] if len(branch) else (codes.ANY, 0)
        first = chr(letter).lower() if code is codes.LITERAL and letter < 128 else ""  # beyond, letters have several cases
        ways[first] = ways.get(first, 0) + _ways(branch)
    return ways.pop("") + max(ways.values(), default=0)
