"""The model card of a bank file, and how it is pushed to the Hub with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from huggingface_hub import CommitInfo

from ..errors import RecastConfigError, RecastLoadError
from ..names import role_of
from ..storage.cards import CARD_NAME, PAPER, card_data, code, hub_link, merge_card, one_line, plain_text, table
from ..storage.json_reader import Fields, read_json
from ..storage.transfer import commit_folder

BANK_WEIGHTS = "recast_bank.safetensors"
BANK_CONFIG = "recast_bank.json"
REST_WEIGHTS = "recast_backbone.safetensors"  # of a compressed model: what its bank does not hold


class SavableBank(Protocol):
    """Template banks that can be written to a folder, such as a ``StoredBank``."""

    def save(self, path: str | Path) -> Any:
        """Write ``recast_bank.json`` and the templates."""


def push_bank_to_hub(
    bank: SavableBank, repo_id: str, *, base_model: str | None = None, license: str | None = None, **commit: Any
) -> CommitInfo:
    """Push stored template banks, with a card, in one commit.

    Args:
        bank: a stored bank.
        repo_id: the repository, made if it does not exist.
        base_model: the repository of the backbone that the bank stands for, for the card.
        license: licence of the bank, for the card.
        commit: ``private``, ``token``, ``revision``, ``commit_message`` and what else :func:`push_tasks_to_hub` has for them.

    Returns:
        the commit.

    Raises:
        RecastHubError: if the Hub refuses, or cannot be reached; nothing is committed then.
    """
    if not hasattr(bank, "save"):
        raise RecastConfigError(f"bank is a {type(bank).__name__}: expected a StoredBank, as load_bank(name) reads it")
    with TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        bank.save(saved)
        return commit_folder(
            saved,
            repo_id,
            lambda path, full, lies: write_bank_card(path, repo_id=full, base_model=base_model, license=license),
            **{"commit_message": "Upload template banks", **commit},
        )


def write_bank_card(
    folder: str | os.PathLike, *, repo_id: str | None = None, base_model: str | None = None, license: str | None = None
) -> str:
    """Write the card of a folder that holds stored template banks.

    Args:
        folder: that ``StoredBank.save`` wrote.
        repo_id: where it will lie; None is the folder's own name.
        base_model: the repository of the backbone, if there is one.
        license: licence of the bank; None leaves what the card says already.

    Returns:
        the path of the card. Of a card that is there already, the text outside our part and the metadata stay.

    Raises:
        RecastLoadError: if the folder holds none.
    """
    folder = Path(folder)
    if not (folder / BANK_CONFIG).is_file():
        raise RecastLoadError(f"{folder} holds no {BANK_CONFIG}: there is no bank in it")
    header = read_json(folder / BANK_CONFIG)
    groups = header.object_by_name("groups")
    members = [member for group in groups.values() for member in group.texts("members")]
    roles = ", ".join(code(role) for role in dict.fromkeys(map(role_of, members)))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name in (BANK_CONFIG, BANK_WEIGHTS))
    facts = [
        ("Base model", hub_link(base_model) if base_model else "a model that is not named"),
        ("Targets", f"{len(members)} modules: {roles}"),
        ("Banks", f"{len(groups)}, with {sum(group.integer('templates', 0, 1 << 40) for group in groups.values())} templates"),
        ("Made by", plain_text(made_by(header.get("mimicry")))),
        ("Size", f"{size:,} bytes"),
        ("Version", plain_text(header.get("version"))),
        ("Fingerprint", plain_text(header.get("fingerprint"))),
        *(("Holds version", _earlier(entry)) for entry in header.objects("history", [])),
    ]
    lines = [
        f"# {plain_text((repo_id or folder.resolve().name).rpartition('/')[2])}",
        "",
        f"{PAPER} template banks. Tasks name the banks that they were learned on, and fetch them from here.",
        "",
        *table(facts),
    ]
    data = card_data(base_model, license)
    return merge_card(folder / CARD_NAME, data, "\n".join(lines), "bank", license_is_given=license is not None)


def _earlier(entry: Fields) -> str:
    return f"{plain_text(entry.get('version'))}, fingerprint {plain_text(entry.get('fingerprint'))}"


def made_by(mimicry: Any) -> str:
    """How a bank was made, in words where its templates were grown or learned."""
    method = mimicry.get("method") if isinstance(mimicry, Mapping) else mimicry
    if method == "grown" and isinstance(mimicry, Mapping):
        sources = _texts(mimicry.get("sources"))
        what = "grown from" if "of" not in mimicry else f"of {mimicry['of']}, grown from"
        return f"{what} {len(sources)} source{'s' * (len(sources) > 1)}: {', '.join(sources)}"
    if method == "learned" and isinstance(mimicry, Mapping):
        tasks = ", ".join(_texts(mimicry.get("tasks")))
        start = made_by(mimicry.get("start"))
        return f"learned together with the tasks {tasks} in {mimicry.get('steps')} steps; started from a bank {start}"
    if method == "readout" and isinstance(mimicry, Mapping):
        kept = mimicry.get("variance")
        share = f"{100 * kept:.0f} %" if isinstance(kept, float) else "some"
        return f"a readout of {one_line(mimicry.get('examples'))} examples, {share} of whose variance it keeps"
    return "of random templates" if method == "random" else one_line(mimicry)


def _texts(values: Any) -> list[str]:
    return [one_line(value) for value in values] if isinstance(values, (list, tuple)) else []
