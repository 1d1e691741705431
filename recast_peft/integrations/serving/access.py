"""Who may see which tasks: bearer tokens of tenants and administrators."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import RecastConfigError
from ...storage.json_reader import Fields, read_json
from ...validation import did_you_mean

FIELDS = ("name", "tasks", "admin")
HASHED = "sha256:"


@dataclass(frozen=True)
class Tenant:
    """What a token stands for.

    Attributes:
        name: for logs.
        tasks: that it sees; None is all of them.
        admin: whether it may put the tasks in that it sees, and take them out.
    """

    name: str
    tasks: frozenset[str] | None = None
    admin: bool = False

    def sees(self, task: str) -> bool:
        """Whether a task is its business."""
        return self.tasks is None or task in self.tasks


ANYBODY = Tenant("anybody", None, False)


class Tenants:
    """Tokens and their tenants. Tokens are kept as SHA-256 hashes alone.

    Args:
        by_token: tenants by their tokens, or by ``sha256:<hash of the token>``.

    Raises:
        RecastConfigError: if there is none, one cannot be sent, a hash is none, or one token is given twice.
    """

    def __init__(self, by_token: Mapping[str, Tenant]) -> None:
        if not by_token:
            raise RecastConfigError("no token was given: nobody could ask for anything")
        self._by_hash = {_stored(token): tenant for token, tenant in by_token.items()}
        if len(self._by_hash) < len(by_token):
            raise RecastConfigError("a token was given twice, as itself and as its hash: leave one of them out")

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Tenants:
        """Read tenants from JSON: ``{"sha256:...": {"name": "ada", "tasks": ["cats"], "admin": false}}``.

        Raises:
            RecastConfigError: if the file cannot be read, or has other fields or values than these; no token is shown.
        """
        fields = read_json(path, error=RecastConfigError)
        return cls({token: _tenant(fields[token], f"entry {n} of {path}") for n, token in enumerate(fields, start=1)})

    def of(self, authorization: str | None) -> Tenant | None:
        """The tenant of a request's ``Authorization`` header; None if its token is nobody's."""
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token:
            return None
        return self._by_hash.get(_hash(token.strip()))


def _tenant(content: Any, what: str) -> Tenant:
    if not isinstance(content, dict):
        raise RecastConfigError(f'{what} holds no object; expected tenants by their tokens, as {{"token": {{"name": "ada"}}}}')
    fields = Fields(content, what, RecastConfigError)
    for key in fields.keys() - set(FIELDS):  # a misspelt "tasks" would show all of them
        raise RecastConfigError(f"{fields.what} has {key!r}: expected {', '.join(FIELDS)}{did_you_mean(key, FIELDS)}")
    tasks: Any = fields.texts("tasks", None)
    return Tenant(fields.text("name", "tenant"), None if tasks is None else frozenset(tasks), fields.flag("admin", False))


def _stored(token: str) -> str:
    if not (token and token.isascii() and token.isprintable() and token == token.strip()):  # the message shows no token
        raise RecastConfigError(
            "a token is empty, or has spaces around it or characters beside the printable ones of ASCII, which callers cannot "
            "send: choose another"
        )
    if not token.lower().startswith(HASHED):
        return _hash(token)
    if not re.fullmatch(r"[0-9a-f]{64}", token.lower().removeprefix(HASHED)):
        raise RecastConfigError(f"a token begins with {HASHED} and is no hash of one: expected 64 hexadecimal digits behind it")
    return token.lower()


def _hash(token: str) -> str:
    return f"{HASHED}{hashlib.sha256(token.encode()).hexdigest()}"
