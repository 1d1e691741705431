"""task_app: a FastAPI application that answers requests of many tasks; the extra ``serving`` installs what it needs.

POST   /v1/tasks/{task}/predict    {"inputs": [...]} or {"inputs": {"input_ids": [...]}}, or a safetensors body
GET    /v1/tasks                   the tasks that the caller sees
PUT    /v1/tasks/{task}            (admin) a zip file with a task's config and tensors
POST   /v1/tasks/{task}/rollback   (admin) the version before
DELETE /v1/tasks/{task}            (admin)
GET    /health, /metrics, /docs
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from safetensors.torch import load as load_tensors
from starlette.requests import ClientDisconnect

from ..._version import __version__
from ...errors import RecastConfigError, RecastError
from ...storage.json_reader import parse_json
from .access import ANYBODY, Tenant, Tenants
from .batcher import Answer, Sample, ServerBusyError, TaskServer
from .store import TaskStore

# no "from __future__ import annotations" here: FastAPI reads the annotations of functions that are made inside of task_app

TENSORS = "application/vnd.safetensors"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_INPUTS = {"schema": {"type": "object", "required": ["inputs"], "properties": {"inputs": {}}}}
PREDICT = {"requestBody": {"required": True, "content": {"application/json": _INPUTS, TENSORS: _BINARY}}}
UPLOAD = {"requestBody": {"required": True, "content": {"application/zip": _BINARY}}}


def task_app(
    server: TaskServer,
    store: TaskStore | None = None,
    *,
    tenants: Tenants | None = None,
    max_body: int = 16 << 20,
    max_upload: int = 256 << 20,
    reload_seconds: float | None = None,
) -> FastAPI:
    """An application around a server.

    Args:
        server: server of the tasks; it is closed when the application stops, after the requests that wait are answered.
        store: store of the tasks' files; None is an application without uploads.
        tenants: whose tokens may see which tasks; None lets anybody see all tasks, and nobody change them.
        max_body: bytes of a request.
        max_upload: bytes of an uploaded task.
        reload_seconds: how often the store looks for new tasks; None never does.

    Returns:
        the application, to be run by ``uvicorn`` or any other ASGI server.
    """
    service = _Service(server, store, tenants, max_body, max_upload)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if store is not None and reload_seconds is not None:
            store.follow(reload_seconds)
        yield
        if store is not None:
            await asyncio.to_thread(store.close)
        await asyncio.to_thread(server.close)

    app = FastAPI(title="RECAST tasks", version=__version__, lifespan=lifespan)
    app.add_exception_handler(RecastError, _say_what_is_wrong)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"], response_class=PlainTextResponse)
    bearer: dict[str, Any] = {"dependencies": [Depends(HTTPBearer(auto_error=False))]}  # so that /docs asks for it
    app.add_api_route("/v1/tasks", service.tasks, methods=["GET"], **bearer)
    app.add_api_route("/v1/tasks/{task}/predict", service.predict, methods=["POST"], openapi_extra=PREDICT, **bearer)
    app.add_api_route("/v1/tasks/{task}/rollback", service.rollback, methods=["POST"], **bearer)
    app.add_api_route("/v1/tasks/{task}", service.upload, methods=["PUT"], openapi_extra=UPLOAD, **bearer)
    app.add_api_route("/v1/tasks/{task}", service.remove, methods=["DELETE"], **bearer)
    return app


class _Service:
    """The methods behind the addresses."""

    def __init__(
        self, server: TaskServer, store: TaskStore | None, tenants: Tenants | None, max_body: int, max_upload: int
    ) -> None:
        self.server, self.store, self.tenants = server, store, tenants
        self.max_body, self.max_upload = max_body, max_upload
        self.meters = _Meters(server)

    def tenant(self, request: Request) -> Tenant:
        """Whose token a request carries."""
        if self.tenants is None:
            return ANYBODY
        found = self.tenants.of(request.headers.get("authorization"))
        if found is None:
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        return found

    def stored(self, request: Request, task: str) -> TaskStore:
        """The store, for an administrator who may change a task."""
        who = self.tenant(request)
        if not who.admin or self.store is None:
            raise HTTPException(403, "only an administrator's token may change tasks")
        if not who.sees(task):
            raise _no_task(task)
        return self.store

    async def health(self) -> dict[str, Any]:
        """Whether the server works, and how many tasks it has."""
        problems = 0 if self.store is None else len(self.store.problems)
        if not self.server.is_alive:
            raise HTTPException(503, "the server is stopping, or its thread is gone")
        return {"status": "ok", "tasks": len(self.server.pool), "tasks_that_cannot_be_read": problems}

    async def metrics(self) -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(generate_latest(self.meters.registry).decode())

    async def tasks(self, request: Request) -> dict[str, Any]:
        """The tasks that the caller sees; for an administrator also those that could not be read, and why."""
        who = self.tenant(request)
        seen: dict[str, Any] = {"tasks": [name for name in self.server.pool.names if who.sees(name)]}
        if who.admin and self.store is not None:
            problems = {name: text for name, text in self.store.problems.items() if who.sees(name)}
            seen["problems"] = {_in_utf8(name): _in_utf8(text) for name, text in problems.items()}
        return seen

    async def predict(self, task: str, request: Request) -> dict[str, Any]:
        """What a task makes of one sample."""
        with self.meters.request():
            self._check_seen(task, self.tenant(request))
            sample = _sample(request.headers.get("content-type", ""), await _body(request, self.max_body))
            self._check_seen(task, self.tenant(request))  # an error of the pool would name other tasks
            try:
                return _shown(await self.server.answer(task, sample))
            except TimeoutError as error:
                raise HTTPException(504, str(error)) from error

    async def upload(self, task: str, request: Request) -> dict[str, Any]:
        """Put a task in service, or a new version of it; it is checked before anybody sees it."""
        store = self.stored(request, task)
        content = await _body(request, self.max_upload)
        await asyncio.to_thread(store.upload, task, content)
        return {"task": task, "versions_before": store.versions(task)}

    async def rollback(self, task: str, request: Request) -> dict[str, Any]:
        """Put the version before in service."""
        store = self._stored_with(task, request)
        return {"task": task, "version": await asyncio.to_thread(store.rollback, task)}

    async def remove(self, task: str, request: Request) -> dict[str, Any]:
        """Take a task out of service."""
        await asyncio.to_thread(self._stored_with(task, request).remove, task)
        return {"task": task}

    def _stored_with(self, task: str, request: Request) -> TaskStore:
        """The store, for an administrator, where it has or had a task."""
        store = self.stored(request, task)
        if task not in store:
            raise _no_task(task)
        return store

    def _check_seen(self, task: str, who: Tenant) -> None:
        if not who.sees(task) or task not in self.server.pool:
            raise _no_task(task)


def _no_task(task: str) -> HTTPException:
    return HTTPException(404, f"there is no task {task!r}")


def _in_utf8(text: str) -> str:
    """A text in which bytes of a file's name that are not UTF-8 are shown as escapes."""
    return text.encode(errors="backslashreplace").decode()


async def _say_what_is_wrong(request: Request, error: Exception) -> JSONResponse:
    busy = isinstance(error, ServerBusyError)
    return JSONResponse(
        {"detail": str(error)}, status_code=503 if busy else 422, headers={"Retry-After": "1"} if busy else None
    )


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, read no further than it may be long."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise HTTPException(413, f"the body is larger than {most:,} bytes")
            parts.append(part)
    except ClientDisconnect as error:
        raise HTTPException(400, "the caller went away before the body was whole") from error
    return b"".join(parts)


def _sample(kind: str, body: bytes) -> Sample:
    """One sample, from JSON or safetensors.

    Raises:
        RecastConfigError: if it is none.
    """
    if kind.partition(";")[0].strip().lower() == TENSORS:
        try:
            tensors = load_tensors(body)
        except Exception as error:  # of many kinds
            raise RecastConfigError(f"the body is no safetensors file: {error}") from error
        return tensors["inputs"] if set(tensors) == {"inputs"} else tensors
    inputs = parse_json(body, "the body", error=RecastConfigError).get("inputs")
    if isinstance(inputs, dict):
        return {name: _tensor(f"inputs[{name!r}]", value) for name, value in inputs.items()}
    return _tensor("inputs", inputs)


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RecastConfigError(f"{name}: expected numbers in lists of equal lengths ({error})") from error
    if not tensor.numel() or tensor.is_complex():
        raise RecastConfigError(f"{name} holds no numbers")
    return tensor


def _shown(answer: Answer) -> dict[str, Any]:
    """An answer as JSON, which knows no infinity."""
    values = answer.output.tolist()
    if not torch.isfinite(answer.output).all():
        values = _without_infinity(values)
    return {"task": answer.task, "output": values, "label": answer.label}


def _without_infinity(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_infinity(part) for part in value]
    return value if math.isfinite(value) else None


class _Meters:
    """What Prometheus reads, in a registry of its own."""

    def __init__(self, server: TaskServer) -> None:
        self.registry = CollectorRegistry()
        self._server = server
        self._latency = Histogram("recast_request_seconds", "Time of a request", registry=self.registry)
        self._failures = Counter("recast_failed_requests", "Requests that were not answered", registry=self.registry)
        self.registry.register(self)  # type: ignore[arg-type]

    @contextmanager
    def request(self) -> Iterator[None]:
        """A block that is one request."""
        with self._latency.time(), self._failures.count_exceptions():
            yield

    def collect(self) -> Any:
        """Gauges that are read when they are asked for."""
        numbers = {**self._server.stats(), "tasks": len(self._server.pool)}
        numbers.update({f"bytes_{key}": size for key, size in self._server.pool.sizes().items()})
        for name, value in numbers.items():
            yield GaugeMetricFamily(f"recast_server_{name}", f"{name} of the server", value=value)
