"""A weak fingerprint of what a model has beside a task's target modules: other weights, norms, running statistics.

A task's coefficients are bound to the weights of its targets, which are compared one by one. What stands around them counts
too: other running statistics alone can cost half of a task's accuracy. One fingerprint of samples of all of it says whether it
is what the task was learned on, up to a change of dtype; a difference is warned of and not refused.

Every tensor counts as much as any other: as a sample of unit length, and as a point on each of two circles whose angle is the
logarithm of its size; a factor that goes round the one goes round no whole number of times on the other. On an ImageNet
EfficientNet-Lite0 and a MobileNetV2 (about 200 tensors beside the targets) that tells a hundredth in the size of every norm, or
a twentieth in the size of one; a shift within one tensor only where it is large. Of a quantised layer the bias alone counts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..composition.fingerprint import same_weight, weight_fingerprint
from ..composition.quantised import quantised_by
from ..holders import plain_modules, unwrapped_module
from ..names import lies_in
from ..placement.sharded import holds_parts
from ..planning.heads import head_names
from .verbs import merged_tasks

SAMPLE = 4096  # numbers of a tensor that are looked at
PERIODS = (1, math.sqrt(2))  # logarithms of the factors of a tensor that each of the circles cannot see
SMALLEST = 1e-4  # root mean square of a tensor that counts: float16 has few bits for smaller numbers


def surroundings_fingerprint(model: nn.Module, targets: Collection[str]) -> str | None:
    """Fingerprint the parameters and persistent buffers of a model beside its targets and its classifier.

    Returns:
        None where it cannot be said: something is merged, holds no numbers, or is spread over processes.
    """
    if merged_tasks(model):
        return None
    if any(holds_parts(unwrapped_module(module)) for module in (model, *plain_modules(model).values())):
        return None
    parts = []
    for tensor in _tensors(model, targets):
        if tensor.is_meta:
            return None
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float().cpu()
        length = float(sample.norm())
        size = length / math.sqrt(len(sample))
        if math.isfinite(size) and size > SMALLEST:  # masks hold infinity
            angles = [2 * math.pi * math.log2(size) / period for period in PERIODS]
            parts += [sample / length, sample.new_tensor([*map(math.cos, angles), *map(math.sin, angles)])]
    return weight_fingerprint(torch.cat(parts)) if parts else None


def _tensors(model: nn.Module, targets: Collection[str]) -> Iterator[Tensor]:
    heads, targeted = head_names(model), set(targets)
    for name, present in {"": model, **plain_modules(model)}.items():
        if lies_in(name, heads):
            continue
        module = unwrapped_module(present)
        is_packed = quantised_by(module) is not None  # libraries refuse much of what could be asked of such weights
        buffers = (b for key, b in module._buffers.items() if not is_packed and key not in module._non_persistent_buffers_set)
        weights = (p for key, p in module._parameters.items() if key == "bias" or not (is_packed or name in targeted))
        yield from (t for t in (*weights, *buffers) if t is not None and t.is_floating_point() and t.numel())


def are_different(first: str | None, second: str | None) -> bool:
    """Whether two fingerprints are of different surroundings; None says nothing."""
    return first is not None and second is not None and not same_weight(first, second)


def warn_of_difference(recorded: str | None, actual: str | None, task: str = "the task") -> None:
    """Warn if what a model has beside a task's targets is not what the task was learned on; None says nothing."""
    if are_different(recorded, actual):
        warnings.warn(
            f"The target modules have the weights that {task} was learned on, but other weights, norms or running statistics "
            f"of the model are not the same\n  fingerprint in the task:  {recorded}\n  fingerprint of the model: {actual}\n"
            "The task may compute something else than it did: load the very checkpoint that it was learned on.",
            stacklevel=2,
        )
