"""Two processes, with copies of the weights or shards of them, give the same results as one."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from llamas import IDS, converted, llama, logits, task_config, train
from models import layers_of, randomise
from peft import PeftModel
from processes import LIMIT_S, start_two
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from recast_peft import RecastConfig, RecastError, get_recast_model

# ---------------------------------------------------------------- what shards, and what is trained under it


def by_fsdp2(model: Any, as_one: bool = False) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in () if as_one else model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_fsdp1(model: Any, as_one: bool = False) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = None if as_one else ModuleWrapPolicy({type(model.get_base_model().model.layers[0])})
    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def by_accelerate(model: Any, version: int) -> Any:
    """Accelerate's own wrapping; it takes FSDP on accelerators alone, so that it is told here that it is there."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True if version == 2 else "FULL_SHARD",
        use_orig_params=True if version == 1 else None,
        state_dict_type="FULL_STATE_DICT",
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin if version else None)
    if version:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, _ = accelerator.prepare(model, optimizer)
    if version:
        assert "FSDP" in type(prepared).__name__ or "FullyShared" in type(prepared).__name__ or version == 1
    return prepared


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "FSDP2": by_fsdp2,
    "FSDP2 as one": lambda model: by_fsdp2(model, as_one=True),
    "FSDP1": by_fsdp1,
    "FSDP1 as one": lambda model: by_fsdp1(model, as_one=True),
    "accelerate DDP": lambda model: by_accelerate(model, 0),
    "accelerate FSDP1": lambda model: by_accelerate(model, 1),
    "accelerate FSDP2": lambda model: by_accelerate(model, 2),
}
SHARED = {"coefficient_sharing": 2, "group_size": 1}  # what the defaults choose for a deep model
MASKED = {"partners": ["piggyback"]}
DIRECTIONS = {"num_directions": 2, "group_size": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in WRAPPERS},
    **{f"{name}, directions": (name, DIRECTIONS) for name in WRAPPERS if "as one" not in name},
    "DDP, compressed": ("accelerate DDP", {"num_templates": 1}),
    "DDP, two sets and a module of its own": ("accelerate DDP", {"num_coefficient_sets": 2, "modules_to_save": ["lm_head"]}),
    "FSDP2, shared coefficients": ("FSDP2", SHARED),
    "FSDP2, compressed": ("FSDP2", {"num_templates": 1}),
    "FSDP1, compressed": ("FSDP1", {"num_templates": 1}),
    "FSDP2, masks": ("FSDP2", MASKED),
    "FSDP2 as one, masks": ("FSDP2 as one", MASKED),
    "FSDP1, masks": ("FSDP1", MASKED),
}
# what is computed beside modules that are called as they are: under tensor parallelism and ZeRO-3
BESIDE: dict[str, dict[str, Any]] = {"groups": {}, "directions": DIRECTIONS}


def whole_state_dict(kind: str, model: Any) -> dict[str, Tensor]:
    """The state dict as users of a wrapper are told to gather it."""
    if "FSDP1" in kind:
        from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

        options = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, options):
            return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def numbers_kept(model: Any, ids: Tensor) -> int:
    """How many numbers a call keeps for its backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss.backward()
    return kept


def refusal(verb: Callable[[], Any]) -> str:
    try:
        verb()
    except RecastError as error:
        return str(error)
    return "not refused"


def tried(kind: str, config: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Everything that is done to a task of a sharded model, and what it gave."""
    found: dict[str, Any] = {}
    plain = converted(**config)
    model = WRAPPERS[kind](plain)
    plain = getattr(model, "module", plain)
    found["losses"] = train(model, IDS[rank : rank + 1])
    plain.save_pretrained(folder / "by all")
    state = whole_state_dict(kind, model)
    if rank == 0:
        plain.save_pretrained(folder / "by one", state_dict=state)
    dist.barrier()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    found["zeroed"] = logits(model)
    plain.load_adapter(folder / "by one" / "task", "task", is_trainable=True)
    found["loaded"] = logits(model)
    with plain.disable_adapter():
        found["without"] = logits(model)
    if "FSDP" in kind:  # right after a call, when what is sharded last is whole
        found["merge at once"] = refusal(plain.merge_adapter)
        found["unload at once"] = refusal(plain.merge_and_unload)
        plain.save_pretrained(folder / "at once")
    found["kept"] = numbers_kept(model, IDS[rank : rank + 1])
    if "FSDP" in kind:
        found["merge"] = refusal(plain.merge_adapter)
        found["add"] = refusal(lambda: plain.add_adapter("second", RecastConfig(target_modules="all-mlp")))
        found["after"] = logits(model)
    return found


def tensor_parallel(config: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Tasks on a model that transformers has spread by its tp_plan; both processes see the whole batch."""
    plain = LlamaForCausalLM.from_pretrained(folder.parent / "plain", tp_plan="auto")
    found: dict[str, Any] = {"plain": logits(plain)}
    found["compressed"] = refusal(lambda: get_recast_model(plain, RecastConfig(target_modules="all-mlp", num_templates=1)))
    model = get_recast_model(plain, task_config(**config), "task")
    assert hasattr(layers_of(model)["model.layers.0.mlp.gate_proj"].base_layer.weight, "full_tensor")
    found["fresh"] = logits(model)
    randomise(model, "task", size=0.1)
    found["losses"] = train(model, IDS)
    found["trained"] = logits(model)
    model.save_pretrained(folder / f"parallel-{rank}")
    model.load_adapter(folder / f"parallel-{rank}" / "task", "again")
    randomise(model, "again", size=0.1)
    with torch.no_grad():
        found["mixed"] = model.eval()(input_ids=IDS, adapter_names=["task", "again"]).logits
    found["merge"] = refusal(model.merge_adapter)
    return found


def tried_with_deepspeed(config: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """The same under ZeRO-3, which trains by an engine, and takes tasks on weights that are partitioned already."""
    import deepspeed

    stage3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
    options = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage3, "zero_allow_untested_optimizer": True}
    found: dict[str, Any] = {"losses": []}
    plain = converted(**config)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=plain, optimizer=optimizer, config=options)
    ids = IDS[rank : rank + 1]
    for _ in range(3):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found["losses"].append(float(loss))
    assert layers_of(plain)["model.layers.0.mlp.gate_proj"].base_layer.weight.shape == (0,)
    plain.save_pretrained(folder / "by all")
    dist.barrier()
    for parameter in (p for p in plain.parameters() if p.requires_grad):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.zero_()
    found["zeroed"] = logits(plain)
    plain.load_adapter(folder / "by all" / "task", "task", is_trainable=True)
    found["loaded"] = logits(plain)
    found["merge"] = refusal(plain.merge_adapter)
    base = llama()
    deepspeed.initialize(model=base, config=options)
    late = get_recast_model(base, task_config(**config), "task")
    late.load_adapter(folder / "by all" / "task", "task")
    found["late"] = logits(late)
    return found


def deepspeed_work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S))
    for name, config in BESIDE.items():
        save_tried(tried_with_deepspeed, config, rank, Path(folder) / name)
    os._exit(0)


def save_tried(verb: Callable[..., dict[str, Any]], config: dict[str, Any], rank: int, place: Path) -> None:
    """Do something in a folder of its own, and write what it gave there."""
    place.mkdir(exist_ok=True)
    try:
        found = verb(config, rank, place)
    except Exception:
        found = {"error": traceback.format_exc()}
    torch.save(found, place / f"{rank}.pt")


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_TORCH_DEVICE="cpu")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for name, (kind, config) in CASES.items():
        save_tried(partial(tried, kind), config, rank, Path(folder) / name)
    found = {"refused": refusal(lambda: train(by_fsdp1(converted(**SHARED)), IDS[:1]))}
    torch.save(found, Path(folder) / f"others-{rank}.pt")
    for name, config in BESIDE.items():
        save_tried(tensor_parallel, config, rank, Path(folder) / f"tensor parallel, {name}")
    os._exit(0)  # not by way of destructors, which wait for each other


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, every case in one start of them."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("sharded")
    llama().save_pretrained(folder / "plain")
    start_two(work, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_process_does(results: Path, name: str) -> None:
    kind, config = CASES[name]
    if kind.startswith("accelerate"):
        pytest.importorskip("accelerate")
    first, second = (torch.load(results / name / f"{rank}.pt") for rank in range(2))
    assert "error" not in first, first["error"]
    expected = converted(**config)
    start = logits(expected)
    losses = train(expected, IDS)
    for loss, one, two in zip(losses, first["losses"], second["losses"], strict=True):
        assert (one + two) / 2 == pytest.approx(loss, rel=1e-5)
    expected.save_pretrained(results / name / "expected")
    wanted = load_file(results / name / "expected" / "task" / "adapter_model.safetensors")
    for way in ("by all", "by one"):
        given = load_file(results / name / way / "task" / "adapter_model.safetensors")
        assert given.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(given[key], value, rtol=1e-4, atol=1e-6)
    check_surroundings(expected, results / name / "by all", results / name / "by one")
    loaded = PeftModel.from_pretrained(llama(), results / name / "by all" / "task", "task")
    trained = logits(expected)
    assert not torch.allclose(trained, start, atol=1e-4)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    for rank in (first, second):
        assert not torch.allclose(rank["zeroed"], trained, atol=1e-4)
        torch.testing.assert_close(rank["loaded"], trained, rtol=1e-4, atol=1e-5)
        with expected.disable_adapter():
            torch.testing.assert_close(rank["without"], logits(expected))


def check_surroundings(expected: PeftModel, *folders: Path) -> None:
    """What lay beside the targets is told by the whole of it, though a process saves a task from its part."""
    wanted = expected.peft_config["task"].surroundings_fingerprint
    assert wanted is not None
    for folder in folders:
        assert json.loads((folder / "task" / "adapter_config.json").read_text())["surroundings_fingerprint"] == wanted


@pytest.fixture(scope="module")
def by_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found under ZeRO-3; DeepSpeed compiles a part of itself at its first start, which takes minutes."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    start_two(deepspeed_work, folder)
    return folder


@pytest.mark.parametrize("name", BESIDE)
def test_ZeRO_3_does_what_one_process_does(by_deepspeed: Path, name: str) -> None:
    folder = by_deepspeed / name
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert "error" not in first, first["error"]
    expected = converted(**BESIDE[name])
    losses = train(expected, IDS)
    for loss, one, two in zip(losses, first["losses"], second["losses"], strict=True):
        assert (one + two) / 2 == pytest.approx(loss, rel=1e-5)
    trained = logits(expected)
    check_surroundings(expected, folder / "by all")
    loaded = PeftModel.from_pretrained(llama(), folder / "by all" / "task", "task")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    for rank in (first, second):
        assert not torch.allclose(rank["zeroed"], trained, atol=1e-4)
        for way in ("loaded", "late"):
            torch.testing.assert_close(rank[way], trained, rtol=1e-4, atol=1e-5)
    assert "spread over processes" in first["merge"]


@pytest.mark.parametrize("name", [name for name, (kind, _) in CASES.items() if "FSDP" in kind])
def test_what_shards_cannot_do_is_refused_and_changes_nothing(results: Path, name: str) -> None:
    found = torch.load(results / name / "0.pt")
    assert all("spread over processes" in found[way] for way in ("merge", "merge at once", "unload at once"))
    check_surroundings(converted(**CASES[name][1]), results / name / "at once")
    for way in ("by all", "at once"):
        given = load_file(results / name / way / "task" / "adapter_model.safetensors")
        torch.testing.assert_close(given, load_file(results / name / "by one" / "task" / "adapter_model.safetensors"))
    assert "add or load tasks first, then shard it" in found["add"]
    torch.testing.assert_close(found["after"], found["loaded"], rtol=0, atol=0)


def test_shared_coefficients_under_FSDP1_are_refused(results: Path) -> None:
    assert "modules that FSDP1 shards apart" in torch.load(results / "others-0.pt")["refused"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", BESIDE)
def test_tensor_parallelism_does_what_one_process_does(results: Path, name: str, rank: int) -> None:
    folder = results / f"tensor parallel, {name}"
    found = torch.load(folder / f"{rank}.pt")
    assert "error" not in found, found["error"]
    assert torch.equal(found["fresh"], found["plain"])
    expected = converted(**BESIDE[name])
    assert found["losses"] == pytest.approx(train(expected, IDS), rel=1e-5)
    trained = logits(expected)
    assert not torch.allclose(trained, found["fresh"], atol=1e-4)
    torch.testing.assert_close(found["trained"], trained, rtol=1e-4, atol=1e-5)
    loaded = PeftModel.from_pretrained(llama(), folder / f"parallel-{rank}" / "task", "task").eval()
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    loaded.load_adapter(folder / f"parallel-{rank}" / "task", "again")
    randomise(loaded, "again", size=0.1)
    with torch.no_grad():
        mixed = loaded(input_ids=IDS, adapter_names=["task", "again"]).logits
    assert not torch.allclose(mixed, trained, atol=1e-4)
    torch.testing.assert_close(found["mixed"], mixed, rtol=1e-4, atol=1e-5)
    assert "spread over processes" in found["merge"]
    assert "cannot be compressed" in found["compressed"]


@pytest.mark.parametrize("name", ["FSDP2"])
def test_what_was_gathered_of_neighbours_is_not_kept_for_the_backward_pass(results: Path, name: str) -> None:
    neighbours = sum(layer.base_layer.weight.numel() for layer in layers_of(converted()).values())
    own = numbers_kept(converted(), IDS[:1])
    assert torch.load(results / name / "0.pt")["kept"] <= own - neighbours
