"""The same tasks as a Ray Serve deployment; needs ray[serve], which no extra installs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, logging, socket, sys, time, torch, timm, ray
from pathlib import Path
from urllib.request import Request, urlopen
from ray import serve
from recast_peft import RecastConfig, TaskPool, get_recast_model

def backbone():
    torch.manual_seed(0); torch.set_num_threads(1)
    return timm.create_model("test_vit", num_classes=4).eval()

folder, later, right = sys.argv[1], sys.argv[1] + "-later", {}
x = torch.randn(3, 160, 160, generator=torch.Generator().manual_seed(0))
for seed, name in enumerate(("cats", "dogs", "cars", "boats")):
    model = get_recast_model(backbone(), RecastConfig(target_modules=["qkv"], num_classes=2 + seed), name).eval()
    for key, parameter in model.named_parameters():
        if f".{name}" in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    model.save_pretrained(later if name == "boats" else folder)
    with torch.no_grad():
        right[name] = model(x[None])[0]

from recast_peft.integrations.serving.ray_serve import ray_application
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, object_store_memory=100_000_000)
options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
app = ray_application(folder, backbone=backbone, reload_seconds=0.2, wait=0.1, max_batch=8, deployment=options)
serve.start(http_options={"host": "127.0.0.1", "port": port})
handle = serve.run(app, logging_config={"log_level": "ERROR"})
asked = [name for _ in range(8) for name in right if name != "boats"]
answers = [handle.predict.remote(name, x.numpy()) for name in asked]
for name, answer in zip(asked, answers):
    torch.testing.assert_close(torch.tensor(answer.result(timeout_s=60)), right[name], atol=1e-4, rtol=1e-4)
try:
    handle.predict.remote("birds", x.numpy()).result(timeout_s=60)
except Exception as error:
    assert "no task 'birds'" in str(error)
else:
    raise AssertionError("an unknown task was answered")
def over_http(task):
    body = json.dumps({"task": task, "inputs": x.tolist()}).encode()
    with urlopen(Request(f"http://127.0.0.1:{port}/", body, {"content-type": "application/json"}), timeout=60) as answer:
        return torch.tensor(json.load(answer)["output"])
torch.testing.assert_close(over_http("cats"), right["cats"], atol=1e-4, rtol=1e-4)
Path(later, "boats").rename(Path(folder, "boats"))  # a task comes while both replicas serve
for attempt in range(300):
    try:
        answers = [handle.predict.remote("boats", x.numpy()).result(timeout_s=60) for _ in range(8)]
        break
    except Exception as error:
        assert "no task 'boats'" in str(error), error
        time.sleep(0.1)
for answer in answers:
    torch.testing.assert_close(torch.tensor(answer), right["boats"], atol=1e-4, rtol=1e-4)
stats = [handle.stats.remote().result(timeout_s=60) for _ in range(20)]  # of either replica
busiest = max(stats, key=lambda each: each["answered"])
assert busiest["answered"] >= 12 and busiest["batches"] < busiest["answered"], stats
print("served", busiest)
serve.shutdown(); ray.shutdown()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ray Serve is made for Linux and macOS")
def test_requests_of_many_tasks_share_batches(tmp_path):
    pytest.importorskip("ray.serve")
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DISABLE_MEMORY_MONITOR": "1"}
    path = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "served" in done.stdout
