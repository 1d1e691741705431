"""The text of a model card: our part between two marks, everything else its owner's; values from files are shown as they are.

What comes from a config (names of labels, tasks and results) may hold anything. :func:`plain` and :func:`code` let none of it
act as Markdown, HTML, a new row or one of our marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..names import METHOD_NAME
from .atomic import write_bytes
from .paths import is_hub_name

CARD_NAME = "README.md"
PAPER = "[RECAST](https://arxiv.org/abs/2411.16870)"
BEGIN, END = "<!-- recast: begin (made from the task's files; write outside of it) -->", "<!-- recast: end -->"
LONGEST = 1000  # characters of one value
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+")
_MARKUP = re.compile(r"([\\`\[\]|])")
_KINDS = ("task", "tasks", "bank")  # of our part, in this order; by how the latter two begin
_BEGINS = re.compile(
    rf"^(?:(?P<tasks>## (?:Tasks|More tasks) in this repository$)|(?P<bank># .*\n\n{re.escape(PAPER)} template banks\.))", re.M
)


# ---------------------------------------------------------------- values


def one_line(value: Any) -> str:
    """A value as one line without control characters, cut where it is very long."""
    text = _CONTROL.sub(" ", f"{value:.4g}" if isinstance(value, float) else str(value)).strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def plain_text(value: Any) -> str:
    """A value as text of a card that is nothing but text."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", text)


def code(value: Any) -> str:
    """A value in the type of code, where neither a backtick nor a bracket of HTML can be escaped."""
    text = one_line(value).replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}").replace("`", "'")
    return f"`{text.replace('|', chr(92) + '|')}`"


def quoted(value: Any) -> str:
    """A value as a literal of Python and JSON, in a block of code."""
    return json.dumps(one_line(value), ensure_ascii=False)


def hub_link(name: str) -> str:
    """A repository of models as a link; a name that is none in the type of code."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_name(name) else code(name)


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows of two columns; both are Markdown already."""
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def _unmarked(text: str) -> str:
    return text.replace("<!--", "<! --").replace("-->", "-- >")


# ---------------------------------------------------------------- the file


def card_data(base: Any, license: str | None, *tags: str) -> dict[str, Any]:
    """The metadata of every card; a base model is named if it is a repository on the Hub."""
    of_base = data_of_bases([base] if is_hub_name(base) else [])
    named = {METHOD_NAME, "peft", *tags, *of_base.get("tags", ())}
    return {"library_name": "peft", **of_base, "tags": sorted(named), **({"license": license} if license else {})}


def data_of_bases(bases: Sequence[str]) -> dict[str, Any]:
    """The metadata that name the base models of a card, repositories on the Hub."""
    if not bases:
        return {}
    tags = [f"base_model:adapter:{base}" for base in bases]
    return {"base_model": list(bases) if len(bases) > 1 else bases[0], "base_model_relation": "adapter", "tags": tags}


def merge_card(path: Path, data: Mapping[str, Any], part: str, kind: str = "task", *, license_is_given: bool = False) -> str:
    """Put our part into a card and keep what its owner wrote around it; writing the same twice changes nothing.

    A task, a list of tasks and a bank may lie in one repository, whose card then has a part of each.

    Args:
        path: path of the card, which is made if it is missing.
        data: metadata; it goes before what is there, but for a license that is not given.
        part: our part of the text; those of other kinds stay.
        kind: what it is of: "task" (that in the folder itself), "tasks" (the list of those in its folders) or "bank".
        license_is_given: whether the license of ``data`` goes before the one that is there.

    Returns:
        the path.
    """
    parts = {**own_parts(path), kind: part.replace(BEGIN, _unmarked(BEGIN)).replace(END, _unmarked(END))}
    block = "\n\n".join([BEGIN, *(parts[kind] for kind in _KINDS if parts.get(kind)), END])
    if not path.is_file():
        _write(path, f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{block}\n")
        return str(path)
    card = read_card(path)
    base = card.data.get("base_model")
    if isinstance(base, str) and not is_hub_name(base):
        card.data["base_model"] = None  # PEFT writes paths of this machine there, which the Hub refuses
    if "model-index" in data:
        card.data.eval_results = None  # type: ignore[attr-defined]  # else the library writes what was there
    for key, value in data.items():
        if key == "tags":
            stays = base and "base_model" not in data
            kept = [tag for tag in card.data.get("tags") or () if stays or not str(tag).startswith("base_model:")]
            value = sorted({*map(str, kept), *value})
        if key == "license" and card.data.get("license") and not license_is_given:
            continue
        card.data[key] = value
    card.text = _with_block(card.text, block)
    _write(path, str(card).replace("\n", "\r\n" if b"\r\n" in path.read_bytes() else "\n"))
    return str(path)


def _with_block(text: str, block: str) -> str:
    before, begun, rest = text.partition(BEGIN)
    if begun and END in rest:
        return before + block + rest.partition(END)[2]
    if "[More Information Needed]" in text:  # the untouched template that PEFT and huggingface_hub write
        return f"\n{block}\n"
    return f"{(before + rest).rstrip()}\n\n{block}\n"


def own_parts(path: Path) -> dict[str, str]:
    """Our part of a card, by kind (see :func:`merge_card`); empty if there is none."""
    text = read_card(path).text.partition(BEGIN)[2].partition(END)[0].strip() if path.is_file() else ""
    begins = [*_BEGINS.finditer(text)]
    kinds = ("task", *(str(begin.lastgroup) for begin in begins))
    found = pairwise([0, *(begin.start() for begin in begins), len(text)])
    return {kind: text[start:end].strip() for kind, (start, end) in zip(kinds, found, strict=True) if start < end}


def read_card(path: Path, *, lenient: bool = False) -> ModelCard:
    """A card, with line ends as ours are; a mark of UTF-8 at its beginning hides its metadata, and is left out.

    Args:
        path: path of the card.
        lenient: leave out metadata that cannot be read; else, if there are any, all are text.
    """
    # a card that is not UTF-8 is its owner's: the bytes come through as they are
    text = re.sub(r"\r\n?", "\n", path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    try:
        return ModelCard(text, ignore_metadata_errors=lenient)
    except Exception:  # its metadata cannot be read whole: they are kept as text, below ours
        return ModelCard(f"---\nlibrary_name: peft\n---\n\n{text}")


def _write(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8", "surrogateescape"))
