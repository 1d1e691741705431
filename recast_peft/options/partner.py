"""What every partner is: options, the places that it can stand at, and the module that a task trains there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import RecastConfigError

if TYPE_CHECKING:
    from ..planning.candidates import Candidate


@dataclass(frozen=True, kw_only=True)
class PartnerConfig:
    """Options of one partner; a subclass is a kind of partner.

    A new partner is a subclass in a file of its own and one row in ``PARTNERS``. Its fields are its options, each with a
    default and of a type that JSON knows.

    Args:
        target_modules: where it stands: names, a regular expression that matches whole names, or a shorthand such as
            ``"all-conv"``. None takes what the partner's paper takes.

    Attributes:
        method: the partner's name, by which a stored config finds it.

    Class attributes:
        acts_on: ``"output"``: the task's module is called with the input and the output of the place and returns what goes
            on; ``"weight"``: it is called with the weight that the place computes with and returns the one to use;
            ``"bias"``: it is called with the output and the bias of the place and returns the output with the bias to use,
            whose difference to the place's own its ``change(bias)`` gives, so that it can be merged.
    """

    acts_on: ClassVar[str] = "output"

    method: str = field(default="", init=False)
    target_modules: tuple[str, ...] | list[str] | str | None = None

    def __post_init__(self) -> None:
        names = self.target_modules
        if names is None or (isinstance(names, str) and names):
            return
        is_listed = isinstance(names, (list, tuple, set, frozenset)) and bool(names)
        self.check("target_modules", is_listed and all(isinstance(n, str) for n in names), "names, a pattern, or None")
        # an order that comes from a set would differ from run to run
        object.__setattr__(self, "target_modules", tuple(sorted(names) if isinstance(names, (set, frozenset)) else names))

    def is_default_place(self, candidate: Candidate, targets: Collection[str]) -> bool:
        """Whether the partner stands here if no target modules are named; ``targets`` are those of the task."""
        raise NotImplementedError

    def refusal(self, candidate: Candidate) -> str | None:
        """Why the partner cannot stand here; None if it can."""
        raise NotImplementedError

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        """A fresh module for one task at one place: it changes nothing yet.

        Args:
            module: the plain module that stands at the place.
            shape: of its weight; None if it has none.
            generator: of whatever is random.
            like: ``device`` and ``dtype`` of the parameters.
        """
        raise NotImplementedError

    def check(self, option: str, holds: bool, expected: str) -> None:
        """Refuse an option's value.

        Raises:
            RecastConfigError: naming the option, its value, and what was expected.
        """
        if not holds:
            raise RecastConfigError(f"{type(self).__name__}({option}={getattr(self, option)!r}): expected {expected}")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
