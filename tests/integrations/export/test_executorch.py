"""ExecuTorch runs what export_program gives."""

from __future__ import annotations

from typing import Any

import pytest
from exported import called, distance
from lora_parts import fill
from models import converted, vit_input
from peft import LoraConfig

from recast_peft import export_program, export_task

TOLERANCE = 1e-5  # of the norm of the outputs: XNNPACK sums in an order of its own
CASES: dict[str, dict[str, Any]] = {
    "scales": {"group_size": 1},
    "directions": {"num_directions": 2},
    "LoRA part": {"group_size": 1, "lora_config": LoraConfig(r=2, target_modules=["qkv", "fc1"])},
}


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_the_model_gives(name, tmp_path):
    exir, runtime = pytest.importorskip("executorch.exir"), pytest.importorskip("executorch.runtime")
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    model = converted("task", num_classes=3, depth=1, target_modules=["qkv", "fc1", "fc2"], **CASES[name])
    x = vit_input()
    program = exir.to_edge_transform_and_lower(export_program(model, x), partitioner=[xnnpack.XnnpackPartitioner()])
    (tmp_path / "model.pte").write_bytes(program.to_executorch().buffer)
    method = runtime.Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    found = []
    for seed in (1, 2):
        fill(model, "task", seed)
        task = export_task(model, tmp_path / "task")
        (logits,) = method.execute([*task.values(), x])
        found.append(logits.numpy().copy())
        assert distance(found[-1], called(model, x)) < TOLERANCE
    assert distance(*found) > 0.01
