"""What is resident in a pool: tasks put in from anywhere, trained, and written to one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..config import RecastConfig
from ..errors import RecastConfigError
from ..names import check_adapter_name
from ..parts.head_building import PreparedHead
from ..storage.versions import keeping_version
from ..tasks.arithmetic import check_combination, combine_heads
from ..validation import checked_names
from .files import PackedTasks, read_pool, write_pool
from .heads import HeadKinds, StoredHead, bytes_of
from .layout import PoolLayout
from .reading import read_folder, read_task
from .table import TaskTable, check_not_diverged


class ResidentTasks(TaskTable):
    """Tasks of one layout, their classifiers, and what is remembered of them; a base class of ``TaskPool``.

    ``make_place_for`` lets the model have a classifier for each task in a place.
    """

    def __init__(
        self,
        layout: PoolLayout,
        configs: Mapping[str, Any],
        make_place_for: Callable[[str], None],
        head_dtype: torch.dtype | str | None,
        serial: int,
    ) -> None:
        self._layout, self._configs, self._make_place_for = layout, configs, make_place_for
        self._kinds = HeadKinds(check_head_dtype(head_dtype))
        super().__init__(layout.width, next(iter(layout.layers.values())).weight_device, serial)

    # ---------------------------------------------------------------- what is in it

    def coefficients(self, name: str) -> dict[str, Tensor]:
        """A task's coefficients ``(templates,)`` by target module; those of biases by the name of their (first) bias."""
        with self.lock:
            row, layout = self.table[self.row(name)].detach(), self._layout
            return {key: row[part].clone() for key, part in layout.slices.items() if key not in layout.lora.entries}

    def lora_factors(self, name: str) -> dict[str, Tensor]:
        """The factors of a task's LoRA part by their names in its file (``blocks.0.attn.qkv.lora_A.weight``); empty without."""
        with self.lock:
            row, slices = self.table[self.row(name)].detach(), self._layout.slices
            return {key: row[slices[key]].view(entry.shape).clone() for key, entry in self._layout.lora.entries.items()}

    def part_of(self, module_name: str) -> slice | None:
        """The columns of a target module in the table, of the coefficients of a bias or of a LoRA part's factor by its name."""
        return self._layout.slices.get(module_name)

    def head(self, row: int) -> nn.Module | None:
        """The classifier of the task in a row as a module that can be written to, or None if it has none."""
        with self.lock:
            stored = self._heads.get(row)
            return None if stored is None else stored.module()

    def prepared_head(self, name: str) -> PreparedHead | None:
        """A task's classifier to be put elsewhere, which nobody writes to; None if it has none."""
        with self.lock:
            stored = self._heads.get(self.row(name))
            return None if stored is None else stored.prepared()

    def sizes(self) -> dict[str, int]:
        """Bytes in memory of the coefficients, the classifiers, what is remembered for routing, and LoRA parts if there are."""
        with self.lock:
            heads = bytes_of(self._heads.values())
            known = sum(tensor.nbytes for k in self._remembered.values() for tensor in (k.prototypes, k.scatter))
        lora = self.table.nbytes * self._layout.lora.width // max(1, self._layout.width)
        sizes = {"coefficients": self.table.nbytes - lora, "heads": heads, "remembered": known}
        return {**sizes, "lora": lora} if lora else sizes

    def nbytes(self) -> int:
        """Bytes of the table and the heads; ``sizes`` has them one by one."""
        return sum(size for what, size in self.sizes().items() if what != "remembered")

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do with table and heads what ``nn.Module.to`` and its kin do with the model; the model calls it."""
        with self.lock:
            self.follow_table(fn)
            self._kinds.follow(fn, self._heads.values())

    # ---------------------------------------------------------------- putting tasks in and taking them out

    def add(self, name: str, source: str | Path | Mapping[str, Tensor] | RecastConfig | None = None, **hub_kwargs: Any) -> int:
        """Put a task in.

        Args:
            name: name of the task.
            source: a saved task (a folder or a name on the Hub), a task that the model has, a state dict as the file of a
                task without a head holds it, or a config for a fresh task (with a head, if it says so); None is a fresh task
                without a head.
            hub_kwargs: ``revision``, ``subfolder``, ``token`` and their like, as for ``AutoRecastModel.from_pretrained``.

        Returns:
            the row.

        Raises:
            RecastConfigError: if the name is taken or cannot be used, or a number is not finite.
            RecastBankError: if the task has other target modules or banks.
            RecastLoadError: if its file is damaged, or was made for other pretrained weights.
            RecastHubError: if its repository cannot be reached or read.
        """
        check_adapter_name(name)
        self.check_new_names([name])
        return self.add_row(name, *self.read(name, source, **hub_kwargs))

    def replace(self, name: str, source: Any, **hub_kwargs: Any) -> int:
        """Put a task in the place of one of the same name, in one step: the arguments and errors are those of ``add``.

        Calls that are on their way end with the former task; whatever is wrong with the new one, the former stays. An active
        task stays active as it was until it is activated again.

        Returns:
            the row, which is another one.
        """
        self.row(name)
        return self.replace_row(name, *self.read(name, source, **hub_kwargs))

    def read(self, name: str, source: Any, **hub_kwargs: Any) -> tuple[Tensor, StoredHead | None]:
        """Numbers and classifier of a task as ``add_row`` and ``replace_row`` take them; see ``add``. Nothing is put in."""
        with torch.inference_mode(False), torch.no_grad():
            values, head = read_task(self._layout, self._configs, name, source, hub_kwargs)
            stored = self._stored(name, head)
        check_not_diverged(name, values, stored)
        return values, stored

    def _stored(self, name: str, head: Any) -> StoredHead | None:
        if head is None:
            self._layout.check_reader(f"task {name!r}")
            return None
        self._make_place_for(head.place)
        with self.lock:
            return self._kinds.stored(head)

    def labels(self, name: str) -> dict[int, str] | None:
        """Names of a task's classes, or None if it has none of its own."""
        with self.lock:
            head = self._heads.get(self.row(name))
        return None if head is None else head.labels.id2label

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        heads: str | None = None,
        **options: Any,
    ) -> int:
        """Put in a weighted combination of tasks of the pool; the arguments are those of ``RecastModel.add_weighted_adapter``.

        The LoRA part of a row has one rank. A sum that needs a higher one is refused, unless ``"svd"`` asks for the nearest.

        Returns:
            the row.

        Raises:
            RecastConfigError: if an argument cannot be used, or LoRA parts cannot be combined so; the pool is left as it was.
        """
        check_adapter_name(adapter_name)
        check_combination(adapters, weights, combination_type, heads, **options)
        with torch.inference_mode(False), torch.no_grad():
            with self.lock:
                rows = {name: self.row(name) for name in adapters}
                stored = {name: self._heads.get(row) for name, row in rows.items()}
                prepared = {name: None if head is None else head.prepared() for name, head in stored.items()}
                numbers = {name: self.table.detach()[row].clone() for name, row in rows.items()}
                for name, values in numbers.items():
                    check_not_diverged(name, values, stored[name])
            values = self._layout.lora.combine(numbers, weights, combination_type, **options)
            head = combine_heads(prepared, weights, heads)
            return self.add_row(adapter_name, values, self._stored(adapter_name, head))

    def load_folder(self, folder: str | Path) -> list[str]:
        """Put in every task saved in a folder: each in one of its own, named as the task; ``"default"`` in the folder itself.

        Returns:
            the names, in alphabetical order. Nothing is put in if one of them cannot be read.
        """
        with torch.inference_mode(False), torch.no_grad():
            names, rows, given = zip(*read_folder(self._layout, self._configs, folder), strict=True)
            with self.lock:
                heads = {i: self._kinds.stored(head) for i, head in enumerate(given) if head is not None}
            return self._put_in(PackedTasks([*names], torch.stack(rows), heads), folder)

    def _put_in(self, tasks: PackedTasks, path: str | Path) -> list[str]:
        """Put in the tasks that were read from a path, all or none; returns their names."""
        if len(tasks.heads) < len(tasks.names):
            self._layout.check_reader(f"a task in {path}")
        self.check_new_names(tasks.names)  # before the model is changed
        for name in dict.fromkeys(head.kind.name for head in tasks.heads.values()):
            self._make_place_for(name)
        with self.lock:
            start = self.add_rows(tasks.names, tasks.table, tasks.heads)
            self._remembered.update({start + place: known for place, known in tasks.remembered.items()})
        return tasks.names

    def parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """What ``model(x, task_ids=...)`` trains: the table, and the heads of the given tasks (None: of all).

        Put all tasks in first: a table that has to grow is a new tensor, which is warned of. A task without a sample in a batch
        gets no gradient, but momentum and weight decay of an optimizer move its row on.

        Raises:
            RecastConfigError: in a run of several processes, each of which would train a pool of its own.
        """
        _check_one_process()
        rows = list(self._heads) if names is None else [self.row(name) for name in dict.fromkeys(checked_names("names", names))]
        heads = [parameter for row in rows if (head := self.head(row)) is not None for parameter in head.parameters()]
        return [self.table, *heads]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Make the table and the heads trainable, or not."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path, keep: int = 0) -> None:
        """Write all tasks to one safetensors file: the table, the names, the heads, and what is remembered for routing.

        A task without a head takes its coefficients (4 bytes each) and its name. The file is written whole or not at all.

        Args:
            path: path of the file.
            keep: versions before this one that are kept beside it, to go back to (``storage.versions``, or
                ``recast-peft versions``).

        Raises:
            RecastConfigError: if a task holds numbers that are not finite.
        """
        with self.lock, torch.no_grad():
            rows = [row for row, name in enumerate(self._names) if name is not None]
            at = {row: place for place, row in enumerate(rows)}
            tasks = PackedTasks(
                self.names,
                self.table.detach()[rows].cpu(),
                {at[row]: self._heads[row] for row in rows if row in self._heads},
                {at[row]: self._remembered[row] for row in rows if row in self._remembered},
            )
        with keeping_version(path, keep):
            write_pool(path, tasks, self._layout)

    def load(self, path: str | Path, skip_damaged: bool = False) -> list[str]:
        """Put in all tasks of a file that ``save`` wrote.

        Classifiers stay in the file, which is mapped into memory: another file may take its place, but nothing may be written
        over it while the pool is in use.

        Args:
            path: path of the file.
            skip_damaged: leave out tasks with numbers that are not finite, where otherwise nothing is put in.

        Returns:
            their names.

        Raises:
            RecastLoadError: if the file is damaged or does not fit the model; nothing is put in then.
            RecastConfigError: if the pool has one of the tasks already.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self._put_in(read_pool(path, self._layout, self._kinds, skip_damaged), path)


def check_head_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype in which classifiers are kept, as it is named or given; None is that of each (``RecastConfigError``)."""
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise RecastConfigError(f"head_dtype={given!r}: expected a floating-point dtype such as 'float16', or None")
    return dtype


def _check_one_process() -> None:
    """Refuse a run of several processes, each of which would train a pool of its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise RecastConfigError(
            "a pool is no part of the model, so no wrapper (DistributedDataParallel, FSDP, DeepSpeed) averages the "
            "gradients of its table and classifiers, and each process would train other numbers: train a pool in one "
            "process, or the tasks one by one as adapters"
        )
