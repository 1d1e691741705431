"""Requests of many tasks at once: each gets its own task's answer, and fails alone."""

from __future__ import annotations

import asyncio
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastConfigError, RecastLoadError, TaskPool, get_recast_model
from recast_peft.integrations.serving import Answer, ServerBusyError, TaskServer, TaskServerError, TaskStore

CLASSES = {"cats": ("lion", "tiger", "lynx"), "dogs": ("pug", "husky"), "cars": None}


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=4).eval()


def save_task(folder: Path, name: str, seed: int) -> None:
    labels = CLASSES.get(name)
    own = {} if labels is None else {"id2label": dict(enumerate(labels))}
    model = get_recast_model(backbone(), RecastConfig(target_modules=["qkv"], **own), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}" in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate(CLASSES):
        save_task(folder / "first", name, seed)
        save_task(folder / "second", name, seed + 10)
    return folder


@pytest.fixture
def store(saved, tmp_path) -> TaskStore:
    shutil.copytree(saved / "first", tmp_path / "live")
    pool = TaskPool(get_recast_model(backbone(), RecastConfig(target_modules=["qkv"]), "layout").eval())
    pool.deactivate()
    made = TaskStore(tmp_path / "live", pool)
    assert made.refresh() == sorted(CLASSES)
    return made


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 160, 160, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def alone(pool: TaskPool, task: str | None, image: Tensor) -> Tensor:
    return pool.model(image[None], task_ids=[task])[0]


def packed(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"{folder.name}/{path.name}")
    return content.getvalue()


class TestServer:
    def test_requests_of_many_tasks_share_batches(self, store, image):
        right = {task: alone(store.pool, task, image) for task in [*CLASSES, None]}
        with TaskServer(store.pool, wait=0.05, max_batch=8) as server:
            futures = [(task, server.submit(task, image)) for _ in range(4) for task in right]
            for task, future in futures:
                answer = future.result(30)
                torch.testing.assert_close(answer.output, right[task], atol=1e-5, rtol=1e-4)
                if task in ("cats", "dogs"):
                    assert answer.label == CLASSES[task][int(right[task].argmax())]
            stats = server.stats()
        assert stats["answered"] == 16
        assert stats["batches"] == 2
        assert [len(right[task]) for task in right] == [3, 2, 4, 4]

    def test_what_is_wrong_with_one_request_is_said_to_it_alone(self, store, image):
        with TaskServer(store.pool, wait=0.05) as server:
            with pytest.raises(RecastConfigError, match="no task 'birds'"):
                server.submit("birds", image)
            with pytest.raises(RecastConfigError, match="expected a tensor"):
                server.submit("cats", [1.0])
            good, bad = server.submit("cats", image), server.submit("cats", torch.zeros(3, 7, 9))
            same_shape = server.submit("dogs", torch.zeros(3, 7, 9))
            assert isinstance(good.result(30), Answer)
            for future in (bad, same_shape):
                with pytest.raises(TaskServerError, match=r"the model refused the sample \(sample \(3, 7, 9\)"):
                    future.result(30)

    def test_a_task_that_is_removed_while_its_request_waits(self, store, image):
        with TaskServer(store.pool, wait=0.3) as server:
            lost, kept = server.submit("cats", image), server.submit("dogs", image)
            store.pool.remove("cats")
            assert kept.result(30).task == "dogs"
            with pytest.raises(RecastConfigError, match="was removed while"):
                lost.result(30)

    def test_a_full_queue_a_deadline_and_a_cancelled_request(self, store, image):
        server = TaskServer(store.pool, wait=0.2, max_queue=3)
        late, gone, good = (
            server.submit("cats", image, timeout=0.01),
            server.submit("cats", image),
            server.submit("dogs", image),
        )
        assert gone.cancel()
        with pytest.raises(ServerBusyError, match="3 requests waiting"):
            server.submit("cats", image)
        assert good.result(30).task == "dogs"
        with pytest.raises(TimeoutError):
            late.result(30)
        server.close()
        with pytest.raises(ServerBusyError, match="is closed"):
            server.submit("cats", image)
        assert server.stats()["timed_out"] == 1

    def test_closing_answers_what_waits(self, store, image):
        server = TaskServer(store.pool, wait=10)
        futures = [server.submit("cats", image) for _ in range(3)]
        server.close()
        assert all(future.result(0).batch == 3 for future in futures)

    def test_asyncio(self, store, image):
        async def ask() -> list[Answer]:
            return await asyncio.gather(*(server.answer(task, image) for task in CLASSES))

        with TaskServer(store.pool, wait=0.05) as server:
            assert [answer.task for answer in asyncio.run(ask())] == list(CLASSES)

    def test_bad_arguments(self, store):
        for bad in ({"max_batch": 0}, {"max_queue": 0}, {"wait": -1}, {"timeout": 0}):
            with pytest.raises(RecastConfigError, match="expected at least one"):
                TaskServer(store.pool, **bad)


class TestStore:
    def test_follows_the_folder(self, store, saved, image):
        pool, folder = store.pool, store.folder
        before = alone(pool, "cats", image)
        shutil.copytree(saved / "second" / "cats", folder / "cats", dirs_exist_ok=True)
        assert store.refresh() == ["cats"]
        assert not torch.allclose(alone(pool, "cats", image), before, atol=1e-3)
        assert store.refresh() == []
        shutil.rmtree(folder / "dogs")
        assert store.refresh() == []  # another process may be putting a new one there
        assert store.refresh() == ["dogs"]
        assert sorted(pool.names) == ["cars", "cats"]

    def test_a_bad_task_leaves_the_former_in_service(self, store, image):
        pool = store.pool
        before = alone(pool, "cats", image)
        file = store.folder / "cats" / "adapter_model.safetensors"
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[-1] ^= 1
        for bad in (good[:100], bytes(flipped)):
            file.write_bytes(bad)
            assert store.refresh() == []
            assert "damaged" in store.problems["cats"]
            assert torch.equal(alone(pool, "cats", image), before)
        with pytest.raises(RecastLoadError):
            store.upload("dogs", b"no zip file")
        entries = load_file(store.folder / "cars" / "adapter_model.safetensors")
        shutil.copytree(store.folder / "cars", store.folder / ".bad" / "cars")
        broken = {key: value * float("nan") for key, value in entries.items()}
        save_file(broken, store.folder / ".bad" / "cars" / "adapter_model.safetensors")
        with pytest.raises((RecastLoadError, RecastConfigError), match="finite|NaN"):
            store.upload("cars", packed(store.folder / ".bad" / "cars"))
        assert store.versions("cars") == []
        file.write_bytes(good)
        assert store.refresh() == ["cats"]
        assert not store.problems

    def test_uploads_versions_and_rollback(self, store, saved, image):
        pool = store.pool
        first = alone(pool, "cats", image)
        store.upload("cats", packed(saved / "second" / "cats"))
        second = alone(pool, "cats", image)
        assert not torch.allclose(first, second, atol=1e-3)
        assert store.versions("cats") == [1]
        assert store.refresh() == []
        store.rollback("cats")
        assert torch.equal(alone(pool, "cats", image), first)
        store.remove("cats")
        assert "cats" not in pool
        assert store.versions("cats")
        store.rollback("cats")
        assert torch.equal(alone(pool, "cats", image), first)
        with pytest.raises(RecastConfigError, match="no version before"):
            store.rollback("dogs")
        for _ in range(8):
            store.upload("cats", packed(saved / "second" / "cats"))
        assert len(store.versions("cats")) == store.keep

    @pytest.mark.parametrize("name", ["../cats", "a/b", "", ".hidden", "/tmp/cats"])
    def test_names_that_leave_the_folder(self, store, saved, name):
        for verb in (lambda: store.upload(name, packed(saved / "second" / "cats")), lambda: store.remove(name)):
            with pytest.raises(RecastConfigError):
                verb()

    def test_a_kill_in_the_middle_of_an_upload(self, store, saved):
        folder = store.folder
        staged = folder / ".versions" / ".incoming-x"
        shutil.copytree(saved / "second" / "cats", staged / "cats")
        shutil.copytree(saved / "second" / "cars", folder / ".versions" / ".incoming-y" / "birds")  # never checked
        (folder / ".versions" / "cats").mkdir()
        (folder / "cats").rename(folder / ".versions" / "cats" / "1")
        TaskStore(folder, store.pool)
        assert (folder / "cats" / "adapter_config.json").is_file()
        assert not (folder / "birds").exists()
        assert not list((folder / ".versions").glob(".incoming*"))


class TestStress:
    def test_clients_beside_uploads_and_rollbacks(self, store, saved, image):
        pool = store.pool
        right = {task: [alone(pool, task, image)] for task in CLASSES}
        for task in ("cats", "dogs"):
            store.upload(task, packed(saved / "second" / task))
            right[task].append(alone(pool, task, image))
        deadline = time.monotonic() + 6
        wrong: list[str] = []

        def client(seed: int) -> int:
            rng, asked = random.Random(seed), 0
            while time.monotonic() < deadline:
                task = rng.choice(list(right))
                output = server(task, image).output
                asked += 1
                if not any(len(output) == len(y) and torch.allclose(output, y, atol=1e-4) for y in right[task]):
                    wrong.append(task)
            return asked

        def change() -> None:
            rng = random.Random(0)
            while time.monotonic() < deadline:
                task = rng.choice(["cats", "dogs"])
                if rng.random() < 0.5:
                    store.rollback(task)
                else:
                    store.upload(task, packed(saved / "second" / task))
                pool.add("guest", RecastConfig(num_classes=5))
                pool.remove("guest")

        with TaskServer(pool) as server, ThreadPoolExecutor(9) as executor:
            changing = executor.submit(change)
            asked = sum(executor.map(client, range(8)))
            changing.result(60)
        assert not wrong
        assert asked > 50


class TestApp:
    @pytest.fixture
    def client(self, store):
        pytest.importorskip("prometheus_client")
        testclient = pytest.importorskip("fastapi.testclient")
        from recast_peft.integrations.serving.access import Tenant, Tenants
        from recast_peft.integrations.serving.app import task_app

        tenants = Tenants({"a": Tenant("ada", frozenset({"cats"})), "root": Tenant("root", None, True), "all": Tenant("all")})
        app = task_app(TaskServer(store.pool), store, tenants=tenants, max_body=2 << 20)
        with testclient.TestClient(app) as client:
            yield client

    @staticmethod
    def token(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {name}"}

    def test_predicts_from_json_and_safetensors(self, client, store, image):
        expected = alone(store.pool, "cats", image)
        by_json = client.post("/v1/tasks/cats/predict", json={"inputs": image.tolist()}, headers=self.token("a"))
        headers = {**self.token("a"), "Content-Type": "application/vnd.safetensors"}
        by_tensors = client.post("/v1/tasks/cats/predict", content=save({"inputs": image}), headers=headers)
        for response in (by_json, by_tensors):
            assert response.status_code == 200, response.text
            torch.testing.assert_close(torch.tensor(response.json()["output"]), expected, atol=1e-4, rtol=1e-4)
            assert response.json()["label"] == CLASSES["cats"][int(expected.argmax())]

    def test_tenants_see_their_tasks_alone(self, client, image):
        body = {"inputs": [1.0]}
        assert client.post("/v1/tasks/cats/predict", json=body).status_code == 401
        assert client.get("/v1/tasks", headers=self.token("nobody")).status_code == 401
        hidden = client.post("/v1/tasks/dogs/predict", json=body, headers=self.token("a"))
        missing = client.post("/v1/tasks/birds/predict", json=body, headers=self.token("a"))
        assert (hidden.status_code, missing.status_code) == (404, 404)
        assert hidden.json()["detail"].replace("dogs", "X") == missing.json()["detail"].replace("birds", "X")
        assert client.get("/v1/tasks", headers=self.token("a")).json() == {"tasks": ["cats"]}
        assert len(client.get("/v1/tasks", headers=self.token("all")).json()["tasks"]) == 3
        for verb, path in (("PUT", ""), ("DELETE", ""), ("POST", "/rollback")):
            assert client.request(verb, f"/v1/tasks/cats{path}", headers=self.token("all")).status_code == 403

    def test_what_is_wrong_is_said(self, client):
        def ask(**kwargs):
            return client.post("/v1/tasks/cats/predict", headers=self.token("a"), **kwargs)

        assert ask(json={"inputs": [[1.0, 2.0], [3.0]]}).status_code == 422
        assert ask(json={"inputs": "abc"}).status_code == 422
        assert ask(json={}).status_code == 422
        assert ask(content=b"{").status_code == 422
        assert "refused the sample" in ask(json={"inputs": [1.0, 2.0]}).json()["detail"]
        assert ask(content=b" " * (3 << 20)).status_code == 413

    def test_an_administrator_changes_tasks(self, client, store, saved, image):
        before = alone(store.pool, "cats", image)
        root = self.token("root")
        assert client.put("/v1/tasks/cats", content=b"no zip", headers=root).status_code == 422
        assert client.put("/v1/tasks/..%2Fcats", content=packed(saved / "second" / "cats"), headers=root).status_code in (
            404,
            422,
        )
        assert client.put("/v1/tasks/cats", content=packed(saved / "second" / "cats"), headers=root).json()[
            "versions_before"
        ] == [1]
        assert not torch.allclose(alone(store.pool, "cats", image), before, atol=1e-3)
        assert client.post("/v1/tasks/cats/rollback", headers=root).status_code == 200
        assert torch.equal(alone(store.pool, "cats", image), before)
        assert client.delete("/v1/tasks/cats", headers=root).status_code == 200
        assert client.post("/v1/tasks/cats/predict", json={"inputs": [1.0]}, headers=root).status_code == 404

    def test_health_metrics_and_the_page_of_the_api(self, client, image):
        client.post("/v1/tasks/cats/predict", json={"inputs": image.tolist()}, headers=self.token("a"))
        client.post("/v1/tasks/cats/predict", json={"inputs": []}, headers=self.token("a"))
        assert client.get("/health").json() == {"status": "ok", "tasks": 3, "tasks_that_cannot_be_read": 0}
        metrics = client.get("/metrics").text
        assert "recast_server_answered 1.0" in metrics
        assert "recast_request_seconds_count 2.0" in metrics
        assert "recast_failed_requests_total 1.0" in metrics
        assert "/v1/tasks/{task}/predict" in client.get("/openapi.json").text

    def test_tenants_from_a_file(self, tmp_path):
        from recast_peft.integrations.serving.access import Tenants

        path = tmp_path / "tokens.json"
        path.write_text(json.dumps({"secret": {"name": "ada", "tasks": ["cats"]}}))
        tenant = Tenants.from_file(path).of("Bearer secret")
        assert tenant.sees("cats")
        assert not tenant.sees("dogs")
        assert not tenant.admin
        path.write_text(json.dumps({"secret": {"tasks": "cats"}}))
        with pytest.raises(RecastConfigError, match="list of texts"):
            Tenants.from_file(path)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_command_serves_a_folder_and_stops_when_told(store, saved, image, tmp_path):
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    torch.save(backbone().state_dict(), tmp_path / "backbone.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import torch, timm, recast_peft.integrations.serving.start as start\n"
        "torch.manual_seed(0); torch.set_num_threads(1)\n"
        f"start.serve_folder({str(store.folder)!r}, port={port}, backbone=timm.create_model('test_vit', num_classes=4))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
                    assert json.load(response)["tasks"] == 3
                break
            except OSError:
                assert process.poll() is None, process.stderr.read().decode()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.3)
        request = urllib.request.Request(
            f"{address}/v1/tasks/dogs/predict", save({"inputs": image}), {"Content-Type": "application/vnd.safetensors"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["label"] in CLASSES["dogs"]
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
        process.stderr.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recast-task-s")]
