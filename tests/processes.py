"""Two processes of torch.distributed on this machine."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp

LIMIT_S = 240


def start_two(function: Callable[[int, int, str], None], folder: Path) -> None:
    """Let two processes work in a folder, for so long: ``function(rank, port, folder)``.

    They are forked off a process that has imported what both need; not off this one, since autograd may have threads by now,
    which a fork does not take along.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    is_posix = "forkserver" in multiprocessing.get_all_start_methods()
    if is_posix:
        multiprocessing.set_forkserver_preload(["recast_peft", "accelerate", "transformers.models.llama.modeling_llama"])
    method = "forkserver" if is_posix else "spawn"
    processes = mp.start_processes(function, args=(port, str(folder)), nprocs=2, start_method=method, join=False)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and not processes.join(timeout=1):
        pass
    for process in processes.processes:
        process.kill()
