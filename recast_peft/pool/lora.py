"""The LoRA part of a pool's tasks: columns of a row for the two factors of each of its modules.

All tasks have the part of the pool's layout: the same modules, ranks and strengths. A task without one has zeros there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastLoadError
from ..holders import Entry, container_key, held_entries
from ..parts.lora import A_PART, lora_config_of
from ..parts.lora_plan import rank_and_alpha
from ..parts.lora_strength import PartStrength, part_layers
from ..parts.lora_sum import nearest_pair
from ..tasks.arithmetic import SUMS, check_svd, combine_rows

FACTORS = (".lora_A.weight", ".lora_B.weight")
ROUNDING = 1e-6  # share of a sum that is lost by float32 alone
MORE = f"{A_PART} that is more than two factors (DoRA or another variant, lora_bias)"

Parts = dict[str, list[float]]  # of each module the rank, and what the product of the factors is multiplied with


def poolable_part(model: nn.Module, adapter: str) -> LoraConfig | None:
    """The config of a task's LoRA part; None if it has none, or one that no row holds."""
    layers = part_layers(model, adapter)
    are_factors = all(entry.name.endswith(FACTORS) for layer in layers for entry in layer.entries(adapter))
    has_variant = any(container_key(adapter) in layer.lora_variant for layer in layers)
    return lora_config_of(model, adapter) if layers and are_factors and not has_variant else None


def refusal_of(lora: Any) -> str | None:
    """What a LoRA part has that no row holds; None if two factors are all."""
    more = ("use_dora", "lora_bias", "velora_config")
    has_more = lora is not None and (lora.init_lora_weights == "mica" or any(getattr(lora, name, None) for name in more))
    return MORE if has_more else None


def lora_modules(names: Iterable[str]) -> list[str]:
    """The modules of a LoRA part by the names of its factors."""
    return [name.removesuffix(FACTORS[0]) for name in names if name.endswith(FACTORS[0])]


class LoraColumns:
    """The LoRA part of an adapter's layout.

    Attributes:
        entries: its factors by the names of their columns, as a task's file names them.
        sizes: how many columns each of them has.
        parts: rank and strength by module, in the order of the columns.
        width: how many columns there are; they are the last of a row.
    """

    def __init__(self, backbone: nn.Module, adapter: str, config: RecastConfig) -> None:
        self.backbone = backbone
        self.layers = part_layers(backbone, adapter)
        self.entries: dict[str, Entry] = {entry.name: entry for layer in self.layers for entry in layer.entries(adapter)}
        self.sizes = {name: math.prod(entry.shape) for name, entry in self.entries.items()}
        self.width = sum(self.sizes.values())
        self.parts = _parts(config.lora_config, [layer.module_name for layer in self.layers])

    def compute_as(self, other: LoraColumns) -> None:
        """Let the factors have the dtypes of another part's."""
        for name, entry in self.entries.items():
            entry.tensor.data = entry.tensor.data.to(other.entries[name].tensor.dtype)

    def check(self, what: str, lora: Any, modules: Iterable[str]) -> None:
        """Refuse a LoRA part on some modules that is not the pool's; a task without one (None) has zeros there.

        Raises:
            RecastBankError: saying both.
        """
        if lora is not None and (given := _parts(lora, modules)) != self.parts:
            raise _other_part(what, given, self.parts)

    def entries_of(self, adapter: str) -> dict[str, Tensor]:
        """The factors of a task of the model."""
        return {entry.name: entry.tensor for entry in held_entries(self.backbone, adapter, PartStrength)}

    def fresh(self, row: Tensor, slices: Mapping[str, slice], generator: torch.Generator) -> None:
        """Write a part that adds nothing yet, and can be trained, into a row: the first factors are random, as PEFT's are."""
        for name, entry in self.entries.items():
            if name.endswith(FACTORS[0]):
                bound = math.prod(entry.shape[1:]) ** -0.5
                row[slices[name]].uniform_(-bound, bound, generator=generator)

    def padded(self, what: str, saved: Any, table: Tensor) -> Tensor:
        """The table ``(tasks, numbers per task)`` of a file with the pool's columns.

        Args:
            what: its tasks are called in messages.
            saved: pairs of ``parts``, as the file has them.
            table: of the file; zeros are added where its tasks have no LoRA part.

        Raises:
            RecastBankError: if they have another part.
            RecastLoadError: if the file is damaged.
        """
        if saved == [[name, part] for name, part in self.parts.items()]:
            return table
        if not saved:
            return F.pad(table, (0, self.width))
        try:
            given = {str(name): [float(rank), float(factor)] for name, (rank, factor) in saved}
        except (TypeError, ValueError) as error:
            raise RecastLoadError(f"{what} is damaged: its LoRA part is {str(saved)[:100]}") from error
        raise _other_part(what, given, self.parts)

    def combine(self, rows: Mapping[str, Tensor], weights: Sequence[float], combination_type: str, **options: Any) -> Tensor:
        """The row of a combined task; see ``combine_rows`` for the arguments.

        Raises:
            RecastConfigError: if parts are to be pruned, or have a sum of a higher rank than a row and ``"svd"`` does not ask
                for the nearest.
        """
        check_svd(combination_type, self.width > 0)
        numbers = len(next(iter(rows.values()))) - self.width
        coefficients = combine_rows([row[:numbers] for row in rows.values()], weights, combination_type, **options)
        parts = {name: row[numbers:] for name, row in rows.items()}
        return torch.cat([coefficients, *self._summed(parts, weights, combination_type)])

    def _summed(self, rows: Mapping[str, Tensor], weights: Sequence[float], combination_type: str) -> list[Tensor]:
        """The columns of the weighted sum of tasks' parts, from those of each."""
        have = [name for name, row in rows.items() if row.any()]
        if have and combination_type not in SUMS:
            raise RecastConfigError(f"task {have[0]!r} has {A_PART}, which cannot be pruned: use 'linear', or 'svd'")
        split = [dict(zip(self.entries, row.split([*self.sizes.values()]), strict=True)) for row in rows.values()]
        found = []
        for module in self.parts:
            a, b = (self.entries[f"{module}{factor}"] for factor in FACTORS)
            pairs = [(own[a.name].view(a.shape), w * own[b.name].view(b.shape)) for w, own in zip(weights, split, strict=True)]
            firsts, seconds = zip(*([pair for pair in pairs if pair[0].any() and pair[1].any()] or pairs[:1]), strict=True)
            first, second = torch.cat(firsts), torch.cat(seconds, dim=1)
            if len(firsts) > 1:
                first, second, lost = nearest_pair(first, second, a.shape[0])
                if lost > ROUNDING and combination_type != "svd":
                    raise RecastConfigError(
                        f"the sum of the LoRA parts of {', '.join(have)} has a higher rank at {module} than a row of the pool "
                        f"holds\n  rank of a row: {a.shape[0]}\n  the nearest of this rank lacks {100 * lost:.2g} % of it\n"
                        "Use combination_type='svd' for the nearest one, or combine the tasks as adapters of the model, which "
                        "is exact (model.add_weighted_adapter)."
                    )
            found += [first.flatten(), second.flatten()]
        return found


def _parts(lora: Any, modules: Iterable[str]) -> Parts:
    if lora is None:
        return {}
    known = {name: rank_and_alpha(lora, name) for name in modules}
    return {name: [rank, alpha / (math.sqrt(rank) if lora.use_rslora else rank)] for name, (rank, alpha) in known.items()}


def unlike_pool(what: str, has: str, task: str, pool: str, like: str = "with its layout") -> RecastBankError:
    """Says what a task has that the pool's have not, and which pool could hold it."""
    return RecastBankError(
        f"{what} has {has}\n  task: {task}\n  pool: {pool}\nMake a pool for it: TaskPool(model, like=<a task {like}>)."
    )


def _other_part(what: str, given: Parts, own: Parts) -> RecastBankError:
    return unlike_pool(what, "a LoRA part that is not the pool's", _shown(given, own), _shown(own, given))


def _shown(parts: Parts, other: Parts) -> str:
    """Parts in a line, with the first module at which they differ from others."""
    if not parts:
        return "no LoRA part"
    first = next((name for name in parts if parts[name] != other.get(name)), next(iter(parts)))
    rank, factor = parts[first]
    return f"{len(parts)} modules, rank {rank:g} and strength {factor:g} at {first}"
