"""A fingerprint of pretrained weights: the same in every floating dtype, another for other weights.

A weight is reduced to its root mean square and a few projections on fixed patterns of signs. Rounding to bfloat16 moves a
projection by about 0.001 of its standard deviation; other weights move it by about 1. So a tolerance tells them apart,
where a hash of the bytes would already differ after a change of dtype.
"""

from __future__ import annotations

import base64
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RecastLoadError
from .compose import without_autocast

PROJECTIONS = 4
BLOCK = 4096  # length of the sign patterns; a weight is cut in blocks of this length
LOG_STEP = 256.0  # steps of the stored base-2 logarithm of the root mean square (0.27 % each)
PROJECTION_STEP = 4096.0  # steps of a stored projection in units of its standard deviation
LOG_TOLERANCE = 2.5 / LOG_STEP  # a weight times 1.01 is 3.7 steps away, one in bfloat16 at most two
PROJECTION_TOLERANCE = 0.015
# of a weight and its form in 4 bits, whose error is a tenth of the weight; of other weights every projection is off by about 1
COARSE_LOG_TOLERANCE = 0.15
COARSE_PROJECTION_TOLERANCE = 0.4


@without_autocast()
def weight_fingerprint(weight: Tensor) -> str:
    """Fingerprint one weight.

    Args:
        weight: any floating dtype, any shape, any device but meta.

    Returns:
        14 characters: base64 of five 16-bit integers (the logarithm of the root mean square, and the projections).
    """
    with torch.no_grad():
        total = torch.zeros(PROJECTIONS, dtype=torch.float64)
        square = 0.0
        patterns = sign_patterns(BLOCK, PROJECTIONS).T.contiguous().to(weight.device)  # (projections, block)
        flat = weight.detach().reshape(-1)
        rows_at_once = 256
        for start in range(0, flat.numel(), BLOCK * rows_at_once):
            part = flat[start : start + BLOCK * rows_at_once].float()
            square += _square_sum(part)
            if part.numel() % BLOCK:
                part = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK))
            projected = patterns @ part.reshape(-1, BLOCK).T  # (projections, rows)
            row_signs = sign_patterns(projected.shape[1], PROJECTIONS, start // BLOCK).T.to(weight.device)
            total += (projected * row_signs).double().sum(dim=1).cpu()
    norm = math.sqrt(square)
    if not math.isfinite(norm):
        raise RecastLoadError("a pretrained weight holds infinite or undefined numbers; no task can be bound to it")
    log_rms = math.log2(norm / math.sqrt(max(1, flat.numel()))) if norm > 0 else -100.0
    projections = total / norm if norm > 0 else total
    numbers = [log_rms * LOG_STEP, *(projections * PROJECTION_STEP).tolist()]
    quantised = np.clip(np.rint(numbers), -32767, 32767).astype("<i2")
    return base64.b64encode(quantised.tobytes()).decode().rstrip("=")


def is_coarser_form(first: str, second: str) -> bool:
    """Whether two fingerprints may be of one weight, of which one form is quantised to few bits."""
    return _are_close(first, second, COARSE_LOG_TOLERANCE, COARSE_PROJECTION_TOLERANCE)


def same_weight(first: str, second: str) -> bool:
    """Whether two fingerprints (``RecastLoadError`` for others) are of one weight, up to a change of floating dtype."""
    return first == second or _are_close(first, second, LOG_TOLERANCE, PROJECTION_TOLERANCE)


def _are_close(first: str, second: str, of_size: float, of_projection: float) -> bool:
    distance = np.abs(_decode(first) - _decode(second))
    return bool(distance[0] <= of_size * LOG_STEP and np.all(distance[1:] <= of_projection * PROJECTION_STEP))


def _square_sum(part: Tensor) -> float:
    """Sum of squares; in float64 only where float32 overflows."""
    square = float(torch.linalg.vector_norm(part)) ** 2
    return square if math.isfinite(square) else float(part.double().square().sum())


@lru_cache(maxsize=256)
def sign_patterns(length: int, count: int, first: int = 0) -> Tensor:
    """Fixed pseudo-random signs ``(length, count)`` in float32: an integer hash, the same on every machine and version."""
    index = torch.arange(first, first + length, dtype=torch.int64)[:, None] * count + torch.arange(count)
    mixed = (index * 2654435761 + 40503) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 3266489917) & 0xFFFFFFFF
    return (((mixed >> 16) & 1) * 2 - 1).float()


def is_fingerprint(value: Any) -> bool:
    """Whether a value is a fingerprint of a weight."""
    try:
        return isinstance(value, str) and _decode(value) is not None
    except RecastLoadError:
        return False


def _decode(fingerprint: str) -> np.ndarray:
    try:
        raw = base64.b64decode(fingerprint + "=" * (-len(fingerprint) % 4), validate=True)
        numbers = np.frombuffer(raw, dtype="<i2").astype(np.int64)
    except (ValueError, TypeError) as error:
        raise RecastLoadError(f"{fingerprint[:40]!r} is not a fingerprint: {error}") from error
    if len(numbers) != PROJECTIONS + 1:
        raise RecastLoadError(f"{fingerprint[:40]!r} is not a fingerprint: {PROJECTIONS + 1} numbers expected")
    return numbers
