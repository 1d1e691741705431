"""Weights that lie elsewhere, in shards or on no device but during a call: the same results everywhere."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import layers_of, randomise
from transformers import LlamaConfig, LlamaForCausalLM

from recast_peft import RecastBankError, RecastConfig, get_recast_model

IDS = torch.arange(8)[None]


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=4, initializer_range=0.2, **sizes))


def converted(group_size: int = 2) -> Any:
    model = get_recast_model(llama(), RecastConfig(target_modules="all-mlp", group_size=group_size), "task")
    randomise(model, "task", size=0.1)
    return model


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients of coefficients by module, gathered."""
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    layers = layers_of(model).items()
    return float(loss), {name: whole(layer.recast_coefficients["task"].grad).clone() for name, layer in layers}


def work(rank: int, kind: str, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = converted()
    blocks = model.get_base_model().model.layers
    if kind == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss, gradients = step(model)
    if rank == 0:
        torch.save((loss, gradients), Path(folder) / "found.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["FSDP2"])
def test_shards_of_blocks_give_what_one_process_gives(kind: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, args=(kind, port, str(tmp_path)), nprocs=2, start_method="fork")
    loss, gradients = torch.load(tmp_path / "found.pt")
    wanted_loss, wanted = step(converted())
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
        assert gradient.any()


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_offloaded_weights_compute_as_those_in_memory(where: str, group_size: int, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, model = converted(group_size), converted(group_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if where == "cpu":
            accelerate.cpu_offload(model.get_base_model(), execution_device="cpu")
        else:
            accelerate.disk_offload(model.get_base_model(), str(tmp_path / "offloaded"), execution_device="cpu")
    layer = next(iter(layers_of(model).values()))
    assert layer.base_layer.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
        with model.disable_adapter(), expected.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    with pytest.raises(RecastBankError, match=r"nothing can be merged into .*offloaded"):
        model.merge_adapter()
