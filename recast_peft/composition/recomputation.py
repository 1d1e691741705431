"""What is computed again in the backward pass is computed as in its forward pass.

Gradient checkpointing calls modules a second time while gradients flow back. By then another task may be active, coefficients
may have moved on, and the call's mixed batch is over. So a layer notes with what it computes, whenever that changes, beside
torch's count of recorded operations; in the backward pass the operation whose gradient is being formed tells which note holds.
Nothing is noted where nothing can be computed again: gradients are recorded and nobody takes hold of what they need.

It rests on private functions of torch, all of them in this file: the number of the running backward pass, the operation in it,
and the counter of operations.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import get_ident
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RecastBankError
from ..holders import TaskHolder
from .blocks import with_attribute
from .calling import call, call_with
from .composed import ComposedModule
from .mixed_batch import MixedBatch
from .mixing import call_mixed

MOST_NOTES = 64  # of each thread
MOST_THREADS = 64
_NO_GRAPH = -1  # the number of a backward pass where none is running


class CallState(NamedTuple):
    """With what a layer computes in a call."""

    tasks: tuple[str, ...]  # whose weight it is
    merged: bool = False  # whether they are merged
    held: tuple[str, ...] | None = None  # the tasks below what another method merged
    mixed: bool = False  # whether every sample has its own task
    batch: MixedBatch | None = None  # that says which; None where it was not kept
    versions: tuple[tuple[int, bool], ...] = ()  # how often each of their parameters was written to, and if it is trained
    recorded: bool = False  # whether gradients were recorded, so that those of the forward pass are the ones that flow
    values: Mapping[str, Tensor] = MappingProxyType({})  # the tasks' coefficients at that time, where they were kept
    strengths: tuple[tuple[str, float], ...] = ()  # the tasks' factors, where one was set

    def is_same(self, other: CallState) -> bool:
        """Whether a call computes the same in both states."""
        return (
            self.tasks == other.tasks
            and self.versions == other.versions
            and self.strengths == other.strengths
            and self.batch is other.batch
            and (self.merged, self.held, self.mixed) == (other.merged, other.held, other.mixed)
        )


@dataclass(eq=False)
class _Note:
    state: CallState
    first: int
    last: int


class CallHistory:
    """The states that a layer computed in, by thread, each with the counts of operations at its first and latest call.

    A copy, by ``deepcopy`` or ``pickle``, begins with none.
    """

    def __init__(self) -> None:
        self._notes: dict[int, deque[_Note]] = {}

    def __reduce__(self) -> tuple:
        return CallHistory, ()

    def note(self, state: CallState) -> None:
        """Note that calls of this thread compute in a state from now on."""
        notes = self._notes.get(get_ident())
        if notes is None:
            if len(self._notes) >= MOST_THREADS:
                self._notes.clear()
            notes = self._notes[get_ident()] = deque(maxlen=MOST_NOTES)
        count = torch._C._autograd._get_sequence_nr()
        notes.append(_Note(state, count, count))

    def note_again(self, state: CallState) -> None:
        """Note a state that was recalled, for checkpoints inside of what is computed again; in the thread that noted it."""
        if get_ident() in self._notes and self.is_news(state):
            self.note(state)

    def is_news(self, state: CallState) -> bool:
        """Whether this thread's latest call computed in another state; if not, this call is added to its note."""
        notes = self._notes.get(get_ident())
        if not notes or not notes[-1].state.is_same(state) or notes[-1].state.recorded != state.recorded:
            return True
        notes[-1].last = torch._C._autograd._get_sequence_nr()
        return False

    def latest(self) -> _Note | None:
        """The note of this thread's latest call that was noted."""
        notes = self._notes.get(get_ident())
        return notes[-1] if notes else None

    def goes_on(self, note: _Note | None) -> bool:
        """Whether a note is this thread's latest; if so, this call, which computes in the same state, is added to it."""
        if note is None or note is not self.latest():
            return False
        note.last = torch._C._autograd._get_sequence_nr()
        return True

    def recall(self) -> CallState | None:
        """The state of the call that is computed again; None if none was noted, ``RecastBankError`` if too much changed."""
        node = torch._C._current_autograd_node()
        if not self._notes or node is None:
            return None
        # an operation that calls modules itself got its number before they were called; else it followed on them
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        follows = hooks is not None and type(node).__name__ != "CheckpointFunctionBackward"
        now = node._sequence_nr() + (not follows)
        own = self._notes.get(get_ident())
        threads = [own] if own else list(self._notes.values())  # an accelerator's gradients are formed in a thread of their own
        found = [self._at(list(notes), now, follows) for notes in threads]
        if any(not state.is_same(found[0]) for state in found[1:]):
            raise RecastBankError(
                "a checkpointed call is computed again in the backward pass, but several threads have called the model with "
                "different tasks since: train in one thread alone, or turn gradient checkpointing off"
            )
        return found[0]

    @staticmethod
    def _at(notes: list[_Note], count: int, follows: bool) -> CallState:
        if follows:
            place = bisect_right(notes, count, key=lambda note: note.first) - 1
        else:
            place = min(bisect_left(notes, count, key=lambda note: note.last), len(notes) - 1)
        if notes[0].first > count and len(notes) == MOST_NOTES:
            raise RecastBankError(
                f"a checkpointed call is computed again in the backward pass, but tasks or coefficients have changed "
                f"{MOST_NOTES} times since: call backward() earlier, or turn gradient checkpointing off"
            )
        return notes[max(0, place)].state


def is_recomputing() -> bool:
    """Whether a backward pass is running in this thread, so that a call computes something again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != _NO_GRAPH


def may_be_recomputed() -> bool:
    """Whether what is computed now, and not compiled, may be computed again in the backward pass.

    One kind of checkpointing records no gradient in the forward pass, as evaluation does; the other one takes hold of every
    tensor that the backward pass needs.
    """
    if torch.is_inference_mode_enabled():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def past_state(layer: ComposedModule, batch: MixedBatch | None) -> CallState | None:
    """The state in which a call has to be computed again; None for any call that computes with what the layer holds now.

    What the layer computes with is noted where it may be needed. ``RecastBankError`` if the state cannot be had again.
    """
    if torch.compiler.is_compiling():
        return None
    if is_recomputing():
        past = layer.history.recall()
        if past is None:
            return None
        layer.history.note_again(past)
        if past.is_same(_state_of(layer, batch)):
            return None
        _check(layer, past)
        return past
    if may_be_recomputed():
        state = _state_of(layer, batch)
        if layer.history.is_news(state):
            layer.history.note(_with_values(layer, state))
    return None


def state_of_call(holder: Any) -> CallState:
    """The state in which what holds no weight computes a call: that of the forward pass if it is computed again.

    ``RecastBankError`` if that of other tasks.
    """
    state = CallState(holder.tasks_of_call(), strengths=_strengths(holder))
    if torch.compiler.is_compiling():
        return state
    if is_recomputing():
        past = holder.history.recall() or state
        if past.tasks != state.tasks:
            raise _has_changed(holder, "other tasks were activated, merged or switched off")
        holder.history.note_again(past)
        return past
    if may_be_recomputed() and holder.history.is_news(state):
        holder.history.note(state)
    return state


def strengths_of_call(holder: Any) -> dict[str, float]:
    """The tasks' factors in a call, which are those of the forward pass if it is computed again; for what holds no weight."""
    strengths = state_of_call(holder).strengths
    return holder.scaling if strengths == _strengths(holder) else dict(strengths)


def call_again(layer: ComposedModule, past: CallState, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the wrapped module computed in a state; gradients flow to the coefficients that the layer holds now."""
    others = () if past.strengths == _strengths(layer) else (layer,)  # several threads may compute their calls again
    with with_attribute(others, "scaling", dict(past.strengths)):
        if past.batch is not None:
            return call_mixed(layer, past.batch, args, kwargs)
        values = {}
        if past.versions != _versions(layer, past.tasks):
            for name in layer.with_coefficients(past.tasks):
                parameter, value = layer.recast_coefficients[name], past.values[name]
                # as often saved for the backward pass as it was, also where the parameter is frozen by now
                values[name] = value.clone().requires_grad_() if past.recorded else value + (parameter - parameter.detach())
        if past.merged:
            with torch.no_grad():
                weight = layer.compose(past.tasks, values=values)
            return call_with(layer, weight, args, kwargs)
        return call(layer, past.tasks, args, kwargs, values)


def _state_of(layer: ComposedModule, batch: MixedBatch | None) -> CallState:
    if layer.is_off(batch):
        return CallState((), held=layer.held)
    is_mixed, is_recorded = batch is not None, torch.is_grad_enabled()
    tasks = layer.tasks_in_force() if batch is None else dict.fromkeys(filter(layer.has_task, batch.names))
    return CallState(
        tuple(tasks),
        merged=bool(layer.merged_adapters) and not is_mixed,
        held=layer.held,
        mixed=is_mixed,
        batch=batch if is_recorded else None,
        versions=_versions(layer, tuple(tasks)),
        recorded=is_recorded,
        strengths=_strengths(layer),
    )


def _strengths(holder: TaskHolder) -> tuple[tuple[str, float], ...]:
    scaling = vars(holder).get("scaling")  # what a task owns whole reads as the module that it is
    return tuple(scaling.items()) if scaling else ()


def _versions(layer: ComposedModule, tasks: tuple[str, ...]) -> tuple[tuple[int, bool], ...]:
    coefficients, masks = layer.recast_coefficients, layer.recast_masks
    found = [coefficients[name] for name in tasks if name in coefficients]
    if len(masks):
        found += [parameter for name in tasks if name in masks for parameter in masks[name].parameters()]
    return tuple([(-1 if p.is_inference() else p._version, p.requires_grad) for p in found])


def _with_values(layer: ComposedModule, state: CallState) -> CallState:
    if state.mixed or not (torch.is_grad_enabled() or layer.training):
        return state
    kept = [name for name in layer.with_coefficients(state.tasks) if name not in layer.recast_masks]
    return state._replace(values={name: layer.recast_coefficients[name].detach().clone() for name in kept})


def _check(layer: ComposedModule, past: CallState) -> None:
    known = {name for name in past.tasks if layer.has_task(name)}
    what: str | None = None
    if past.held != layer.held:
        what = "an adapter of another method was merged or unmerged"
    elif past.mixed and past.batch is None:
        what = "a mixed batch is over, which checkpointing forgets with use_reentrant=True and not with use_reentrant=False"
    elif known != set(past.tasks):
        what = f"the task {min(set(past.tasks) - known)!r} was deleted"
    elif past.versions != _versions(layer, past.tasks) and set(past.values) != set(past.tasks):
        what = "parameters of the task were written to, or frozen"
    if what is not None:
        raise _has_changed(layer, what)


def _has_changed(holder: TaskHolder, what: str) -> RecastBankError:
    return RecastBankError(
        f"{holder.module_name} is computed again in the backward pass (gradient checkpointing), but since its forward pass "
        f"{what}. Call backward() before anything is changed, or turn gradient checkpointing off"
    )
