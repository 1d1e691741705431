"""Pools and heads of tasks on an accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerator import CLOSE, DEVICE, GRADIENT_ERROR, is_here, loss_of, needs_device, pool_of, relative, small, vit_x
from models import KINDS, layers_of, outputs, randomise, reference_model, seeded, tiny_vit, vit_input

from recast_peft import RecastConfig, TaskPool, fit_discriminant_head, get_recast_model
from recast_peft.composition import mixing

pytestmark = needs_device


class TestPool:
    @pytest.mark.parametrize("merge", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_activated_tasks_and_the_exact_way_back(self, merge: bool, dtype: torch.dtype) -> None:
        model, pool = pool_of()
        model.to(dtype)
        assert is_here(pool.table)
        assert pool.table.dtype == torch.float32
        plain, x = tiny_vit().to(DEVICE, dtype), vit_x(dtype=dtype)
        expected = outputs(plain, x)
        seen = []
        for name in ("task0", "task1", "task0"):
            pool.activate(name, merge=merge)
            seen.append(outputs(model, x))
            alone = small(seed=None)
            for module, layer in layers_of(alone).items():
                layer.recast_coefficients["default"].data.copy_(pool.coefficients(name)[module])
            # composed in float32 and rounded, as the library says; the products are then the same
            wide = reference_model(tiny_vit().to(DEVICE, dtype).float(), alone)
            torch.testing.assert_close(seen[-1], outputs(wide.to(dtype), x), **CLOSE[dtype])
        assert torch.equal(seen[0], seen[2])
        assert not torch.allclose(seen[0], seen[1], atol=2e-2)
        pool.deactivate()
        assert torch.equal(outputs(model, x), expected)
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.get_base_layer().weight, plain.get_parameter(f"{name}.weight"))

    def test_it_follows_the_model(self) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "first").eval()
        pool = TaskPool(model)
        for i in range(20):  # beyond the first capacity
            pool.add(f"task{i}")
        pool.table.data[:20] = torch.randn(20, pool.numbers_per_task, generator=torch.Generator().manual_seed(0)) * 0.3
        values = pool.table.detach().clone()
        pool.activate("task7")
        there = outputs(model, vit_input())
        model.to(DEVICE)
        assert is_here(pool.table)
        assert torch.equal(pool.table.cpu(), values)
        torch.testing.assert_close(outputs(model, vit_x(2)).cpu(), there, **CLOSE[torch.float32])
        pool.add("late")
        assert is_here(pool.table)
        assert is_here(pool.ids(["late", None]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("products", [False, True], ids=["composed for each task", "products of the whole batch"])
    def test_every_sample_gets_its_own_task(self, products: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mixing, "products_are_cheaper", lambda *args: products)
        model, pool = pool_of()
        model.to(dtype)
        x = vit_x(dtype=dtype)
        names = ["task1", "task0", None, "task2", "task1", None]
        for numbers in (pool.ids(names), pool.ids(names).cpu()):
            mixed = outputs(model, x, task_ids=numbers)
            assert is_here(mixed)
            alone = {}
            for name in dict.fromkeys(names):
                pool.deactivate() if name is None else pool.activate(name)
                alone[name] = outputs(model, x)
            for i, name in enumerate(names):
                torch.testing.assert_close(mixed[i], alone[name][i], **CLOSE[dtype])
        assert not torch.allclose(alone["task0"], alone["task1"], atol=2e-2)

    @pytest.mark.parametrize("kind", ["conv2d", "transformers Conv1D", "embedding"])
    def test_adapter_names_of_other_layers(self, kind: str) -> None:
        row = KINDS[kind]
        config = RecastConfig(target_modules=row.targets)
        model = get_recast_model(seeded(row.build).to(DEVICE), config, "red").eval()
        model.add_adapter("blue", RecastConfig(target_modules=row.targets))
        for seed, name in enumerate(("red", "blue")):
            randomise(model, name, seed)
        x = torch.cat([row.inputs()] * 2)[:3].to(DEVICE)
        names = ["blue", "__base__", "red"]
        mixed = outputs(model, x, adapter_names=names)
        for i, name in enumerate(names):
            adapters = [] if name == "__base__" else [name]
            alone = reference_model(seeded(row.build).to(DEVICE), model, adapters)
            torch.testing.assert_close(mixed[i], outputs(alone, x)[i], **CLOSE[torch.float32])
        assert not torch.allclose(mixed[0], mixed[2], atol=1e-3)

    def test_one_batch_trains_many_tasks(self) -> None:
        model, pool = pool_of()
        pool.requires_grad_()
        names = ["task0", "task2", "task0"]
        x = vit_x(3)
        loss_of(model(x, task_ids=pool.ids(names))).backward()
        together = pool.table.grad.clone()
        assert is_here(together)
        assert not together[pool.row("task1")].any()
        for name in ("task0", "task2"):
            # the same loss of the same rows, each with a batch of one task
            pool.table.grad = None
            keep = torch.tensor([n == name for n in names], device=DEVICE)
            y = model(x, task_ids=pool.ids([name] * 3))
            loss_of(torch.where(keep[:, None], y, y.detach())).backward()
            assert relative(together[pool.row(name)], pool.table.grad[pool.row(name)]) < GRADIENT_ERROR

    def test_a_packed_file_is_the_same_everywhere(self, tmp_path: Path) -> None:
        _, pool = pool_of()
        pool.save(tmp_path / "pool")
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv", "fc1"]), "first").eval()
        there = TaskPool(model)
        there.load(tmp_path / "pool")
        assert there.table.device.type == "cpu"
        assert torch.equal(there.table[:3], pool.table[:3].cpu())


def test_a_classifier_in_closed_form_is_that_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    x = torch.randn(30, 5, 8, generator=generator) + 2 * torch.randn(3, 1, 8, generator=generator)[labels]
    heads = {}
    for device in (torch.device("cpu"), DEVICE):
        model = get_recast_model(tiny_vit().to(device), RecastConfig(target_modules=["qkv"], num_classes=3))
        randomise(model)
        # batches may lie on the CPU
        head = fit_discriminant_head(model, [(x[:16], labels[:16]), (x[16:], labels[16:])])
        assert head.weight.device.type == device.type
        found = outputs(model.eval(), x.to(device)).argmax(1).cpu()
        assert (found == labels).float().mean() > 0.9
        heads[device.type] = head
    # float32 features, whose rounding the inverse of their covariance makes larger
    assert relative(heads[DEVICE.type].weight, heads["cpu"].weight) < 1e-3


def test_heads_of_tasks_in_a_mixed_batch() -> None:
    model = get_recast_model(tiny_vit().to(DEVICE), RecastConfig(target_modules=["qkv"], num_classes=5), "first").eval()
    pool = TaskPool(model)
    for name, classes in (("five", 5), ("two", 2)):
        pool.add(name, RecastConfig(num_classes=classes))
        pool.table.data[pool.row(name)] += 0.2
    x = vit_x(4)
    names = ["two", "five", "two", None]
    mixed = outputs(model, x, task_ids=pool.ids(names))
    assert is_here(mixed)
    for i, name in enumerate(names[:3]):
        pool.activate(name)
        alone = outputs(model, x)[i]
        torch.testing.assert_close(mixed[i, : len(alone)], alone, **CLOSE[torch.float32])
        assert mixed[i, len(alone) :].isinf().all()
