"""TaskPool: thousands of tasks resident beside one model, activated in place, or many in one batch.

The tasks are the rows of one table (their coefficients, side by side over all target modules). Activating a task copies one
row into the coefficients of one adapter, the slot, so its time does not depend on how many tasks there are, no new tensor
is made, and a compiled model is not compiled again.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..banks.grown_bank import GrownBank
from ..banks.template_bank import follow_device
from ..composition.compose import average_sets
from ..composition.fingerprint import same_weight
from ..composition.mixed_batch import NO_TASK, MixedBatch
from ..config import RecastConfig
from ..errors import RecastBankError, RecastBaseMismatchError, RecastConfigError, RecastLoadError, RecastTargetError
from ..hub.peft_models import TaskModel, with_task_verbs
from ..hub.transfer import fetch_task
from ..layer import RecastLayer, recast_layers
from ..model import RecastModel
from ..names import COEFFICIENTS, MODEL_PREFIX
from ..parts import PARTS, BiasConfig
from ..parts.bias_part import TaskBiases, bias_bank_of, bias_coefficients, bias_entry, bias_holders, bias_owners
from ..parts.head import TaskHead, task_head
from ..parts.head_building import Labels, PreparedHead, PrototypeHead, find_head, prepare_head
from ..tasks.arithmetic import check_combination, combine_heads, combine_rows, head_of_adapter
from ..tasks.files import check_entries
from .routing import TaskFeatures, nearest_task, summarise

SLOT = "task_pool"
FORMAT = "recast-task-pool-1"
LAYOUT = ("groups", "recipes", "base_fingerprint", "bank", "heads", "remembered")  # JSON in the file's metadata
FIRST_CAPACITY = 16


class TaskPool:
    """Tasks of one model, as rows of one table.

    Args:
        model: a PEFT model with at least one RECAST task; all tasks of the pool have that task's target modules and banks.
        like: the task whose layout the pool takes; None is the first one.
        slot: the name of the adapter that the pool adds to the model and writes the active task into.

    Attributes:
        table: ``(capacity, numbers per task)`` in float32; rows beyond the tasks, and of removed tasks, are zero. Coefficient
            sets are stored as their mean, which describes the same weights. It can be trained: see ``parameters``.

    Raises:
        RecastConfigError: if the model has no RECAST task.
    """

    def __init__(self, model: PeftModel, like: str | None = None, slot: str = SLOT) -> None:
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, RecastModel):
            raise RecastConfigError("a TaskPool needs a model with a RECAST task: call get_recast_model(model, config) first")
        names = [name for name in tuner.peft_config if isinstance(tuner.peft_config[name], RecastConfig)]
        like = like or names[0]
        if like not in names:
            raise RecastConfigError(f"like={like!r}: the model has the tasks {', '.join(names)}")
        self.model = model
        self._tuner = tuner
        self.slot = slot
        layout = cast(RecastConfig, tuner.peft_config[like]).layout(inference_mode=True)
        if slot not in tuner.peft_config:
            model.add_adapter(slot, layout)
        self._config: RecastConfig = tuner.peft_config[slot]  # type: ignore[assignment]
        if _layout_of(layout) != _layout_of(self._config):
            raise RecastConfigError(
                f"slot={slot!r}: the model has such an adapter already, with other target modules or banks than {like!r}: "
                "give the slot another name"
            )
        layers = {n: layer for n, layer in recast_layers(tuner.model).items() if slot in layer.recast_bank}
        self._layers: dict[str, RecastLayer] = layers
        self._slices: dict[str, slice] = {}
        width = 0
        for name, layer in layers.items():
            templates = layer.recast_bank[slot].num_templates
            self._slices[name] = slice(width, width + templates)
            width += templates
        self._bias_owners = bias_owners(tuner.model, slot)
        for name, owner in self._bias_owners.items():
            self._slices[name] = slice(width, width + owner.offset.numel())
            width += owner.offset.numel()
        self._bias_holders = bias_holders(tuner.model, slot)
        device = next(iter(layers.values())).weight_device
        self.table = nn.Parameter(torch.zeros(FIRST_CAPACITY, width, device=device), requires_grad=False)
        self._names: list[str | None] = []
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._heads: dict[int, PreparedHead] = {}
        self._remembered: dict[int, TaskFeatures] = {}
        # layers whose bank only approximates the pretrained weight that they keep: no coefficients of the slot give it back
        self._keep_base = [layer for layer in layers.values() if layer.is_compressed and not layer.is_released]
        self._active: str | None = None
        self._shown_head: TaskHead | None = None
        tuner.task_pool = (self, *(pool for pool in tuner.task_pool if pool.slot != slot))
        with_task_verbs(model)
        if not isinstance(model, TaskModel) and "task_ids" in inspect.signature(type(model).forward).parameters:
            model.register_forward_pre_hook(_refuse_task_ids, with_kwargs=True)
        special = getattr(model, "special_peft_forward_args", None)
        if special is not None:
            special.add("task_ids")

    @property
    def _backbone(self) -> nn.Module:
        return self.model.get_base_model()

    # ---------------------------------------------------------------- what is in it

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order of their rows."""
        return [name for name in self._names if name is not None]

    @property
    def numbers_per_task(self) -> int:
        """Coefficients of one task, the coefficient sets averaged."""
        return self.table.shape[1]

    @property
    def active(self) -> str | None:
        """The task that is in force, or None for the pretrained model and for an ordinary adapter."""
        return self._active if self._slot_is_active() else None

    def row(self, name: str) -> int:
        """The row of a task.

        Raises:
            RecastConfigError: if there is no such task.
        """
        if name not in self._rows:
            near = ", ".join(self.names[:5])
            raise RecastConfigError(
                f"the pool has no task {name!r}; it has {len(self)}: {near}{', ...' if len(self) > 5 else ''}"
            )
        return self._rows[name]

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """Row numbers of tasks, for ``task_ids``; None is the pretrained model."""
        rows = [NO_TASK if name is None else self.row(name) for name in names]
        return torch.tensor(rows, device=self.table.device)

    def coefficients(self, name: str) -> dict[str, Tensor]:
        """A task's coefficients ``(templates,)`` by target module; those of biases by the name of their (first) bias."""
        row = self.table[self.row(name)].detach()
        return {module: row[part].clone() for module, part in self._slices.items()}

    def head(self, row: int) -> nn.Module | None:
        """The classifier of the task in a row, or None if it has none."""
        prepared = self._heads.get(row)
        return None if prepared is None else prepared.module

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do with table and heads what ``nn.Module.to`` and its kin do with the model; the model calls it."""
        self.table.data = follow_device(fn, self.table.data)
        for prepared in self._heads.values():
            prepared.module._apply(fn)

    def nbytes(self) -> int:
        """Bytes of the table and the heads."""
        heads = sum(p.numel() * p.element_size() for h in self._heads.values() for p in h.module.parameters())
        return self.table.numel() * self.table.element_size() + heads

    # ---------------------------------------------------------------- putting tasks in and taking them out

    def add(self, name: str, source: str | Path | Mapping[str, Tensor] | RecastConfig | None = None, **hub_kwargs: Any) -> int:
        """Put a task in.

        Args:
            name: of the task.
            source: a saved task (a folder or a name on the Hub), a task that the model has, a state dict as a task file holds
                it, or a config for a fresh task (with a head, if it says so); None is a fresh task without a head.
            hub_kwargs: ``revision``, ``subfolder``, ``token`` and their like, as for ``AutoRecastModel.from_pretrained``.

        Returns:
            the row.

        Raises:
            RecastConfigError: if the name is taken or cannot be used.
            RecastBankError: if the task has other target modules or banks.
            RecastLoadError: if its file is damaged, or was made for other pretrained weights.
            RecastHubError: if its repository cannot be reached or read.
        """
        self._check_new_name(name)
        values, head = self._read(name, source, hub_kwargs)
        return self._put(name, values, head)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
        heads: str | None = None,
    ) -> int:
        """Put in a weighted combination of tasks of the pool; the arguments are those of ``RecastModel.add_weighted_adapter``.

        Returns:
            the row.

        Raises:
            RecastConfigError: if an argument cannot be used; the pool is left as it was.
        """
        check_combination(adapters, weights, combination_type, density, majority_sign_method, heads)
        rows = {name: self.row(name) for name in adapters}
        values = combine_rows(
            [self.table.detach()[rows[name]] for name in adapters], weights, combination_type, density, majority_sign_method
        )
        head = combine_heads({name: copy.deepcopy(self._heads.get(row)) for name, row in rows.items()}, weights, heads)
        self._check_new_name(adapter_name)
        return self._put(adapter_name, values, head)

    def load_folder(self, folder: str | Path) -> list[str]:
        """Put in every task saved in a folder (each in a folder of its own, named as the task).

        Returns:
            the names, in alphabetical order. Nothing is put in if one of them cannot be read.
        """
        paths = sorted(p.parent for p in Path(folder).glob("*/adapter_config.json"))
        if not paths:
            raise RecastLoadError(f"{folder} holds no saved task (no folder with an adapter_config.json in it)")
        read = [(path.name, *self._read(path.name, path, {})) for path in paths]
        taken = [name for name, _, _ in read if name in self._rows]
        if taken:
            raise RecastConfigError(f"the pool has these tasks already: {', '.join(taken)}")
        for name, values, head in read:
            self._put(name, values, head)
        return [name for name, _, _ in read]

    def remove(self, name: str) -> None:
        """Take a task out; if it was in force, the pretrained model is."""
        row = self.row(name)
        if self.active == name:
            self.deactivate()
        del self._rows[name]
        self._names[row] = None
        self._free.append(row)
        self._heads.pop(row, None)
        self._remembered.pop(row, None)
        with torch.no_grad():
            self.table[row].zero_()

    def parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """What ``model(x, task_ids=...)`` trains: the table, and the heads of the given tasks (None: of all).

        Put all tasks in first: a table that has to grow is a new tensor.
        """
        rows = self._heads if names is None else [self.row(name) for name in names]
        heads = [p for row in rows if row in self._heads for p in self._heads[row].module.parameters()]
        return [self.table, *heads]

    def requires_grad_(self, requires_grad: bool = True) -> TaskPool:
        """Make the table and the heads trainable, or not."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    # ---------------------------------------------------------------- one task in force

    def activate(self, name: str, merge: bool = False) -> None:
        """Put a task in force.

        Args:
            name: of the task.
            merge: write its composed weights into the modules (in place: the same storage for every task), so that the model
                runs at the plain model's speed. Otherwise the weights are composed as they are used.
        """
        row = self.row(name)
        self._make_slot_active()
        if not merge:
            self._unmerge()
        self._write(self.table[row])
        if merge:
            for layer in self._layers.values():
                layer.merge_in_place([self.slot])
            for holder in self._bias_holders:
                holder.merge_in_place(self.slot)
        self._show_head(row)
        self._active = name

    def deactivate(self) -> None:
        """Put the pretrained model in force, to the last bit (the slot's coefficients are zero)."""
        self._make_slot_active()
        self._unmerge()
        self._write(torch.zeros_like(self.table[0]))
        for layer in self._keep_base:
            layer.idle_slot = self.slot
        self._show_head(NO_TASK)
        self._active = None

    @contextmanager
    def use(self, name: str, merge: bool = False) -> Iterator[None]:
        """Put a task in force until the block ends, and then what was before (an ordinary adapter too), also after errors."""
        before, merged = self.active, any(layer.merged for layer in self._layers.values())
        ordinary = None if self._slot_is_active() else (list(self.model.active_adapters), self.model.active_adapter)
        trainable = [(p, p.requires_grad) for p in self.model.parameters()] if ordinary is not None else []
        try:
            self.activate(name, merge=merge)
            yield
        finally:
            if before is None:
                self.deactivate()
            else:
                self.activate(before, merge=merged)
            if ordinary is not None:
                self._tuner.set_adapter(ordinary[0])
                self.model.active_adapter = ordinary[1]
                for parameter, requires_grad in trainable:
                    parameter.requires_grad_(requires_grad)

    def batch(self, tasks: Tensor | Sequence[str | None]) -> Any:
        """A block in which every sample has its own task: ``with pool.batch(["a", "b"]): model(x)``.

        Args:
            tasks: ``(samples,)`` row numbers, or names; -1 or None is the pretrained model.
        """
        task_ids = tasks if isinstance(tasks, Tensor) else self.ids(tasks)
        return self._tuner.samples_with_tasks(self.mixed_batch_of(task_ids))

    def mixed_batch_of(self, task_ids: Tensor, beams: int = 1) -> MixedBatch:
        """The coefficients of each sample, gathered once for all layers.

        Raises:
            ValueError: if a row number is not that of a task.
            RecastConfigError: if gradients are recorded with gradient checkpointing: what is computed again in the backward
                pass would no longer know the tasks.
        """
        self._check_slot()
        if task_ids.ndim != 1 or task_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"task_ids must be whole numbers of shape (samples,), got {task_ids.dtype} {tuple(task_ids.shape)}"
            )
        if not torch.compiler.is_compiling():
            unknown = [i for i in set(task_ids.tolist()) if i != NO_TASK and not self._is_row(i)]
            if unknown:
                raise ValueError(f"task_ids holds {unknown[:5]}, which are no rows of the pool's {len(self)} tasks")
            if torch.is_grad_enabled() and any(map(_is_checkpointed, self._backbone.modules())):
                raise RecastConfigError(
                    "a mixed batch cannot be trained with gradient checkpointing, which computes layers again after the call, "
                    "when the tasks of its samples are forgotten: turn it off (gradient_checkpointing_disable() of "
                    "transformers, set_grad_checkpointing(False) of timm), or call the model under torch.no_grad()"
                )
        present = (task_ids >= 0).to(self.table.dtype)[:, None]
        gathered = self.table[task_ids.clamp_min(0).to(self.table.device)] * present.to(self.table.device)
        return MixedBatch(task_ids=task_ids, pool=self, coefficients=gathered, beams=beams)

    def part_of(self, module_name: str) -> slice | None:
        """The columns of a target module in the table, or of the coefficients of a bias by its name."""
        return self._slices.get(module_name)

    # ---------------------------------------------------------------- finding the task

    def remember(self, name: str, inputs: Any, labels: Tensor | None = None) -> None:
        """Remember what a task's samples look like to the pretrained model, so that ``route`` can choose it.

        Args:
            name: of the task.
            inputs: samples ``(samples, ...)``, or a dictionary of such tensors that the model takes by name.
            labels: ``(samples,)`` classes; given, each class has a prototype of its own.

        Raises:
            RecastConfigError: if there is no such task, no sample, or not one label for each.
        """
        row = self.row(name)
        self._remembered[row] = summarise(self.base_features(inputs), labels)

    def route(self, inputs: Any) -> Tensor:
        """Choose a task for each sample, from what the pretrained model makes of it.

        Args:
            inputs: as for ``remember``.

        Returns:
            ``(samples,)`` rows, to be given on as ``task_ids``.

        Raises:
            RecastConfigError: if no task is remembered, or there is no sample.
        """
        return nearest_task(self.base_features(inputs), self._remembered).to(self.table.device)

    def base_features(self, inputs: Any) -> Tensor:
        """What reaches the classifier of the pretrained model, ``(samples, features)`` in float32 on the CPU.

        Of a model without a classifier its output; of features by position their mean.
        """
        first = next(iter(inputs.values()), None) if isinstance(inputs, Mapping) else inputs
        if not isinstance(first, Tensor) or not len(first):
            raise RecastConfigError(
                f"inputs={inputs!r}: expected samples in a tensor, or a dictionary of such tensors that the model takes by "
                "name; at least one sample"
            )
        samples = len(first)
        caught: list[Tensor] = []
        try:
            head = self._backbone.get_submodule(find_head(self._backbone, self._config.head_module))
        except RecastTargetError:
            head = None
        handle = None if head is None else head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.batch([None] * samples):
                out = self._backbone(**inputs) if isinstance(inputs, Mapping) else self._backbone(inputs)
        finally:
            if handle is not None:
                handle.remove()
            self.model.train(training)
        features = (caught[-1] if caught else out).detach().float().cpu()
        return features if features.ndim == 2 else features.flatten(1, -2).mean(dim=1)

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write all tasks to one safetensors file: the table, the names, the heads, and what is remembered for routing.

        A task without a head takes its coefficients (4 bytes each) and its name.
        """
        rows = [row for row, name in enumerate(self._names) if name is not None]
        tensors = {
            "coefficients": self.table.detach()[rows].cpu().contiguous(),
            "names": torch.frombuffer(bytearray("\n".join(self.names).encode()) or bytearray(1), dtype=torch.uint8),
        }
        heads: dict[str, Any] = {}
        remembered = {}
        for place, row in enumerate(rows):
            if row in self._remembered:
                known = self._remembered[row]
                tensors[f"prototypes.{place}"] = known.prototypes.contiguous()
                tensors[f"scatter.{place}"] = known.scatter.contiguous()
                remembered[str(place)] = known.samples
            prepared = self._heads.get(row)
            if prepared is None:
                continue
            heads[str(place)] = {
                "module": prepared.name,
                "type": "prototypes" if isinstance(prepared.module, PrototypeHead) else "linear",
                "dtype": None if prepared.stored_dtype is None else str(prepared.stored_dtype).removeprefix("torch."),
                "classes": prepared.labels.num_classes,
                "id2label": prepared.labels.id2label,
            }
            for key, value in prepared.module.state_dict().items():
                stored = value if prepared.stored_dtype is None else value.to(prepared.stored_dtype)
                tensors[f"head.{place}.{key}"] = stored.detach().cpu().contiguous()
        metadata = {
            "format": FORMAT,
            "groups": json.dumps(self._config.groups),
            "recipes": json.dumps(self._config.recipes),
            "base_fingerprint": json.dumps(self._config.base_fingerprint),
            "bank": json.dumps(_bank_fingerprint(self._config)),
            "biases": json.dumps(self._bias_layout()),
            "heads": json.dumps(heads),
            "remembered": json.dumps(remembered),
            "tasks": str(len(rows)),
        }
        save_file(tensors, str(path), metadata=metadata)

    def load(self, path: str | Path) -> list[str]:
        """Put in all tasks of a file that ``save`` wrote.

        Returns:
            their names.

        Raises:
            RecastLoadError: if the file is damaged or does not fit the model; nothing is put in then.
        """
        table, names, heads, remembered = self._read_packed(path)
        taken = [name for name in names if name in self._rows]
        if taken:
            raise RecastConfigError(f"the pool has these tasks already: {', '.join(taken[:5])}")
        start = len(self._names)
        self._reserve(start + len(names))
        with torch.no_grad():
            self.table[start : start + len(names)] = table.to(self.table.device)
        self._names += names
        self._rows.update({name: start + i for i, name in enumerate(names)})
        self._remembered.update({start + place: known for place, known in remembered.items()})
        for place, head in heads.items():
            self._heads[start + place] = head
            task_head(self._backbone, head.name)
        return names

    # ---------------------------------------------------------------- inside

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or "\n" in name:
            raise RecastConfigError(f"name={name!r}: expected a name without line breaks")
        if name in self._rows:
            raise RecastConfigError(f"the pool has a task {name!r} already; remove it first")

    def _is_row(self, row: int) -> bool:
        return 0 <= row < len(self._names) and self._names[row] is not None

    def _slot_is_active(self) -> bool:
        return list(self.model.active_adapters) == [self.slot]

    def _check_slot(self) -> None:
        if self.slot not in self._tuner.peft_config:
            raise RecastConfigError(
                f"the adapter {self.slot!r}, which this pool writes into, was deleted from the model: make a new TaskPool"
            )

    def _make_slot_active(self) -> None:
        self._check_slot()
        if not self._slot_is_active():
            self._tuner.set_adapter(self.slot, inference_mode=True)
            self.model.active_adapter = self.slot
        for layer in self._keep_base:
            layer.idle_slot = None

    def _write(self, row: Tensor) -> None:
        with torch.no_grad():
            targets = [layer.recast_coefficients[self.slot] for layer in self._layers.values()]
            targets += [owner.offset for owner in self._bias_owners.values()]
            sources = [row[part].detach() for part in self._slices.values()]
            torch._foreach_copy_([t.data for t in targets], [s.view_as(t) for s, t in zip(sources, targets, strict=True)])

    def _unmerge(self) -> None:
        parts: list[Any] = [*self._layers.values(), *self._bias_holders]
        for part in parts:
            part.unmerge()

    def _show_head(self, row: int) -> None:
        prepared = self._heads.get(row)
        if prepared is None:
            if self._shown_head is not None:
                self._shown_head.show(self.slot, None)
            return
        wrapper = task_head(self._backbone, prepared.name)
        wrapper.show(self.slot, prepared)
        self._shown_head = wrapper

    def _put(self, name: str, values: Tensor, head: PreparedHead | None) -> int:
        if self._free:
            row = self._free.pop()
            self._names[row] = name
        else:
            row = len(self._names)
            self._reserve(row + 1)
            self._names.append(name)
        self._rows[name] = row
        with torch.no_grad():
            self.table[row] = values.to(self.table.device)
        if head is not None:
            self._heads[row] = head
            task_head(self._backbone, head.name)
        return row

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.table):
            return
        capacity = max(rows, 2 * len(self.table))
        grown = torch.zeros(capacity, self.table.shape[1], device=self.table.device)
        grown[: len(self.table)] = self.table.detach()
        self.table = nn.Parameter(grown, requires_grad=self.table.requires_grad)

    def _read(self, name: str, source: Any, hub_kwargs: dict[str, Any]) -> tuple[Tensor, PreparedHead | None]:
        """The row ``(numbers per task,)`` and the head of a task."""
        backbone = self._backbone
        given = self._tuner.peft_config.get(source) if isinstance(source, str) else source
        if isinstance(given, RecastConfig):
            _refuse_parts(name, given)
            self._check_biases(f"task {name!r}", given)
        if source is None or isinstance(source, RecastConfig):
            return torch.zeros(self.numbers_per_task), None if source is None else prepare_head(backbone, source)
        if isinstance(source, Mapping):
            entries = dict(source)
            has_biases = any(bias_entry(key) in entries for key in self._bias_owners)
            return self._row_of(f"task {name!r}", entries, {}, has_biases), None
        if isinstance(source, str) and source in self.model.peft_config:
            return self._row_of_adapter(source), head_of_adapter(self._backbone, source)
        folder = str(fetch_task(source, **hub_kwargs))
        config = RecastConfig.from_pretrained(folder)
        _refuse_parts(name, config)
        self._check_config(str(source), config)
        entries = load_peft_weights(folder, device="cpu")
        head = prepare_head(backbone, config)
        shapes = {} if head is None else head.shapes()
        values = self._row_of(f"the task at {str(source)!r}", entries, shapes, _bias_config(config) is not None)
        if head is not None:
            prefix = f"{MODEL_PREFIX}{head.name}."
            head.module.load_state_dict({k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)})
            head.module.requires_grad_(False)
        return values, head

    def _row_of(self, what: str, entries: dict[str, Tensor], own: dict[str, tuple[int, ...]], has_biases: bool) -> Tensor:
        keys = {f"{MODEL_PREFIX}{name}.{COEFFICIENTS}": self._slices[name] for name in self._layers}
        # the number of sets may differ from task to task: what is stored is their mean
        shapes: dict[str, tuple[int, ...]] = {
            key: (entries[key].shape[0] if key in entries and entries[key].ndim == 2 else 1, part.stop - part.start)
            for key, part in keys.items()
        }
        shapes.update({f"{MODEL_PREFIX}{key}": shape for key, shape in own.items()})
        if self._versions:
            entries = {key: self._extended(value, keys[key]) if key in keys else value for key, value in entries.items()}
        biases = {bias_entry(name): self._slices[name] for name in self._bias_owners} if has_biases else {}
        for key, part in biases.items():
            shapes[key] = (part.stop - part.start,)
            if key in entries and entries[key].ndim == 1 and len(self._bias_versions) > 1:
                entries[key] = F.pad(entries[key], (0, max(0, part.stop - part.start - len(entries[key]))))
        check_entries(what, entries, shapes)
        row = torch.zeros(self.numbers_per_task)
        for key, part in keys.items():
            row[part] = average_sets(entries[key].float())
        for key, part in biases.items():
            row[part] = entries[key].float()
        return row

    def _row_of_adapter(self, adapter: str) -> Tensor:
        config: RecastConfig = self.model.peft_config[adapter]  # type: ignore[assignment]
        _refuse_parts(adapter, config)
        if config.groups != self._config.groups:
            raise _other_layout(f"task {adapter!r} of the model", config, self._config)
        wrappers = [n for n, m in self._backbone.named_modules() if _is_owned(m, adapter)]
        if wrappers or config.bias != "none":
            own = ", ".join(wrappers[:3]) + (", ..." if len(wrappers) > 3 else "") if wrappers else f"biases ({config.bias!r})"
            raise RecastBankError(
                f"task {adapter!r} of the model owns more than coefficients and a head of RecastConfig(num_classes=): {own}. "
                "A pool cannot hold that; keep the task as an adapter."
            )
        self._check_bank(f"task {adapter!r} of the model", config)
        row = torch.zeros(self.numbers_per_task)
        for name, layer in self._layers.items():
            values = layer.recast_coefficients[adapter].detach().float().cpu()
            row[self._slices[name]] = average_sets(self._extended(values, self._slices[name]))
        for name, values in bias_coefficients(self._backbone, adapter).items():
            start = self._slices[name].start
            row[start : start + len(values)] = values.detach().float().cpu()
        return row

    @property
    def _bias_versions(self) -> tuple[str | None, ...]:
        """Fingerprints of the bank of biases that the pool's tasks are on, and of its earlier versions; (None,) without one."""
        bank = bias_bank_of(self._backbone, self.slot)
        return (None,) if bank is None else (bank.fingerprint, *(str(entry["fingerprint"]) for entry in bank.history))

    def _check_biases(self, what: str, config: RecastConfig) -> None:
        """Refuse coefficients of biases that the pool's are not; a task without any has zeros there."""
        partner = _bias_config(config)
        if partner is None:
            return
        own = _bias_config(self._config)
        reference = config.partner_bank("bias")
        given = None if reference is None else reference["fingerprint"]
        if own is None or given not in self._bias_versions or (given is None and partner.target_modules != own.target_modules):
            raise RecastBankError(
                f"{what} has coefficients of biases that are not the pool's\n  task: {_shown_biases(config)}\n"
                f"  pool: {_shown_biases(self._config)}\nMake a pool for it: TaskPool(model, like=<a task with its layout>)."
            )

    @property
    def _versions(self) -> tuple[str, ...]:
        """Fingerprints of the stored bank that the pool's tasks are on, and of its earlier versions; empty for other banks."""
        for layer in self._layers.values():
            bank = layer.recast_bank[self.slot]
            if isinstance(bank, GrownBank):
                return (bank.fingerprint, *(str(entry["fingerprint"]) for entry in bank.history))
            if bank.stored is not None and bank.recipe is None:
                return (str(bank.stored["fingerprint"]),)
        return ()

    def _extended(self, values: Tensor, part: slice) -> Tensor:
        """Coefficients of a task on an earlier version of a grown bank: zero for the templates that came later."""
        lacking = part.stop - part.start - values.shape[-1]
        return F.pad(values, (0, lacking)) if self._versions and lacking > 0 else values

    def _check_config(self, what: str, config: RecastConfig) -> None:
        if config.groups != self._config.groups or config.recipes != self._config.recipes:
            raise _other_layout(f"the task at {what!r}", config, self._config)
        self._check_bank(f"the task at {what!r}", config)
        self._check_biases(f"the task at {what!r}", config)
        self._check_fingerprint(what, config.base_fingerprint or {})

    def _check_bank(self, what: str, config: RecastConfig) -> None:
        fingerprint = _bank_fingerprint(config)
        if fingerprint not in (self._versions or (None,)):
            raise _other_bank(what, fingerprint, self._versions)

    def _check_fingerprint(self, what: str, recorded: Mapping[str, str]) -> None:
        own = self._config.base_fingerprint or {}
        differ = [name for name in own if name in recorded and not same_weight(recorded[name], own[name])]
        if differ:
            raise RecastBaseMismatchError(
                f"{what} was made for other pretrained weights: {len(differ)} of {len(own)} modules differ "
                f"({', '.join(differ[:3])}, ...). Load the weights that it was made for."
            )

    def _read_packed(self, path: str | Path) -> tuple[Tensor, list[str], dict[int, PreparedHead], dict[int, TaskFeatures]]:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise RecastLoadError(
                    f"{path} is no file of a TaskPool (format {metadata.get('format')!r}, expected {FORMAT!r})"
                )
            table = tensors["coefficients"]
            count = int(metadata["tasks"])
            names = list(bytes(tensors["names"].numpy()).decode().split("\n")) if count else []
            layout: dict[str, Any] = {key: json.loads(metadata[key]) for key in LAYOUT}
            biases = json.loads(metadata.get("biases", "{}"))  # files of earlier versions do not name them
            remembered = {
                int(k): TaskFeatures(tensors[f"prototypes.{k}"], tensors[f"scatter.{k}"], samples)
                for k, samples in layout["remembered"].items()
            }
        except (SafetensorError, OSError, KeyError, ValueError, UnicodeDecodeError) as error:
            if isinstance(error, RecastLoadError):
                raise
            raise RecastLoadError(f"the tasks in {path} cannot be read: {error}") from error
        if (layout["groups"], layout["recipes"]) != (self._config.groups, self._config.recipes):
            raise RecastBankError(f"the tasks in {path} have other target modules or banks than this pool")
        if layout["bank"] != _bank_fingerprint(self._config):
            raise _other_bank(f"the tasks in {path}", layout["bank"], self._versions)
        if biases != self._bias_layout():
            raise RecastBankError(
                f"the tasks in {path} have coefficients of biases that are not the pool's\n  file: {biases}\n"
                f"  pool: {self._bias_layout()}"
            )
        self._check_fingerprint(str(path), layout["base_fingerprint"])
        if tuple(table.shape) != (len(names), self.numbers_per_task) or not torch.isfinite(table).all():
            raise RecastLoadError(
                f"the table in {path} is damaged: shape {tuple(table.shape)}, expected {(len(names), self.numbers_per_task)}, "
                f"finite: {bool(torch.isfinite(table).all())}"
            )
        heads = {int(k): self._head_from(int(k), v, tensors) for k, v in layout["heads"].items()}
        return table, names, heads, remembered

    def _bias_layout(self) -> dict[str, Any]:
        """Which coefficients of biases a row holds, and on which bank; empty without any."""
        sizes = {name: owner.offset.numel() for name, owner in self._bias_owners.items()}
        return {"bank": self._bias_versions[0], "coefficients": sizes} if sizes else {}

    def _head_from(self, place: int, saved: dict[str, Any], tensors: dict[str, Tensor]) -> PreparedHead:
        prefix = f"head.{place}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            config = RecastConfig(
                num_classes=saved["classes"],
                id2label=saved["id2label"],
                head_module=saved["module"],
                head_type=saved["type"],
                head_dtype=saved["dtype"],
            )
            head = prepare_head(self._backbone, config)
            assert head is not None
            head.module.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise RecastLoadError(f"the head of task {place} is damaged or does not fit the model: {error}") from error
        head.module.requires_grad_(False)
        head.labels = Labels(config.num_classes, config.id2label)
        return head


def _bank_fingerprint(config: RecastConfig) -> str | None:
    reference = config.bank_reference
    return None if reference is None else reference["fingerprint"]


def _layout_of(config: RecastConfig) -> tuple[Any, ...]:
    """What tasks of one pool have in common."""
    partner = _bias_config(config)
    biases = None if partner is None else (partner.target_modules, config.partner_bank("bias"))
    return config.groups, config.recipes, _bank_fingerprint(config), biases


def _bias_config(config: RecastConfig) -> BiasConfig | None:
    return next((partner for partner in config.partners or () if isinstance(partner, BiasConfig)), None)


def _shown_biases(config: RecastConfig) -> str:
    partner, bank = _bias_config(config), config.partner_bank("bias")
    if partner is None:
        return "none"
    if bank is not None:
        return f"those of the bank {bank['name'] or 'in memory'}, fingerprint {bank['fingerprint']}"
    return f"one for each bias of {partner.target_modules or 'all layers'}"


def _refuse_task_ids(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("task_ids") is not None:
        raise RecastConfigError(
            f"{type(model).__name__} has an argument task_ids of its own, which no pool ever sees: give the tasks by a block, "
            "with pool.batch(names_or_rows): model(...)"
        )


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether a module of transformers or timm is computed again in the backward pass."""
    if getattr(module, "grad_checkpointing", False) is True:
        return True
    return module.training and getattr(module, "gradient_checkpointing", False) is True


def _is_owned(module: nn.Module, adapter: str) -> bool:
    """Whether a task owns a module whole, other than as its head."""
    understood = (TaskHead, TaskBiases)
    return isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, understood) and adapter in module._adapters


def _other_bank(what: str, fingerprint: str | None, own: Sequence[str]) -> RecastBankError:
    return RecastBankError(
        f"{what} has another template bank than the pool\n  bank of the task: {fingerprint or 'no stored bank'}\n"
        f"  bank of the pool: {own[0] if own else 'no stored bank'}{' or an earlier version' if len(own) > 1 else ''}\n"
        "Make a pool for it: TaskPool(model, like=<a task on its bank>)."
    )


def _other_layout(what: str, config: RecastConfig, own: RecastConfig) -> RecastBankError:
    theirs = sorted(m for members in (config.groups or {}).values() for m in members)
    ours = sorted(m for members in (own.groups or {}).values() for m in members)
    return RecastBankError(
        f"{what} has other target modules or banks than the pool\n"
        f"  task: {len(config.groups or {})} banks, {len(theirs)} modules ({', '.join(theirs[:2])}, ...)\n"
        f"  pool: {len(own.groups or {})} banks, {len(ours)} modules ({', '.join(ours[:2])}, ...)\n"
        "Make a pool for it: TaskPool(model, like=<a task with its layout>)."
    )


def _refuse_parts(name: str, config: RecastConfig) -> None:
    refusals = [text for part in PARTS if (text := part.refusal_to_combine(config)) is not None]
    if refusals:
        raise RecastConfigError(
            f"a pool cannot hold task {name!r}: it owns {', '.join(refusals)} beside its coefficients and its classifier. "
            "Keep it as an adapter (model.load_adapter)."
        )
