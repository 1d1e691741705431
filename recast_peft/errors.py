"""The exceptions of this library: one small family, so that a caller can catch all of it or one kind.

Every message says what was given, what was expected, and what to do.
"""

from __future__ import annotations

LONGEST_LINE = 2_000  # characters of a message
MOST_LINES = 200


def shortened(text: str) -> str:
    """A text without the middle of lines that hold a very long value, and without the end of one with very many lines."""
    half, lines = LONGEST_LINE // 2, text.split("\n")
    cut = [line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}" for line in lines[:MOST_LINES]]
    return "\n".join([*cut, *(["..."] if len(lines) > MOST_LINES else [])])


class RecastError(Exception):
    """Base class of every error that this library raises on purpose."""

    def __str__(self) -> str:
        return shortened(super().__str__())  # values and names from files may be of any length


class RecastConfigError(RecastError, ValueError):
    """A field of a config, or an argument, has a value that cannot be used."""


class RecastTargetError(RecastError, ValueError):
    """The target modules cannot be found, or cannot be expressed by templates."""


class RecastBankError(RecastError, ValueError):
    """A task and the template banks of the model do not fit each other."""


class RecastLoadError(RecastError, ValueError):
    """A task file is damaged, incomplete, or does not fit the model."""


class RecastBaseMismatchError(RecastLoadError):
    """A task was learned on other pretrained weights than those of this model."""


class RecastHubError(RecastError, OSError):
    """A repository on the Hub cannot be reached, read or written."""


class RecastSequenceError(RecastError, ValueError):
    """Tasks cannot be learned in sequence as asked, or an accuracy that is needed was not measured."""


class RecastCompatibilityError(RecastError, ImportError):
    """The installed PEFT has changed under this library."""
