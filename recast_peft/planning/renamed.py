"""Modules that have another name than a stored task gives them, found by the fingerprints of their weights.

A library renames its modules from one version to the next, and a backbone becomes a part of a user's module or is taken out of
one. The weights stay what they were, and a task holds a fingerprint of each that it composes:

    names that the task gives    -key_mapping->  -same fingerprint, one module->  names in the model
    other names in its file      -rules that all of these pairs agree on------->  (norms, heads, places of partners)

Nothing is guessed: a weight that several modules have, or none, leaves the task with the names that it came with.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..composition.fingerprint import same_weight
from ..config import RecastConfig
from ..names import block_of, ends_in, plain_name, unwrapped
from .candidates import Candidate, composed_layer, find_candidates


class Renaming:
    """Says how modules that a task names are called in a model.

    Args:
        model: a plain model, or one with tasks.
        pairs: modules whose names are known in both, by their old names.
        key_mapping: regular expressions and what replaces them, as PEFT takes them: the first that matches a name.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, str], key_mapping: Mapping[str, str] | None = None) -> None:
        self.pairs, self.key_mapping = dict(pairs), dict(key_mapping or {})
        self.known = {plain_name(name) for name, _ in unwrapped(model).named_modules()}
        self._library_name = _renamed_by_transformers(model) if pairs else lambda name: name
        found: dict[str, set[str]] = {}
        for old, new in pairs.items():
            for before, after in _prefix_pairs(old, new):
                found.setdefault(before, set()).add(after)
        rules = [(before, *after) for before, after in found.items() if len(after) == 1]  # two things say nothing
        self.rules = sorted(rules, key=lambda rule: -rule[0].count("."))  # the longest first

    def __call__(self, name: str) -> str | None:
        """The name in the model of a module that a task names; None if no rule leads to one."""
        name = mapped(name, self.key_mapping)
        if name in self.pairs:
            return self.pairs[name]
        for spelling in (name, self._library_name(name)):
            replaced = (_replaced(spelling, before, after) for before, after in self.rules)
            for new in (*replaced, spelling):
                if new in self.known:
                    return new
        return None


def mapped(name: str, key_mapping: Mapping[str, str] | None) -> str:
    """A name as a ``key_mapping`` changes it.

    >>> mapped("blocks.0.attn", {"^blocks": "encoder.blocks"})
    'encoder.blocks.0.attn'
    """
    for pattern, replacement in (key_mapping or {}).items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def find_renamed(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    base_fingerprint: Mapping[str, str],
    key_mapping: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Find the modules of a stored task that have other names in this model.

    Args:
        model: a plain model, or one with tasks.
        groups: the modules that the task composes, by group.
        base_fingerprint: that of each module's pretrained weight.
        key_mapping: regular expressions and what replaces them; they go first.

    Returns:
        for each of the task's modules with another name the one in the model. It is empty where all names are there, and,
        ``key_mapping`` aside, where the weights do not tell (not found, or several times): the names are refused then as they
        are. A warning says what was found by the weights.
    """
    names = [name for members in groups.values() for name in members]
    named = {name: mapped(name, key_mapping) for name in names}
    by_key = {old: new for old, new in named.items() if old != new}
    candidates = {c.name: c for c in find_candidates(model)}
    if all(new in candidates for new in named.values()) or not all(name in base_fingerprint for name in names):
        return by_key
    found = _by_weight(model, {named[name]: base_fingerprint[name] for name in names}, candidates)
    if found is None:
        return by_key
    renamed = {old: found[new] for old, new in named.items() if found[new] != old}
    shown = "\n".join(f"  {old} -> {new}" for old, new in list(renamed.items())[:3])
    warnings.warn(
        f"{len(renamed)} of {len(names)} modules of the task have other names in this model; they were found by their "
        f"pretrained weights:\n{shown}\nSave the task again to store it under these names.",
        stacklevel=2,
    )
    return renamed


def renamed_fields(config: RecastConfig, called: Renaming) -> dict[str, Any]:
    """The fields of a task's config that name modules, for a model that calls these otherwise.

    A name that is the ending of one in the model, and a pattern, stays as it is.
    """

    def new(value: Any) -> Any:
        if isinstance(value, dict):
            return {new(name): kept for name, kept in value.items()}
        if isinstance(value, (list, tuple, set)):
            return type(value)(new(name) for name in value)
        is_there = not isinstance(value, str) or any(ends_in(name, [value]) for name in called.known)
        return value if is_there else called(value) or value

    lora: Any = copy.deepcopy(config.lora_config)
    for name in () if lora is None else ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        setattr(lora, name, new(getattr(lora, name)))
    head, partners = config.head_module, config.partners
    return {
        "record": replace(config.record, lora_config=lora),  # type: ignore[type-var]
        "head_module": head and (called(head) or head),
        "modules_to_save": new(config.modules_to_save),
        "partners": partners and [replace(p, target_modules=new(p.target_modules)) for p in partners],  # type: ignore
    }


def _by_weight(model: nn.Module, wanted: dict[str, str], candidates: dict[str, Candidate]) -> dict[str, str] | None:
    """The one module of each weight; None if some weight has none, or it cannot be said which."""
    usable = [c for c in candidates.values() if c.weight_name is not None and c.reason is None]
    held = {c.name: c.fingerprint for c in usable if composed_layer(c.visible) is not None or not c.weight.is_meta}
    matches = {name: [n for n, own in held.items() if same_weight(fingerprint, own)] for name, fingerprint in wanted.items()}
    for name, hits in matches.items():
        if name in hits:  # where it always was
            hits[:] = [name]
    pairs = {name: hits[0] for name, hits in matches.items() if len(hits) == 1}
    rules = Renaming(model, pairs)
    for name, hits in matches.items():
        if len(hits) > 1 and rules(name) in hits:  # weights that are equal: the others say which is which
            pairs[name] = str(rules(name))
    return pairs if len(set(pairs.values())) == len(wanted) else None


def _renamed_by_transformers(model: nn.Module) -> Callable[[str], str]:
    """What a module that was saved by an earlier version of transformers is called now, by the library's own list."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    return lambda name: rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")


def _prefix_pairs(old: str, new: str) -> Iterator[tuple[str, str]]:
    """What a pair says of the names above it, with ``#`` for a number that is the same in both."""
    above = list(_above(old, new))
    yield from above
    block = _with_places(block_of(old).split("."), block_of(new).split("."))
    if block[0] not in dict(above):  # the layers of a block were renamed: the block itself is there
        yield from _above(block_of(old), block_of(new))


def _above(old: str, new: str) -> Iterator[tuple[str, str]]:
    """A pair of names, and those above them as long as they end alike."""
    a, b = old.split("."), new.split(".")
    while a and b:
        yield _with_places(a, b)
        if a.pop() != b.pop():
            return
    yield _with_places(a, b)


def _with_places(old: list[str], new: list[str]) -> tuple[str, str]:
    numbers = [part for part in old if part.isdigit()]
    if numbers != [part for part in new if part.isdigit()]:
        return ".".join(old), ".".join(new)
    return tuple(".".join("#" if part.isdigit() else part for part in parts) for parts in (old, new))  # type: ignore[return-value]


def _replaced(name: str, before: str, after: str) -> str | None:
    """A name with another beginning; None if it does not begin that way."""
    parts, start = name.split("."), before.split(".") if before else []
    if len(parts) < len(start) or any(p != s and not (s == "#" and p.isdigit()) for p, s in zip(parts, start, strict=False)):
        return None
    numbers = iter([p for p, s in zip(parts, start, strict=False) if s == "#"])
    begin = [next(numbers) if part == "#" else part for part in after.split(".") if part]
    return ".".join(begin + parts[len(start) :])
