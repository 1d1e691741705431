"""One safetensors file for all tasks of a pool.

    coefficients           (tasks, numbers per task); last those of the LoRA part
    names                  UTF-8, one a line
    heads.K.places         (heads,) places among the tasks, of all classifiers of kind K
    heads.K.labels         (heads,) their labels in the metadata
    heads.K.<key>          (heads, ...) their tensors
    remembered.*           what is remembered for routing
    metadata               the layout, the kinds of classifiers and their labels as JSON

Files of the first format, which had two tensors for each classifier, are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastLoadError
from ..layer import fingerprints_of
from ..parts.head_building import Labels, PreparedHead, head_type, prepare_head
from ..storage.json_reader import parse_value
from ..storage.tensors import read_tensors, write_tensors
from ..tasks.surroundings import surroundings_fingerprint
from ..validation import check_is_no_folder, checked, listed, optional, text
from .heads import HeadKinds, StoredHead
from .layout import PoolLayout, banks_of
from .routing import TaskFeatures

FORMATS = ("recast-task-pool-1", "recast-task-pool-2")
AT_ONCE = 1024  # tasks that are looked at together
LAYOUT = ("groups", "recipes", "base_fingerprint", "bank", "heads", "remembered")  # JSON in the file's metadata
# and what later versions added, as it is taken of files without it
ADDED = {
    **{"biases": "{}", "lora": "[]", "labels": "[]"},
    **dict.fromkeys(("surroundings_fingerprint", "readout", "num_directions"), "null"),
}


@dataclass
class PackedTasks:
    """Tasks as a file holds them: classifiers and what is remembered by the task's place."""

    names: list[str]
    table: Tensor
    heads: dict[int, StoredHead] = field(default_factory=dict)
    remembered: dict[int, TaskFeatures] = field(default_factory=dict)

    def damaged(self) -> list[int]:
        """Places of tasks with numbers that are not finite."""
        bad = {*_damaged_rows(self.table)}
        apart: dict[int, list[int]] = {}  # by kind: places of classifiers that are in no block
        blocks: dict[int, dict[int, int]] = {}  # by block: their places by their rows
        for place, head in self.heads.items():
            if head.row is None:
                apart.setdefault(id(head.kind), []).append(place)
            else:
                blocks.setdefault(id(head.block), {})[head.row] = place
        for places in apart.values():
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                for tensors in zip(*(self.heads[place].held() for place in some), strict=True):
                    bad.update(some[row] for row in _damaged_rows(torch.stack(tensors)))
        for rows in blocks.values():
            for tensor in self.heads[next(iter(rows.values()))].block:
                bad.update(rows[row] for row in _damaged_rows(tensor) if row in rows)
        return sorted(bad)

    def without(self, places: Sequence[int]) -> PackedTasks:
        """The other tasks."""
        kept = [place for place in range(len(self.names)) if place not in {*places}]
        at = {place: new for new, place in enumerate(kept)}
        return PackedTasks(
            [self.names[place] for place in kept],
            self.table[kept],
            {at[place]: head for place, head in self.heads.items() if place in at},
            {at[place]: known for place, known in self.remembered.items() if place in at},
        )


def _damaged_rows(values: Tensor) -> list[int]:
    """Which of ``(tasks, ...)`` hold numbers that are not finite."""
    is_finite = torch.cat([torch.isfinite(some).flatten(1).all(dim=1) for some in values.split(AT_ONCE)])
    return (~is_finite).nonzero().flatten().tolist()


def write_pool(path: str | Path, tasks: PackedTasks, layout: PoolLayout) -> None:
    """Write tasks to a file, whole or not at all.

    Raises:
        RecastConfigError: if a task holds numbers that are not finite, or the path is a folder.
    """
    check_is_no_folder(path, "pool.safetensors")
    bad = [tasks.names[place] for place in tasks.damaged()]
    if bad:
        raise RecastConfigError(
            f"{len(bad)} of {len(tasks.names)} tasks hold numbers that are not finite (NaN or infinity): {', '.join(bad[:5])}. "
            "Remove them first (pool.remove); nothing was written."
        )
    text = "\n".join(tasks.names).encode()
    tensors = {"coefficients": tasks.table, "names": torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)}
    tensors.update(_remembered_tensors(tasks.remembered))
    head_tensors, kinds, labels = _head_tensors(tasks.heads)
    metadata = {
        "groups": layout.config.groups,
        "recipes": layout.config.recipes,
        "num_directions": layout.config.num_directions,
        "base_fingerprint": fingerprints_of(layout.layers),
        "surroundings_fingerprint": surroundings_fingerprint(layout.backbone, layout.layers),
        "bank": layout.bank,
        "biases": layout.biases(),
        "lora": list(layout.lora.parts.items()),
        "readout": layout.readout,
        "heads": kinds,
        "labels": labels,
        "remembered": {},
    }
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    write_tensors(path, {**tensors, **head_tensors}, {"tasks": str(len(tasks.names)), **texts, "format": FORMATS[-1]})


def _head_tensors(heads: Mapping[int, StoredHead]) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    """Tensors, kinds and labels of classifiers."""
    by_kind: dict[tuple[int, Any], list[int]] = {}
    for place, head in heads.items():
        by_kind.setdefault((id(head.kind), head.stored_dtype), []).append(place)
    tensors: dict[str, Tensor] = {}
    kinds = []
    all_labels = {repr(head.labels): head.labels for head in heads.values()}
    numbers = {text: number for number, text in enumerate(all_labels)}
    for number, places in enumerate(by_kind.values()):
        first = heads[places[0]]
        kinds.append(
            {
                "module": first.kind.name,
                "type": head_type(first.kind.empty),
                "dtype": None if first.stored_dtype is None else str(first.stored_dtype).removeprefix("torch."),
                "classes": first.labels.num_classes,
            }
        )
        for key, rows in _stacked([heads[place] for place in places]).items():
            tensors[f"heads.{number}.{key}"] = rows
        tensors[f"heads.{number}.places"] = torch.tensor(places)
        tensors[f"heads.{number}.labels"] = torch.tensor([numbers[repr(heads[place].labels)] for place in places])
    return tensors, kinds, [_saved_labels(labels) for labels in all_labels.values()]


def _saved_labels(labels: Labels) -> dict[str, Any]:
    kind = {} if labels.problem_type is None else {"problem_type": labels.problem_type}
    return {"classes": labels.num_classes, "id2label": labels.id2label, **kind}


def _stacked(heads: Sequence[StoredHead]) -> dict[str, Tensor]:
    """The tensors of classifiers of one kind, ``(classifiers, ...)``, as they are saved."""
    stacked = {}
    for position, key in enumerate(heads[0].kind.keys):
        values = [head.held()[position] for head in heads]
        dtype = heads[0].stored_dtype
        if dtype is None or not values[0].is_floating_point():
            dtype = values[0].dtype if len({v.dtype for v in values}) == 1 else heads[0].kind.dtypes[position]
        stacked[key] = torch.stack([value.detach().to("cpu", dtype) for value in values])
    return stacked


def _remembered_tensors(remembered: Mapping[int, TaskFeatures]) -> dict[str, Tensor]:
    if not remembered:
        return {}
    known = list(remembered.values())
    return {
        "remembered.places": torch.tensor(list(remembered)),
        "remembered.counts": torch.tensor([len(k.prototypes) for k in known]),
        "remembered.samples": torch.tensor([k.samples for k in known]),
        "remembered.prototypes": torch.cat([k.prototypes for k in known]),
        "remembered.scatter": torch.stack([k.scatter for k in known]),
    }


# ---------------------------------------------------------------- reading


def read_pool(path: str | Path, layout: PoolLayout, kinds: HeadKinds, skip_damaged: bool = False) -> PackedTasks:
    """Read and check a file of tasks.

    Raises:
        RecastLoadError: if the file is damaged, or holds tasks with numbers that are not finite.
        RecastBankError: if it does not fit the pool.
        RecastBaseMismatchError: if it was made for other pretrained weights.
    """
    what, tensors, texts = _opened(path)
    with _errors_of_damage(f"{what} is damaged"):
        known = {**ADDED, **texts}
        said = {key: parse_value(known[key], f"{key!r} of {what}") for key in (*LAYOUT, *ADDED)}
        surroundings = checked(optional(text), "surroundings_fingerprint", said["surroundings_fingerprint"])
        table, names = tensors["coefficients"], _names(tensors["names"], int(texts["tasks"]))
    _check_layout(path, said, layout)
    layout.check_readout(f"the tasks in {path}", said["readout"])
    layout.check_surroundings(what, surroundings)
    table = layout.lora.padded(f"each task in {path}", said["lora"], table)
    if tuple(table.shape) != (len(names), layout.width) or not table.is_floating_point() or len({*names}) < len(names):
        raise RecastLoadError(
            f"the table in {path} is damaged: {table.dtype} of shape {tuple(table.shape)} and {len({*names})} names, expected "
            f"numbers of shape {(len(names), layout.width)}"
        )
    tasks = PackedTasks(names, table)
    with _errors_of_damage(f"{what} is damaged or does not fit the model"):
        if texts["format"] == FORMATS[0]:
            _read_first_format(tasks, said, tensors, layout, kinds)
        else:
            tasks.heads = _read_heads(said["heads"], said["labels"], tensors, layout, kinds, len(names))
            tasks.remembered = _read_remembered(tensors, len(names))
    bad = tasks.damaged()
    if bad and not skip_damaged:
        raise RecastLoadError(
            f"{len(bad)} of {len(names)} tasks in {path} hold numbers that are not finite (NaN or infinity): "
            f"{', '.join(names[place] for place in bad[:5])}. load(path, skip_damaged=True) puts in the others."
        )
    return tasks.without(bad) if bad else tasks


def _opened(path: str | Path) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """What messages call a file, its tensors and its texts."""
    what = f"the file of tasks {path}"
    file = read_tensors(path, what, floating=False, finite=False)
    format = file.metadata.get("format")
    if format not in FORMATS:
        raise RecastLoadError(f"{path} is no file of a TaskPool (format {format!r}, expected one of {', '.join(FORMATS)})")
    return what, file.tensors, file.metadata


@contextmanager
def _errors_of_damage(cannot: str) -> Iterator[None]:
    """A block that reads what a file holds, in which each of the many kinds of error says the same of it."""
    try:
        yield
    except RecastLoadError:
        raise
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise RecastLoadError(f"{cannot}: {error!r}. Nothing was loaded; fetch it again.") from error


def describe_pool(path: str | Path) -> list[tuple[str, str]]:
    """What a file of tasks holds, as lines of a name and a value; no model is needed.

    Raises:
        RecastLoadError: if it is damaged, or no file of tasks.
    """
    what, tensors, texts = _opened(path)
    with _errors_of_damage(f"{what} is damaged"):
        names = _names(tensors["names"], int(texts["tasks"]))
        groups = parse_value(texts["groups"], f"'groups' of {what}")
        first_format = len(parse_value(texts["heads"], f"'heads' of {what}"))
        heads = sum(len(tensor) for key, tensor in tensors.items() if re.fullmatch(r"heads\.\d+\.places", key))
        width = tensors["coefficients"].shape[1]
        lora = parse_value(texts.get("lora", "[]"), f"'lora' of {what}")
        modules = f", with a LoRA part on {len(lora)} modules" if lora else ""
        members = sum(map(len, groups.values()))
    return [
        ("tasks", f"{len(names):,}: {listed(names, 5)}" if names else "none"),
        ("target modules", f"{members} in {len(groups)} banks"),
        ("numbers" if modules else "coefficients", f"{width:,} each{modules}"),
        ("classifiers", f"{heads if texts['format'] == FORMATS[-1] else first_format:,}"),
        ("size", f"{Path(path).stat().st_size:,} bytes"),
    ]


def _names(text: Tensor, count: int) -> list[str]:
    names = bytes(text.to(torch.uint8).numpy()).decode().split("\n") if count else []
    if len(names) != count or not all(names):
        raise ValueError(f"{len(names)} names for {count} tasks")
    return names


def _check_layout(path: Any, said: dict[str, Any], layout: PoolLayout) -> None:
    if (said["groups"], said["recipes"], said["num_directions"]) != banks_of(layout.config):
        raise RecastBankError(f"the tasks in {path} have other target modules or banks than this pool")
    if said["bank"] != layout.bank:
        raise layout.other_bank(f"the tasks in {path}", said["bank"])
    if said["biases"] != layout.biases():
        raise RecastBankError(
            f"the tasks in {path} have coefficients of biases that are not the pool's\n  file: {said['biases']}\n"
            f"  pool: {layout.biases()}"
        )
    recorded = said["base_fingerprint"] or {}
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise RecastLoadError(f"the fingerprints in {path} are damaged: expected one for each module")
    layout.check_fingerprint(str(path), recorded)


def _empty_head(saved: Mapping[str, Any], id2label: Any, layout: PoolLayout) -> PreparedHead:
    config = RecastConfig(
        num_classes=saved["classes"],
        id2label=id2label,
        head_module=saved["module"],
        head_type=saved["type"],
        head_dtype=saved["dtype"],
    )
    head = prepare_head(layout.backbone, config)
    if head is None:
        raise RecastLoadError(f"a classifier in the place of {saved['module']!r} does not say how many classes it has")
    return head


def _read_heads(
    saved: Any, labels: Any, tensors: Mapping[str, Tensor], layout: PoolLayout, kinds: HeadKinds, count: int
) -> dict[int, StoredHead]:
    heads: dict[int, StoredHead] = {}
    kinds_of_loss = [RecastConfig(num_classes=1, problem_type=entry.get("problem_type")).problem_type for entry in labels]
    known = [Labels(e["classes"], _id2label(e["id2label"]), kind) for e, kind in zip(labels, kinds_of_loss, strict=True)]
    for number, kind_saved in enumerate(saved):
        prefix = f"heads.{number}."
        rows = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        places, own = rows.pop("places").tolist(), rows.pop("labels").tolist()
        empty = _empty_head(kind_saved, None, layout)
        shapes = {key: (len(places), *value.shape) for key, value in empty.module.state_dict().items()}
        if {key: tuple(value.shape) for key, value in rows.items()} != shapes or len(own) != len(places):
            raise RecastLoadError(
                f"the classifiers of kind {number} are damaged or do not fit the model\n"
                f"  in the file: { {key: tuple(value.shape) for key, value in rows.items()} }\n  expected:    {shapes}"
            )
        kind = kinds.kind_of(empty)
        values = tuple(kinds.kept_rows(rows[key], dtype) for key, dtype in zip(kind.keys, kind.dtypes, strict=True))
        own_labels = [kinds.labels(given) for given in known]
        for position, (place, label) in enumerate(zip(places, own, strict=True)):
            if not 0 <= place < count or place in heads or known[label].num_classes != kind_saved["classes"]:
                raise RecastLoadError(f"the classifier of place {place} among {count} tasks is damaged")
            heads[place] = StoredHead(kind, values, own_labels[label], empty.stored_dtype, position)
    return heads


def _id2label(saved: Any) -> dict[int, str] | None:
    return None if saved is None else {int(key): str(value) for key, value in saved.items()}


def _read_remembered(tensors: Mapping[str, Tensor], count: int) -> dict[int, TaskFeatures]:
    if "remembered.places" not in tensors:
        return {}
    places, counts, samples, prototypes, scatter = (
        tensors[f"remembered.{key}"] for key in ("places", "counts", "samples", "prototypes", "scatter")
    )
    pieces = prototypes.split(counts.tolist())
    if not all(0 <= place < count for place in places.tolist()) or prototypes.shape[1:] != scatter.shape[1:]:
        raise RecastLoadError("what is remembered for routing is damaged")
    return {
        place: TaskFeatures(piece.clone(), spread.clone(), number)
        for place, piece, spread, number in zip(places.tolist(), pieces, scatter, samples.tolist(), strict=True)
    }


def _read_first_format(
    tasks: PackedTasks, said: dict[str, Any], tensors: Mapping[str, Tensor], layout: PoolLayout, kinds: HeadKinds
) -> None:
    places = range(len(tasks.names))
    if lost := [place for place in (*said["remembered"], *said["heads"]) if not place.isdecimal() or int(place) not in places]:
        raise RecastLoadError(f"the file has parts of a task {lost[0]}, and {len(places)} tasks: it is damaged")
    for place, samples in said["remembered"].items():
        known = TaskFeatures(tensors[f"prototypes.{place}"], tensors[f"scatter.{place}"], samples)
        tasks.remembered[int(place)] = known
    for place, saved in said["heads"].items():
        prefix = f"head.{place}."
        with _errors_of_damage(f"the head of task {place} is damaged or does not fit the model"):
            head = _empty_head(saved, _id2label(saved["id2label"]), layout)
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            head.module.load_state_dict(state)
        tasks.heads[int(place)] = kinds.stored(head)
