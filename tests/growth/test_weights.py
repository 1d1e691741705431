"""Banks that grow: principal components of what sources did to the weights, beside the pretrained weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from models import KINDS, layers_of, outputs, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from recast_peft import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    StoredBank,
    TaskPool,
    convert_to_lora,
    extend_bank,
    get_recast_model,
    grow_bank,
    growth_report,
    load_bank,
    load_compressed_model,
    mimicry_report,
    plan_recast,
    push_bank_to_hub,
    push_task_to_hub,
    save_compressed_model,
)
from recast_peft.banks.files import BANK_CONFIG
from recast_peft.banks.grown_templates import factorise
from recast_peft.growth.sources import task_vectors

X = vit_input(4)
TARGETS = ["qkv", "fc1"]


def lora(seed: int, rank: int = 2, targets: list[str] | None = None) -> PeftModel:
    """An adapter that moved the weights."""
    model = get_peft_model(tiny_vit(), LoraConfig(r=rank, target_modules=targets or TARGETS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def config(**fields: object) -> RecastConfig:
    return RecastConfig(**{"target_modules": TARGETS, "group_size": 1, **fields})  # type: ignore[arg-type]


def grown(seeds: tuple[int, ...] = (0, 1, 2), **fields: object) -> StoredBank:
    return grow_bank(tiny_vit(), [(lora(seed), "default") for seed in seeds], config(), **fields)  # type: ignore[arg-type]


def on(bank: object, name: str = "default", model: nn.Module | None = None, seed: int = 1) -> PeftModel:
    result = get_recast_model(model or tiny_vit(), RecastConfig(bank=bank), name).eval()  # type: ignore[arg-type]
    randomise(result, name, seed)
    return result


def composed_by_hand(bank: StoredBank, model: PeftModel, adapter: str = "default") -> nn.Module:
    """A plain copy whose weights were composed by plain arithmetic."""
    plain = tiny_vit()
    pretrained = tiny_vit()
    layers = layers_of(model)
    with torch.no_grad():
        for group in bank.groups.values():
            assert group.grown is not None
            templates: list[Tensor] = []
            if group.grown.plain:
                templates += [pretrained.get_parameter(f"{m}.weight") for m in group.members]
            templates += group.grown.dense()
            for member in group.members:
                offsets = layers[member].recast_coefficients[adapter].mean(0)
                assert len(offsets) == len(templates)
                for offset, template in zip(offsets, templates, strict=True):
                    plain.get_parameter(f"{member}.weight").add_(offset * template)
    return plain


class TestGrowing:
    def test_all_components_span_the_sources(self) -> None:
        bank = grown()
        targets = {t.name: t for t in plan_recast(tiny_vit(), config()).candidates}
        vectors = [task_vectors(tiny_vit(), lora(seed), targets) for seed in range(3)]
        for group in bank.groups.values():
            assert group.grown is not None
            assert len(group.grown) == 3
            basis = torch.stack([t.flatten() for t in group.grown.dense()], 1).double()
            for vector in vectors:
                move = vector[group.members[0]].flatten().double()
                found = basis @ torch.linalg.lstsq(basis, move[:, None]).solution
                assert torch.allclose(found[:, 0], move, atol=1e-5)

    def test_the_components_are_those_of_the_singular_values(self) -> None:
        bank = grown(num_templates=1)
        name, group = next(iter(bank.groups.items()))
        moves = torch.stack([lora(seed).base_model.model.get_submodule(name).get_delta_weight("default") for seed in range(3)])
        values = torch.linalg.svdvals(moves.detach().flatten(1).double())
        assert group.grown is not None
        assert group.grown.energy == pytest.approx((float(values[0] ** 2 / values.square().sum()),), rel=1e-4)
        size = moves.detach().flatten(1).norm(dim=1).square().mean().sqrt()
        assert float(group.grown.dense()[0].norm()) == pytest.approx(float(size), rel=1e-4)

    def test_a_source_may_be_given_in_many_ways(self, tmp_path: Path) -> None:
        model = lora(0)
        model.save_pretrained(tmp_path / "adapter")
        fine_tuned = copy.deepcopy(model).merge_and_unload()
        save_file(fine_tuned.state_dict(), tmp_path / "model.safetensors")
        wanted = grow_bank(tiny_vit(), [model], config())
        for source in (
            (model, "default"),
            tmp_path / "adapter",
            str(tmp_path / "adapter"),
            fine_tuned,
            fine_tuned.state_dict(),
            tmp_path,
            tmp_path / "model.safetensors",
        ):
            found = grow_bank(tiny_vit(), [source], config())  # type: ignore[list-item]
            assert found.fingerprint == wanted.fingerprint

    def test_a_recast_task_is_a_source(self) -> None:
        task = on(grown(), seed=3)
        bank = grow_bank(tiny_vit(), [task], config())
        again = on(bank)
        target = next(iter(bank.groups))
        with torch.no_grad():
            layers_of(again)[target].recast_coefficients["default"].copy_(torch.tensor([[0.0, 1.0]]))
            moved = layers_of(again)[target].weight - tiny_vit().get_parameter(f"{target}.weight")
            wanted = layers_of(task)[target].get_delta_weight("default")
        assert torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0).abs() > 0.9999

    def test_a_recast_task_with_a_lora_part_is_a_source(self, tmp_path: Path) -> None:
        """Both parts count: the task vector is the sum of what coefficients and LoRA add, worked out by hand."""
        part = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
        task = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], lora_config=part), "task").eval()
        randomise(task, "task")
        task.save_pretrained(tmp_path)
        state = {name: value.detach() for name, value in task.named_parameters()}
        targets = {t.name: t for t in plan_recast(tiny_vit(), config()).candidates}
        for source in ((task, "task"), tmp_path / "task"):
            vectors = task_vectors(tiny_vit(), source, targets)
            for name in targets:
                keys = {k: v for k, v in state.items() if f".{name}." in k and ".task" in k}
                a, b = (next(v for k, v in keys.items() if f"lora_{part}" in k) for part in "AB")
                wanted = 4 * b @ a  # lora_alpha 8, rank 2
                if name.endswith("qkv"):
                    members = next(m for m in task.peft_config["task"].groups.values() if name in m)
                    offsets = next(v for k, v in keys.items() if "recast_coefficients" in k)[0]
                    assert offsets.abs().min() > 0
                    wanted = wanted + sum(o * targets[m].weight for o, m in zip(offsets, members, strict=True))
                assert torch.allclose(vectors[name], wanted, atol=1e-5)
        both = [grow_bank(tiny_vit(), [source], config()).fingerprint for source in ((task, "task"), tmp_path / "task")]
        assert both[0] == both[1]

    def test_a_head_of_the_source_does_not_matter(self, tmp_path: Path) -> None:
        def headed(classes: int) -> nn.Module:
            model = tiny_vit()
            model.head = seeded(lambda: nn.Linear(4, classes))
            return model

        source = get_peft_model(headed(3), LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"]))
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        source.save_pretrained(tmp_path)
        wanted = grow_bank(headed(3), [source], config()).fingerprint
        for classes in (3, 5):
            assert grow_bank(headed(classes), [tmp_path], config()).fingerprint == wanted
        assert grow_bank(tiny_vit(), [tmp_path], config()).fingerprint == wanted

    def test_an_adapter_for_another_width_is_refused(self, tmp_path: Path) -> None:
        other = get_peft_model(nn.ModuleDict({"fc1": nn.Linear(3, 5)}), LoraConfig(target_modules=["fc1"]))
        other.save_pretrained(tmp_path)
        plain = nn.ModuleDict({"fc1": nn.Linear(7, 5)})
        with pytest.raises(RecastBankError, match="does not fit the model"):
            grow_bank(plain, [tmp_path], RecastConfig(target_modules=["fc1"], group_size=1))

    def test_a_group_shares_its_templates(self) -> None:
        bank = grow_bank(tiny_vit(), [lora(0), lora(1)], config(group_size=2), num_templates=3)
        group = next(iter(bank.groups.values()))
        assert len(group.members) == 2
        assert group.num_templates == 5
        model = on(bank)
        assert torch.allclose(outputs(model, X), outputs(composed_by_hand(bank, model), X), atol=1e-5)

    def test_modules_that_no_source_moved(self) -> None:
        only_qkv = lora(0, targets=["qkv"])
        with_plain = grow_bank(tiny_vit(), [only_qkv], config())
        without = grow_bank(tiny_vit(), [only_qkv], config(), plain_templates=False)
        assert {g.num_templates for n, g in with_plain.groups.items() if "fc1" in n} == {1}
        assert not [name for name in without.groups if "fc1" in name]
        with pytest.raises(RecastBankError, match="none of the 1 sources moved"):
            grow_bank(tiny_vit(), [tiny_vit()], config())

    def test_a_rank_keeps_what_it_can(self) -> None:
        dense, pairs, all_of_it = grown(num_templates=2), grown(num_templates=2, rank=1), grown(num_templates=2, rank=6)
        lost = growth_report(dense).groups[0].energy[-1] - growth_report(pairs).groups[0].energy[-1]
        assert 0.01 < lost < 0.9
        assert growth_report(all_of_it).groups[0].energy[-1] == pytest.approx(
            growth_report(dense).groups[0].energy[-1], abs=1e-5
        )
        assert pairs.nbytes < dense.nbytes / 4
        left, right = factorise(torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0)), 99)
        assert left.shape == (2, 6, 6)
        assert right.shape == (2, 6, 12)

    @pytest.mark.parametrize("fields", [{"num_templates": 0}, {"rank": 0}, {"rank": True}])
    def test_wrong_numbers_are_refused(self, fields: dict) -> None:
        with pytest.raises(RecastConfigError, match="at least 1"):
            grown(**fields)

    def test_wrong_sources_are_refused(self, tmp_path: Path) -> None:
        for sources in ([], str(tmp_path), lora(0)):
            with pytest.raises(RecastConfigError, match="at least one source"):
                grow_bank(tiny_vit(), sources, config())  # type: ignore[arg-type]
        with pytest.raises(RecastBankError, match="cannot be read"):
            grow_bank(tiny_vit(), [tmp_path / "nothing"], config())
        with pytest.raises(RecastBankError, match="has no adapter 'other'"):
            grow_bank(tiny_vit(), [(lora(0), "other")], config())
        with pytest.raises(RecastBankError, match="none of the target modules"):
            grow_bank(tiny_vit(), [{"other.weight": torch.zeros(1)}], config())
        name = f"{next(iter(grown().groups))}.weight"
        with pytest.raises(RecastBankError, match="another shape"):
            grow_bank(tiny_vit(), [{name: torch.zeros(1, 1)}], config())
        with pytest.raises(RecastConfigError, match="plain pretrained model"):
            grow_bank(on(grown()), [lora(0)], config())

    def test_the_report(self) -> None:
        report = growth_report(grown(num_templates=2))
        assert all(0 < g.energy[0] < g.energy[1] < 1 for g in report.groups)
        assert "energy 2" in str(report)
        assert report.to_dict()["version"] == 1
        model = on(grown(num_templates=2))
        assert report.num_coefficients == sum(l.recast_coefficients["default"].numel() for l in layers_of(model).values())  # noqa: E741
        with pytest.raises(RecastBankError, match="no grown templates"):
            growth_report(_fitted_bank())


def _fitted_bank() -> StoredBank:
    from recast_peft import fit_bank
    from recast_peft.mimicry import Gradient

    return fit_bank(
        tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry=Gradient(steps=2, progress=False))
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
        assert layer.recast_bank["default"].grown.tensors[0].dtype == dtype
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

    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        grown().save(tmp_path)
        file = tmp_path / BANK_CONFIG
        content = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
        file.write_text(json.dumps(content).replace('"plain": true', '"plain": false'))
        with pytest.raises(RecastLoadError, match="lacks .*only_grown"):
            load_bank(tmp_path)


class TestExtending:
    def versions(self, **fields: object) -> tuple[StoredBank, StoredBank]:
        first = grown(seeds=(0, 1), num_templates=2, **fields)
        return first, extend_bank(first, tiny_vit(), [lora(2), lora(3)], num_templates=2)

    @pytest.mark.parametrize("rank", [None, 2])
    def test_the_first_templates_stay(self, rank: int | None) -> None:
        first, second = self.versions(rank=rank)
        assert second.version == 2
        assert second.fingerprint != first.fingerprint
        for name, group in second.groups.items():
            old = first.groups[name].grown
            assert group.grown is not None
            assert old is not None
            assert len(group.grown) == 4
            assert all(torch.equal(a[: len(old)], b) for a, b in zip(group.grown.tensors, old.tensors, strict=True))
        earlier = second.at(first.fingerprint)
        assert earlier is not None
        assert StoredBank(earlier.groups).fingerprint == first.fingerprint

    def test_new_templates_are_new_directions(self) -> None:
        first = grown(seeds=(0, 1))
        again = extend_bank(first, tiny_vit(), [lora(0), lora(1)])
        assert [g.num_templates for g in again.groups.values()] == [g.num_templates for g in first.groups.values()]
        second = extend_bank(first, tiny_vit(), [lora(1), lora(2)])
        assert {len(g.grown) for g in second.groups.values()} == {3}
        assert all(g.grown.energy[-1] == pytest.approx(1, abs=1e-5) for g in second.groups.values())

    @pytest.mark.parametrize("rank", [None, 2])
    def test_an_old_task_works_on_the_newer_bank_to_the_last_bit(self, tmp_path: Path, rank: int | None) -> None:
        first, second = self.versions(rank=rank)
        model = on(first.save(tmp_path / "bank"))
        model.save_pretrained(tmp_path / "old")
        wanted = outputs(model, X)
        second.save(tmp_path / "bank")  # in place of the first
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "old").eval()
        assert torch.equal(outputs(loaded, X), wanted)
        newer = on(load_bank(tmp_path / "bank"), "new", seed=6)  # and beside a task on the new version
        newer.load_adapter(tmp_path / "old", "old")
        newer.set_adapter("old")
        assert torch.equal(outputs(newer.eval(), X), wanted)
        pool = TaskPool(newer, like="new")  # and in a pool of the new version, with zeros for the new templates
        pool.add("from the file", tmp_path / "old")
        pool.add("from the model", "old")
        for name in pool:
            assert all(not row[-2:].any() for row in pool.coefficients(name).values())
            with pool.use(name):
                assert torch.equal(outputs(newer, X), wanted)

    def test_what_cannot_be_extended(self) -> None:
        with pytest.raises(RecastBankError, match="no grown templates"):
            extend_bank(_fitted_bank(), tiny_vit(), [lora(0)])
        with pytest.raises(RecastBankError, match="other pretrained weights"):
            extend_bank(grown(), tiny_vit(seed=5), [lora(0)])
        with pytest.raises(RecastConfigError, match="at least one source"):
            extend_bank(grown(), tiny_vit(), [])


EVERY_FORM = pytest.mark.parametrize(
    "fields", [{}, {"rank": 2}, {"plain_templates": False}, {"rank": 2, "plain_templates": False}]
)


@EVERY_FORM
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_task_is_one_graph(self, fields: dict) -> None:
        model = on(grown(**fields))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(outputs(compiled, X), outputs(model, X), atol=1e-5)
        compiled(X).square().sum().backward()
        found = [layer.recast_coefficients["default"].grad.clone() for layer in layers_of(model).values()]
        model.zero_grad()
        model(X).square().sum().backward()
        for layer, gradient in zip(layers_of(model).values(), found, strict=True):
            assert torch.allclose(layer.recast_coefficients["default"].grad, gradient, rtol=1e-4, atol=1e-5)

    def test_a_mixed_batch_is_one_graph_for_any_tasks(self, fields: dict) -> None:
        model = on(grown(**fields))
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


class TestWithTheRest:
    def test_a_model_that_calls_all_its_children(self) -> None:
        plain = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
        source = {name: value + 0.1 for name, value in plain.state_dict().items()}
        targets = RecastConfig(target_modules=["0", "2"], group_size=1)
        model = on(grow_bank(plain, [source], targets), model=copy.deepcopy(plain))
        weights = {name: layer.compose(["default"]) for name, layer in layers_of(model).items()}
        hidden = torch.tanh(nn.functional.linear(X, weights["0"], plain[0].bias))
        assert torch.allclose(outputs(model, X), nn.functional.linear(hidden, weights["2"], plain[2].bias), atol=1e-6)
        assert not torch.allclose(outputs(model, X), outputs(plain, X), atol=1e-2)

    def test_a_budget_that_the_bank_exceeds_is_refused(self) -> None:
        bank = grown()
        numbers = growth_report(bank).num_coefficients
        assert plan_recast(tiny_vit(), RecastConfig(bank=bank, max_coefficients=numbers)).num_coefficients == numbers == 32
        with pytest.raises(RecastConfigError, match="needed:  32\n  allowed: 31"):
            get_recast_model(tiny_vit(), RecastConfig(bank=bank, max_coefficients=31))

    @pytest.mark.parametrize(("sharing", "numbers"), [("roles", 16), ("blocks", 16), ("all", 8)])
    def test_coefficients_may_be_shared(self, sharing: str, numbers: int, tmp_path: Path) -> None:
        bank = grow_bank(tiny_vit(), [lora(0), lora(1)], config(group_size=2), num_templates=2).save(tmp_path / "bank")
        model = get_recast_model(tiny_vit(), RecastConfig(bank=bank, coefficient_sharing=sharing)).eval()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers
        randomise(model)
        assert torch.allclose(outputs(model, X), outputs(composed_by_hand(bank, model), X), atol=1e-5)
        model.save_pretrained(tmp_path / "task")
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task").eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        assert (
            sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values() if p.ndim == 2 and len(p) == 1) == numbers
        )

    def test_a_compressed_model_is_no_form_of_it(self, tmp_path: Path) -> None:
        with pytest.raises(RecastBankError, match="adds to the pretrained weights"):
            save_compressed_model(on(grown()), tmp_path / "model")
        assert not (tmp_path / "model").exists()
        grown().save(tmp_path / "bank")
        with pytest.raises(RecastLoadError):
            load_compressed_model(tiny_vit(), tmp_path / "bank")

    @EVERY_FORM
    def test_a_lora_beside_it(self, fields: dict) -> None:
        task = on(grown(**fields), "task")
        both = get_peft_model(task.base_model.model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).eval()
        plain = tiny_vit()
        with torch.no_grad():
            for name, layer in layers_of(task).items():
                delta = layer.get_delta_weight("task")
                added = both.base_model.model.get_submodule(name).get_delta_weight("default")
                assert added.abs().max() > 1e-3
                plain.get_parameter(f"{name}.weight").add_(delta + added)
        wanted = outputs(plain, X)
        assert torch.allclose(outputs(both, X), wanted, atol=1e-5)
        both.merge_adapter()
        assert torch.allclose(outputs(both, X), wanted, atol=1e-5)
        both.unmerge_adapter()
        for name, layer in layers_of(task).items():
            assert torch.equal(layer.pretrained_weight, tiny_vit().get_parameter(f"{name}.weight"))

    def test_low_rank_templates_make_a_lora_without_error(self) -> None:
        """Two templates of rank 1 and no pretrained weight among them: what a task adds has rank 2."""
        model = on(grown(num_templates=2, rank=1, plain_templates=False))
        _, state, report = convert_to_lora(model, 2)
        assert report.worst_relative_error < 1e-5
        lora_model = get_peft_model(tiny_vit(), LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)).eval()
        lora_model.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False)
        assert torch.allclose(outputs(lora_model, X), outputs(model, X), atol=1e-5)
        _, _, report = convert_to_lora(on(grown(num_templates=2, rank=1)), 2)  # the pretrained weight has full rank
        assert report.worst_relative_error > 0.1


class TestOnTheHub:
    def card(self, hub: HubServer, name: str) -> str:
        return hub.repositories[name].find("main").files["README.md"].decode()

    def test_bank_and_task_are_pushed_and_found(self, hub: HubServer, tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path / "private" / "flowers")
        bank = grow_bank(tiny_vit(), [tmp_path / "private" / "flowers", (lora(1), "default"), tiny_vit(3)], config(), rank=2)
        push_bank_to_hub(bank, "ada/bank", base_model="ada/vit")
        card = self.card(hub, "ada/bank")
        assert "| Made by | grown from 3 sources: flowers, adapter 'default', weights of TinyVit |" in card
        assert str(tmp_path) not in card
        assert f"| Fingerprint | {bank.fingerprint} |" in card
        model = on(load_bank("ada/bank"))
        push_task_to_hub(model, "ada/birds")
        assert "stored bank `ada/bank`" in self.card(hub, "ada/birds")
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), "ada/birds").eval(), X), outputs(model, X))

    def test_an_older_task_finds_its_version_in_a_newer_bank(self, hub: HubServer) -> None:
        first = grown(seeds=(0, 1), rank=2)
        push_bank_to_hub(first, "ada/bank")
        old = on(load_bank("ada/bank"))
        push_task_to_hub(old, "ada/old")
        second = extend_bank(load_bank("ada/bank"), tiny_vit(), [lora(2)])
        push_bank_to_hub(second, "ada/bank")
        card = self.card(hub, "ada/bank")
        assert "| Version | 2 |" in card
        assert f"| Holds version | 1, fingerprint {first.fingerprint} |" in card
        assert "grown from 3 sources" in card
        assert load_bank("ada/bank").fingerprint == second.fingerprint != first.fingerprint
        again = PeftModel.from_pretrained(tiny_vit(), "ada/old").eval()
        assert torch.equal(outputs(again, X), outputs(old, X))
        again.add_adapter("new", RecastConfig(bank=load_bank("ada/bank")))
        assert {layer.recast_bank["new"].version for layer in layers_of(again).values()} == {2}

    def test_by_the_models_own_verb(self, hub: HubServer) -> None:
        model = on(grown(rank=2))
        stored = model.base_model.push_bank_to_hub("ada/bank")
        assert load_bank("ada/bank").mimicry == stored.mimicry == grown(rank=2).mimicry
        assert model.peft_config["default"].bank_reference["fingerprint"] == stored.fingerprint
