"""Classifiers of a pool's tasks: tensors by task, and one module for all that are alike.

Of 100,000 tasks the classifiers are what takes memory, so a task's is two tensors and no module; of one that was read from a
pool's file it is a row of the tensors there, which the system maps into memory as they are used. Its tensors are never written
to: a call that holds them computes with them to its end, whatever becomes of the task. A classifier that is trained, or that
somebody asked for, is a module of its own from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts.head_building import Labels, PreparedHead

Call = Callable[..., Any]


@dataclass(eq=False)
class HeadKind:
    """What classifiers of one place, class and size have in common.

    Attributes:
        name: name of the module in the plain model.
        empty: the module, its tensors on the meta device.
        keys: keys of its tensors.
        dtypes: dtypes in which they are computed with.
    """

    name: str
    empty: nn.Module
    keys: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]

    def module(self, tensors: Iterable[Tensor]) -> nn.Module:
        """A module with these tensors (not copies of them)."""
        own = self.empty.state_dict(keep_vars=True).values()
        instead = {
            id(old): nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            for old, new in zip(own, tensors, strict=True)
        }
        return copy.deepcopy(self.empty, instead)

    def call(self, tensors: tuple[Tensor, ...]) -> Call:
        """What computes with these tensors."""
        if type(self.empty) is not nn.Linear:
            return self.module(tensors)
        weight, bias = tensors if len(tensors) == 2 else (tensors[0], None)
        return lambda x: F.linear(x, weight, bias)


class StoredHead:
    """The classifier of one task.

    Args:
        kind: what it is.
        tensors: its numbers, in the order of the kind's keys; maybe in half precision. With a row: those of many classifiers,
            ``(classifiers, ...)``.
        labels: labels of the task.
        stored_dtype: dtype in which it is saved; None is that of the tensors.
        row: its place among many classifiers.
    """

    __slots__ = ("_labels", "block", "kind", "live", "row", "slot", "stored_dtype")

    def __init__(
        self,
        kind: HeadKind,
        tensors: tuple[Tensor, ...],
        labels: Labels,
        stored_dtype: torch.dtype | None = None,
        row: int | None = None,
    ) -> None:
        self.kind, self.block, self._labels, self.stored_dtype, self.row = kind, tensors, labels, stored_dtype, row
        self.live: nn.Module | None = None  # the module, once it may be trained or written to
        self.slot: Any = None  # through which the model shows it

    @property
    def labels(self) -> Labels:
        """Labels of the task; while the model shows it, with what is set in the model's config."""
        if self.slot is not None:
            self._labels = self.slot.labels_now() or self._labels
        return self._labels

    def shown_by(self, slot: Any) -> None:
        """Say through which slot the model shows it from now on; None: it does no longer."""
        self._labels, self.slot = self.labels, slot

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its numbers, in the order of the kind's keys."""
        return self.block if self.row is None else tuple(tensor[self.row] for tensor in self.block)

    @tensors.setter
    def tensors(self, tensors: tuple[Tensor, ...]) -> None:
        self.block, self.row = tensors, None

    def state(self) -> dict[str, Tensor]:
        """Its tensors by their names in the module, in the dtypes of the computation."""
        if self.live is not None:
            return self.live.state_dict()
        return dict(zip(self.kind.keys, self._as_computed(), strict=True))

    def call(self) -> Call:
        """What computes with it as it is now."""
        return self.live if self.live is not None else self.kind.call(self._as_computed())

    def fits(self, module: nn.Module) -> bool:
        """Whether a module can take over its numbers: one of its class with tensors of the same shapes."""
        empty = self.kind.empty if self.live is None else self.live
        return type(module) is type(empty) and _shapes(module) == _shapes(empty)

    def copy(self) -> nn.Module:
        """A frozen module with its numbers, which are nobody else's."""
        made = copy.deepcopy(self.live) if self.live is not None else self.kind.module(t.clone() for t in self._as_computed())
        return made.requires_grad_(False)

    def module(self) -> nn.Module:
        """The module, which can be trained and written to."""
        if self.live is None:
            self.live = self.kind.module(tensor.clone() for tensor in self._as_computed())
            self.tensors = ()
        return self.live

    def prepared(self) -> PreparedHead:
        """To be put into a model: nobody writes to it."""
        module = self.live if self.live is not None else self.kind.module(self._as_computed())
        return PreparedHead(self.kind.name, module, self.labels, self.stored_dtype)

    def held(self) -> tuple[Tensor, ...]:
        """The tensors that are in memory for it."""
        return tuple(self.live.state_dict().values()) if self.live is not None else self.tensors

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do what ``nn.Module.to`` does; a tensor that is kept in half precision changes its device alone."""
        if self.live is not None:
            self.live._apply(fn)
            return
        moved = (
            fn(tensor) if tensor.dtype == before else tensor.to(fn(torch.empty(0, device=tensor.device)).device)
            for tensor, before in zip(self.tensors, self.kind.dtypes, strict=True)
        )
        self.tensors = tuple(moved)

    def _as_computed(self) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t, dtype in zip(self.tensors, self.kind.dtypes, strict=True))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def _key(name: str, module: nn.Module, dtypes: tuple[torch.dtype, ...]) -> tuple[Any, ...]:
    return name, str(module), tuple(_shapes(module).items()), dtypes


def bytes_of(heads: Collection[StoredHead]) -> int:
    """Bytes in memory of classifiers; those of one block are looked at once."""
    blocks = {id(head.block): head.block for head in heads if head.row is not None}
    row_bytes = {key: sum(tensor.nbytes // len(tensor) for tensor in block) for key, block in blocks.items()}
    apart = sum(tensor.nbytes for head in heads if head.row is None for tensor in head.held())
    return apart + sum(row_bytes[id(head.block)] for head in heads if head.row is not None)


class HeadKinds:
    """The kinds of a pool's classifiers and their labels, each once.

    Args:
        dtype: dtype of kept classifiers; None keeps them as they come, or as they will be saved where that loses nothing.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._kinds: dict[tuple[Any, ...], HeadKind] = {}
        self._labels: dict[str, Labels] = {}

    def stored(self, head: PreparedHead) -> StoredHead:
        """A classifier as a pool keeps it."""
        tensors = tuple(self.kept(value, head.stored_dtype) for value in head.module.state_dict().values())
        return StoredHead(self.kind_of(head), tensors, self.labels(head.labels), head.stored_dtype)

    def kind_of(self, head: PreparedHead) -> HeadKind:
        """What a classifier is."""
        state = head.module.state_dict()
        dtypes = tuple(value.dtype for value in state.values())
        key = _key(head.place, head.module, dtypes)
        if key not in self._kinds:
            empty = copy.deepcopy(head.module).to("meta").requires_grad_(False)
            self._kinds[key] = HeadKind(head.place, empty, tuple(state), dtypes)
        return self._kinds[key]

    def kept(self, value: Tensor, stored_dtype: torch.dtype | None) -> Tensor:
        """A tensor of its own in the dtype that it is kept in."""
        if value.is_floating_point():
            if self.dtype is not None:
                return value.to(self.dtype, copy=True)
            if stored_dtype is not None and torch.equal(narrow := value.to(stored_dtype), value):
                return narrow.clone() if narrow is value else narrow
        return value.clone()

    def kept_rows(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for tensors ``(classifiers, ...)`` of a file, which are computed with in another dtype maybe."""
        if not values.is_floating_point() or not dtype.is_floating_point:
            return values.to(dtype)
        wanted = self.dtype or (values.dtype if values.dtype.itemsize <= dtype.itemsize else dtype)
        return values.to(wanted)

    def labels(self, labels: Labels) -> Labels:
        """The same labels, held once for all tasks that have them."""
        return self._labels.setdefault(repr(labels), labels)

    def follow(self, fn: Callable[[Tensor], Tensor], heads: Iterable[StoredHead]) -> None:
        """Do with all classifiers what ``nn.Module.to`` and its kin do with the model."""
        for head in heads:
            head.follow(fn)
        for kind in self._kinds.values():
            kind.dtypes = tuple(fn(torch.empty(0, dtype=dtype)).dtype for dtype in kind.dtypes)
        self._kinds = {_key(kind.name, kind.empty, kind.dtypes): kind for kind in self._kinds.values()}
