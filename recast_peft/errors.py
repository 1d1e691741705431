"""The exceptions of this library: one small family, so that a caller can catch all of it or one kind.

Every message says what was given, what was expected, and what to do.
"""

from __future__ import annotations


class RecastError(Exception):
    """Base class of every error that this library raises on purpose."""


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
