"""``adapter_config.json``: read with care, written whole or not at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..errors import RecastConfigError
from ..names import METHOD_NAME
from ..storage.atomic import made_folder, write_json
from ..storage.json_reader import parse_json
from ..storage.pairs import read_companion
from ..storage.patterns import check_pattern
from ..validation import Unexpected, a_path, check_arguments, plain, shown


def read_fields(file: str | os.PathLike) -> dict[str, Any]:
    """The fields that a file holds, of the method that it names.

    Raises:
        RecastConfigError: if it holds no JSON object, is too large or nested too deeply, or is of a method that PEFT lacks.
    """
    check_arguments(a_path, file=file)
    path = Path(file)
    try:
        content = read_companion(path.with_name(SAFETENSORS_WEIGHTS_NAME), path)
    except OSError as error:
        raise RecastConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    values = dict(parse_json(content, str(path), error=RecastConfigError))
    values.pop("runtime_config", None)  # as PEFT does: it is of no use in a file
    if "results" in values:  # earlier versions wrote nan there, which no JSON holds
        values["results"] = json.loads(json.dumps(values["results"]), parse_constant=lambda name: None)
    method = values.get("peft_type")
    if not isinstance(method, str) or method not in PeftType.__members__ or {"cls", "self"} & values.keys():
        raise RecastConfigError(
            f"{path} is no config of a method that PEFT knows\n  given:    peft_type={shown(method)}\n"
            f"  expected: {shown(METHOD_NAME.upper())}, or another of PEFT's\nFetch it again."
        )
    for where, pattern in _patterns(values):
        check_pattern(pattern, f"{where} of {path}")
    return values


def _patterns(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions of a config that will be run; a stored task's targets are its groups, by name."""
    lora, partners = values.get("lora_config"), values.get("partners")
    within = {
        "": {} if values.get("groups") else values,
        "lora_config.": lora,
        **{f"partners[{place}].": partner for place, partner in enumerate(partners if isinstance(partners, list) else ())},
    }
    for prefix, fields in within.items():
        if not isinstance(fields, Mapping):
            continue
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            given = fields.get(name)
            listed = [given] if isinstance(given, str) else list(given) if isinstance(given, (dict, list)) else []
            is_pattern = isinstance(given, (str, dict)) or name == "layers_pattern"  # a list holds plain names
            yield from ((prefix + name, text) for text in listed if is_pattern and isinstance(text, str))


def write_fields(folder: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write the fields of a config, without those of RECAST's own that are None: they would outweigh a task's numbers."""
    kept = {name: value for name, value in values.items() if value is not None or name in PeftConfig.__dataclass_fields__}
    write_json(made_folder(folder) / CONFIG_NAME, kept, sort_keys=True)


def writable(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the fields of a config as JSON holds them; PEFT makes lists of sets when it writes them.

    Raises:
        RecastConfigError: naming a field that was set to what JSON does not hold.
    """
    copied: dict[str, Any] = {}
    for name, value in values.items():
        try:
            copied[name] = plain(value) if name == "results" else copy.deepcopy(value)
            json.dumps(list(value) if isinstance(value, set) else copied[name], allow_nan=False)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"expected {error}" if isinstance(error, Unexpected) else str(error)
            raise RecastConfigError(f"RecastConfig({name}={shown(value)}) cannot be written: {what}") from error
    return copied
