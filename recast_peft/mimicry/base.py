"""What every mimicry method is, and what it returns."""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..validation import Options


@dataclass(frozen=True)
class Recipe:
    """Templates that are a fixed mix of the group's pretrained weights: T = mix @ W, and W_l is about base[l] @ T.

    Attributes:
        mix: ``(templates, layers)`` in float64.
        base: ``(layers, templates)`` in float64.
    """

    mix: Tensor
    base: Tensor

    def to_lists(self) -> dict[str, list[list[float]]]:
        """Plain numbers, as a task stores them."""
        return {"mix": self.mix.tolist(), "base": self.base.tolist()}

    @classmethod
    def from_lists(cls, stored: dict[str, list[list[float]]]) -> Recipe:
        """The recipe that ``to_lists`` wrote."""
        return cls(torch.tensor(stored["mix"], dtype=torch.float64), torch.tensor(stored["base"], dtype=torch.float64))


@dataclass(frozen=True)
class FittedTemplates:
    """Templates that are no mix of the pretrained weights, and so have to be stored: W_l is about base[l] @ templates.

    Attributes:
        templates: ``(templates, *weight_shape)``.
        base: ``(layers, templates)``.
    """

    templates: Tensor
    base: Tensor


@dataclass(frozen=True)
class MimicryMethod(Options, ABC):
    """Options of one way to find templates and base coefficients; a subclass is a method.

    A new method is a subclass in a file of its own and one row in ``METHODS``. Its fields are its options, each with a
    default and of a type that JSON knows.

    Class attributes:
        name: name by which a config names the method.
        fits_full_banks: it also fits banks with as many templates as layers, for which no fit is needed.
        needs_data: it needs a few batches, so that it runs in ``fit_bank`` alone.
    """

    name: ClassVar[str] = ""
    fits_full_banks: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def fit(
        self, weights: Sequence[Tensor], num_templates: int, *, label: str = "", moments: Sequence[Tensor | None] | None = None
    ) -> Recipe | FittedTemplates:
        """Find templates and base coefficients for one group.

        Args:
            weights: the pretrained weights of the group's layers, all of one shape.
            num_templates: n, at most the number of layers.
            label: the group's name: shown in the progress bar, and part of the seed.
            moments: for a method that ``needs_data``: the second moment ``(fan_in, fan_in)`` of each layer's input.
        """

    def to_dict(self) -> dict[str, Any]:
        """The options as a config stores them: ``{"method": name, option: value, ...}``."""
        return {"method": self.name, **dataclasses.asdict(self)}


def local_generator(seed: int, label: str, device: torch.device) -> torch.Generator:
    """A generator for one group, the same whatever other groups there are."""
    # one hash of both: on the CPU a generator takes only the lower 32 bits of its seed
    return torch.Generator(device=device).manual_seed(zlib.crc32(f"{seed} {label}".encode()))


def flatten(weights: Sequence[Tensor]) -> Tensor:
    """The group's weights as rows ``(layers, numbers)`` in float32 on the first weight's device."""
    device = weights[0].device
    return torch.stack([weight.detach().reshape(-1).to(device, torch.float32) for weight in weights])


def scale_templates(templates: Tensor, base: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Give every template the mean norm of the layers, so that a coefficient is measured in weights.

    Args:
        templates: ``(templates, numbers)``.
        base: ``(layers, templates)``.
        weights: ``(layers, numbers)``.

    Returns:
        templates and base coefficients that compose the same weights. Layers of zeros have no norm to give: their
        templates are zeros too.
    """
    wanted, norms = weights.norm(dim=1).mean(), templates.norm(dim=1)
    if not wanted:
        return torch.zeros_like(templates), base
    scale = scale_to(norms, wanted)
    return templates * scale[:, None], base / scale


def scale_to(norms: Tensor, wanted: Tensor) -> Tensor:
    """Factors that give directions a norm; one without energy keeps its own, since rounding errors alone would grow."""
    return torch.where(norms > 1e-6 * wanted, wanted / norms.clamp_min(torch.finfo(norms.dtype).tiny), torch.ones_like(norms))
