"""Whether what lies in a folder is whole and fit to be used: tasks, banks, compressed models, packed pools. Builds no model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..banks.card import BANK_CONFIG, BANK_WEIGHTS, REST_WEIGHTS
from ..banks.files import find_bank, load_bank
from ..config import RecastConfig
from ..errors import RecastBankError, RecastError
from ..names import COEFFICIENTS
from ..options.record import hub_repository
from ..storage.cards import CARD_NAME, read_card
from ..storage.json_reader import Fields
from ..storage.pairs import companion_of
from ..storage.tensors import CHECKSUM, check_finite, check_floating, outliers, read_metadata, read_tensors
from .task_files import numbers_file, read_task_config, task_sizes

ERROR, WARNING, INFO = "error", "warning", "info"


@dataclass(frozen=True)
class Finding:
    """What was found of one file or folder.

    Attributes:
        level: ``"error"`` (cannot be used), ``"warning"`` (can, but look at it) or ``"info"``.
        place: the file or folder.
        text: what was found.
    """

    level: str
    place: Path
    text: str


def verify_folder(folder: Path) -> list[Finding]:
    """Look at everything of this library in a folder, and in the folders in it, however deep; hidden ones are left out.

    Args:
        folder: a task, a folder of tasks, a bank, a compressed model, a folder with packed pools, or several of these; or the
            file of a packed pool.

    Returns:
        what was found; an error if there is nothing.
    """
    if folder.is_file():
        return [*_guarded(folder, _packed(folder))] or [Finding(ERROR, folder, "it is no packed pool; give a task's folder")]
    if not folder.is_dir():
        return [Finding(ERROR, folder, "there is no such folder or file")]
    found = [finding for place in _folders(folder) for finding in _verify_one(place)]
    return found or [Finding(ERROR, folder, "there is no task, bank, compressed model or packed pool in it")]


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and those in it; a link to a folder is looked at, but not what lies deeper there, which may lead back."""
    for root, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(root)
        yield from (path for name in names if (path := Path(root, name)).is_symlink())


def _verify_one(folder: Path) -> Iterator[Finding]:
    if (folder / CONFIG_NAME).is_file() or numbers_file(folder) is not None:
        yield from _guarded(folder, _task(folder))
    if (folder / BANK_WEIGHTS).is_file() or (folder / BANK_CONFIG).is_file():
        yield from _guarded(folder, _bank(folder))
    known = {SAFETENSORS_WEIGHTS_NAME, BANK_WEIGHTS, REST_WEIGHTS}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in known:
            yield from _guarded(file, _packed(file))


def _guarded(place: Path, findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            held = list(findings)
        yield from held
        yield from (Finding(WARNING, place, str(warning.message)) for warning in said if warning.category is UserWarning)
    except (RecastError, OSError) as error:
        yield Finding(ERROR, place, str(error))


def _task(folder: Path) -> Iterator[Finding]:
    fields = read_task_config(folder)
    config = RecastConfig.from_pretrained(str(folder))  # refuses values of the wrong kind
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        yield Finding(ERROR, folder, f"there is no {SAFETENSORS_WEIGHTS_NAME}: the task's numbers are missing")
        return
    content = read_tensors(file, floating=False)
    coefficients = {key: tensor for key, tensor in content.tensors.items() if COEFFICIENTS in key}
    check_floating(str(file), coefficients)
    yield Finding(INFO, folder, f"a task of {task_sizes(folder).coefficients:,} coefficients, whole")
    if CHECKSUM not in content.metadata:
        yield Finding(WARNING, file, "has no checksum (written by an earlier version, or by another program)")
    for key, value in outliers(coefficients).items():
        yield Finding(WARNING, file, f"{key} holds {value:.4g}; no task that was trained has a coefficient as large as that")
    yield from _provenance(folder, config, fields)


def _provenance(folder: Path, config: RecastConfig, fields: Fields) -> Iterator[Finding]:
    backbone: dict[str, Any] = config.backbone or {}
    repository = hub_repository(backbone)
    if not fields.get("base_fingerprint"):
        yield Finding(WARNING, folder, "no fingerprint of the pretrained weights: a wrong base would not be noticed")
    if repository is None:
        yield Finding(WARNING, folder, "its backbone is no repository on the Hub: others have to find it themselves")
    elif not backbone.get("revision"):
        yield Finding(WARNING, folder, f"the revision of its backbone {repository} is not known")
    else:
        yield Finding(INFO, folder, f"learned on {repository} at {backbone['revision']}")
    license = _license(folder / CARD_NAME) or backbone.get("license")
    yield Finding(INFO, folder, f"license: {license}") if license else Finding(WARNING, folder, "no license is stated")
    for reference in (config.bank_reference, *config.partner_banks.values()):
        if reference is not None and reference.get("name"):
            yield _named_bank(folder, dict(reference))


def _named_bank(folder: Path, reference: dict[str, str | None]) -> Finding:
    try:
        bank = find_bank({**reference, "name": Path(str(reference["name"])).name}, str(folder))
    except RecastBankError:
        return Finding(WARNING, folder, f"its bank {reference['name']!r} does not lie here and was not looked at")
    return Finding(INFO, folder, f"its bank lies at {bank.name}, fingerprint {bank.fingerprint}")


def _license(card: Path) -> Any:
    return read_card(card, lenient=True).data.get("license") if card.is_file() else None


def _bank(folder: Path) -> Iterator[Finding]:
    bank = load_bank(folder)
    yield Finding(INFO, folder, f"a bank of {len(bank.groups)} groups, fingerprint {bank.fingerprint}, whole")
    if not _license(folder / CARD_NAME):
        yield Finding(WARNING, folder, "no license is stated")
    rest = companion_of(folder / BANK_WEIGHTS, folder / REST_WEIGHTS)
    if rest.is_file():
        content = read_tensors(rest, floating=False)
        yield Finding(INFO, folder, f"the rest of a compressed model, {len(content.tensors)} tensors, whole")


def _packed(file: Path) -> Iterator[Finding]:
    said = read_metadata(file)
    if said and "groups" not in said:
        return  # a file of others, which may be large
    content = read_tensors(file, floating=False, finite=False)
    if "groups" not in content.metadata:
        return  # a file of others
    check_finite(str(file), content.tensors)
    yield Finding(INFO, file, f"a packed pool of {len(content.tensors)} tensors, whole")
    if CHECKSUM not in content.metadata:
        yield Finding(WARNING, file, "has no checksum (written by an earlier version)")
