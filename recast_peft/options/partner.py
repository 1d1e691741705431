"""What every partner is: options, the places that it can stand at, and the module that a task trains there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..errors import RecastConfigError
from ..validation import Options, optional, resolve_options, shown, targets
from .record import Reference

__all__ = ["PARTNERS", "PartnerCandidate", "PartnerConfig", "resolve_partners"]


class PartnerCandidate(Protocol):
    """A module of a model as a partner is shown it (the plan's own candidates are such)."""

    @property
    def name(self) -> str:
        """Its name in the plain model."""

    @property
    def module(self) -> nn.Module:
        """The plain module."""

    @property
    def weight_name(self) -> str | None:
        """The parameter that it computes with; None if it has none."""

    @property
    def reason(self) -> str | None:
        """Why its weight cannot be composed; None if it can."""

    @property
    def path(self) -> tuple[tuple[str, nn.Module], ...]:
        """The modules around it from the model down, wrappers among them, each with its name in the one before it."""

    @property
    def slot(self) -> str:
        """Its name in the last of them."""


PARTNERS: dict[str, type[PartnerConfig]] = {}
"""Kinds of partner by name; a subclass of PartnerConfig is one as soon as its file is imported."""


@dataclass(frozen=True, kw_only=True)
class PartnerConfig(Options, ABC):
    """Options of one partner; a subclass is a kind of partner, under the name that it gives: ``class Mine(PartnerConfig,
    method="mine")``.

    Its fields are its options, each with a default and of a type that JSON knows.

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
        is_trained: whether a task trains numbers for it.
    """

    acts_on: ClassVar[str] = "output"
    is_trained: ClassVar[bool] = True

    method: str = field(default="", init=False)
    target_modules: tuple[str, ...] | list[str] | str | None = None

    def __init_subclass__(cls, method: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method:
            cls.method = method
            PARTNERS[method] = cls

    def __post_init__(self) -> None:
        self.check(optional(targets), "target_modules")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(targets(self.target_modules)))

    @abstractmethod
    def is_default_place(self, candidate: PartnerCandidate, targets: Collection[str]) -> bool:
        """Whether the partner stands here if no target modules are named; ``targets`` are those of the task.

        It is asked of places that ``refusal`` does not refuse.
        """

    @abstractmethod
    def refusal(self, candidate: PartnerCandidate) -> str | None:
        """Why the partner cannot stand here; None if it can."""

    @abstractmethod
    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        """A fresh module for one task at one place: it changes nothing yet.

        Args:
            module: the plain module that stands at the place.
            shape: shape of its weight; None if it has none.
            generator: generator of whatever is random.
            like: ``device`` and ``dtype`` of the parameters.
        """

    @property
    def bank_reference(self) -> Reference | None:
        """What a task stores of the bank that the partner is on; None for partners without banks."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The options as a config stores them: ``{"method": name, option: value, ...}``."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def stored_shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of what a file holds of a module that ``build`` made, by the names in it."""
        return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def partners_of(config: Any) -> list[PartnerConfig]:
    """The partners of a ``RecastConfig``, none where it names none."""
    return config.partners or []


def resolve_partners(partners: Any) -> list[PartnerConfig]:
    """The partners that a config means.

    Args:
        partners: a list of partners, each as its own object, its name, or ``{"method": name, option: value, ...}``.

    Raises:
        RecastConfigError: if there is no such partner or option, a value cannot be used, or a partner is named twice.
    """
    if not isinstance(partners, (list, tuple)):
        raise RecastConfigError(f"partners={shown(partners)}: expected a list of partners, such as [AdaptFormerConfig()]")
    kind: Any = PartnerConfig  # abstract
    resolved: list[PartnerConfig] = [resolve_options("partners", partner, kind, PARTNERS) for partner in partners]
    methods = [partner.method for partner in resolved]
    double = sorted({method for method in methods if methods.count(method) > 1})
    if double:
        raise RecastConfigError(f"partners names {double[0]!r} twice; give one of them all target_modules")
    return resolved
