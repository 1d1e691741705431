"""From a folder of tasks to a server of them: the backbone is found by the first task that can be read."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ...auto import AutoRecastModel
from ...errors import RecastConfigError, RecastError
from ...pool.pool import TaskPool
from ...pool.resident import check_head_dtype
from ...validation import COUNT, a_path, check_arguments, number_above, text, whole_number
from .batcher import TaskServer, check_server_options
from .store import TaskStore


def open_folder(folder: str | Path, *, backbone: Any = None, head_dtype: str | None = None) -> TaskStore:
    """A pool of the tasks in a folder, which has the layout of the first one with a LoRA part, or of the first one.

    Args:
        folder: folder of saved tasks, one in a folder each.
        backbone: as for ``AutoRecastModel.from_pretrained``; None finds the one that the tasks name.
        head_dtype: dtype in which classifiers are kept, as for ``TaskPool``.

    Raises:
        RecastConfigError: if no task in the folder can be read; the reasons are in the message.
    """
    check_head_dtype(head_dtype)
    check_arguments(a_path, folder=folder)
    reasons = []
    paths = sorted(Path(folder).glob(f"*/{CONFIG_NAME}"))
    # a pool like a task with a LoRA part holds those without one as well
    for path in sorted(paths, key=lambda path: not _has_lora(path)):
        try:
            model = AutoRecastModel.from_pretrained(path.parent, backbone=backbone, adapter_name="layout")
        except RecastError as error:
            reasons.append(f"{path.parent.name}: {error}")
            continue
        pool = TaskPool(model, like="layout", head_dtype=head_dtype)
        pool.deactivate()
        store = TaskStore(folder, pool)
        store.refresh()
        return store
    raise RecastConfigError(f"{folder} holds no task that can be served" + "".join(f"\n  {reason}" for reason in reasons[:5]))


def _has_lora(config: Path) -> bool:
    try:
        return b'"lora_config"' in config.read_bytes()
    except OSError:  # whoever reads the task says why
        return False


def serve_folder(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: str | Path | None = None,
    backbone: Any = None,
    head_dtype: str | None = None,
    reload_seconds: float = 5.0,
    max_body: int = 16 << 20,
    **options: Any,
) -> None:
    """Serve the tasks of a folder over HTTP until the process is told to stop (SIGINT, SIGTERM); what waits is answered first.

    Args:
        folder: folder of saved tasks.
        host, port: to listen at.
        tokens: a file of tenants, see ``Tenants.from_file``; without one anybody sees all tasks, and nobody changes them.
        backbone, head_dtype: as for ``open_folder``.
        reload_seconds: how often the folder is looked at for tasks that came, changed or went.
        max_body: bytes of a request.
        options: options of ``TaskServer``.

    Raises:
        RecastConfigError: if FastAPI, uvicorn or prometheus_client is missing, a number cannot be meant, or nothing can be
            served.
        OSError: if the port is taken.
        TypeError: if ``TaskServer`` has no such option. All of this is told before a model is built.
    """
    try:
        import uvicorn

        from .access import Tenants
        from .app import task_app
    except ImportError as error:
        raise RecastConfigError(f"serving needs more packages ({error}): pip install 'recast_peft[serving]'") from error
    check_arguments(text, host=host)
    check_arguments(whole_number(0, 65535), port=port)
    check_arguments(COUNT, max_body=max_body)
    check_arguments(number_above(0), reload_seconds=reload_seconds)
    check_server_options(**options)
    tenants = None if tokens is None else Tenants.from_file(tokens)
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
        pass  # a port that is taken is told now, not when a large model is in memory
    store = open_folder(folder, backbone=backbone, head_dtype=head_dtype)
    server = TaskServer(store.pool, **options)
    app = task_app(server, store, tenants=tenants, max_body=max_body, reload_seconds=reload_seconds)
    try:
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=30)
    except SystemExit as error:  # by a status that means something else here
        raise OSError(f"nothing is served at {host}:{port}; the log above says why") from error
