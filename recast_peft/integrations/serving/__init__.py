"""Many tasks as a service: requests of any tasks are computed in one batch.

``TaskServer`` collects requests from threads and asyncio; ``task_app`` is a FastAPI application around it (the extra
``serving``), ``ray_application`` a Ray Serve deployment. ``recast-peft serve`` starts the first on one machine.
"""

from __future__ import annotations

from .batcher import Answer, ServerBusyError, TaskServer, TaskServerError
from .store import TaskStore

__all__ = ["Answer", "ServerBusyError", "TaskServer", "TaskServerError", "TaskStore"]
