"""Bank files: template banks that do not follow from the pretrained weights, stored once for all tasks on them.

A bank file is a folder with ``recast_bank.safetensors`` (templates, base coefficients, and in its metadata the header: groups,
members, method, fingerprints) and ``recast_bank.json`` (the header again, to be read by people and earlier versions). One file
holds everything, so that a bank is replaced in one step. A task names its bank by name (a folder or a repository) and
fingerprint, which is held against the tensors when the bank is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ..composition.fingerprint import same_weight
from ..errors import RecastBankError, RecastError, RecastHubError, RecastLoadError
from ..storage.atomic import locked, made_folder, write_json
from ..storage.json_reader import Fields, parse_json, read_json
from ..storage.paths import goes_up, inside, is_hub_name
from ..storage.tensors import TensorFile, checksum, read_tensors, write_tensors
from ..storage.transfer import NoSuchFile, fetch_together
from ..validation import a_path, check_arguments, optional, text
from .card import BANK_CONFIG, BANK_WEIGHTS, push_bank_to_hub
from .stored_group import StoredGroup, read_group

FORMAT = 1
HEADER = "recast_bank"  # the entry of the metadata that holds the header
MOST_VERSIONS = 1000


@dataclass(frozen=True, eq=False)
class StoredBank:
    """Template banks of a whole model, as a bank file holds them.

    Attributes:
        groups: what every bank holds, by its name.
        base_fingerprint: fingerprints of the pretrained weights that the bank stands for, by module name.
        mimicry: the method that made it, with its options.
        name: where it is stored, a folder or a repository; None while it is in memory alone.
        version: counts the states of a bank that grows; each has a fingerprint of its own.
        fingerprint: fingerprint of templates and base coefficients: 16 hexadecimal digits.
        history: earlier versions of a bank that grew: ``{"version": ..., "fingerprint": ..., "templates": {group: count}}``
            with the count of grown templates. Every version holds the templates of the one before first.
    """

    groups: Mapping[str, StoredGroup]
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    mimicry: str | Mapping[str, Any] = "closed_form"
    name: str | None = None
    version: int = 1
    fingerprint: str = ""
    history: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if all(group.kind == "exact" for group in self.groups.values()):
            raise RecastBankError(
                "there is nothing to store: these banks follow from the pretrained weights of the base model and the task files"
            )
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", checksum(self.tensors(), torch.float32))

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({group.kind for group in self.groups.values()}))
        known = f"name={self.name!r}, version={self.version}, fingerprint={self.fingerprint!r}"
        return f"StoredBank(groups={len(self.groups)}, {kinds}; {known})"

    def __deepcopy__(self, memo: dict) -> StoredBank:
        return self  # nothing in it is ever written to, and a config is copied often

    @property
    def is_of_biases(self) -> bool:
        """Whether its templates are of biases, so that it belongs to a ``BiasConfig``."""
        return any(group.kind == "bias" for group in self.groups.values())

    @property
    def is_readout(self) -> bool:
        """Whether its templates read layers for a classifier, so that it belongs to a ``ReadoutConfig``."""
        return any(group.kind == "readout" for group in self.groups.values())

    @property
    def field(self) -> str:
        """How a task's config is given it."""
        if self.is_readout:
            return "RecastConfig(partners=[ReadoutConfig(bank=...)])"
        return "RecastConfig(partners=[BiasConfig(bank=...)])" if self.is_of_biases else "RecastConfig(bank=...)"

    @property
    def reference(self) -> dict[str, str | None]:
        """What a task stores of its bank: ``{"name": ..., "fingerprint": ...}``."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    @property
    def nbytes(self) -> int:
        """Bytes of templates and base coefficients."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Templates and base coefficients by their names in a bank file."""
        return {key: tensor for name, group in self.groups.items() for key, tensor in group.named(name).items()}

    def at(self, fingerprint: str | None) -> StoredBank | None:
        """An earlier version of this bank, in the same memory.

        Args:
            fingerprint: fingerprint of that version; None is the bank as it is.

        Returns:
            the version, or None if the bank never had this fingerprint.
        """
        if fingerprint in (None, self.fingerprint):
            return self
        for place, entry in enumerate(self.history):
            if entry["fingerprint"] == fingerprint:
                groups = {
                    name: group if group.grown is None else replace(group, grown=group.grown.first(entry["templates"][name]))
                    for name, group in self.groups.items()
                }
                history = self.history[:place]
                return replace(self, groups=groups, version=entry["version"], fingerprint=entry["fingerprint"], history=history)
        return None

    def check_base(self, member: str, fingerprint: str, error: type[RecastError] = RecastBankError) -> None:
        """Refuse a model that is not the one that the bank was made for.

        Args:
            member: a module of the bank.
            fingerprint: that of the module in the model.
            error: what is raised.

        Raises:
            RecastBankError: (or ``error``) naming the module, with both fingerprints.
        """
        if not same_weight(self.base_fingerprint[member], fingerprint):
            kind = "biases" if self.is_of_biases else "weights"
            raise error(
                f"the bank {self.name or 'in memory'} was made for other pretrained {kind}; {member} differs\n"
                f"  fingerprint in the bank:  {self.base_fingerprint[member]}\n  fingerprint of the model: {fingerprint}\n"
                f"Load the model that the bank was made for, or make a bank for this one."
            )

    def save(self, path: str | Path) -> StoredBank:
        """Write the bank file into a folder; a bank that is there is replaced in one step.

        Args:
            path: the folder, made if missing.

        Returns:
            the same bank under the folder's name.
        """
        folder = made_folder(path)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.tensors().items()}
        header = {
            "format": FORMAT,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "history": [dict(entry) for entry in self.history],
            "content": checksum(tensors),
            "rounded": checksum(tensors, torch.float32) != self.fingerprint,
            "mimicry": self.mimicry if isinstance(self.mimicry, str) else dict(self.mimicry),
            "groups": {name: group.describe() for name, group in self.groups.items()},
            "base_fingerprint": dict(self.base_fingerprint),
        }
        with locked(folder):
            write_tensors(folder / BANK_WEIGHTS, tensors, {HEADER: json.dumps(header)})
            write_json(folder / BANK_CONFIG, {**header, "checksum": _header_checksum(header)})
        return self.under(str(path))

    def push_to_hub(self, repo_id: str, **options: Any) -> StoredBank:
        """Upload the bank file with its card to a repository.

        Args:
            repo_id: the repository, made if it does not exist.
            options: further arguments of :func:`recast_peft.push_bank_to_hub`, such as ``private`` and ``token``.

        Returns:
            the same bank under the repository's name.
        """
        return self.under(push_bank_to_hub(self, repo_id, **options).repo_url.repo_id)

    def under(self, name: str | None) -> StoredBank:
        """The same bank under another name.

        Args:
            name: folder or repository where it is stored; None while it is in memory alone.
        """
        check_arguments(optional(text), name=name)
        return replace(self, name=name)


@torch.inference_mode(False)  # what is read inside inference_mode could never be trained on
def load_bank(name: str | Path, *, revision: str | None = None, token: str | None = None) -> StoredBank:
    """Read a bank file from a folder, or from a repository on the Hub.

    Args:
        name: folder, or name of a repository.
        revision: branch, tag or commit of the repository; None is its main branch.
        token: access token of the Hub; None takes the one that you are logged in with.

    Returns:
        the bank, under this name.

    Raises:
        RecastBankError: if there is none, or its repository cannot be reached.
        RecastLoadError: if it is damaged, is not the bank that it says it is, or is of a format not known here.
    """
    check_arguments(a_path, name=name)
    folder = Path(name) if has_bank(Path(name)) else _fetched(str(name), revision, token)
    what = f"the bank file at {str(name)!r}"
    file = read_tensors(folder / BANK_WEIGHTS, what)
    return _assemble(str(name), what, _header(folder, file, what), file)


def has_bank(folder: Path) -> bool:
    """Whether a folder holds a bank file."""
    return os.path.isfile(folder / BANK_WEIGHTS)  # False, not an error, for a name that no file can have


def _fetched(name: str, revision: str | None, token: str | None) -> Path:
    reason: RecastError | None = None
    if is_hub_name(name):
        try:
            return fetch_together(name, BANK_CONFIG, BANK_WEIGHTS, hub_kwargs={"revision": revision, "token": token})
        except (RecastHubError, NoSuchFile) as error:
            reason = error
    raise RecastBankError(
        f"there is no template bank at {name!r}: neither a folder with {BANK_WEIGHTS} and {BANK_CONFIG}, nor a repository "
        f"on the Hub that can be reached{f' ({reason})' if reason else ''}"
    ) from reason


def _header(folder: Path, file: TensorFile, what: str) -> Fields:
    """The header of a bank file.

    It stands in the metadata of the tensors, so that both are of one moment. The JSON beside them is read too: one that is
    damaged is refused. One that is whole and of another moment (a process was killed between the two) does not count.
    """
    held = file.metadata.get(HEADER)
    path = folder / BANK_CONFIG
    if held is None or path.is_file():
        beside = read_json(path, f"{BANK_CONFIG} of {what}")
        _check_format(beside, what)
        stored = beside.content.pop("checksum", None)  # type: ignore[attr-defined]
        if stored is not None and stored != _header_checksum(beside.content):
            raise RecastLoadError(
                f"{BANK_CONFIG} of {what} is damaged: it is not what was written. Fetch it again. (Who changed it on purpose "
                "takes its 'checksum' out.)"
            )
        if held is None or stored is None:
            return beside
    header = parse_json(held, f"the header of {what}")
    _check_format(header, what)
    return header


def _header_checksum(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def _check_format(header: Fields, what: str) -> None:
    if header.get("format") != FORMAT:
        raise RecastLoadError(
            f"{what} is of another format\n  format of the file: {header.get('format')}\n  format known here: {FORMAT}\n"
            "Update recast_peft, or write the bank again."
        )


def _assemble(name: str, what: str, header: Fields, file: TensorFile) -> StoredBank:
    """The bank of a header and its tensors, each of which is held against the other."""
    if header.text("content") != file.content:
        raise RecastLoadError(f"{what} is damaged: {BANK_WEIGHTS} is not what {BANK_CONFIG} says. Fetch it again.")
    entries = header.object_by_name("groups")
    groups = {bank: read_group(bank, entry, file.tensors, what) for bank, entry in entries.items()}
    used = {key for bank, group in groups.items() for key in group.named(bank)}
    unused = sorted(set(file.tensors) - used)
    if unused or not used:
        raise RecastLoadError(f"{what} holds {unused[0] if unused else 'no tensor'}, of which its groups do not speak")
    mimicry, fingerprints = header.get("mimicry"), header.text_by_name("base_fingerprint")
    read = {member for group in groups.values() for member in group.members[: None if group.offset is None else -1]}
    if not read <= fingerprints.keys():
        lacking = sorted(read - fingerprints.keys())[0]
        raise RecastLoadError(
            f"{what} does not say which pretrained weight {lacking} stands for: it is damaged. Fetch it again."
        )
    bank = StoredBank(
        groups,
        fingerprints,
        mimicry if isinstance(mimicry, str) else dict(header.object("mimicry")),
        name,
        header.integer("version", 1, MOST_VERSIONS),
        header.text("fingerprint"),
        tuple(_earlier(entry, groups) for entry in header.objects("history", [])),
    )
    _check_fingerprint(bank, file, what, header.flag("rounded", None))
    return bank


def _earlier(entry: Fields, groups: Mapping[str, StoredGroup]) -> dict[str, Any]:
    """One line of the history of a bank that grew."""
    counts = entry.object("templates")
    grown = {name: counts.integer(name, 0, len(group.grown)) for name, group in groups.items() if group.grown is not None}
    return {"version": entry.integer("version", 1, MOST_VERSIONS), "fingerprint": entry.text("fingerprint"), "templates": grown}


def _check_fingerprint(bank: StoredBank, file: TensorFile, what: str, is_rounded: bool | None) -> None:
    """Refuse a bank that calls itself by the fingerprint of another one; earlier files do not say whether they are rounded."""
    if is_rounded is None:
        is_rounded = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in file.tensors.values())
    versions = [bank, *(bank.at(entry["fingerprint"]) for entry in bank.history)]
    for version in versions:
        assert version is not None
        is_whole = version is bank and {t.dtype for t in file.tensors.values()} == {torch.float32}
        actual = file.content if is_whole else checksum(version.tensors(), torch.float32)
        if actual == version.fingerprint:
            continue
        if not is_rounded:
            raise RecastLoadError(
                f"{what} is not the bank that it says it is: its version {version.version} has other templates\n"
                f"  fingerprint that it states: {version.fingerprint}\n  fingerprint of its tensors: {actual}\n"
                "Fetch it again; tasks that were learned on it would compute something else."
            )
        warnings.warn(
            f"{what} holds templates that were rounded when it was saved from a model in half precision, so that its "
            f"fingerprint {version.fingerprint} cannot be held against them. Save it from a model in float32.",
            stacklevel=5,
        )
        return


def find_bank(reference: Mapping[str, str | None], task_folder: str | None = None, hint: str | None = None) -> StoredBank:
    """The bank that a config names.

    A config that was read from a saved task may have been written by anybody. The bank that it names is looked for in the
    task's folder, below it, beside it and beside the folder above under the last part of the name, and on the Hub; another path
    is not followed. A name that the caller gave may be any folder.

    Args:
        reference: ``{"name": ..., "fingerprint": ...}``; without a fingerprint any bank of the name will do.
        task_folder: where the task was read from; None if it was not read.
        hint: the end of the message if it is not found; None says how a bank of weights is handed over.

    Raises:
        RecastBankError: if it is not found, or is another one; the message says how to hand it over.
    """
    name, fingerprint = reference.get("name"), reference.get("fingerprint")
    tried: list[str] = []
    for place in _places(name, task_folder, tried):
        try:
            bank = load_bank(place)
        except RecastBankError as error:
            tried.append(str(error))
            continue
        found = bank.at(fingerprint)
        if found is not None:
            return found
        tried.append(f"{place} holds {bank.fingerprint}")
    raise RecastBankError(
        f"the task needs the template bank {name!r} with fingerprint {fingerprint}, which is not at hand\n"
        + "".join(f"  {line}\n" for line in tried)
        + (hint or how_to_load())
    )


def _places(name: str | None, task_folder: str | None, refused: list[str]) -> list[str | Path]:
    """Where a bank of a name may be read from; why not elsewhere is added to ``refused``."""
    if task_folder is None:
        return [name] if name else []
    folder, own = Path(task_folder), ""
    places: list[str | Path] = [folder]
    if name and folder.is_dir():
        own = "" if goes_up(name) else PurePosixPath(PureWindowsPath(name).as_posix()).name
        try:
            places.append(inside(folder, name, "the name of the bank"))
        except RecastLoadError as error:
            refused.append(str(error))
        # a bank that lies where it was saved beside its tasks, or was moved together with them
        above = folder.absolute().parents[:2] if own else ()
        places += [path / own for path in above if not os.path.islink(path / own)]
    places = [place for place in places if has_bank(Path(place))]
    if own and not places:
        refused.append(f"none lies in the task's folder, and no {own!r} beside it or the folder above: lay it there, or")
    return [*places, name] if name and is_hub_name(name) else places


def how_to_load(field: str = "bank", value: str = "load_bank(folder_or_repository)") -> str:
    """The end of a message about a bank that is not at hand."""
    return (
        "Hand the bank over with the task's config:\n  config = RecastConfig.from_pretrained(task)\n"
        f"  config.{field} = {value}\n  model = PeftModel.from_pretrained(backbone, task, config=config)"
    )
