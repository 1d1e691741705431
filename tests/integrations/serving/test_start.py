"""From a folder of tasks to a server of them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save
from served import CLASSES, alone, backbone

from recast_peft import RecastConfig, RecastConfigError, get_recast_model
from recast_peft.integrations.serving import TaskServer
from recast_peft.integrations.serving.start import open_folder, serve_folder


def test_a_pool_for_tasks_with_a_lora_part_and_without(store, image):
    config = RecastConfig(target_modules=["qkv"], lora_config=LoraConfig(r=2))
    model = get_recast_model(backbone(), config, "with").eval()
    for name, parameter in model.named_parameters():
        if ".with" in name:
            parameter.data.add_(0.05)
    model.save_pretrained(store.folder)
    opened = open_folder(store.folder, backbone=backbone())
    assert opened.problems == {}
    assert sorted(opened.pool.names) == ["cars", "cats", "dogs", "with"]
    with TaskServer(opened.pool) as server, torch.no_grad():
        futures = {name: server.submit(name, image) for name in ("with", "cats")}
        torch.testing.assert_close(futures["with"].result().output, model(image[None])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(futures["cats"].result().output, alone(store.pool, "cats", image), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_read_stops_no_other_task(store, image):
    (store.folder / "a folder" / "adapter_config.json").mkdir(parents=True)
    opened = open_folder(store.folder, backbone=backbone())
    assert sorted(opened.pool.names) == ["cars", "cats", "dogs"]
    assert [*opened.problems] == ["a folder"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": 3},
        {"port": 99_999},
        {"port": -1},
        {"max_body": -1},
        {"reload_seconds": float("nan")},
        {"max_batch": 0},
        {"timeout": "soon"},
        {"output_of": "logits"},
        {"head_dtype": "int8"},
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_a_model_is_built(wrong, store, monkeypatch):
    monkeypatch.setattr("recast_peft.integrations.serving.start.AutoRecastModel", None)
    with pytest.raises(RecastConfigError, match=f"{next(iter(wrong))}=.*expected"):
        serve_folder(store.folder, **wrong)


def test_an_option_that_there_is_not_is_refused_before_a_model_is_built(store, monkeypatch):
    monkeypatch.setattr("recast_peft.integrations.serving.start.AutoRecastModel", None)
    with pytest.raises(TypeError, match="max_bach"):
        serve_folder(store.folder, max_bach=3)


def test_a_port_that_is_taken_is_told(store, monkeypatch):
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:

        def take(*args, **options):
            taken.bind(("127.0.0.1", port))
            taken.listen()
            return store

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setattr("recast_peft.integrations.serving.start.open_folder", take)
        with pytest.raises(OSError, match=f"nothing is served at 127.0.0.1:{port}"):  # taken while the model was built
            serve_folder(store.folder, port=port)
        monkeypatch.setattr("recast_peft.integrations.serving.start.open_folder", None)
        with pytest.raises(OSError, match=f"127.0.0.1.*{port}"):  # before
            serve_folder(store.folder, port=port)


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
