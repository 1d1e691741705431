"""What lies in the folder of a saved task: its config, and how many numbers of which kind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..config import RecastConfig
from ..errors import RecastLoadError
from ..names import COEFFICIENTS, METHOD_NAME, MODEL_PREFIX, entry_key
from ..options.partner import PARTNERS
from ..parts.partner import partner_of_entry
from ..planning.groups import PlannedGroup, coefficient_owners
from ..storage.json_reader import Fields, parse_json
from ..storage.pairs import read_companion
from ..storage.tensors import read_shapes


def has_task_numbers(folder: str | os.PathLike) -> bool:
    """Whether a task's file of numbers lies in a folder."""
    return numbers_file(Path(folder)) is not None


def numbers_file(folder: Path) -> Path | None:
    """A task's file of numbers."""
    return next((folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()), None)


def tasks_inside(folder: Path) -> list[str]:
    """The subfolders that hold a task."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / CONFIG_NAME).is_file())


@dataclass(frozen=True)
class TaskSizes:
    """Numbers and bytes of a saved task: coefficients, LoRA part, partners, whatever else it holds, its files.

    Coefficients that modules share count once, though each module has an entry of its own in the file.
    """

    coefficients: int
    lora: int
    partners: dict[str, int]
    others: int
    file_bytes: int
    config_bytes: int

    @property
    def all(self) -> int:
        """All numbers of the task."""
        return self.coefficients + self.lora + self.beside

    @property
    def beside(self) -> int:
        """Numbers beside coefficients and LoRA part; a bit of a mask counts as one."""
        return self.others + sum(self.partners.values())

    def of_partners(self) -> str:
        """Each partner with its numbers."""
        masks = {method for method, config in PARTNERS.items() if config.acts_on == "weight"}
        return ", ".join(f"{m} {count:,} {'bits' if m in masks else 'numbers'}" for m, count in self.partners.items())


def numbers_by_key(folder: str | os.PathLike) -> dict[str, int]:
    """The keys of a saved task's file, with how many numbers each has.

    Raises:
        RecastLoadError: if there is no such file, or it is damaged.
    """
    file = numbers_file(Path(folder))
    if file is None:
        raise RecastLoadError(
            f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: the task's numbers are missing. Copy the whole folder, or save the "
            "task again."
        )
    if file.name == SAFETENSORS_WEIGHTS_NAME:
        return {entry_key(key): torch.Size(shape).numel() for key, shape in read_shapes(file).items()}
    try:
        entries: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return {entry_key(str(key)): value.numel() for key, value in entries.items()}
    except Exception as error:  # pickle has a kind of error for each kind of damage
        raise RecastLoadError(f"{file} is damaged or incomplete: {error}\nNothing was loaded; fetch it again.") from error


def task_sizes(folder: Path) -> TaskSizes:
    """Numbers and bytes of a saved task."""
    counts = numbers_by_key(folder)
    config = read_task_config(folder)
    for key in _shared_entries(folder, counts) if config.get("coefficient_sharing") is not None else ():
        counts.pop(key, None)
    file = numbers_file(folder)
    assert file is not None
    coefficients = lora = others = 0
    partners: dict[str, int] = {}
    for key, count in counts.items():
        partner = partner_of_entry(key, count)
        if partner is not None:
            partners[partner[0]] = partners.get(partner[0], 0) + partner[1]
        elif COEFFICIENTS in key:
            coefficients += count
        elif f".{LoraModel.prefix}" in key:
            lora += count
        else:
            others += count
    if not config.get("train_coefficients", True):
        coefficients = 0  # they are there, at zero
    return TaskSizes(coefficients, lora, partners, others, file.stat().st_size, (folder / CONFIG_NAME).stat().st_size)


def _shared_entries(folder: Path, counts: dict[str, int]) -> list[str]:
    """The entries of modules that use the coefficients of another module."""
    config = RecastConfig.from_pretrained(str(folder))
    keys = {member: f"{MODEL_PREFIX}{member}.{COEFFICIENTS}" for group in (config.groups or {}).values() for member in group}
    groups = [
        PlannedGroup(name, tuple(group), (), torch.float32, counts.get(keys[group[0]], 0), 1)
        for name, group in (config.groups or {}).items()
    ]
    owners = coefficient_owners(groups, config.coefficient_sharing)
    return [keys[member] for member, owner in owners.items() if owner != member]


def read_task_config(folder: Path) -> Fields:
    """The fields of a saved task's config, as they stand in its file.

    Raises:
        RecastLoadError: if there is none, it is damaged, or it is of another method.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise RecastLoadError(f"{folder} holds no {CONFIG_NAME}: it is no saved task")
    content = parse_json(read_companion(folder / SAFETENSORS_WEIGHTS_NAME, file), str(file))
    if str(content.get("peft_type")).lower() != METHOD_NAME:
        raise RecastLoadError(
            f"{file} is of another method\n  expected: {METHOD_NAME.upper()}\n"
            f"  given:    {str(content.get('peft_type'))[:80]}\nLoad it with peft.AutoPeftModel or peft.PeftModel."
        )
    return content
