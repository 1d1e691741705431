"""What a conversion decided about a task: written with it, and read again instead of deciding once more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from ..banks.files import StoredBank
from ..composition.blocks import with_variable
from ..errors import RecastBankError, RecastConfigError
from ..mimicry import Fidelity
from ..storage.paths import is_hub_name

Reference = dict[str, str | None]
"""What is stored of a bank: ``{"name": ..., "fingerprint": ...}``."""

DECIDED: list[str] = []
"""The ``decided()`` fields of a config, where there is a record, are the record's, here and in ``adapter_config.json``."""

_KEY_MAPPING: ContextVar[Mapping[str, str] | None] = ContextVar("key_mapping", default=None)


@dataclass(frozen=True)
class TaskRecord:
    """What a conversion decided about one task: the fields of :class:`RecastConfig` that are called so, and

    Args:
        bank: the stored bank that the coefficients belong to; None if the banks follow from the pretrained weights.
        partner_banks: the stored banks that partners belong to, by the partner's name.
        is_stored: the task was read from a file, or from what a file holds. Such a record is kept when its config is put on
            another model; any other is dropped then, and the config describes a new task.
        origin: where the task was read from, a folder or repository and the options for the Hub, until it is put on a model;
            not stored.
        saved: the ``modules_to_save`` that the file names, likewise: PEFT's models for a ``task_type`` add classifiers to those
            of a config, which the file does not hold.
        key_mapping: regular expressions and what replaces them in the names of the task's modules, as PEFT takes them; not
            stored.
        renamed: how a module that the task's file names is called in the model, where that has other names; not stored.
    """

    groups: dict[str, list[str]]
    base_fingerprint: dict[str, str]
    recipes: dict[str, dict[str, list[list[float]]]] | None = None
    bank: Reference | None = None
    partner_banks: dict[str, Reference] = field(default_factory=dict)
    num_directions: int | None = None
    num_coefficient_sets: int = 1
    coefficient_sharing: str | int | None = None
    lora_config: LoraConfig | None = None
    problem_type: str | None = None
    backbone: dict[str, Any] | None = None
    fidelity: dict[str, float] | None = None
    surroundings_fingerprint: str | None = None
    is_stored: bool = False
    origin: tuple[str, dict[str, Any]] | None = None
    saved: tuple[str, ...] = ()
    key_mapping: Mapping[str, str] | None = None
    renamed: Callable[[str], str | None] | None = None

    @property
    def folder(self) -> str | None:
        """The folder or repository that the task was read from, as long as it is on no model."""
        return None if self.origin is None else self.origin[0]


def to_fields(record: TaskRecord) -> dict[str, Any]:
    """The record as fields of ``adapter_config.json``, where it lies flat among what the user chose."""
    return {**{name: getattr(record, name) for name in DECIDED}, "bank": record.bank}


def from_fields(fields: Mapping[str, Any], partner_banks: Mapping[str, Reference]) -> TaskRecord | None:
    """The record of a stored task.

    Returns:
        None if the fields are of no stored task: without fingerprints, groups are a user's choice.
    """
    if fields["groups"] is None or fields["base_fingerprint"] is None:
        return None
    found = {name: fields[name] for name in DECIDED}
    bank, mapping = reference_of(fields["bank"]), _KEY_MAPPING.get()
    return TaskRecord(**found, bank=bank, partner_banks=dict(partner_banks), is_stored=True, key_mapping=mapping)


def modules_called(key_mapping: Mapping[str, str] | None) -> AbstractContextManager[None]:
    """Read configs of tasks whose modules have other names in the model that they are for, until the block ends.

    Args:
        key_mapping: regular expressions and what replaces them in the modules' names: the first that matches a name.

    Raises:
        RecastConfigError: if it is no mapping of regular expressions.
    """
    if not isinstance(key_mapping or {}, Mapping):
        raise RecastConfigError(f"key_mapping is a {type(key_mapping).__name__}; a mapping of regular expressions is expected")
    for pattern, replacement in (key_mapping or {}).items():
        try:
            re.sub(pattern, replacement, "")
        except (re.error, TypeError) as error:
            shown = f"{pattern!r}: {replacement!r} cannot be used: {error}"
            raise RecastConfigError(f"key_mapping: {shown}; a regular expression and what replaces it are expected") from error
    return with_variable(_KEY_MAPPING, key_mapping)


class Decided:
    """A field of a config that a conversion decides: it reads as the record has it, without a record as it was given."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        DECIDED.append(name)

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self.default  # where a dataclass asks for it
        return vars(config)[self.name] if config.record is None else getattr(config.record, self.name)

    def __set__(self, config: Any, value: Any) -> None:
        if config.record is not None and config.record.is_stored:
            raise RecastConfigError(
                f"{self.name} of a stored task says how it was made, and cannot be changed\n  stored: "
                f"{getattr(config.record, self.name)!r:.200}\n  given:  {value!r:.200}\nMake a new RecastConfig for a new task."
            )
        vars(config)[self.name] = value


def decided(default: Any = None) -> Any:
    """A dataclass field that a conversion decides, see :class:`Decided`."""
    return Decided(default)


def reference_of(bank: StoredBank | Mapping[str, str | None] | str | None) -> Reference | None:
    """What is stored of a bank that a config names: an object, a name or a reference."""
    if bank is None:
        return None
    if isinstance(bank, StoredBank):
        return bank.reference
    if isinstance(bank, str):
        return {"name": bank, "fingerprint": None}
    return {"name": bank.get("name"), "fingerprint": bank.get("fingerprint")}


def bank_to_use(given: Any, record: TaskRecord | None, partner: str | None = None) -> StoredBank | Reference | None:
    """The bank that a task is put on: what its config names, which for a stored task has to be the one of its record.

    Args:
        given: the config's bank: an object in memory, a name or a reference.
        record: record of a stored task; None for a new one.
        partner: the partner that the bank is for; None for the bank of the coefficients.

    Returns:
        the bank, where it is in memory (at the version of the record, if it has grown since), or a reference to it.

    Raises:
        RecastBankError: if a stored task is handed another bank.
    """
    if record is None:
        return given if isinstance(given, StoredBank) else reference_of(given)
    stored = record.bank if partner is None else record.partner_banks.get(partner)
    wanted = None if stored is None else stored["fingerprint"]
    if isinstance(given, StoredBank):
        found = None if stored is None else given.at(wanted)
        if found is None:
            raise _other_bank(partner, stored, f"{given.fingerprint} ({given.name or 'in memory'})")
        return found
    named = reference_of(given)
    if named is None:
        return stored
    if stored is None or named["fingerprint"] not in (None, wanted):
        raise _other_bank(partner, stored, f"{named['fingerprint']} ({named['name']!r})")
    return {"name": named["name"] or stored["name"], "fingerprint": wanted}


def _other_bank(partner: str | None, stored: Reference | None, given: str) -> RecastBankError:
    kind = "template bank" if partner is None else f"bank for its partner {partner}"
    return RecastBankError(
        f"the task was made on {'no' if stored is None else 'another'} {kind}\n"
        f"  bank of the task: {None if stored is None else stored['fingerprint']}\n  bank given:       {given}"
    )


def mean_fidelity(measured: Iterable[Fidelity]) -> dict[str, float] | None:
    """How well compressed banks reproduce their members, as a record holds it; None where nothing was measured."""
    each = list(measured)
    if not each:
        return None
    cosines = [fidelity.cosine for fidelity in each]
    return {
        "mean_cosine": sum(cosines) / len(cosines),
        "worst_cosine": min(cosines),
        "mean_relative_error": sum(fidelity.relative_error for fidelity in each) / len(each),
    }


def hub_repository(backbone: Mapping[str, Any] | None) -> str | None:
    """The repository on the Hub that holds a backbone's weights, if it is known to be there."""
    if not backbone:
        return None
    name = backbone.get("repository") if backbone.get("library") == "timm" else backbone.get("name")
    return name if is_hub_name(name) else None


AFTER_SAVING: list[Callable[[str], None]] = []
"""Called with the folder each time that a config was written: the model card is made here, by a package further out."""

BEFORE_LOADING: list[Callable[[Any], Any]] = []
"""Called with the model each time that a task's file is put in: a ``PeftModel`` gets the verbs of a package further out."""
