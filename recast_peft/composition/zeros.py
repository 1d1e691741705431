"""A pool's slot that no task is in: what would be multiplied by its zeros is left out of eager calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Zeros:
    """The numbers of an adapter, noted while all of them are zero.

    What outlives a call multiplies by them all the same, so that a task that is written there later is seen: graphs that are
    compiled, exported, traced or captured, and calls whose gradients are recorded, which may be computed again. Numbers that
    somebody wrote or exchanged since count as any others; but torch counts no write in place by way of ``.data``: call
    ``forget`` then. A copy begins with nothing noted.

    Args:
        adapter_name: the adapter.
    """

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        # holder -> what was active, and the numbers with what is known of each
        self._noted: dict[int, tuple[list[str], list[tuple[Tensor, tuple[int, int]]]]] = {}

    def __reduce__(self) -> tuple[type[Zeros], tuple[str]]:
        return Zeros, (self.adapter_name,)

    def note(self, holders: Iterable[Any]) -> None:
        """Note what the adapter has in these places, which is zero now; it is active."""
        for holder in holders:
            numbers = holder.numbers_of(self.adapter_name)
            if numbers and not any(number.is_inference() for number in numbers):
                self._noted[id(holder)] = list(holder.active_adapters), [(n, _state_of(n)) for n in numbers]

    def forget(self) -> None:
        """Other numbers may be written from now on."""
        self._noted = {}

    def are_all(self, holder: Any) -> bool:
        """Whether a call that begins now would compute with nothing else in a place; never while a graph is made."""
        noted = self._noted.get(id(holder))
        if noted is None or torch.is_grad_enabled() or torch.jit.is_tracing():
            return False
        active, numbers = noted
        now: Sequence[Tensor] = holder.numbers_of(self.adapter_name) if holder.active_adapters == active else ()
        are_same = len(now) == len(numbers) and all(
            number is old and _state_of(number) == state for number, (old, state) in zip(now, numbers, strict=True)
        )
        return are_same and not _may_be_captured(now[0].device.type)


def _state_of(number: Tensor) -> tuple[int, int]:
    """What is another one where other numbers lie; an exchange of ``.data``, as by ``vector_to_parameters``, is no write."""
    return number._version, number.data_ptr()


def _may_be_captured(device: str) -> bool:
    """Whether what is computed now may become part of a graph that is called again; of other devices nobody knows."""
    return torch.cuda.is_current_stream_capturing() if device == "cuda" else device not in ("cpu", "mps")
