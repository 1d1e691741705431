"""ray_application: the tasks of a folder as a Ray Serve deployment, for more than one machine.

Every replica holds the backbone and all tasks, and collects its own requests into batches. The folder has to be readable on
every machine (a shared disk); each replica follows it by itself.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from torch import Tensor

from ...errors import RecastConfigError
from ...pool.resident import check_head_dtype
from ...storage.json_reader import parse_json
from .batcher import TaskServer, check_server_options
from .start import open_folder


class TaskReplica:
    """One replica; by handle: ``await handle.predict.remote("cats", sample)``, over HTTP: ``{"task": ..., "inputs": ...}``.

    For the arguments see ``ray_application``.
    """

    def __init__(
        self, folder: str, backbone: Any, head_dtype: str | None, reload_seconds: float | None, options: dict[str, Any]
    ) -> None:
        made = backbone() if callable(backbone) and not isinstance(backbone, torch.nn.Module) else backbone
        self.store = open_folder(folder, backbone=made, head_dtype=head_dtype)
        self.server = TaskServer(self.store.pool, **options)
        if reload_seconds is not None:
            self.store.follow(reload_seconds)

    async def predict(self, task: str | None, sample: Any) -> Any:
        """The output of one sample, as a numpy array.

        Args:
            task: name; None is the pretrained model.
            sample: an array or tensor without a batch dimension, or several by name.
        """
        named = {key: _tensor(value) for key, value in sample.items()} if isinstance(sample, dict) else _tensor(sample)
        return (await self.server.answer(task, named)).output.numpy()

    async def __call__(self, request: Request) -> dict[str, Any]:
        fields = parse_json(await request.body(), "the body", error=RecastConfigError)
        sample = fields.get("inputs", [])
        return {"output": (await self.predict(fields.text("task"), sample)).tolist()}

    def stats(self) -> dict[str, int]:
        """Counts of this replica's requests and batches."""
        return self.server.stats()

    async def check_health(self) -> None:
        """Asked by Ray: a replica whose serving thread is gone is replaced."""
        if not self.server.is_alive:
            raise RuntimeError("the serving thread is gone")

    async def __del__(self) -> None:
        await asyncio.to_thread(self.store.close)
        await asyncio.to_thread(self.server.close)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def ray_application(
    folder: str | Path,
    *,
    backbone: Any = None,
    head_dtype: str | None = None,
    reload_seconds: float | None = 5.0,
    deployment: dict[str, Any] | None = None,
    **options: Any,
) -> serve.Application:
    """The tasks of a folder as a Ray Serve application, for ``serve.run``.

    Args:
        folder: folder of saved tasks, readable wherever a replica runs.
        backbone: as for ``open_folder``, or a function that makes it in the replica.
        head_dtype: dtype in which classifiers are kept.
        reload_seconds: how often each replica looks at the folder; None never does.
        deployment: options of ``serve.deployment``: ``num_replicas``, ``autoscaling_config``, ``ray_actor_options`` and so on.
        options: options of ``TaskServer``.
    """
    check_server_options(**options)
    check_head_dtype(head_dtype)
    chosen = {"max_ongoing_requests": 2 * options.get("max_batch", 32), **(deployment or {})}
    replica = serve.deployment(**chosen)(TaskReplica)
    return replica.bind(str(folder), backbone, head_dtype, reload_seconds, options)
