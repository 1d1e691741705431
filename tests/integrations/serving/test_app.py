"""The server over HTTP: what it answers, to whom, and what it says of a bad request."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from served import CLASSES, alone, packed

from recast_peft.integrations.serving import TaskServer


class TestApp:
    @pytest.fixture
    def client(self, store):
        pytest.importorskip("prometheus_client")
        testclient = pytest.importorskip("fastapi.testclient")
        from recast_peft.integrations.serving.access import Tenant, Tenants
        from recast_peft.integrations.serving.app import task_app

        tenants = Tenants(
            {
                "a": Tenant("ada", frozenset({"cats"})),
                "root": Tenant("root", None, True),
                "all": Tenant("all"),
                "of cats": Tenant("of cats", frozenset({"cats"}), True),
            }
        )
        app = task_app(TaskServer(store.pool), store, tenants=tenants, max_body=2 << 20)
        with testclient.TestClient(app) as client:
            yield client

    @staticmethod
    def token(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {name}"}

    def test_predicts_from_json_and_safetensors(self, client, store, image):
        expected = alone(store.pool, "cats", image)
        by_json = client.post("/v1/tasks/cats/predict", json={"inputs": image.tolist()}, headers=self.token("a"))
        headers = {**self.token("a"), "Content-Type": "Application/Vnd.SafeTensors; v=1"}
        by_tensors = client.post("/v1/tasks/cats/predict", content=save({"inputs": image}), headers=headers)
        for response in (by_json, by_tensors):
            assert response.status_code == 200, response.text
            torch.testing.assert_close(torch.tensor(response.json()["output"]), expected, atol=1e-4, rtol=1e-4)
            assert response.json()["label"] == CLASSES["cats"][int(expected.argmax())]

    def test_a_sample_of_whole_numbers_is_a_picture_too(self, client, store, image):
        black = torch.zeros(image.shape, dtype=torch.int64)
        expected = alone(store.pool, "cats", black.float())
        for inputs in (black.tolist(), {"x": black.tolist()}):
            answer = client.post("/v1/tasks/cats/predict", json={"inputs": inputs}, headers=self.token("a"))
            assert answer.status_code == 200, answer.text
            torch.testing.assert_close(torch.tensor(answer.json()["output"]), expected, atol=1e-4, rtol=1e-4)

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

    def test_tasks_that_are_not_there_and_names_of_none(self, client):
        root = self.token("root")
        for verb, place, status in (
            ("DELETE", "birds", 404),
            ("POST", "birds/rollback", 404),
            ("POST", "cars/rollback", 422),  # it has no version before
            ("DELETE", "a%00b", 422),
            ("POST", f"{'long' * 70}/rollback", 422),
        ):
            response = client.request(verb, f"/v1/tasks/{place}", headers=root)
            assert response.status_code == status, response.text
            assert response.json()["detail"]

    def test_an_administrator_of_some_tasks_changes_no_others(self, client, store, saved):
        own, content = self.token("of cats"), packed(saved / "second" / "dogs")
        for name in ("dogs", "birds"):  # one that is there, and one that is not
            answers = [
                client.put(f"/v1/tasks/{name}", content=content, headers=own),
                client.delete(f"/v1/tasks/{name}", headers=own),
                client.post(f"/v1/tasks/{name}/rollback", headers=own),
            ]
            assert [(a.status_code, a.json()["detail"]) for a in answers] == [(404, f"there is no task {name!r}")] * 3
        store.problems.update(cats="of cats", dogs="of dogs")
        assert client.get("/v1/tasks", headers=own).json() == {"tasks": ["cats"], "problems": {"cats": "of cats"}}
        assert client.put("/v1/tasks/cats", content=packed(saved / "second" / "cats"), headers=own).status_code == 200
        assert client.delete("/v1/tasks/cats", headers=own).status_code == 200
        assert sorted(store.pool.names) == ["cars", "dogs"]

    @pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
    def test_a_folder_whose_name_is_not_utf8_is_listed(self, client, store):
        folder = Path(os.fsdecode(os.fsencode(store.folder) + b"/b\xffd"))
        shutil.copytree(store.folder / "cats", folder)
        assert store.refresh() == []
        listed = client.get("/v1/tasks", headers=self.token("root"))
        assert listed.status_code == 200
        assert "plain name" in listed.json()["problems"]["b\\udcffd"]

    def test_a_client_that_goes_away_while_it_sends_is_no_error_of_the_server(self, client):
        async def gone():
            return {"type": "http.disconnect"}

        async def nobody(message):
            pass

        headers = [(b"authorization", b"Bearer a")]
        scope = {"type": "http", "method": "POST", "path": "/v1/tasks/cats/predict", "query_string": b"", "headers": headers}
        asyncio.run(client.app(scope, gone, nobody))

    def test_health_metrics_and_the_page_of_the_api(self, client, image):
        client.post("/v1/tasks/cats/predict", json={"inputs": image.tolist()}, headers=self.token("a"))
        client.post("/v1/tasks/cats/predict", json={"inputs": []}, headers=self.token("a"))
        assert client.get("/health").json() == {"status": "ok", "tasks": 3, "tasks_that_cannot_be_read": 0}
        metrics = client.get("/metrics").text
        assert "recast_server_answered 1.0" in metrics
        assert "recast_request_seconds_count 2.0" in metrics
        assert "recast_failed_requests_total 1.0" in metrics
        assert "/v1/tasks/{task}/predict" in client.get("/openapi.json").text
