"""Peak memory of a piece of work: every allocation and release that torch's profiler records, added up in their order.

On a CPU that is exact for tensors and for temporaries inside operators; what the matrix library keeps for itself outside
torch's allocator is not seen. On a GPU the allocator's own counter is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes that were allocated on a device at one moment of a call, above what was there before it."""
    if torch.device(device).type == "cuda":
        function()  # libraries allocate what they work in at their first use
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
