"""Grown, compressed and fitted banks on an accelerator are those of the CPU."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerator import (
    CASES,
    CLOSE,
    DEVICE,
    images,
    is_here,
    needs_device,
    on_cuda,
    plain_of,
    pool_of,
    relative,
    run,
    storages,
    task_of,
    vit_x,
)
from models import TinyVit, layers_of, move, outputs, tiny_vit, vit_input
from torch import Tensor, nn

from recast_peft import BiasConfig, RecastConfig, StoredBank, TaskPool, fit_bank, get_recast_model, grow_bank, grow_bias_bank
from recast_peft.mimicry import DataAware, Gradient

pytestmark = needs_device


def moved(seed: int, part: str, size: float = 0.1) -> dict[str, Tensor]:
    """A fine-tuned form of the tiny model: every parameter whose name ends so is moved at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + (size * torch.randn(p.shape, generator=generator) if name.endswith(part) else 0.0)
        for name, p in tiny_vit().named_parameters()
    }


WEIGHTS = {"target_modules": ["qkv", "fc1"], "group_size": 1}


def weight_bank(device: torch.device = DEVICE, **fields: Any) -> StoredBank:
    return grow_bank(tiny_vit().to(device), [moved(i, "weight") for i in range(3)], RecastConfig(**WEIGHTS), **fields)


def bias_bank(device: torch.device = DEVICE) -> StoredBank:
    return grow_bias_bank(tiny_vit().to(device), [moved(i, "bias", 0.3) for i in range(3)])


GROWN: dict[str, Callable[[], RecastConfig]] = {
    "dense": lambda: RecastConfig(bank=weight_bank()),
    "of low rank": lambda: RecastConfig(bank=weight_bank(rank=2)),
    "of biases": lambda: RecastConfig(**WEIGHTS, partners=[BiasConfig(bank=bias_bank())]),
    "a coefficient for each bias": lambda: RecastConfig(**WEIGHTS, partners=["bias"]),
}


class TestGrownBanks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", GROWN)
    def test_fresh_merged_and_mixed(self, kind: str, dtype: torch.dtype) -> None:
        plain, x = tiny_vit().to(DEVICE, dtype), vit_x(dtype=dtype)
        expected = outputs(plain, x)
        model = get_recast_model(tiny_vit().to(DEVICE, dtype), GROWN[kind](), "first").eval()
        assert torch.equal(outputs(model, x), expected)
        pool = TaskPool(model)
        for seed, name in enumerate(("one", "two")):
            row = pool.add(name)
            values = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(seed)) * 0.3
            pool.table.data[row] = values.to(DEVICE)
        live = {}
        for name in ("one", "two"):
            pool.activate(name)
            live[name] = outputs(model, x)
            model.merge_adapter()
            torch.testing.assert_close(outputs(model, x), live[name], **CLOSE[dtype])
            model.unmerge_adapter()
            assert torch.equal(outputs(model, x), live[name])
            pool.activate(name, merge=True)
            torch.testing.assert_close(outputs(model, x), live[name], **CLOSE[dtype])
        assert not torch.allclose(live["one"], live["two"], atol=0.1)
        pool.deactivate()
        assert torch.equal(outputs(model, x), expected)
        live[None] = expected
        names = ["two", None, "one", "one", None, "two"]
        mixed = outputs(model, x, task_ids=pool.ids(names))
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], live[name][i], **CLOSE[dtype])
        for name, parameter in plain.named_parameters():
            if name.endswith("bias") and "blocks" in name:
                module, _, _ = name.rpartition(".")
                assert torch.equal(model.get_base_model().get_submodule(module).bias, parameter)

    @pytest.mark.parametrize("make", [weight_bank, bias_bank])
    def test_they_are_those_of_the_cpu(self, make: Callable[..., StoredBank]) -> None:
        """Principal components of the same moves, up to their signs."""
        here, there = make(), make(torch.device("cpu"))
        assert list(here.groups) == list(there.groups)
        for name, group in here.groups.items():
            for own, wanted in zip(group.grown.tensors, there.groups[name].grown.tensors, strict=True):
                own, wanted = own.cpu().flatten(1), wanted.flatten(1)
                signs = (own * wanted).sum(1, keepdim=True).sign()
                torch.testing.assert_close(signs * own, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
            assert group.grown.energy == pytest.approx(there.groups[name].grown.energy, rel=1e-4)

    def test_a_task_on_a_bank_moves_between_devices(self) -> None:
        config = RecastConfig(bank=weight_bank(), partners=[BiasConfig(bank=bias_bank())])
        model = get_recast_model(tiny_vit().to(DEVICE), config).eval()
        move(model, size=0.3)
        here = outputs(model, vit_x())
        assert not torch.allclose(here, outputs(tiny_vit().to(DEVICE), vit_x()), atol=0.1)
        torch.testing.assert_close(outputs(model.cpu(), vit_input(6)), here.cpu(), **CLOSE[torch.float32])
        assert torch.equal(outputs(model.to(DEVICE), vit_x()), here)


class TestCompressedBanks:
    @pytest.mark.parametrize(
        ("case", "size", "templates"), [*((case, 2, 1) for case in CASES), ("convolutions", 3, 2), ("GPT-2", 4, 2)]
    )
    def test_they_are_those_of_the_cpu(self, case: str, size: int, templates: int) -> None:
        fields = {"group_size": size, "num_templates": templates}
        here = task_of(case, **fields)
        config = RecastConfig(target_modules=CASES[case].targets, **fields)
        there = get_recast_model(CASES[case].build(), config).eval()
        plain = CASES[case].build()
        changed = 0
        for (name, own), other in zip(layers_of(here).items(), layers_of(there).values(), strict=True):
            with torch.no_grad():
                weight, wanted = own.compose([]), other.compose([])
            assert is_here(weight)
            assert relative(weight, wanted) < 1e-5
            changed += not torch.allclose(wanted, plain.get_parameter(f"{name}.weight"), atol=1e-3)
        assert changed
        assert run(here, case).isfinite().all()

    @pytest.mark.parametrize("keep", [False, True])
    def test_pretrained_weights_are_released(self, keep: bool) -> None:
        plain = plain_of("vision transformer")
        x = images().to(DEVICE)
        expected = outputs(plain, x)
        before = sum(storages(plain).values())
        config = RecastConfig(target_modules=["fc1", "fc2"], num_templates=1, keep_base_weights=keep)
        model = get_recast_model(plain, config).eval()
        targets = sum(torch.Size(layer.weight_shape).numel() * 4 for layer in layers_of(model).values())
        after = sum(storages(model).values())
        assert all(layer.is_released == (not keep) for layer in layers_of(model).values())
        assert abs(after - before - (targets / 2 if keep else -targets / 2)) < 2000  # coefficients, base coefficients
        if keep:
            with model.disable_adapter():
                assert torch.equal(outputs(model, x), expected)
        else:
            assert all(layer.get_base_layer().weight is None for layer in layers_of(model).values())
        assert not torch.allclose(outputs(model, x), expected, atol=1e-3)

    @on_cuda
    def test_the_memory_is_given_back(self) -> None:
        plain = plain_of("vision transformer")
        targets = [p for name, p in plain.named_parameters() if name.endswith(("fc1.weight", "fc2.weight"))]
        expected = sum(p.numel() for p in targets) * 4 / 2
        del targets
        config = RecastConfig(target_modules=["fc1", "fc2"], num_templates=1)
        get_recast_model(plain_of("vision transformer"), config)  # the first products take work space that stays
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = get_recast_model(plain, config)
        gc.collect()
        released = before - torch.cuda.memory_allocated()
        assert released > 0.8 * expected  # less what coefficients and base coefficients take, in blocks of 512 bytes
        assert layers_of(model)

    def test_merging_and_a_mixed_batch(self) -> None:
        model, pool = pool_of(2, num_templates=1)
        x = vit_x()
        live = {}
        for name in ("task0", "task1"):
            pool.activate(name)
            live[name] = outputs(model, x)
            pool.activate(name, merge=True)
            torch.testing.assert_close(outputs(model, x), live[name], **CLOSE[torch.float32])
        pool.deactivate()
        names = ["task0", "task1"] * 3
        mixed = outputs(model, x, task_ids=pool.ids(names))
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], live[name][i], **CLOSE[torch.float32])


def wide_vit() -> TinyVit:
    return tiny_vit(depth=2, width=16)


class TestFitting:
    def test_gradient_mimicry_comes_to_the_optimum_as_on_the_cpu(self) -> None:
        """Random starts differ from device to device; the least-squares optimum, by singular values, does not."""
        method = Gradient(steps=400, decay_every=100, progress=False)
        optimum = []
        for part in ("attn.qkv", "mlp.fc1"):
            rows = [wide_vit().get_parameter(f"blocks.{i}.{part}.weight").detach().double().flatten() for i in range(2)]
            u, sizes, v = torch.linalg.svd(torch.stack(rows), full_matrices=False)
            optimum += [relative(sizes[0] * u[i, 0] * v[0], row) for i, row in enumerate(rows)]
        for device in (torch.device("cpu"), DEVICE):
            plain = wide_vit().to(device)
            config = RecastConfig(target_modules=["qkv", "fc1"], num_templates=1, mimicry=method)
            model = get_recast_model(copy.deepcopy(plain), config)
            found = []
            for name, layer in layers_of(model).items():
                bank = layer.recast_bank["default"]
                assert bank.templates.device.type == bank.base_coefficients.device.type == device.type
                with torch.no_grad():
                    found.append(relative(layer.compose([]), plain.get_parameter(f"{name}.weight")))
            # two equal weights are shared out between the members in many ways, of one sum of squares
            assert sum(e * e for e in found) < 1.03 * sum(e * e for e in optimum)

    def test_data_aware_mimicry_fits_as_well_as_on_the_cpu(self) -> None:
        batches = [vit_input(32) * scale for scale in (0.5, 1.0, 2.0)]
        config = RecastConfig(
            target_modules=["qkv", "fc1"], num_templates=1, mimicry=DataAware(distill_steps=20, progress=False)
        )
        changes = {}
        for device in (torch.device("cpu"), DEVICE):
            plain = tiny_vit().to(device)
            x = vit_input(64).to(device)
            bank = fit_bank(plain, config, batches)
            model = get_recast_model(tiny_vit().to(device), RecastConfig(bank=bank)).eval()
            assert all(b.templates.device.type == device.type for b in banks_of(model))
            changes[device.type] = relative(outputs(model, x), outputs(plain, x))
        assert changes["cpu"] < 0.9
        assert changes[DEVICE.type] < 1.1 * changes["cpu"]


def banks_of(model: nn.Module) -> list[Any]:
    return [bank for layer in layers_of(model).values() for bank in layer.recast_bank.values()]
