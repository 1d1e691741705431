"""Bank files: template banks that do not follow from the pretrained weights, stored once for all tasks on them.

A bank file is a folder with ``recast_bank.safetensors`` (templates and base coefficients) and ``recast_bank.json`` (what they
are: groups, members, method, fingerprints). A task names its bank by name (a folder or a repository) and fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import RecastBankError, RecastLoadError
from ..mimicry import Recipe
from .grown_templates import PARTS, GrownTemplates

BANK_WEIGHTS = "recast_bank.safetensors"
BANK_CONFIG = "recast_bank.json"
FORMAT = 1
# how a group's templates are given; a further kind is a row here and in StoredGroup
KINDS = ("exact", "dense", "grown", "bias")


@dataclass(frozen=True, eq=False)
class StoredGroup:
    """One group of a stored bank.

    Attributes:
        members: names of the target modules, in the order of their depth.
        templates: ``(templates, *weight_shape)``; None where the members' pretrained weights are the templates.
        base: base coefficients ``(layers, templates)`` in float32; None with ``templates``.
        recipe: how the templates were mixed from the pretrained weights, where they were: a task that names its recipe
            knows the bank by it.
        grown: templates beside or in place of the members' pretrained weights, to which offsets are added.
        widths: for templates of biases the numbers in each member's bias; a template of ``grown`` holds those of all members
            side by side. None for templates of weights.
    """

    members: tuple[str, ...]
    templates: Tensor | None = None
    base: Tensor | None = None
    recipe: Recipe | None = None
    grown: GrownTemplates | None = None
    widths: tuple[int, ...] | None = None

    @property
    def kind(self) -> str:
        """``"exact"``, ``"dense"``, ``"grown"`` or ``"bias"``."""
        if self.grown is not None:
            return "grown" if self.widths is None else "bias"
        return "exact" if self.templates is None else "dense"

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape of the members' weights, where the bank knows it."""
        if self.grown is not None:
            return self.grown.weight_shape
        return None if self.templates is None else tuple(self.templates.shape[1:])

    @property
    def num_templates(self) -> int:
        """Templates in the group."""
        if self.grown is not None:
            return len(self.grown) + (len(self.members) if self.grown.plain else 0)
        return len(self.members) if self.templates is None else len(self.templates)

    @property
    def num_coefficients(self) -> int:
        """Numbers that a task trains for the group; one coefficient of a template of biases moves all members."""
        return self.num_templates * (len(self.members) if self.widths is None else 1)

    def biases(self) -> dict[str, Tensor]:
        """The templates of biases by member, each ``(templates, width)``, in the same memory."""
        assert self.grown is not None
        assert self.widths is not None
        return dict(zip(self.members, self.grown.tensors[0].split(list(self.widths), dim=1), strict=True))


@dataclass(frozen=True, eq=False)
class StoredBank:
    """Template banks of a whole model, as a bank file holds them.

    Attributes:
        groups: by bank name.
        base_fingerprint: of the pretrained weights that the bank stands for, by module name.
        mimicry: the method that made it, with its options.
        name: where it is stored, a folder or a repository; None while it is in memory alone.
        version: counts the states of a bank that grows; each has a fingerprint of its own.
        fingerprint: of templates and base coefficients: 16 hexadecimal digits.
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
                "there is nothing to store: every template of these banks is a pretrained weight, so that the banks follow "
                "from the base model and the task files"
            )
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _digest(self._tensors(), torch.float32))

    def __deepcopy__(self, memo: dict) -> StoredBank:
        return self  # nothing in it is ever written to, and a config is copied often

    @property
    def is_of_biases(self) -> bool:
        """Whether its templates are of biases, so that it belongs to a ``BiasConfig``."""
        return any(group.kind == "bias" for group in self.groups.values())

    @property
    def reference(self) -> dict[str, str | None]:
        """What a task stores of its bank: ``{"name": ..., "fingerprint": ...}``."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    @property
    def nbytes(self) -> int:
        """Bytes of templates and base coefficients."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, group in self.groups.items():
            if group.templates is not None and group.base is not None:
                tensors[f"{name}.templates"], tensors[f"{name}.base"] = group.templates, group.base
            elif group.grown is not None:
                tensors.update(group.grown.named(name))
        return tensors

    def at(self, fingerprint: str | None) -> StoredBank | None:
        """This bank as it was when it had a fingerprint (None: as it is), in the same memory; None if it never had."""
        if fingerprint in (None, self.fingerprint):
            return self
        for place, entry in enumerate(self.history):
            if entry["fingerprint"] == fingerprint:
                groups = {
                    name: group if group.grown is None else replace(group, grown=group.grown.first(entry["templates"][name]))
                    for name, group in self.groups.items()
                }
                return replace(
                    self,
                    groups=groups,
                    version=int(entry["version"]),
                    fingerprint=str(fingerprint),
                    history=self.history[:place],
                )
        return None

    def save(self, path: str | Path) -> StoredBank:
        """Write the bank file into a folder, which is made if missing.

        Returns:
            the same bank under the folder's name.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self._tensors().items()}
        header = {
            "format": FORMAT,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "history": [dict(entry) for entry in self.history],
            "content": _digest(tensors),
            "mimicry": self.mimicry if isinstance(self.mimicry, str) else dict(self.mimicry),
            "groups": {
                name: {
                    "kind": group.kind,
                    "members": list(group.members),
                    "templates": group.num_templates,
                    "recipe": None if group.recipe is None else group.recipe.to_lists(),
                    **({} if group.grown is None else _described(group.grown)),
                    **({} if group.widths is None else {"widths": list(group.widths)}),
                }
                for name, group in self.groups.items()
            },
            "base_fingerprint": dict(self.base_fingerprint),
        }
        save_file(tensors, folder / BANK_WEIGHTS, metadata={"format": "pt"})
        (folder / BANK_CONFIG).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        return self.under(str(path))

    def push_to_hub(self, repo_id: str, **options: Any) -> StoredBank:
        """Upload the bank file with its card to a repository; see ``push_bank_to_hub`` for the arguments.

        Returns:
            the same bank under the repository's name.
        """
        from ..hub.transfer import push_bank_to_hub  # it stands above bank_files

        return self.under(push_bank_to_hub(self, repo_id, **options).repo_url.repo_id)

    def under(self, name: str | None) -> StoredBank:
        """The same bank under another name."""
        return replace(self, name=name)


def load_bank(name: str | Path, *, revision: str | None = None, token: str | None = None) -> StoredBank:
    """Read a bank file from a folder, or from a repository on the Hub.

    Raises:
        RecastBankError: if there is none.
        RecastLoadError: if it is damaged, or of a format that this version does not know.
    """
    paths = _local_files(Path(name)) or _hub_files(str(name), revision, token)
    try:
        header = json.loads(paths[1].read_text(encoding="utf-8"))
        tensors = load_file(paths[0])
    except (OSError, ValueError, SafetensorError) as error:
        raise RecastLoadError(f"the bank file at {str(name)!r} cannot be read: {error}. Fetch it again.") from error
    return _assemble(str(name), header, tensors)


def _local_files(folder: Path) -> tuple[Path, Path] | None:
    paths = folder / BANK_WEIGHTS, folder / BANK_CONFIG
    return paths if paths[0].is_file() and paths[1].is_file() else None


def _hub_files(name: str, revision: str | None, token: str | None) -> tuple[Path, Path]:
    try:
        weights, config = (hf_hub_download(name, f, revision=revision, token=token) for f in (BANK_WEIGHTS, BANK_CONFIG))
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        raise RecastBankError(
            f"there is no template bank at {name!r}: neither a folder with {BANK_WEIGHTS} and {BANK_CONFIG}, nor a repository "
            f"on the Hub that can be reached ({type(error).__name__})"
        ) from error
    return Path(weights), Path(config)


def _assemble(name: str, header: Any, tensors: dict[str, Tensor]) -> StoredBank:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        given = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise RecastLoadError(
            f"the bank file at {name!r} is of another format\n  format of the file: {given}\n  format known here: {FORMAT}\n"
            "Update recast_peft, or write the bank again."
        )
    try:
        if header["content"] != _digest(tensors):
            raise RecastLoadError(
                f"the bank file at {name!r} is damaged: {BANK_WEIGHTS} is not what {BANK_CONFIG} says. Fetch it again."
            )
        groups = {}
        for bank, entry in header["groups"].items():
            if entry["kind"] not in KINDS:
                raise RecastLoadError(f"bank {bank!r} of {name!r} is of kind {entry['kind']!r}; known: {', '.join(KINDS)}")
            dense = entry["kind"] == "dense"
            groups[bank] = StoredGroup(
                tuple(entry["members"]),
                tensors[f"{bank}.templates"] if dense else None,
                tensors[f"{bank}.base"] if dense else None,
                None if entry.get("recipe") is None else Recipe.from_lists(entry["recipe"]),
                _grown_of(bank, entry, tensors) if entry["kind"] in ("grown", "bias") else None,
                tuple(entry["widths"]) if entry["kind"] == "bias" else None,
            )
        return StoredBank(
            groups,
            header["base_fingerprint"],
            header["mimicry"],
            name,
            int(header["version"]),
            header["fingerprint"],
            tuple(header.get("history", ())),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RecastLoadError(f"{BANK_CONFIG} of {name!r} lacks or misstates {error}. Fetch it again.") from error


def _described(grown: GrownTemplates) -> dict[str, Any]:
    return {
        "shape": list(grown.weight_shape),
        "plain": grown.plain,
        "factored": len(grown.tensors) == 2,
        "energy": list(grown.energy),
    }


def _grown_of(bank: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GrownTemplates:
    only = "" if entry["plain"] else "only_"
    parts = tuple(tensors[f"{bank}.{only}{part}"] for part in PARTS[2 if entry["factored"] else 1])
    return GrownTemplates(parts, tuple(entry["shape"]), entry["plain"], tuple(entry["energy"]))


def find_bank(
    reference: Mapping[str, str | None], task_folder: str | None = None, how_to_load: str | None = None
) -> StoredBank:
    """The bank that a task names.

    Args:
        reference: ``{"name": ..., "fingerprint": ...}``; without a fingerprint any bank of the name will do.
        task_folder: where the task was read from; the bank may lie there too, or at a path relative to it.
        how_to_load: the end of the message if it is not found; None says how a bank of weights is handed over.

    Raises:
        RecastBankError: if it is not found, or is another one; the message says how to hand it over.
    """
    name, fingerprint = reference.get("name"), reference.get("fingerprint")
    tried: list[str] = []
    candidates = [task_folder, str(Path(task_folder) / name) if name else None] if task_folder else []
    for place in candidates:
        if place is not None and _local_files(Path(place)):
            bank = load_bank(place)
            found = bank.at(fingerprint)
            if found is not None:
                return found
            tried.append(f"{place} holds {bank.fingerprint}")
    if name:
        try:
            bank = load_bank(name)
        except RecastBankError as error:
            tried.append(str(error))
        else:
            found = bank.at(fingerprint)
            if found is not None:
                return found
            tried.append(f"{name} holds {bank.fingerprint}")
    raise RecastBankError(
        f"the task needs the template bank {name!r} with fingerprint {fingerprint}, which is not at hand\n"
        + "".join(f"  {line}\n" for line in tried)
        + (how_to_load or HOW_TO_LOAD)
    )


HOW_TO_LOAD = (
    "Hand the bank over with the task's config:\n"
    "  config = RecastConfig.from_pretrained(task)\n"
    "  config.bank = load_bank(folder_or_repository)\n"
    "  model = PeftModel.from_pretrained(backbone, task, config=config)"
)


def check_reference(reference: Any) -> str | None:
    """What is wrong with the bank that a config names, or None."""
    if not isinstance(reference, Mapping) or not set(reference) <= {"name", "fingerprint"} or not any(reference.values()):
        return "the name of a bank file, a StoredBank, or {'name': ..., 'fingerprint': ...}"
    if not all(value is None or isinstance(value, str) for value in reference.values()):
        return "texts as 'name' and 'fingerprint'"
    return None


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """A hash of names, shapes and numbers; in ``dtype`` if given, else as they are."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {dtype or tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), 1 << 24):  # in parts: a copy in another dtype of all at once would be large
            part = flat[start : start + (1 << 24)]
            digest.update((part if dtype is None else part.to(dtype)).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
