"""Tasks of a pool that have a LoRA part: trained, in files, refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_parts import fill
from models import small_vit
from peft import LoraConfig, PeftModel
from pooled_parts import CASES, NAMES, PART, answer, each_alone, pool_of, with_tasks

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, RecastLoadError, TaskPool, get_recast_model
from recast_peft.pool.files import describe_pool


class TestTraining:
    def test_each_sample_moves_its_own_task_as_it_would_alone(self):
        model, x = with_tasks()
        pool = pool_of(model)
        with torch.enable_grad():
            pool.requires_grad_()
            answer(model, x, task_ids=pool.ids(["t0", "t0", "t1", "t0", "t0"]))[2].square().sum().backward()
            grad = pool.table.grad.clone()
            model.set_adapter("t1")
            answer(model, x)[2].square().sum().backward()
        assert not grad[[pool.row("t0"), pool.row("t2"), pool.row("alone")]].any()
        for name, parameter in model.named_parameters():
            if ".lora_" in name and ".t1" in name:
                key = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".t1", "")
                own = grad[pool.row("t1"), pool.part_of(key)].view_as(parameter)
                torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-5)

    def test_a_fresh_task_changes_nothing_and_can_be_trained(self):
        model, x = with_tasks()
        pool = TaskPool(model)
        pool.add("fresh", RecastConfig(seed=1))
        pool.add("other", RecastConfig(seed=2))
        base = answer(model, x, task_ids=[None] * 5)
        assert torch.equal(answer(model, x, task_ids=["fresh"] * 5), base)
        assert not torch.equal(pool.table[0], pool.table[1])
        with torch.enable_grad():
            pool.requires_grad_()
            answer(model, x, task_ids=["fresh"] * 5).square().sum().backward()
        for key in pool.lora_factors("fresh"):
            if key.endswith("lora_B.weight"):
                assert pool.table.grad[0, pool.part_of(key)].any()

    def test_a_part_that_is_the_pools_none_and_a_larger_one(self):
        model, _ = with_tasks("its targets")
        pool = TaskPool(model)
        pool.add("same", RecastConfig(lora_config=LoraConfig(r=2), num_classes=3))
        assert pool.table[pool.row("same")].any()
        pool.add("small", RecastConfig(group_size=2))  # trains its coefficients alone
        assert not pool.table[pool.row("small")].any()
        with pytest.raises(RecastBankError, match="LoRA part that is not the pool's"):
            pool.add("larger", RecastConfig(lora_config=LoraConfig(r=4)))

    def test_dropout_of_a_part(self):
        part = copy.deepcopy(PART)
        part.lora_dropout = 0.5
        build, x, options = CASES["timm's vit"]
        model = get_recast_model(build(), RecastConfig(**{**options, "lora_config": part}), "t0")
        fill(model, "t0", 1)
        pool = TaskPool(model.train())
        pool.add("t0", "t0")
        torch.manual_seed(0)
        first = answer(model, x, task_ids=["t0"] * 5)
        assert not torch.equal(answer(model, x, task_ids=["t0"] * 5), first)


class TestFiles:
    def test_saved_loaded_and_taken_out_as_an_ordinary_task(self, tmp_path):
        model, x = with_tasks()
        alone, pool = each_alone(model, x), pool_of(model)
        pool.save(tmp_path / "pool.safetensors")
        said = dict(describe_pool(tmp_path / "pool.safetensors"))
        assert said["numbers"] == f"{pool.numbers_per_task:,} each, with a LoRA part on 6 modules"
        again = TaskPool(model, slot="again")
        assert again.load(tmp_path / "pool.safetensors") == list(NAMES)
        assert torch.equal(again.table, pool.table)
        again.activate("t1")
        assert torch.equal(answer(model, x), alone["t1"])
        model.save_pretrained(tmp_path, selected_adapters=["again"])
        loaded = PeftModel.from_pretrained(small_vit(), tmp_path / "again").eval()
        assert torch.equal(answer(loaded, x), alone["t1"])

    def test_a_file_of_tasks_without_the_part(self, tmp_path):
        model, x = with_tasks()
        alone = each_alone(model, x)
        without = TaskPool(model, like="alone", slot="without")
        without.add("alone", "alone")
        without.save(tmp_path / "without.safetensors")
        pool = TaskPool(model)
        pool.load(tmp_path / "without.safetensors")
        pool.activate("alone")
        assert torch.equal(answer(model, x), alone["alone"])
        pool.save(tmp_path / "with.safetensors")
        with pytest.raises(RecastBankError, match="(?s)LoRA part that is not the pool's.*task: 6 modules.*pool: no LoRA part"):
            without.load(tmp_path / "with.safetensors")

    @pytest.mark.parametrize("saved", [[["x"]], 3, [["x", "y"]]])
    def test_a_damaged_part_is_refused(self, saved):
        model, _ = with_tasks()
        with pytest.raises(RecastLoadError, match="damaged"):
            TaskPool(model)._layout.lora.padded("each task", saved, torch.zeros(1, 3))

    def test_sizes_and_factors(self):
        model, _ = with_tasks()
        pool = pool_of(model)
        sizes = pool.sizes()
        assert sizes["coefficients"] + sizes["lora"] == pool.table.nbytes == pool.nbytes()
        numbers = [p.numel() for name, p in model.named_parameters() if ".lora_" in name and ".t0" in name]
        assert sizes["lora"] == sum(numbers) * 4 * len(pool.table)
        assert sum(values.numel() for values in pool.coefficients("t0").values()) == pool.numbers_per_task - sum(numbers)
        factors = pool.lora_factors("t1")
        held = {name: p for name, p in model.named_parameters() if ".lora_A.t1" in name}
        for name, parameter in held.items():
            key = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".t1", "")
            assert torch.equal(factors[key], parameter)
        assert not any(values.any() for values in pool.lora_factors("alone").values())
        assert set(TaskPool(model, like="alone", slot="other").sizes()) == {"coefficients", "heads", "remembered"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "shown"),
        [
            ({"r": 4}, "rank 4"),
            ({"lora_alpha": 5}, "strength 3.5"),
            ({"use_rslora": False}, "strength 1.5"),
            ({"target_modules": ["qkv"]}, "2 modules"),
        ],
    )
    def test_another_part_than_the_pools(self, change, shown, tmp_path):
        model, _ = with_tasks()
        pool = TaskPool(model)
        options = CASES["timm's vit"][2]
        config = RecastConfig(**{**options, "lora_config": LoraConfig(**{**vars_of(PART), **change})})
        model.add_adapter("unlike", copy.deepcopy(config))
        fill(model, "unlike", 5)
        model.save_pretrained(tmp_path, selected_adapters=["unlike"])
        for source in ("unlike", tmp_path / "unlike", config):
            with pytest.raises(RecastBankError, match=f"(?s)task: .*{shown}.*pool: 6 modules.*Make a pool for it"):
                pool.add("new", source)
        assert len(pool) == 0
        own = TaskPool(model, like="unlike", slot="own")
        own.add("new", tmp_path / "unlike")
        with pytest.raises(RecastConfigError, match="another LoRA part"):
            TaskPool(model, like="t0", slot="own")

    @pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "mica"}])
    def test_more_than_two_factors(self, more, tmp_path):
        model, _ = with_tasks()
        config = RecastConfig(**{**CASES["timm's vit"][2], "lora_config": LoraConfig(**{**vars_of(PART), **more})})
        model.add_adapter("more", config)
        model.save_pretrained(tmp_path, selected_adapters=["more"])
        for pool in (TaskPool(model), TaskPool(model, like="more", slot="more_slot")):
            for source in ("more", tmp_path / "more"):
                with pytest.raises(RecastConfigError, match="more than two factors"):
                    pool.add("new", source)
        pool.add("alone", "alone")  # tasks without one can be in its pool
        assert pool.lora_factors("alone") == {}

    def test_sums_that_a_row_cannot_hold_and_pruned_parts(self):
        model, _ = with_tasks()
        pool = pool_of(model)
        shown = r"(?s)parts of t0, t1 has a higher rank at \S+qkv .*of a row: 2.*lacks \d+ % of it.*'svd'.*model.add_weighted"
        with pytest.raises(RecastConfigError, match=shown):
            pool.add_weighted_adapter(["t0", "t1"], [0.5, 0.5], "sum")
        for how in ("ties", "magnitude_prune"):
            with pytest.raises(RecastConfigError, match="task 't1' has a LoRA part, which cannot be pruned"):
                pool.add_weighted_adapter(["alone", "t1"], [0.5, 0.5], "sum", how, density=0.5)
        kept = pool.table[pool.row("t0")].clone()
        pool.table[pool.row("t0"), -1] = float("nan")  # as training may leave it
        with pytest.raises(RecastConfigError, match="task 't0' holds numbers that are not finite"):
            pool.add_weighted_adapter(["t1", "t0"], [0.5, 0.5], "sum", "svd")
        pool.table[pool.row("t0")] = kept
        assert pool.names == list(NAMES)
        pool.add_weighted_adapter(["alone"], [0.5], "pruned", "ties", density=1.0)
        without = TaskPool(model, like="alone", slot="without")
        without.add("alone", "alone")
        with pytest.raises(RecastConfigError, match="none of the tasks has a LoRA part"):
            without.add_weighted_adapter(["alone"], [0.5], "half", "svd")


class TestSums:
    """A sum in the pool is the model's own, wherever a row has room for it."""

    @pytest.mark.parametrize("case", ["timm's vit", "its targets", "wide convolutions", "gpt2"])
    @pytest.mark.parametrize(
        ("weights", "how"),
        [({"t1": -0.5}, "linear"), ({"alone": 2.0, "t1": 0.5}, "linear"), ({"t0": 0.5, "t1": 0.7, "alone": -1.0}, "svd")],
        ids=str,
    )
    def test_as_the_model_combines_them(self, case, weights, how):
        model, x = with_tasks(case)
        pool = pool_of(model)
        pool.add_weighted_adapter(list(weights), list(weights.values()), "sum", how)
        model.add_weighted_adapter(list(weights), list(weights.values()), "sum", how)
        model.set_adapter("sum")
        wanted = answer(model, x)
        alone = each_alone(model, x)
        assert all(not torch.allclose(wanted, other, rtol=1e-3) for other in alone.values())
        pool.activate("sum")
        torch.testing.assert_close(answer(model, x), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))

    def test_one_task_with_weight_one_is_that_task_to_the_last_bit(self):
        model, _ = with_tasks()
        pool = pool_of(model)
        pool.add_weighted_adapter(["t1"], [1.0], "same")
        assert torch.equal(pool.table[pool.row("same")], pool.table[pool.row("t1")])

    def test_parts_that_share_a_factor_are_summed_exactly(self):
        model, _ = with_tasks()
        pool = pool_of(model)
        for name in pool.lora_factors("t0"):
            if name.endswith("lora_A.weight"):
                pool.table[pool.row("t1"), pool.part_of(name)] = pool.table[pool.row("t0"), pool.part_of(name)]
        pool.add_weighted_adapter(["t0", "t1"], [0.5, -0.5], "sum")
        factors = [pool.lora_factors(name) for name in ("t0", "t1", "sum")]
        for key in (key.removesuffix("A.weight") for key in factors[0] if key.endswith("lora_A.weight")):
            t0, t1, total = (own[f"{key}B.weight"] @ own[f"{key}A.weight"] for own in factors)
            torch.testing.assert_close(total, 0.5 * t0 - 0.5 * t1, rtol=1e-4, atol=1e-6)

    def test_a_task_without_the_part(self):
        model, _ = with_tasks()
        pool = pool_of(model)
        pool.add_weighted_adapter(["alone"], [0.5], "half")
        half = pool.coefficients("half")
        assert all(torch.equal(half[key], values / 2) for key, values in pool.coefficients("alone").items())
        assert not any(values.any() for values in pool.lora_factors("half").values())


def vars_of(config: LoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "target_modules")
    return {name: copy.deepcopy(getattr(config, name)) for name in names}
