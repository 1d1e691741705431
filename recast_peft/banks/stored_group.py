"""One group of a stored bank: what it holds, how a header describes it, and what of a header is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import RecastLoadError
from ..mimicry import FittedTemplates, Recipe
from ..storage.json_reader import Fields
from ..storage.tensors import check_shapes
from ..validation import is_matrix
from .grown_templates import PARTS, GrownTemplates

# how a group's templates are given; a further kind is a row here and in StoredGroup
KINDS = ("exact", "dense", "grown", "bias", "readout")
MOST = 1 << 40  # templates, widths and sides of shapes, which the tensors themselves bound


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
        widths: for templates of biases the numbers in each member's bias, of a readout the features that each member reads; a
            template of ``grown`` holds those of all members side by side. None for templates of weights.
        offset: of a readout: what is added to the features that its templates read, ``(templates,)``; else None.
        pools: of a readout: whether what members read is pooled over positions, or read at each of them; else None.
    """

    members: tuple[str, ...]
    templates: Tensor | None = None
    base: Tensor | None = None
    recipe: Recipe | None = None
    grown: GrownTemplates | None = None
    widths: tuple[int, ...] | None = None
    offset: Tensor | None = None
    pools: bool | None = None

    @classmethod
    def of(cls, members: tuple[str, ...], fitted: FittedTemplates | None) -> StoredGroup:
        """A group with fitted templates; None leaves it to the members' pretrained weights."""
        return cls(members) if fitted is None else cls(members, fitted.templates.detach(), fitted.base.float())

    @property
    def kind(self) -> str:
        """``"exact"``, ``"dense"``, ``"grown"``, ``"bias"`` or ``"readout"``."""
        if self.offset is not None:
            return "readout"
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
        """Numbers that a task trains for the group: none for a readout; for biases a coefficient moves all members."""
        if self.offset is not None:
            return 0
        return self.num_templates * (len(self.members) if self.widths is None else 1)

    def by_member(self) -> dict[str, Tensor]:
        """The templates of biases, or of a readout, by member, each ``(templates, width)``, in the same memory."""
        assert self.grown is not None
        assert self.widths is not None
        return dict(zip(self.members, self.grown.tensors[0].split(list(self.widths), dim=1), strict=True))

    def named(self, bank: str) -> dict[str, Tensor]:
        """The tensors by their names in a bank file."""
        if self.grown is not None:
            return {**self.grown.named(bank), **({} if self.offset is None else {f"{bank}.offset": self.offset})}
        if self.templates is None or self.base is None:
            return {}
        return {f"{bank}.templates": self.templates, f"{bank}.base": self.base}

    def describe(self) -> dict[str, Any]:
        """The group as the header of a bank file has it; see :func:`read_group`."""
        described: dict[str, Any] = {
            "kind": self.kind,
            "members": list(self.members),
            "templates": self.num_templates,
            "recipe": None if self.recipe is None else self.recipe.to_lists(),
        }
        if self.grown is not None:
            described["shape"] = list(self.grown.weight_shape)
            described["plain"] = self.grown.plain
            described["factored"] = len(self.grown.tensors) == 2
            described["energy"] = list(self.grown.energy)
        if self.widths is not None:
            described["widths"] = list(self.widths)
        if self.pools is not None:
            described["pools"] = self.pools
        return described


def read_group(bank: str, entry: Fields, tensors: Mapping[str, Tensor], what: str) -> StoredGroup:
    """A group as a header describes it, with tensors that fit the description.

    Raises:
        RecastLoadError: if the description and the tensors do not fit each other.
    """
    kind = entry.text("kind")
    if kind not in KINDS:
        raise RecastLoadError(f"bank {bank!r} of {what} is of kind {kind!r}; known: {', '.join(KINDS)}")
    members = tuple(entry.texts("members"))
    if not members or len(set(members)) < len(members) or not all(members):
        raise RecastLoadError(
            f"bank {bank!r} of {what} has the members {list(members)[:6]}; each is expected once, by its name"
        )
    templates = entry.integer("templates", 0, MOST)
    recipe = _recipe(entry, len(members), templates)
    group = StoredGroup(members, recipe=recipe)
    if kind == "dense":
        found, base = _dense(bank, len(members), tensors, what)
        group = replace(group, templates=found, base=base)
    elif kind != "exact":
        group = replace(group, grown=_grown(bank, entry, tensors, what))
    if kind in ("bias", "readout"):
        group = replace(group, widths=tuple(entry.integers("widths", 1, MOST)))
    if kind == "readout":
        check_shapes(what, tensors, {f"{bank}.offset": (templates,)})
        group = replace(group, offset=tensors[f"{bank}.offset"], pools=entry.flag("pools"))
    if group.num_templates != templates:
        raise RecastLoadError(
            f"bank {bank!r} of {what} has another number of templates\n  in its description: {templates}\n"
            f"  in its tensors:     {group.num_templates}\nNothing was loaded; fetch it again."
        )
    if group.widths is not None and (len(group.widths) != len(members) or (sum(group.widths),) != group.weight_shape):
        raise RecastLoadError(
            f"bank {bank!r} of {what} has templates of {group.weight_shape} numbers for widths of {list(group.widths)[:6]}, "
            f"for {len(members)} members. Nothing was loaded; fetch it again."
        )
    return group


def _dense(bank: str, layers: int, tensors: Mapping[str, Tensor], what: str) -> tuple[Tensor, Tensor]:
    names = f"{bank}.templates", f"{bank}.base"
    check_shapes(what, tensors, {name: tuple(tensors[name].shape) if name in tensors else () for name in names})
    templates, base = (tensors[name] for name in names)
    if templates.ndim < 2 or not templates.numel():
        raise RecastLoadError(
            f"{what}: {names[0]} has shape {tuple(templates.shape)}; (templates, *shape of a weight) expected"
        )
    check_shapes(what, tensors, {names[1]: (layers, len(templates))})
    return templates, base


def _grown(bank: str, entry: Fields, tensors: Mapping[str, Tensor], what: str) -> GrownTemplates:
    plain, factored = entry.flag("plain"), entry.flag("factored")
    names = [f"{bank}.{'' if plain else 'only_'}{part}" for part in PARTS[2 if factored else 1]]
    shape = tuple(entry.integers("shape", 1, MOST))
    first = tensors.get(names[0])
    if not shape or first is None or first.ndim < 1 or (factored and first.ndim != 3):
        raise RecastLoadError(f"{what} lacks {names[0]}, or it or its shape {shape} cannot be used. Fetch it again.")
    count = len(first)
    expected: dict[str, tuple[int, ...]]
    if factored:
        rank = first.shape[2]
        expected = {names[0]: (count, shape[0], rank), names[1]: (count, rank, math.prod(shape[1:]))}
    else:
        expected = {names[0]: (count, *shape)}
    check_shapes(what, tensors, expected)
    return GrownTemplates(tuple(tensors[name] for name in names), shape, plain, tuple(entry.numbers("energy", [])))


def _recipe(entry: Fields, layers: int, templates: int) -> Recipe | None:
    stored = entry.object("recipe", None)
    if stored is None:
        return None
    for key, rows, columns in (("mix", templates, layers), ("base", layers, templates)):
        if not is_matrix(stored.get(key), rows, columns):
            raise RecastLoadError(f"{stored.what}: {key!r} is expected to have {rows} rows of {columns} finite numbers")
    return Recipe.from_lists(stored.content)  # type: ignore[arg-type]
