"""Templates between the main directions of a weight: the directions, and tasks that train a core between them."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from models import KINDS, Kind, converted, layers_of, outputs, randomise, seeded, state, tiny_vit, vit_input, weight_names
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from recast_peft import (
    AdaptFormerConfig,
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    TaskPool,
    convert_to_lora,
    create_recast_optimizer,
    get_recast_model,
    hotswap_adapter,
    plan_recast,
)
from recast_peft.banks.directions_bank import directions_before, main_directions

TARGETS = ["qkv", "fc1"]


def weight(rows: int = 24, columns: int = 16, seed: int = 0, values: list[float] | None = None) -> Tensor:
    """A matrix of given singular values, or of normal numbers."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if values is None:
        return matrix
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]


def by_hand(plain: nn.Module, model: nn.Module, *adapters: str) -> nn.Module:
    """A copy of the plain model with ``W + s U C V`` for the core of each task, in float64 where the weights are."""
    result = copy.deepcopy(plain)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            parameter = result.get_parameter(weight_names(plain, [name])[name])
            change = torch.zeros_like(parameter, dtype=torch.float64)
            for adapter in adapters:
                core = layer.recast_coefficients[adapter].mean(0).double()
                left, right = main_directions(plain.get_parameter(weight_names(plain, [name])[name]), round(len(core) ** 0.5))
                change += (left @ core.view(left.shape[1], -1) @ right).view(parameter.shape)
            parameter += change.to(parameter.dtype)
    return result


class TestDirections:
    def test_they_are_orthonormal_and_as_large_as_the_weight_is_between_them(self) -> None:
        matrix = weight()
        left, right = main_directions(matrix, 5)
        size = left.norm(dim=0)[0]
        assert torch.allclose(left.T @ left, size**2 * torch.eye(5, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(right @ right.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(((left / size).T @ matrix @ right.T).norm() / 5**0.5, size)

    def test_well_apart_they_are_the_singular_vectors(self) -> None:
        matrix = weight(values=[100.0, 10.0, 1.0, 0.1])
        left, right = main_directions(matrix, 3)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        for i in range(3):
            assert float((left[:, i] @ u[:, i] / left[:, i].norm()).abs()) > 1 - 1e-6
            assert float((right[i] @ v[i]).abs()) > 1 - 1e-6

    @pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
    def test_a_rounded_weight_has_nearly_the_same_ones_where_singular_vectors_turn(self, shape: tuple[int, int]) -> None:
        matrix = weight(*shape, values=[1.0] * 16)  # every basis of its spaces is one of singular vectors
        core = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def change(rounded: Tensor, exactly: bool) -> Tensor:
            if exactly:
                u, s, v = torch.linalg.svd(rounded.double(), full_matrices=False)
                return u[:, :4] * s[:4] @ core @ v[:4]
            left, right = main_directions(rounded, 4)
            return left @ core @ right

        def moved(exactly: bool) -> float:
            before, after = (change(m, exactly) for m in (matrix, matrix.bfloat16()))
            return float((before - after).norm() / before.norm())

        assert moved(exactly=False) < 0.02  # bfloat16 keeps eight bits
        assert moved(exactly=True) > 0.5

    def test_fewer_are_the_first_of_more(self) -> None:
        few, many = main_directions(weight(), 2), main_directions(weight(), 6)
        assert torch.allclose(few[1], many[1][:2], atol=1e-12)
        assert torch.allclose(few[0] / few[0].norm(dim=0), many[0][:, :2] / many[0][:, :2].norm(dim=0), atol=1e-12)

    @pytest.mark.parametrize("values", [[2.0, 1.0], [0.0]])
    def test_what_a_weight_has_not_got_is_zero_and_not_of_rounding(self, values: list[float]) -> None:
        exact = weight(values=values)
        left, right = main_directions(exact, 4)
        rank = sum(value > 0 for value in values)
        assert not left[:, rank:].any()
        assert left[:, :rank].any(dim=0).all()
        noise = 1e-14 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        again = main_directions(exact + noise * exact.abs().max(), 4)
        core = torch.ones(4, 4, dtype=torch.float64)
        assert torch.allclose(left @ core @ right, again[0] @ core @ again[1], atol=1e-6)

    @pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
    @pytest.mark.parametrize("values", [None, [2.0, 1.0], [0.0]])
    def test_the_weight_makes_the_left_ones_of_these(self, shape: tuple[int, int], values: list[float] | None) -> None:
        matrix = weight(*shape, values=values)
        left, before = main_directions(matrix, 4)[0], directions_before(matrix, 4)
        assert before.shape == (shape[1], 4)
        assert torch.allclose(matrix @ before, left, atol=1e-10)
        assert left.is_contiguous()
        assert before.is_contiguous()

    def test_they_are_these_on_every_machine(self) -> None:
        left, right = main_directions(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
        # by hand: (W W^T)^3 W g for the start g, which is numpy's RandomState(0).standard_normal(3), then W^T of it
        start = torch.tensor([1.76405235, 0.40015721, 0.97873798], dtype=torch.float64)
        values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        u, v = values**7 * start, values**8 * start
        assert torch.allclose(left[:, 0] / left.norm(), u / u.norm(), atol=1e-9)
        assert torch.allclose(right[0], v / v.norm(), atol=1e-9)


class TestPlan:
    def test_a_layer_trains_a_core(self) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(target_modules=TARGETS, num_directions=3))
        assert (len(plan.groups), plan.num_coefficients) == (8, 8 * 9)
        assert all(group.num_templates == 9 and len(group.members) == 1 for group in plan.groups)
        assert "9 (3 directions)" in str(plan)
        assert plan.model_bytes_after - plan.model_bytes == 4 * 3 * 4 * (8 + 24 + 8 + 16)  # U and V of each layer, in float32

    def test_no_weight_has_more_than_its_smaller_side(self) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=TARGETS, num_directions=100))
        assert all(layer.recast_coefficients["default"].shape == (1, 64) for layer in layers_of(model).values())

    @pytest.mark.parametrize("budget", [48, 71, 72, 127, 128, 1000, 10**6])
    def test_a_budget_is_given_to_as_many_as_it_keeps(self, budget: int) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(max_coefficients=budget))
        directions = {48: 2, 71: 2, 72: 3, 127: 3, 128: 4, 1000: 8, 10**6: 8}[budget]
        assert plan.num_coefficients == 8 * directions**2 <= budget
        assert f"num_directions={directions} needs {8 * directions**2} numbers" in str(plan)
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=budget, num_classes=5))
        assert sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "head" not in n) == 8 * directions**2

    @pytest.mark.parametrize(
        ("fields", "numbers"),
        [
            ({"max_coefficients": 47}, 32),  # less than the default's: groups
            ({"max_coefficients": 100, "group_size": 4}, 32),
            ({"max_coefficients": 100, "coefficient_sharing": "roles"}, 16),
            ({"max_coefficients": 100, "num_coefficient_sets": 2}, 64),
        ],
    )
    def test_a_smaller_budget_and_one_beside_a_size_go_to_groups(self, fields: dict[str, Any], numbers: int) -> None:
        plan = plan_recast(tiny_vit(), RecastConfig(**fields))
        assert (plan.num_coefficients, plan.num_directions) == (numbers, None)

    def test_less_than_one_a_layer_is_shared(self) -> None:
        plan = plan_recast(tiny_vit(depth=40), RecastConfig(max_coefficients=50))
        assert (plan.num_directions, plan.coefficient_sharing) == (None, "roles")

    @pytest.mark.parametrize("fields", [{"group_size": 2}, {"num_groups": 1}, {"num_templates": 1}, {"bank": "me/bank"}])
    def test_beside_another_size_they_are_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(RecastConfigError, match=r"num_directions=2 and .* were both given"):
            RecastConfig(num_directions=2, **fields)

    def test_the_given_number_must_keep_the_budget(self) -> None:
        with pytest.raises(RecastConfigError, match="needed:  72\n  allowed: 50"):
            plan_recast(tiny_vit(), RecastConfig(num_directions=3, max_coefficients=50))

    def test_a_compressed_model_takes_none(self) -> None:
        model = converted("first", num_templates=1, group_size=2)
        before = state(model)
        with pytest.raises(RecastBankError, match="main directions adds to the pretrained weights"):
            model.add_adapter("second", RecastConfig(target_modules=["qkv"], num_directions=2))
        assert state(model) == before


def on_kind(kind: Kind, **fields: Any) -> tuple[nn.Module, PeftModel, Tensor]:
    """A model of a kind in float64 with a task on directions."""
    plain = seeded(kind.build).double()
    options = {**kind.config, "target_modules": kind.targets, "num_directions": 2, **fields}
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(**options), "task").eval().double()
    randomise(model, "task")
    x = kind.inputs()
    return plain, model, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
class TestKinds:
    def test_a_task_computes_with_its_core(self, kind: Kind) -> None:
        plain, model, x = on_kind(kind)
        wanted = outputs(by_hand(plain, model, "task"), x)
        assert not torch.allclose(wanted, outputs(plain, x), atol=1e-3)
        assert torch.allclose(outputs(model, x), wanted, atol=1e-10)
        model.merge_adapter()
        assert torch.allclose(outputs(model, x), wanted, atol=1e-10)
        model.unmerge_adapter()
        assert all(torch.equal(layer.pretrained_weight, p) for layer, p in pretrained(plain, model))
        assert torch.allclose(outputs(model.merge_and_unload(), x), wanted, atol=1e-10)

    def test_numbers_in_float32_round_no_model_in_float64(self, kind: Kind) -> None:
        _, model, x = on_kind(kind)
        for layer in layers_of(model).values():
            layer.recast_coefficients["task"].data = layer.recast_coefficients["task"].data.float()
        live = outputs(model, x)
        model.merge_adapter()
        assert torch.allclose(outputs(model, x), live, rtol=1e-12, atol=1e-12)

    def test_gradients(self, kind: Kind) -> None:
        plain, model, x = on_kind(kind)
        model.train()
        loss = model(x).square().sum()
        loss.backward()
        for name, layer in layers_of(model).items():
            core = layer.recast_coefficients["task"]
            step = torch.zeros_like(core)
            step[0, 1] = 1e-6  # a central difference, by plain arithmetic
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    core += sign * step
                    ends.append(by_hand(plain, model, "task").train()(x).square().sum())
                    core -= sign * step
            assert core.grad is not None
            wanted = (ends[0] - ends[1]) / 2e-6
            assert torch.allclose(core.grad[0, 1], wanted.to(core.grad), rtol=1e-4, atol=1e-5), name

    def test_a_fresh_task_changes_nothing(self, kind: Kind) -> None:
        options = {**kind.config, "target_modules": kind.targets, "num_directions": 2}
        model = get_recast_model(seeded(kind.build), RecastConfig(**options)).eval()
        assert torch.equal(outputs(model, kind.inputs()), outputs(seeded(kind.build), kind.inputs()))

    def test_each_sample_has_its_own_core(self, kind: Kind) -> None:
        if not kind.mixed_batch:
            pytest.skip("the module takes one task at a time")
        plain, model, x = on_kind(kind)
        options = {**kind.config, "target_modules": kind.targets, "num_directions": 2}
        model.add_adapter("other", RecastConfig(**options))
        randomise(model, "other", 5)
        x = torch.cat([x, x + 1 if x.is_floating_point() else x])
        names = ["task", "other", "__base__", "task"]
        alone = {name: outputs(by_hand(plain, model, *([] if name == "__base__" else [name])), x) for name in names}
        wanted = torch.stack([alone[name][i] for i, name in enumerate(names)])
        assert torch.allclose(outputs(model, x, adapter_names=names), wanted, atol=1e-10)
        pool = TaskPool(model)
        for name in ("task", "other"):
            pool.add(name, name)
        tasks = ["other", None, "task", "task"]
        wanted = torch.stack([alone[name or "__base__"][i] for i, name in enumerate(tasks)])
        assert torch.allclose(outputs(model, x, task_ids=pool.ids(tasks)), wanted, atol=1e-6)


def pretrained(plain: nn.Module, model: nn.Module) -> list[tuple[Any, Tensor]]:
    return [(layer, plain.get_parameter(weight_names(plain, [name])[name])) for name, layer in layers_of(model).items()]


class TestTasks:
    def test_it_is_saved_and_loaded(self, tmp_path: Path) -> None:
        model = converted("task", num_directions=3, init_weights=False)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval()
        assert loaded.peft_config["task"].num_directions == 3
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert (tmp_path / "task" / "adapter_model.safetensors").stat().st_size < 4 * 4 * 9 + 2000

    def test_what_a_budget_decided_is_kept(self, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(max_coefficients=100, init_weights=False), "task").eval()
        model.save_pretrained(tmp_path)
        file = tmp_path / "task" / "adapter_config.json"
        file.write_text(file.read_text().replace('"max_coefficients": 100', '"max_coefficients": 1000'))
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    def test_other_weights_are_refused(self, tmp_path: Path) -> None:
        converted("task", num_directions=3, init_weights=False).save_pretrained(tmp_path)
        with pytest.raises(RecastBaseMismatchError, match="learned on other pretrained weights"):
            PeftModel.from_pretrained(tiny_vit(seed=1), tmp_path / "task", "task")

    def test_tasks_of_one_number_share_a_bank_and_others_stand_beside(self) -> None:
        model = converted("two", num_directions=2, init_weights=False)
        model.add_adapter("again", RecastConfig(target_modules=["qkv"], num_directions=2))
        model.add_adapter("three", RecastConfig(target_modules=["qkv"], num_directions=3, init_weights=False))
        model.add_adapter("groups", RecastConfig(target_modules=["qkv"], group_size=1, init_weights=False))
        for layer in layers_of(model).values():
            banks = layer.recast_bank
            assert banks["two"] is banks["again"]
            assert len({id(banks[name]) for name in ("two", "three", "groups")}) == 3
        model.base_model.set_adapter(["two", "three", "groups"])
        plain = by_hand(tiny_vit(), model, "two", "three")
        with torch.no_grad():
            for name, layer in layers_of(model).items():
                scale = layer.recast_coefficients["groups"][0, 0]
                plain.get_parameter(f"{name}.weight").add_(scale * tiny_vit().get_parameter(f"{name}.weight"))
        assert torch.allclose(outputs(model, vit_input()), outputs(plain, vit_input()), atol=1e-5)
        model.merge_adapter(["two", "three", "groups"])
        assert torch.allclose(outputs(model, vit_input()), outputs(plain, vit_input()), atol=1e-5)

    def test_its_weights_are_composed_where_the_coefficients_lie(self) -> None:
        bank = layers_of(converted(num_directions=2))["blocks.0.attn.qkv"].recast_bank["default"]
        assert bank.added_to(None, torch.zeros(4, device="meta")).is_meta

    def test_tasks_are_added_up(self) -> None:
        model = converted("a", num_directions=2, init_weights=False)
        model.add_adapter("b", RecastConfig(target_modules=["qkv"], num_directions=2, init_weights=False, seed=1))
        model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum")
        assert model.peft_config["sum"].num_directions == 2
        for layer in layers_of(model).values():
            a, b, total = (layer.recast_coefficients[name] for name in ("a", "b", "sum"))
            assert torch.allclose(total, 0.5 * a + 2.0 * b)

    def test_a_pool_takes_tasks_of_its_own_number_alone(self, tmp_path: Path) -> None:
        model = converted("task", max_coefficients=70, init_weights=False)  # four cores of 4 x 4
        pool = TaskPool(model)
        pool.add("task", "task")
        pool.add("same", RecastConfig(target_modules=["qkv"], max_coefficients=70))
        assert pool.table.shape[1] == 64
        with pytest.raises(RecastBankError, match="other target modules or banks than the pool"):
            pool.add("larger", RecastConfig(target_modules=["qkv"], max_coefficients=200))
        converted("other", num_directions=3, init_weights=False).save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match="other target modules or banks than the pool"):
            pool.add("other", tmp_path / "other")
        assert pool.names == ["task", "same"]
        pool.save(tmp_path / "pool")
        again = TaskPool(converted("slot", num_directions=4))
        again.load(tmp_path / "pool")
        wanted = outputs(model, vit_input(), task_ids=pool.ids(["task", "same"]))
        assert torch.equal(outputs(again.model, vit_input(), task_ids=again.ids(["task", "same"])), wanted)

    def test_as_many_numbers_on_another_bank_are_no_task_of_a_pool(self, tmp_path: Path) -> None:
        sizes: dict[str, dict[str, Any]] = {"core": {"num_directions": 1}, "scales": {"group_size": 1}}  # a number a layer
        model = converted("core", **sizes["core"])
        model.add_adapter("scales", RecastConfig(target_modules=["qkv"], **sizes["scales"]))
        model.save_pretrained(tmp_path)
        pools = {name: TaskPool(model, slot=f"slot of {name}", like=name) for name in ("core", "scales")}
        for (name, pool), other in zip(pools.items(), ("scales", "core"), strict=True):
            pool.add(name, name)
            for given in (other, tmp_path / other, RecastConfig(target_modules=["qkv"], **sizes[other])):
                with pytest.raises(RecastBankError, match="other target modules or banks than the pool"):
                    pool.add("other", given)
            pool.save(tmp_path / f"{name} pool")
        for name, other in (("scales", "core"), ("core", "scales")):
            with pytest.raises(RecastBankError, match="other target modules or banks than this pool"):
                pools[name].load(tmp_path / f"{other} pool")
            assert pools[name].names == [name]

    def test_more_directions_than_a_weight_has_are_as_many_as_it_has(self, tmp_path: Path) -> None:
        task = converted("task", num_directions=100, init_weights=False)
        task.save_pretrained(tmp_path)
        model = converted("other", num_directions=100)
        assert model.peft_config["other"].num_directions == 8
        hotswap_adapter(model, str(tmp_path / "task"), "other")
        assert torch.equal(outputs(model, vit_input()), outputs(task, vit_input()))

    def test_a_deleted_task_takes_its_directions_with_it(self) -> None:
        model = converted("two", num_directions=2)
        model.add_adapter("again", RecastConfig(target_modules=["qkv"], num_directions=2))
        model.add_adapter("three", RecastConfig(target_modules=["qkv"], num_directions=3))
        banks = weakref.WeakSet(layer.recast_bank["three"] for layer in layers_of(model).values())
        assert len(banks) == 4
        model.delete_adapter("three")
        model.delete_adapter("two")
        assert not banks
        held = {layer.recast_bank["again"] for layer in layers_of(model).values()}
        assert {*model.get_base_model().recast_banks.values()} == held

    def test_a_pools_tasks_are_swapped_while_merged(self) -> None:
        pool = TaskPool(converted("slot", num_directions=2))
        for name in ("a", "b"):
            pool.add(name)
        pool.table.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        for name in ("a", "b", "a"):
            pool.activate(name)
            live = outputs(pool.model, vit_input())
            pool.activate(name, merge=True)
            assert torch.allclose(outputs(pool.model, vit_input()), live, atol=1e-5)
            pool.activate("b" if name == "a" else "a", merge=True)  # in place of what is merged
            pool.activate(name, merge=True)
            assert torch.allclose(outputs(pool.model, vit_input()), live, atol=1e-5)
        pool.deactivate()
        assert torch.equal(outputs(pool.model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_a_lora_of_that_rank_says_the_same(self) -> None:
        model = converted("task", num_directions=2, init_weights=False)
        wanted = outputs(model, vit_input())
        config, weights, report = convert_to_lora(model, 2, "task")
        assert report.worst_relative_error < 1e-5
        lora = get_peft_model(tiny_vit(), config).eval()
        set_peft_model_state_dict(lora, weights)
        assert torch.allclose(outputs(lora, vit_input()), wanted, atol=1e-5)

    def test_beside_partners_and_in_half_precision(self) -> None:
        model = get_recast_model(
            tiny_vit(), RecastConfig(num_directions=2, init_weights=False, partners=[AdaptFormerConfig(target_modules=["mlp"])])
        ).eval()
        wanted = outputs(model, vit_input())
        found = outputs(model.to(torch.bfloat16), vit_input().bfloat16())
        assert all(layer.recast_coefficients["default"].dtype == torch.float32 for layer in layers_of(model).values())
        assert torch.allclose(found.float(), wanted, atol=0.05)

    def test_a_copy_and_a_move_compute_the_same(self) -> None:
        model = converted("task", num_directions=2, init_weights=False)
        wanted = outputs(model, vit_input())
        assert torch.equal(outputs(copy.deepcopy(model), vit_input()), wanted)
        assert not any("recast_banks" in key for key in model.state_dict())

    @pytest.mark.filterwarnings("ignore:the state dict has other weights")
    def test_a_whole_state_dict_brings_the_directions_of_its_weights(self) -> None:
        other = get_recast_model(tiny_vit(seed=1), RecastConfig(target_modules=["qkv"], num_directions=2, init_weights=False))
        wanted = outputs(other.eval(), vit_input())
        emptied = converted(num_directions=2).to("meta").to_empty(device="cpu")  # buffers that no file holds too
        for model in (converted(num_directions=2), emptied, nn.Sequential(converted(num_directions=2))):
            inner = model if isinstance(model, PeftModel) else model[0]
            model.load_state_dict(other.state_dict() if inner is model else nn.Sequential(other).state_dict())
            assert torch.equal(outputs(model, vit_input()), wanted)
        other.load_state_dict({key: value * float("nan") for key, value in other.state_dict().items()})
        assert outputs(other, vit_input()).isnan().all()  # as without tasks
        left = layers_of(inner)["blocks.0.attn.qkv"].recast_bank["default"].left
        model.load_state_dict(model.state_dict())
        assert layers_of(inner)["blocks.0.attn.qkv"].recast_bank["default"].left is left  # the weights are those that it was of

    @pytest.mark.filterwarnings("ignore:the state dict has other weights")
    def test_weights_that_came_another_way_bring_their_directions(self, tmp_path: Path) -> None:
        other = get_recast_model(tiny_vit(seed=1), RecastConfig(target_modules=["qkv"], num_directions=2, init_weights=False))
        wanted = outputs(other.eval(), vit_input())
        written = converted(num_directions=2)  # as torch.distributed.checkpoint loads
        for key, tensor in written.state_dict().items():
            tensor.copy_(other.state_dict()[key])
        written.load_state_dict(written.state_dict())
        assert torch.equal(outputs(written, vit_input()), wanted)
        accelerate.Accelerator().save_model(other, tmp_path)
        for model in (converted(num_directions=2), converted(num_directions=2).to("meta")):
            found = accelerate.load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})
            assert torch.equal(outputs(found, vit_input()), wanted)

    def test_training_moves_the_core_alone(self) -> None:
        model = converted("task", num_directions=2).train()
        optimizer = create_recast_optimizer(model, lr=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        first = model(vit_input()).square().sum()
        first.backward()
        optimizer.step()
        assert model(vit_input()).square().sum() < first
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "recast_coefficients" in name}

    def test_the_rate_falls_with_the_number_of_directions(self) -> None:
        def rate(**fields: Any) -> float:
            return create_recast_optimizer(converted(**fields), lr=0.1).param_groups[0]["lr"]

        # four layers, which add up like their root
        assert rate(num_directions=2) == pytest.approx(0.13 / (0.32 * 2**0.6 * 4**0.5))
        assert rate(num_directions=8) == pytest.approx(rate(num_directions=2) / 4**0.6)
        assert rate(num_directions=1) == 0.2  # at most
