"""A task as plain tensors, named and shaped as the inputs of an exported graph, and files that any language reads.

    coefficients     (numbers per task,) float32, the modules side by side; behind them the factors of a LoRA part
    <module>.<key>   tensors of the modules that the task owns: its classifier, norms

A file is safetensors: eight bytes with the length of a JSON header, the header, the numbers. docs/reference/files.md reads one
in JavaScript and C.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...composition.outputs import is_out_of_reach
from ...config import RecastConfig, tasks_among
from ...errors import RecastBankError, RecastConfigError
from ...holders import holders
from ...layer import RecastLayer, fingerprints_of
from ...names import modules_of, unwrapped
from ...parts import PARTS
from ...parts.bias_part import bias_coefficients, bias_holders
from ...parts.lora import A_PART, PartLayer
from ...parts.saved import TaskNorm
from ...parts.wrapper import TaskModule, task_modules
from ...pool.layout import PoolLayout, same_layout
from ...pool.pool import TaskPool, tuner_of
from ...storage.tensors import write_tensors
from ...tasks.verbs import merged_tasks
from ...validation import check_is_no_folder, check_is_task, checked_names
from .lora import part_columns, refusals_of_part

COEFFICIENTS = "coefficients"
LAYOUT = "recast_layout"  # the entry of the metadata of graphs and files that says which belong together
NAMES = "recast_tasks"  # names of the tasks of a table, as JSON
ALLOWED = ("norms", "modules_to_save")  # parts that are inputs of a graph, which no row of a pool can hold


@dataclass(frozen=True)
class GraphTask:
    """A task as plain tensors."""

    name: str
    row: Tensor  # coefficients and the factors of a LoRA part, ``(numbers per task,)``
    owned: dict[str, Tensor] = field(default_factory=dict)  # tensors of the modules that it owns, by the plain model's names

    def tensors(self) -> dict[str, Tensor]:
        """All of it by the names of a graph's inputs, in alphabetical order."""
        found = {COEFFICIENTS: self.row, **self.owned}
        return {name: found[name].detach().cpu().float().contiguous() for name in sorted(found)}


class Source:
    """Where tasks come from: a model with its active task, or a pool.

    Args:
        given: a PEFT model, or a ``TaskPool``.
        task: the task of a model that the layout is taken from; None is the active one.

    Raises:
        RecastConfigError: if there is no such RECAST task.
    """

    def __init__(self, given: PeftModel | TaskPool, task: str | None = None) -> None:
        self.pool = given if isinstance(given, TaskPool) else None
        model = given.model if isinstance(given, TaskPool) else unwrapped(given)
        self.tuner = tuner_of(model)
        self.backbone = self.tuner.model
        if self.pool is not None:
            self.adapter = self.pool.slot
        else:
            active = list(self.tuner.active_adapters) if task is None else [task]
            if len(active) != 1:
                raise RecastConfigError(f"{len(active)} tasks are active ({', '.join(active)}): activate the one that is meant")
            self.adapter = active[0]
        self.config = self._config(self.adapter)
        self.layout = PoolLayout(self.backbone, self.config, self.adapter)

    def _config(self, name: str) -> RecastConfig:
        tasks = tasks_among(self.tuner.peft_config)
        check_is_task(name, tasks)
        return tasks[name]

    @property
    def identity(self) -> str:
        """A hash of which numbers a row holds, and of the pretrained weights that they are for: 16 hexadecimal digits."""
        columns = {name: [part.start, part.stop] for name, part in self.layout.slices.items()}
        banks: dict[str, Any] = {
            "bank": self.layout.bank,
            "biases": self.layout.bias_versions[0],
            "readout": self.layout.readout,
            "directions": self.config.num_directions,  # cores may have as many numbers as a group has templates
        }
        named = {key: value for key, value in banks.items() if value is not None}
        said = json.dumps({"columns": columns, "base": fingerprints_of(self.layout.layers), **named}, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def names(self) -> list[str]:
        """The tasks of the pool, or those of the model that have this layout."""
        if self.pool is not None:
            return self.pool.names
        slots = {pool.slot for pool in self.tuner.task_pool}
        configs = tasks_among(self.tuner.peft_config)
        return [name for name, config in configs.items() if name not in slots and same_layout(config, self.config)]

    def task(self, name: str) -> GraphTask:
        """A task by its name.

        Raises:
            RecastConfigError: if there is none.
            RecastBankError: if it has other targets or banks, or a LoRA part that there is no room for.
        """
        offsets: dict[str, Tensor]
        if self.pool is not None:
            offsets, factors, like = self.pool.coefficients(name), self.pool.lora_factors(name), self.adapter
            head = self.pool.prepared_head(name)
            owned = {} if head is None else {head.place: head.module}
        else:
            config = self._config(name)
            if not same_layout(config, self.config):
                raise RecastBankError(
                    f"task {name!r} has other target modules, biases or banks than task {self.adapter!r}: export it alone"
                )
            check_exportable(self.backbone, name, config)
            offsets = {module: layer.offset(name) for module, layer in self.layout.layers.items()}
            strengths = bias_strengths(self.backbone, name)
            offsets.update({key: strengths[key] * own for key, own in bias_coefficients(self.backbone, name).items()})
            factors, like = self.layout.lora.entries_of(name), name
            places = task_modules(self.backbone, name)
            whole = [own for own in places if not own.coefficients_of(name) and own.bank_of(name) is None]
            owned = {own.module_name: own.modules_to_save[name] for own in whole}
        row = torch.zeros(self.layout.width)
        for key, values in {**offsets, **part_columns(self.layout, name, like, factors)}.items():
            row[self.layout.slices[key]] = values.detach().float().cpu().flatten()
        named = {f"{place}.{key}": value for place, module in owned.items() for key, value in module.state_dict().items()}
        return GraphTask(name, row, {key: value for key, value in named.items() if value.is_floating_point()})

    def example(self) -> GraphTask:
        """A task that has what all have that a graph is to take.

        Raises:
            RecastConfigError: if the pool is empty.
        """
        if self.pool is None:
            return self.task(self.adapter)
        if not self.pool.names:
            raise RecastConfigError("the pool is empty: its first task says what classifier the graph takes")
        return self.task(self.pool.active or self.pool.names[0])

    def owned_module(self, place: TaskModule) -> nn.Module:
        """The module that the example has at a place."""
        if self.pool is None:
            return place.modules_to_save[self.adapter]
        head = self.pool.prepared_head(self.example().name)
        assert head is not None
        return head.module


def source_of(given: PeftModel | TaskPool, tasks: Sequence[str] | None) -> tuple[Source, list[str]]:
    """Where tasks come from, with the layout of the first one, and their names; None is all of the pool, or of one layout."""
    named = None if tasks is None else checked_names("tasks", tasks)
    source = Source(given, named[0] if named else None)
    return source, source.names() if named is None else named


def bias_strengths(model: nn.Module, task: str) -> dict[str, float]:
    """The strengths of a task's coefficients of biases, by the names that ``bias_coefficients`` has.

    Raises:
        RecastConfigError: if biases of one group have several, which no coefficient can say.
    """
    found: dict[str, float] = {}
    for holder in bias_holders(model, task):
        factor = holder.scaling.get(task, 1.0)
        if found.setdefault(holder.key_of(task), factor) != factor:
            raise RecastConfigError(
                f"task {task!r} has strengths of {found[holder.key_of(task)]:g} and {factor:g} at biases that share their "
                "coefficients: set one of them on all layers (set_scale)"
            )
    return found


def check_exportable(model: nn.Module, task: str, config: RecastConfig) -> None:
    """Refuse what a graph cannot express; nothing has been written yet (``RecastBankError``)."""
    parts = [part.refusal_to_combine(config) for part in PARTS if part.name not in ALLOWED]
    found = holders(model, task)
    parts += [
        f"a strength at the norm {h.module_name}" for h in found if isinstance(h, TaskNorm) and h.scaling.get(task, 1) != 1
    ]
    refused = list(dict.fromkeys(text for text in parts if text not in (None, A_PART))) + refusals_of_part(model, task)
    compressed = [layer.module_name for layer in holders(model, task, RecastLayer) if layer.is_compressed]
    if compressed:
        refused.append(f"a compressed bank (at {compressed[0]})")
    if refused:
        can_merge = not any(holder.refusal_to_merge(task) or holder.refusal_to_unload(task) for holder in found)
        instead = "the merged model instead (merge_and_unload), one graph a task, or " if can_merge else ""
        raise RecastBankError(
            f"task {task!r} cannot be an input of a graph: it has {', '.join(refused)}. Nothing was written. Export {instead}a "
            "task without it."
        )


def check_model(model: nn.Module) -> None:
    """Refuse a model that does not compute with its plain weights now (``RecastBankError``)."""
    merged = merged_tasks(model)
    if merged:
        raise RecastBankError(f"task {merged[0]!r} is merged: call unmerge_adapter() before the model is exported")
    layers = modules_of(model, RecastLayer)
    others = [layer.module_name for layer in layers if any(not isinstance(o, PartLayer) for o in layer.other_layers)]
    if others:
        raise RecastBankError(f"{others[0]} has layers of another method of PEFT beside its task: merge or unload them first")
    away = [layer.module_name for layer in layers if is_out_of_reach(layer)]
    if away:
        raise RecastBankError(
            f"the weight of {away[0]} is quantised or offloaded, which no graph can express: export the model in float32, and "
            "quantise the graph"
        )


# ---------------------------------------------------------------- files


def export_task(model: PeftModel | TaskPool, path: str | Path, task: str | None = None) -> dict[str, Tensor]:
    """Write one task as what an exported graph takes: a safetensors file with one tensor for each of the graph's inputs.

    Args:
        model: a model with the task, or a pool.
        path: path of the file; its folder is made if it is missing.
        task: name of the task; None is the active one.

    Returns:
        the tensors, in float32: ``coefficients`` ``(numbers per task,)`` with the factors of a LoRA part at its end, and those
        of the classifier and of norms that the task owns, by the plain model's names (``head.weight``).

    Raises:
        RecastConfigError: if there is no such task.
        RecastBankError: if it has what no graph can express; nothing is written.
    """
    check_is_no_folder(path, "task.safetensors")
    source = Source(model, task)
    name = (source.adapter if source.pool is None else source.pool.active) if task is None else task
    if name is None:
        raise RecastConfigError("no task of the pool is active: name the one that is meant with task=")
    tensors = source.task(name).tensors()
    write_tensors(path, tensors, metadata(source, [name]))
    return tensors


def export_tasks(model: PeftModel | TaskPool, path: str | Path, tasks: Sequence[str] | None = None) -> list[str]:
    """Write many tasks to one file: ``coefficients`` ``(tasks, numbers per task)``, and what they own stacked likewise.

    Task i of the file is row i of each tensor, so that an app reads one task without reading the others.

    Args:
        model: a model with the tasks, or a pool.
        path: path of the file; its folder is made if it is missing.
        tasks: their names; None is all of the pool, or of the model.

    Returns:
        the names, in the order of the rows.

    Raises:
        RecastConfigError: if there is no such task, or their classifiers differ in size.
        RecastBankError: if one has what no graph can express; nothing is written.
    """
    check_is_no_folder(path, "tasks.safetensors")
    source, names = source_of(model, tasks)
    if not names:
        raise RecastConfigError("there is no task to export")
    read = [source.task(name).tensors() for name in names]
    shapes = {key: tuple(value.shape) for key, value in read[0].items()}
    for name, tensors in zip(names, read, strict=True):
        own = {key: tuple(value.shape) for key, value in tensors.items()}
        if own != shapes:
            raise RecastConfigError(
                f"tasks of one file own modules of the same shapes\n  {names[0]}: {shapes}\n  {name}: {own}\n"
                "Write tasks with classifiers of other sizes to files of their own."
            )
    stacked = {key: torch.stack([tensors[key] for tensors in read]) for key in shapes}
    write_tensors(path, stacked, metadata(source, names))
    return names


def metadata(source: Source, names: Sequence[str]) -> dict[str, str]:
    """What a graph or a file of tasks says of itself."""
    return {LAYOUT: source.identity, NAMES: json.dumps(list(names))}
