"""LoRA parts of a combined task: what they add is the weighted sum of what the tasks add."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_parts import fill, lora
from models import EmbeddingNet, composed_weights, outputs, seeded, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastConfigError, get_recast_model
from recast_peft.parts.lora_strength import part_layers
from recast_peft.parts.lora_sum import nearest_pair

TASKS: dict[str, Any] = {
    "wide": lora(r=3, lora_alpha=5, target_modules=["qkv", "fc1"]),
    "scaled by the root": lora(r=4, use_rslora=True, target_modules=["fc1", "fc2"]),
    "coefficients alone": None,
}


def added(model: PeftModel, task: str) -> dict[str, Tensor]:
    """What a task's LoRA part adds to every weight, by plain arithmetic."""
    found = {}
    for layer in part_layers(model):
        if layer.has_task(task):
            a, b = layer.lora_A[task].weight, layer.lora_B[task].weight
            config = layer._parts.configs[task]
            rank = layer.r[task]
            found[layer.module_name] = b @ a * (layer.lora_alpha[task] / (rank**0.5 if config.use_rslora else rank))
    return {name: value.detach() for name, value in found.items()}


@pytest.fixture
def model() -> PeftModel:
    names = {"one": "wide", "two": "scaled by the root", "three": "coefficients alone"}
    model = None
    for seed, (name, task) in enumerate(names.items()):
        config = RecastConfig(target_modules=["qkv", "proj"], lora_config=TASKS[task])
        if model is None:
            model = get_recast_model(tiny_vit(), config, name)
        else:
            model.add_adapter(name, config)
        fill(model, name, seed + 1)
    assert model is not None
    return model.eval()


WEIGHTS = {"one": 0.5, "two": -1.5, "three": 2.0}


def test_what_is_added_is_the_weighted_sum(model: PeftModel, tmp_path: Path) -> None:
    for layer in part_layers(model):  # a strength belongs to the model and not to the task
        if layer.has_task("one"):
            layer.set_scale("one", 0.3)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    parts, total = {name: added(model, name) for name in WEIGHTS}, added(model, "sum")
    assert total.keys() == parts["one"].keys() | parts["two"].keys()
    assert {layer.module_name.rpartition(".")[2]: layer.r["sum"] for layer in part_layers(model)} == {
        "qkv": 3,
        "fc1": 7,
        "fc2": 4,
    }
    for name, value in total.items():
        expected = sum(weight * parts[task][name] for task, weight in WEIGHTS.items() if name in parts[task])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    plain = tiny_vit()
    start = dict(plain.named_parameters())
    weights = {task: composed_weights(plain, model, [task]) for task in (*WEIGHTS, "sum")}
    for name, value in weights["sum"].items():
        base = start[name]
        expected = sum(weight * (weights[task][name] - base) for task, weight in WEIGHTS.items())
        torch.testing.assert_close(value - base, expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("sum")
    y = outputs(model, vit_input())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "sum", "sum").eval()
    assert torch.equal(outputs(loaded, vit_input()), y)


@pytest.mark.filterwarnings("ignore:.*have other names in this model")
@pytest.mark.parametrize(("trained", "used"), [("outside", "alone"), ("alone", "outside")])
def test_the_sum_of_parts_fits_a_model_around_its_own_and_back(trained: str, used: str, tmp_path: Path) -> None:
    build = {"alone": lambda: tiny_vit().eval(), "outside": lambda: nn.Sequential(OrderedDict(body=tiny_vit())).eval()}
    model = get_recast_model(build[trained](), RecastConfig(target_modules=["qkv"], lora_config=TASKS["wide"]), "one").eval()
    model.add_adapter("two", RecastConfig(target_modules=["qkv"], lora_config=TASKS["scaled by the root"]))
    for seed, name in enumerate(("one", "two")):
        fill(model, name, seed + 1)
    model.add_weighted_adapter(["one", "two"], [0.5, -1.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(build[used](), tmp_path / "sum").eval()
    assert torch.equal(outputs(other, vit_input()), outputs(model, vit_input()))


def nearest(weight: Tensor, rank: int) -> Tensor:
    u, sizes, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, :rank] * sizes[:rank]) @ v[:rank]).float()


def test_svd_is_nearest_to_the_sum_of_those_of_the_largest_rank(model: PeftModel) -> None:
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "near", "svd")
    total, near = added(model, "sum"), added(model, "near")
    ranks = {layer.module_name.rpartition(".")[2]: layer.r["near"] for layer in part_layers(model)}
    assert ranks == {"qkv": 3, "fc1": 4, "fc2": 4}
    for name, value in near.items():
        expected = nearest(total[name], ranks[name.rpartition(".")[2]])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        assert ("fc1" in name) == bool((value - total[name]).norm() > 0.01 * total[name].norm())


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3, 3), (2, 7)], ids=str)
@pytest.mark.parametrize("rank", [2, 8])
def test_a_nearest_pair(shape: tuple[int, ...], rank: int) -> None:
    first, second = torch.randn(5, *shape[1:]), torch.randn(shape[0], 5, *[1] * (len(shape) - 2))
    total = second.flatten(1) @ first.flatten(1)
    a, b, lost = nearest_pair(first, second, rank)
    assert (a.shape, b.shape) == ((rank, *first.shape[1:]), (len(second), rank, *second.shape[2:]))
    found = b.flatten(1) @ a.flatten(1)
    torch.testing.assert_close(found, nearest(total, rank), rtol=1e-4, atol=1e-4)
    assert lost == pytest.approx(float((found - total).norm() / total.norm()), abs=1e-6)
    assert nearest_pair(first * 0, second, rank)[2] == 0


def test_one_task_alone_is_itself(model: PeftModel) -> None:
    model.add_weighted_adapter(["two"], [1.0], "same")
    results = []
    for name in ("two", "same"):
        model.set_adapter(name)
        results.append(outputs(model, vit_input()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "target", "x"),
    [
        (EmbeddingNet, "tables.0", torch.tensor([[1, 2, 0]])),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "0", torch.randn(1, 3, 7, 7)),
    ],
    ids=["embedding", "convolution"],
)
@pytest.mark.parametrize("how", ["linear", "svd"])
def test_parts_of_other_kinds_of_layers(build: Any, target: str, x: Tensor, how: str) -> None:
    config = RecastConfig(target_modules=[target], group_size=1, lora_config=lora())
    model = get_recast_model(seeded(build), config, "one").eval()
    model.add_adapter("two", config)
    for seed, name in enumerate(("one", "two")):
        fill(model, name, seed + 1)
    for weights, name in (([1.0, 0.0], "one"), ([0.0, 1.0], "two")):
        model.add_weighted_adapter(["one", "two"], weights, "sum", how)
        results = []
        for task in (name, "sum"):
            model.set_adapter(task)
            results.append(outputs(model, x))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        model.delete_adapter("sum")


def test_what_cannot_be_summed_is_refused_and_changes_nothing(model: PeftModel) -> None:
    with pytest.raises(RecastConfigError, match=r"owns more than .* \(a LoRA part\), which cannot be pruned"):
        model.add_weighted_adapter(["one", "three"], [1, 1], "sum", "ties", density=0.5)
    model.add_adapter(
        "dora", RecastConfig(target_modules=["qkv", "proj"], lora_config=lora(target_modules=["fc1"], use_dora=True))
    )
    with pytest.raises(RecastConfigError, match=r"its LoRA part at blocks\.0\.mlp\.fc1 is more than two factors"):
        model.add_weighted_adapter(["one", "dora"], [1, 1], "sum")
    part_layers(model)[0].lora_A["one"].weight.data[0, 0] = float("nan")
    for how in ("linear", "svd"):
        with pytest.raises(RecastConfigError, match=r"task 'one' holds numbers that are not finite .* in blocks\.0\.\S+lora_A"):
            model.add_weighted_adapter(["two", "one"], [1, 1], "sum", how)
    assert "sum" not in model.peft_config


def test_what_fails_in_writing_leaves_no_task(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("recast_peft.tasks.arithmetic.write_sum", fail)
    before = list(model.state_dict())
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum")
    assert "sum" not in model.peft_config
    assert list(model.state_dict()) == before


def test_parts_on_both_sides_of_a_layer_that_came_between_them() -> None:
    config = RecastConfig(target_modules=["fc1"], lora_config=lora(target_modules=["qkv"]))
    model = get_recast_model(tiny_vit(), config, "below").eval()
    model.add_adapter("between", RecastConfig(target_modules=["qkv"]))
    model.add_adapter("above", config)
    for seed, name in enumerate(("below", "above")):
        fill(model, name, seed + 1)
    model.add_weighted_adapter(["below", "above"], [0.5, -2.0], "sum")
    parts = {name: added(model, name) for name in ("below", "above", "sum")}
    assert len(parts["sum"]) == 4
    for name, total in parts["sum"].items():
        torch.testing.assert_close(total, 0.5 * parts["below"][name] - 2.0 * parts["above"][name], rtol=1e-5, atol=1e-6)
