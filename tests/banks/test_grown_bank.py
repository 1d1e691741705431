"""A grown bank: tasks on pretrained weights and grown templates side by side, alone and beside other banks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from grown_weights import EVERY_FORM, TARGETS, X, composed_by_hand, grown, on
from models import KINDS, layers_of, outputs, randomise, seeded, tiny_vit
from peft import PeftModel
from torch._dynamo.testing import CompileCounter

from recast_peft import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    TaskPool,
    get_recast_model,
    grow_bank,
    load_bank,
    mimicry_report,
    plan_recast,
)


@pytest.mark.parametrize("fields", [{}, {"rank": 2}, {"plain_templates": False}, {"rank": 2, "plain_templates": False}])
class TestTasks:
    def test_a_fresh_task_changes_nothing(self, fields: dict) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(bank=grown(**fields))).eval()
        assert torch.equal(outputs(model, X), outputs(tiny_vit(), X))
        assert mimicry_report(model).is_exact

    def test_composing(self, fields: dict) -> None:
        bank = grown(**fields)
        model = on(bank)
        wanted = outputs(composed_by_hand(bank, model), X)
        assert not torch.allclose(wanted, outputs(tiny_vit(), X), atol=1e-2)
        assert torch.allclose(outputs(model, X), wanted, atol=1e-5)

    def test_gradients(self, fields: dict) -> None:
        model = on(grown(**fields)).train()
        model(X).square().mean().backward()
        for layer in layers_of(model).values():
            gradient = layer.recast_coefficients["default"].grad
            assert gradient is not None
            assert gradient.ne(0).all()
        assert [n for n, p in model.named_parameters() if p.requires_grad and "recast_coefficients" not in n] == []

    def test_merge_and_exact_unmerge(self, fields: dict) -> None:
        model = on(grown(**fields))
        before = outputs(model, X)
        model.merge_adapter()
        assert torch.equal(outputs(model, X), before)
        model.unmerge_adapter()
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.pretrained_weight, tiny_vit().get_parameter(f"{name}.weight"))
        assert torch.equal(outputs(model, X), before)
        plain = model.merge_and_unload()
        assert torch.equal(outputs(plain, X), before)
        assert not hasattr(plain, "recast_banks")

    def test_bank_and_task_are_reloaded(self, fields: dict, tmp_path: Path) -> None:
        model = on(grown(**fields))
        stored = model.base_model.save_bank(tmp_path / "bank")
        assert stored.fingerprint == grown(**fields).fingerprint
        model.save_pretrained(tmp_path / "task")
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task").eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        again = load_bank(tmp_path / "bank")
        assert again.fingerprint == stored.fingerprint
        assert {n: g.grown.energy for n, g in again.groups.items()} == {
            n: g.grown.energy for n, g in grown(**fields).groups.items()
        }
        assert (tmp_path / "task" / "adapter_model.safetensors").stat().st_size < 10_000

    def test_a_pool(self, fields: dict, tmp_path: Path) -> None:
        model = on(grown(**fields))
        model.base_model.save_bank(tmp_path / "bank")
        model.add_adapter("b", RecastConfig(bank=model.peft_config["default"].bank))
        randomise(model, "b", seed=5)
        wanted = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            wanted[name] = outputs(model, X)
            model.save_pretrained(tmp_path / "tasks", selected_adapters=[name])
        with model.disable_adapter():
            wanted[None] = outputs(model, X)
        pool = TaskPool(model)
        pool.add("one", "default")
        pool.add("two", tmp_path / "tasks" / "b")
        for name, task in (("one", "default"), ("two", "b")):
            with pool.use(name, merge=True):
                assert torch.allclose(outputs(model, X), wanted[task], atol=1e-6)
        mixed = outputs(model, X, task_ids=pool.ids(["two", "one", None, "two"]))
        rows = torch.stack([wanted[t][i] for i, t in enumerate(("b", "default", None, "b"))])
        assert torch.allclose(mixed, rows, atol=1e-5)
        names = outputs(model, X, adapter_names=["b", "default", "__base__", "b"])
        assert torch.allclose(names, rows, atol=1e-5)
        pool.save(tmp_path / "pool.safetensors")
        other = TaskPool(on(load_bank(tmp_path / "bank")))
        assert other.load(tmp_path / "pool.safetensors") == ["one", "two"]
        read, kept = other.coefficients("two"), pool.coefficients("two")
        assert list(read) == list(kept)
        assert all(torch.equal(read[module], kept[module]) for module in kept)
        strange = TaskPool(on(grown(seeds=(7, 8, 9), **fields)))
        for attempt in (
            lambda: strange.load(tmp_path / "pool.safetensors"),
            lambda: strange.add("x", tmp_path / "tasks" / "b"),
        ):
            with pytest.raises(RecastBankError, match="another template bank"):
                attempt()


@EVERY_FORM
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_task_is_one_graph(self, fields: dict) -> None:
        model = on(grown(depth=1, **fields), model=tiny_vit(depth=1))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(outputs(compiled, X), outputs(model, X), atol=1e-5)
        compiled(X).square().sum().backward()
        found = [layer.recast_coefficients["default"].grad.clone() for layer in layers_of(model).values()]
        model.zero_grad()
        model(X).square().sum().backward()
        for layer, gradient in zip(layers_of(model).values(), found, strict=True):
            assert torch.allclose(layer.recast_coefficients["default"].grad, gradient, rtol=1e-4, atol=1e-5)

    def test_a_mixed_batch_is_one_graph_for_any_tasks(self, fields: dict) -> None:
        model = on(grown(depth=1, **fields), model=tiny_vit(depth=1))
        pool = TaskPool(model)
        for seed in range(3):
            randomise(model, seed=seed)
            pool.add(f"task-{seed}", "default")
        counter = CompileCounter()
        compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
        for ids in ([0, 1, 2, 0], [2, 2, 1, -1]):
            rows = torch.tensor(ids)
            with pool.batch(rows):
                found = outputs(compiled, X)
            assert torch.allclose(found, outputs(model, X, task_ids=rows), atol=1e-5)
        assert counter.frame_count == 1


class TestMixedBatches:
    @pytest.mark.parametrize("kind", ["linear", "transformers Conv1D", "conv2d", "conv2d with dilation and groups", "conv1d"])
    @EVERY_FORM
    def test_other_kinds_of_modules(self, kind: str, fields: dict) -> None:
        entry = KINDS[kind]
        plain, x = seeded(entry.build), entry.inputs()
        sources = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            moved = {n: w + 0.2 * torch.randn(w.shape, generator=generator) for n, w in plain.state_dict().items()}
            sources.append(moved)
        bank = grow_bank(plain, sources, RecastConfig(target_modules=entry.targets, group_size=1), **fields)
        model = on(bank, "one", seeded(entry.build))
        model.add_adapter("two", RecastConfig(bank=bank))
        randomise(model, "two", seed=5)
        pool = TaskPool(model)
        wanted = {None: outputs(plain, x)}
        for name in ("one", "two"):
            pool.add(name, name)
            model.set_adapter(name)
            wanted[name] = outputs(model, x)
            model.merge_adapter()
            assert torch.allclose(outputs(model, x), wanted[name], atol=1e-5)
            model.unmerge_adapter()
        assert not torch.allclose(wanted["one"], wanted["two"], atol=1e-2)
        for tasks in (("two", "one"), ("one", None), ("two", "two")):
            mixed = outputs(model, x, task_ids=pool.ids(tasks))
            assert torch.allclose(mixed, torch.stack([wanted[t][i] for i, t in enumerate(tasks)]), atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        model = on(grown(rank=2)).to(dtype)
        pool = TaskPool(model)
        pool.add("one", "default")
        wanted = outputs(model, X.to(dtype))
        found = outputs(model, X.to(dtype), task_ids=pool.ids(["one", "one", "one", None]))
        assert found.dtype == dtype
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(found[:3], wanted[:3], atol=tolerance, rtol=tolerance)
        assert not torch.allclose(found[3], wanted[3], atol=tolerance, rtol=tolerance)

    def test_gradients_reach_coefficients_and_input(self) -> None:
        model = on(grown(rank=2))
        pool = TaskPool(model)
        pool.add("one", "default")
        pool.requires_grad_()
        x = X.clone().requires_grad_()
        model(x, task_ids=pool.ids(["one"] * 4)).square().sum().backward()
        alone = X.clone().requires_grad_()
        model.set_adapter("default")
        model(alone).square().sum().backward()
        assert torch.allclose(x.grad, alone.grad, rtol=1e-4, atol=1e-5)
        for name, layer in layers_of(model).items():
            own = layer.recast_coefficients["default"].grad[0]
            assert own.ne(0).all()
            assert torch.allclose(pool.table.grad[0, pool.part_of(name)], own, rtol=1e-4, atol=1e-5)


class TestBesideOtherBanks:
    def test_tasks_on_one_bank_share_it(self, tmp_path: Path) -> None:
        model = on(grown())
        model.add_adapter("b", RecastConfig(bank=model.peft_config["default"].bank))
        for layer in layers_of(model).values():
            assert layer.recast_bank["b"] is layer.recast_bank["default"]

    def test_a_plain_task_and_a_grown_one_add(self) -> None:
        model = on(grown())
        model.add_adapter("plain", RecastConfig(target_modules=TARGETS))
        randomise(model, "plain", seed=4)
        name, layer = next(iter(layers_of(model).items()))
        both = layer.compose(["default", "plain"])
        alone = layer.get_delta_weight("default") + layer.get_delta_weight("plain")
        assert torch.allclose(both, tiny_vit().get_parameter(f"{name}.weight") + alone, atol=1e-5)

    def test_compressed_banks_are_refused(self) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=TARGETS, num_templates=1))
        with pytest.raises(RecastBankError, match="adds to the pretrained weights"):
            model.add_adapter("b", RecastConfig(bank=grown()))

    def test_other_pretrained_weights_are_refused(self) -> None:
        with pytest.raises(RecastBaseMismatchError):
            get_recast_model(tiny_vit(seed=5), RecastConfig(bank=grown()))

    def test_the_plan_says_so(self) -> None:
        bank = grown(num_templates=2)
        plan = plan_recast(tiny_vit(), RecastConfig(bank=bank))
        assert plan.model_bytes_after - plan.model_bytes == bank.nbytes
        assert "3 (grown)" in str(plan)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        model = on(grown()).to(dtype)
        layer = next(iter(layers_of(model).values()))
        assert layer.weight.dtype == dtype
        assert layer.recast_bank["default"].grown_templates.tensors[0].dtype == dtype
        assert torch.isfinite(outputs(model, X.to(dtype))).all()

    def test_copies_and_deletion(self) -> None:
        model = on(grown())
        wanted = outputs(model, X)
        twin = copy.deepcopy(model)
        randomise(model, seed=9)
        assert torch.equal(outputs(twin, X), wanted)
        twin.add_adapter("b", RecastConfig(bank=twin.peft_config["default"].bank))
        twin.delete_adapter("default")
        twin.set_adapter("b")
        assert torch.equal(outputs(twin, X), outputs(tiny_vit(), X))
