"""One task, two parts: coefficients and a LoRA under one adapter name."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_parts import lora, lora_parameters
from models import KINDS, composed_weights, layers_of, outputs, randomise, reference_model, seeded, tiny_vit, vit_input
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.functional import set_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_peft import (
    AutoRecastModel,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    RecastTargetError,
    TaskPool,
    convert_to_lora,
    create_recast_optimizer,
    get_recast_model,
    push_task_to_hub,
)
from recast_peft.cli import main
from recast_peft.parts import lora as lora_part_module
from recast_peft.parts.lora import part_layers

TARGETS = {
    "the same": None,
    "some of them": ["qkv"],
    "others": ["fc1"],
    "around and beside": ["proj", "fc2"],
}


def two_parts(name: str = "task", **fields: Any) -> PeftModel:
    """A tiny vision transformer with one task of two parts that both do something."""
    config = RecastConfig(target_modules=["qkv", "proj"], lora_config=lora(**fields))
    model = get_recast_model(tiny_vit(), config, name).eval()
    fill(model, name)
    return model


def fill(model: nn.Module, name: str = "task", seed: int = 3) -> None:
    randomise(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_lora_by_hand(plain: nn.Module, model: PeftModel, scale: float = 3.0, name: str = "task") -> nn.Module:
    """Adds scale * B A to the weights of a plain model, by the names in the task's keys."""
    parts = {k.partition(f".{name}")[0]: p.detach() for k, p in lora_parameters(model, name).items()}
    result = copy.deepcopy(plain)
    for key, b in parts.items():
        if key.endswith("lora_B"):
            module = key.removesuffix(".lora_B").removeprefix("base_model.model.").replace(".base_layer", "")
            with torch.no_grad():
                result.get_submodule(module).weight += scale * b @ parts[key.removesuffix("B") + "A"]
    return result


def expected(model: PeftModel, x: Tensor, name: str = "task") -> Tensor:
    """W + sum d T + scale B A, by plain arithmetic."""
    return outputs(with_lora_by_hand(reference_model(tiny_vit(), model, (name,)), model, name=name), x)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class TestComputation:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_a_fresh_task_changes_nothing(self, targets):
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=targets)))
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert len(lora_parameters(model, "default")) == 2 * 4 * (1 if targets is None else len(targets))

    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_both_parts_add(self, targets):
        model = two_parts(target_modules=targets)
        close(outputs(model, vit_input()), expected(model, vit_input()))

    def test_each_part_can_be_switched_off_alone(self):
        model = two_parts(target_modules=["qkv", "fc1"])
        both = outputs(model, vit_input())
        with model.disable_part("lora"):
            close(outputs(model, vit_input()), outputs(reference_model(tiny_vit(), model, ("task",)), vit_input()))
            with model.disable_part("recast"):
                assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        with model.disable_part("recast"):
            close(outputs(model, vit_input()), outputs(with_lora_by_hand(tiny_vit(), model), vit_input()))
            with pytest.raises(RecastConfigError, match="leave the block of disable_part"):
                model.merge_adapter()
        with pytest.raises(ZeroDivisionError), model.disable_part("lora"):
            _ = 1 / 0
        assert torch.equal(outputs(model, vit_input()), both)
        model.merge_adapter()
        with pytest.raises(RecastConfigError, match="unmerge_adapter"), model.disable_part("lora"):
            pass

    def test_a_part_that_is_not_there_cannot_be_switched_off(self):
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]))
        with pytest.raises(RecastConfigError, match="no LoRA part"), model.disable_part("lora"):
            pass
        with pytest.raises(RecastConfigError, match="expected one of 'recast', 'lora'"), model.disable_part("dora"):
            pass

    def test_both_parts_are_trained_together(self):
        model = two_parts().train()
        model(vit_input()).square().sum().backward()
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trained == {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert len(trained) == 8 + 2 * 8
        assert model.get_nb_trainable_parameters()[0] == 16 + 4 * (2 * (8 + 24) + 2 * (8 + 8))

    def test_the_optimiser_has_a_group_for_each_part(self):
        optimizer = create_recast_optimizer(two_parts(), lr=1e-3, lora_lr=5e-3)
        groups = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        assert groups == [(8, 0.05, 0.0), (16, 5e-3, 0.01)]
        assert create_recast_optimizer(two_parts(), lr=1e-3).param_groups[1]["lr"] == 1e-3

    def test_dora_beside_coefficients_by_hand(self):
        config = RecastConfig(target_modules=["0"], lora_config=lora(use_dora=True))
        plain = seeded(KINDS["linear"].build)
        model = get_recast_model(seeded(KINDS["linear"].build), config, "task").eval()
        assert torch.equal(outputs(model, vit_input()), outputs(plain, vit_input()))
        fill(model)
        weight = composed_weights(plain, model, ("task",))["layers.0.weight"].detach()
        parts = {k.partition(".lora_")[2]: p.detach() for k, p in lora_parameters(model).items()}
        moved = weight + 3.0 * parts["B.task.weight"] @ parts["A.task.weight"]
        magnitude = parts["magnitude_vector.task.weight"]
        plain.layers[0].weight.data = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
        close(outputs(model, vit_input()), outputs(plain, vit_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes(self, dtype):
        model = two_parts(target_modules=["qkv", "fc1"])
        live = outputs(model, vit_input())
        if dtype == torch.float32:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = outputs(model, vit_input())
        else:
            result = outputs(copy.deepcopy(model).to(dtype), vit_input().to(dtype))
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), live, rtol=0.05, atol=0.05)

    def test_compiled_as_one_graph(self):
        model = two_parts(target_modules=["qkv", "fc1"]).train()
        expected = outputs(model, vit_input())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = compiled(vit_input())
        close(found.detach(), expected)
        found.sum().backward()
        mine = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(vit_input()).sum().backward()
        assert len(mine) == 24
        for key, parameter in model.named_parameters():
            if key in mine:
                close(mine[key], parameter.grad)


VARIANTS = {
    "plain": {}, "rank-stabilised": {"use_rslora": True}, "DoRA": {"use_dora": True}, "with bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"}, "MiCA": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "patterns": {"rank_pattern": {"0": 3}, "alpha_pattern": {"0": 7}},
}  # fmt: skip
NOT_BUILT = {  # by PEFT, and what it says
    ("conv2d", "MiCA"): "unsupported variant", ("conv2d", "orthogonal"): "Unknown initialization",
    ("conv2d padded in a circle", "MiCA"): "unsupported variant",
    ("conv2d padded in a circle", "orthogonal"): "Unknown initialization",
    ("conv2d padded in a circle", "with bias"): "computed by its weight",
    ("weight-standardised conv2d", "MiCA"): "unsupported variant",
    ("weight-standardised conv2d", "orthogonal"): "Unknown initialization",
    ("weight-standardised conv2d", "with bias"): "computed by its weight",
    ("linear subclass", "with bias"): "computed by its weight", ("embedding", "with bias"): "has none",
    ("linear without bias", "with bias"): "has none", ("bilinear weight reader", "with bias"): "has none",
}  # fmt: skip
SOME_KINDS = [
    "linear", "linear without bias", "conv2d", "conv2d padded in a circle", "weight-standardised conv2d", "transformers Conv1D",
    "linear subclass", "bilinear weight reader", "embedding",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
class TestVariants:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("name", SOME_KINDS)
    def test_a_variant_works_or_is_refused(self, name, variant, tmp_path):
        kind = KINDS[name]
        config = RecastConfig(target_modules=kind.targets, lora_config=lora(**VARIANTS[variant]))
        if (name, variant) in NOT_BUILT:
            model = seeded(kind.build)
            with pytest.raises(RecastTargetError, match=NOT_BUILT[name, variant]):
                get_recast_model(model, config)
            assert not layers_of(model)
            return
        model = get_recast_model(seeded(kind.build), config, "task").eval()
        x, pretrained = kind.inputs(), outputs(seeded(kind.build), kind.inputs())
        torch.testing.assert_close(outputs(model, x), pretrained, rtol=0, atol=1e-6 if variant == "orthogonal" else 0)
        fill(model)
        live = outputs(model, x)
        with model.disable_part("lora"):
            assert not torch.allclose(outputs(model, x), live, atol=1e-3)
        model.merge_adapter()
        close(outputs(model, x), live)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, x), live)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(seeded(kind.build), tmp_path / "task", adapter_name="again").eval()
        assert torch.equal(outputs(loaded, x), live)
        close(outputs(model.merge_and_unload(), x), live)
        with loaded.disable_adapter():
            assert torch.equal(outputs(loaded, x), pretrained)

    def test_velora_on_linear_layers(self):
        model = two_parts(target_modules=["qkv", "fc1"], velora_config={"num_groups": 4})
        live = outputs(model, vit_input())
        close(live, expected(model, vit_input()))
        model.train()(vit_input()).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in lora_parameters(model).values())
        close(outputs(model.eval().merge_and_unload(), vit_input()), live)

    def test_a_weight_that_is_read_has_the_lora_in_it_with_gradients(self):
        kind = KINDS["bilinear weight reader"]
        model = get_recast_model(seeded(kind.build), RecastConfig(target_modules=kind.targets, lora_config=lora()), "task")
        fill(model)
        model(kind.inputs()).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora_parameters(model).values())


class TestMerging:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    @pytest.mark.parametrize("safe", [False, True])
    def test_merging_and_back_to_the_last_bit(self, targets, safe):
        model = two_parts(target_modules=targets)
        live = outputs(model, vit_input())
        pristine = {k: v.clone() for k, v in tiny_vit().state_dict().items()}
        for _ in range(3):
            model.merge_adapter(safe_merge=safe)
            close(outputs(model, vit_input()), live)
            model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), live)
        plain = model.unload()
        assert all(torch.equal(v, pristine[k]) for k, v in plain.state_dict().items())

    @pytest.mark.parametrize("broken", ["recast", "lora"])
    def test_a_task_that_is_not_finite_is_not_merged(self, broken):
        model = two_parts(target_modules=["qkv", "fc2"])
        name = "recast_coefficients" if broken == "recast" else "fc2.lora_B"
        last = [p for key, p in model.named_parameters() if name in key][-1]
        last.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert not any(layer.merged for layer in (*layers_of(model).values(), *part_layers(model)))
        plain = model.unload()
        assert all(torch.equal(v, tiny_vit().state_dict()[k]) for k, v in plain.state_dict().items())

    def test_a_merged_model_that_changes_its_dtype_comes_back(self):
        model = two_parts(target_modules=["qkv", "fc1"])
        model.merge_adapter()
        model.to(torch.float64)
        model.unmerge_adapter()
        with model.disable_adapter():
            close(outputs(model, vit_input().double()), outputs(tiny_vit().double(), vit_input().double()))

    def test_switching_the_whole_task_off_while_it_is_merged(self):
        model = two_parts(target_modules=["qkv", "fc1"], use_dora=True)
        live = outputs(model, vit_input())
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert torch.equal(outputs(model, vit_input()), live)


@pytest.fixture
def three() -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with a task of two parts, one of coefficients alone, and one of two parts elsewhere; and what each computes."""
    model = two_parts(target_modules=["qkv", "fc1"])
    model.add_adapter("alone", RecastConfig(target_modules=["qkv"]))
    model.add_adapter("other", RecastConfig(target_modules=["fc2"], lora_config=lora(target_modules=["fc1", "proj"])))
    fill(model, "alone", 5)
    fill(model, "other", 6)
    results = {}
    for name in ("task", "alone", "other"):
        model.set_adapter(name)
        results[name] = outputs(model, vit_input())
        close(results[name], expected(model, vit_input(), name))
    return model, results


@pytest.mark.filterwarnings("ignore")
class TestSeveralTasks:
    def test_every_sample_its_own_task(self, three):
        model, results = three
        x = torch.cat([vit_input()[:1]] * 4)
        mixed = outputs(model, x, adapter_names=["task", "other", "__base__", "alone"])
        wanted = [results["task"], results["other"], outputs(tiny_vit(), vit_input()), results["alone"]]
        close(mixed, torch.stack([result[0] for result in wanted]))

    def test_saved_together_and_loaded_in_another_order(self, three, tmp_path):
        model, results = three
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "alone", adapter_name="alone").eval()
        for name in ("other", "task"):
            loaded.load_adapter(tmp_path / name, name)
        for name, result in results.items():
            loaded.set_adapter(name)
            assert torch.equal(outputs(loaded, vit_input()), result)

    @pytest.mark.parametrize("name", ["task", "alone", "other"])
    def test_merging_a_task_that_is_not_active_into_a_plain_model(self, three, name):
        model, results = three
        model.set_adapter("alone")
        close(outputs(model.merge_and_unload(adapter_names=[name]), vit_input()), results[name])

    def test_two_tasks_at_once(self, three):
        model, _ = three
        model.base_model.set_adapter(["task", "other"])
        live = outputs(model, vit_input())
        model.merge_adapter(["task"])
        model.merge_adapter(["other"])
        close(outputs(model, vit_input()), live)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), live)

    def test_changing_the_task_while_one_is_merged(self, three):
        model, results = three
        for name in ("task", "other", "alone", "task"):
            model.set_adapter(name)
            model.merge_adapter()
            close(outputs(model, vit_input()), results[name])

    def test_deleting_a_task_takes_both_parts(self, three):
        model, results = three
        model.delete_adapter("task")
        assert not [key for key in model.state_dict() if "task" in key]
        assert all("task" not in layer.active_adapters for layer in part_layers(model))
        for name in ("alone", "other"):
            model.set_adapter(name)
            assert torch.equal(outputs(model, vit_input()), results[name])
        model.add_adapter("task", RecastConfig(target_modules=["qkv"], lora_config=lora()))
        model.set_adapter("task")
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_a_pool_beside_tasks_of_two_parts(self, three):
        model, results = three
        pool = TaskPool(model)
        pool.add("row")
        with torch.no_grad():
            pool.table[0].normal_(std=0.2)
        with pytest.raises(RecastConfigError, match="it owns a LoRA part"):
            pool.add("second", "task")
        pool.activate("row")
        row = outputs(model, vit_input())
        reference = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv", "proj"]), "row").eval()
        for key, values in pool.coefficients("row").items():
            layers_of(reference)[key].recast_coefficients["row"].data = values[None]
        close(row, outputs(reference, vit_input()))
        close(outputs(model, vit_input(), task_ids=torch.tensor([0, -1]))[0], row[0])
        model.set_adapter("task")
        assert torch.equal(outputs(model, vit_input()), results["task"])

    def test_what_a_combination_or_a_lora_cannot_hold_is_refused(self, three, tmp_path):
        model, _ = three
        with pytest.raises(RecastConfigError, match="a LoRA part"):
            model.add_weighted_adapter(["task"], [-1.0], "forget")
        with pytest.raises(RecastConfigError, match="a LoRA part"):
            convert_to_lora(model, 4, "task")
        assert not model.base_model.supports_lora_conversion("task")
        model.save_pretrained(tmp_path)
        with pytest.raises(RecastConfigError, match="a LoRA part"):
            TaskPool(model, like="alone").add("task", tmp_path / "task")


class TestFiles:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_a_task_is_one_folder(self, targets, tmp_path):
        model = two_parts(target_modules=targets)
        live = outputs(model, vit_input())
        model.save_pretrained(tmp_path)
        config = RecastConfig.from_pretrained(tmp_path / "task")
        assert isinstance(config.lora_config, LoraConfig)
        assert config.lora_config.target_modules == set(targets or ["qkv", "proj"])
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                tiny_vit(), tmp_path / "task", adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage
            ).eval()
            assert torch.equal(outputs(loaded, vit_input()), live)
            assert not any(p.requires_grad for p in loaded.parameters())

    def test_the_lora_part_alone_is_a_lora(self, tmp_path):
        model = two_parts(target_modules=["qkv", "fc1"], use_dora=True)
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
        alone = get_peft_model(tiny_vit(), LoraConfig(**content["lora_config"])).eval()
        entries = load_peft_weights(str(tmp_path / "task"))
        set_peft_model_state_dict(alone, {k: v for k, v in entries.items() if ".lora_" in k})
        with model.disable_part("recast"):
            assert torch.equal(outputs(alone, vit_input()), outputs(model, vit_input()))

    @pytest.mark.parametrize("damage", ["missing", "unexpected", "wrongly shaped", "not finite"])
    def test_a_damaged_part_is_refused_before_the_model_is_touched(self, damage, tmp_path):
        two_parts(target_modules=["fc1"]).save_pretrained(tmp_path)
        file = tmp_path / "task" / "adapter_model.safetensors"
        entries = load_file(file)
        key = "base_model.model.blocks.2.mlp.fc1.lora_A.weight"
        if damage == "missing":
            del entries[key]
        elif damage == "unexpected":
            entries[key.replace("fc1", "fc2")] = entries[key].clone()
        else:
            entries[key] = entries[key][:1].clone() if damage == "wrongly shaped" else entries[key] * float("nan")
        save_file(entries, file)
        model = tiny_vit()
        with pytest.raises(RecastLoadError, match=damage):
            PeftModel.from_pretrained(model, tmp_path / "task")
        assert list(model.state_dict()) == list(tiny_vit().state_dict())

    def test_one_config_for_two_models(self, tmp_path):
        given = LoraConfig(r=2)
        before = copy.deepcopy(given)
        config = RecastConfig(target_modules=["qkv"], lora_config=given)
        first = get_peft_model(tiny_vit(), config)
        config.target_modules = ["fc1"]
        get_peft_model(tiny_vit(depth=2), config)
        assert given == before
        first.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).lora_config.target_modules == {"qkv"}

    def test_the_card_and_inspect_count_both_parts(self, tmp_path, capsys):
        two_parts(target_modules=["fc1"]).save_pretrained(tmp_path)
        card = (tmp_path / "task" / "README.md").read_text()
        assert "208 (16 coefficients, 192 of the LoRA part)" in card
        assert "LoRA of rank 2 on `fc1`" in card
        assert main(["inspect", str(tmp_path / "task")]) == 0
        assert "LoRA part        192 numbers" in capsys.readouterr().out

    def test_injected_without_a_wrapper(self):
        config = RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=["qkv", "fc1"]))
        model = inject_adapter_in_model(config, tiny_vit(), "task").eval()
        inject_adapter_in_model(RecastConfig(target_modules=["qkv"]), model, "second")
        set_adapter(model, "task")
        fill(model)
        live = outputs(model, vit_input())
        assert not torch.allclose(live, outputs(tiny_vit(), vit_input()), atol=1e-3)
        state = get_peft_model_state_dict(model, adapter_name="task")
        assert {key.rpartition(".qkv.")[2] for key in state if ".qkv." in key} == {
            "recast_coefficients", "lora_A.weight", "lora_B.weight"
        }  # fmt: skip
        unnamed = RecastConfig(lora_config=lora(target_modules=["qkv", "fc1"]))
        other = inject_adapter_in_model(unnamed, tiny_vit(), "again", state_dict=state).eval()
        assert not set_peft_model_state_dict(other, state, adapter_name="again").unexpected_keys
        assert torch.equal(outputs(other, vit_input()), live)
        set_adapter(model, "second")
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        set_adapter(model, "task")
        assert torch.equal(outputs(model, vit_input()), live)

    def test_from_the_name_of_the_task(self, tmp_path):
        model = two_parts(target_modules=["fc1"])
        model.save_pretrained(tmp_path)
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tiny_vit(), is_trainable=True).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert len([p for p in loaded.parameters() if p.requires_grad]) == 8 + 8

    def test_pushed_and_fetched_by_name(self, hub):
        model = two_parts(target_modules=["fc1"])
        push_task_to_hub(model, "ada/two-parts")
        fetched = AutoRecastModel.from_pretrained("ada/two-parts", backbone=tiny_vit())
        assert torch.equal(outputs(fetched, vit_input()), outputs(model, vit_input()))


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_stand_on_their_own(self, copied):
        model = two_parts(target_modules=["qkv", "fc1"])
        live = outputs(model, vit_input())
        twin = copied(model)
        fill(model, seed=8)
        assert torch.equal(outputs(twin, vit_input()), live)
        twin.merge_adapter()
        close(outputs(twin, vit_input()), live)
        assert not any(layer.merged for layer in layers_of(model).values())


class TestCompressedBanks:
    def config(self, **fields: Any) -> RecastConfig:
        return RecastConfig(target_modules=["qkv", "proj"], num_templates=1, lora_config=lora(**fields))

    def test_a_part_where_a_bank_stands_for_the_weights(self, tmp_path):
        model = get_recast_model(tiny_vit(), self.config(), "task").eval()
        without = RecastConfig(target_modules=["qkv", "proj"], num_templates=1)
        assert torch.equal(outputs(model, vit_input()), outputs(get_recast_model(tiny_vit(), without).eval(), vit_input()))
        model.add_adapter("second", self.config(target_modules=["proj", "fc1"]))
        results = {}
        for name in ("task", "second"):
            fill(model, name)
            model.set_adapter(name)
            results[name] = outputs(model, vit_input())
            model.merge_adapter()
            close(outputs(model, vit_input()), results[name])
            model.unmerge_adapter()
            assert torch.equal(outputs(model, vit_input()), results[name])
        assert all(layer.is_released for layer in layers_of(model).values())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "second", adapter_name="second").eval()
        loaded.load_adapter(tmp_path / "task", "task")
        for name in ("second", "task"):
            loaded.set_adapter(name)
            assert torch.equal(outputs(loaded, vit_input()), results[name])

    @pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "mica"}])
    def test_variants_that_start_from_the_pretrained_weight_are_refused(self, fields):
        with pytest.raises(RecastTargetError, match="compressed bank stands for it"):
            get_recast_model(tiny_vit(), self.config(**fields))


class TestRefusals:
    def test_a_failure_in_the_middle_leaves_the_model_as_it_was(self, monkeypatch):
        model = two_parts(target_modules=["qkv", "fc1"])
        live, keys = outputs(model, vit_input()), list(model.state_dict())
        adopted = []
        adopt = lora_part_module._adopt

        def break_at_the_third(*args: Any) -> None:
            adopted.append(args)
            if len(adopted) == 3:
                raise RuntimeError("on purpose")
            adopt(*args)

        monkeypatch.setattr(lora_part_module, "_adopt", break_at_the_third)
        config = RecastConfig(target_modules=["qkv", "fc2"], lora_config=lora(target_modules=["qkv", "fc1", "fc2"]))
        plain = tiny_vit()
        for name, broken in (("on a model with a task", model.base_model.model), ("on a plain model", plain)):
            adopted.clear()
            with pytest.raises(RuntimeError, match="on purpose"):
                model.add_adapter("second", config) if broken is not plain else get_recast_model(plain, config)
            assert adopted, name
        assert list(plain.state_dict()) == list(tiny_vit().state_dict())
        assert list(model.state_dict()) == keys
        assert list(model.peft_config) == ["task"]
        assert torch.equal(outputs(model, vit_input()), live)
        model.merge_adapter()
        close(outputs(model, vit_input()), live)


class TestOtherLoras:
    def test_a_lora_on_other_modules_leaves_the_part_alone(self):
        model = two_parts(target_modules=["qkv"])
        live = outputs(model, vit_input())
        other = get_peft_model(model.base_model.model, LoraConfig(r=2, target_modules=["fc1"]), adapter_name="other").eval()
        assert torch.equal(outputs(other, vit_input()), live)
        assert all(p.requires_grad for p in lora_parameters(model).values())
        other.delete_adapter("other")
        assert torch.equal(outputs(other, vit_input()), live)

    @pytest.mark.filterwarnings("ignore")
    def test_a_lora_on_the_same_modules_is_refused_either_way(self):
        model = two_parts(target_modules=["qkv"])
        live = outputs(model, vit_input())
        with pytest.raises(RecastTargetError, match="LoRA part of RECAST tasks"):
            get_peft_model(model.base_model.model, LoraConfig(r=2, target_modules=["fc1", "qkv"]), adapter_name="other")
        assert torch.equal(outputs(model, vit_input()), live)
        assert list(model.peft_config) == ["task"]
        assert not [key for key in model.state_dict() if ".other" in key]
        plain = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["qkv"]), adapter_name="other").base_model.model
        with pytest.raises(RecastTargetError, match="another LoRA stands on blocks.0.attn.qkv"):
            get_peft_model(plain, RecastConfig(target_modules=["fc1"], lora_config=lora(target_modules=["qkv"])))
        assert not layers_of(plain)


def test_the_parts_of_a_mixed_expression_by_hand():
    """One linear layer, all numbers by hand: W x + d0 W x + d1 V x + s B A x + b."""
    kind = KINDS["linear"]
    plain = seeded(kind.build)
    config = RecastConfig(target_modules=["0", "1"], lora_config=lora(r=1, lora_alpha=2, target_modules=["0"]))
    model = get_recast_model(seeded(kind.build), config, "task").eval()
    fill(model)
    layer = model.get_base_model().layers[0]
    first, second = plain.layers[0], plain.layers[1]
    d = layers_of(model)["layers.0"].recast_coefficients["task"][0]
    x = vit_input()
    by_hand = (1 + d[0]) * F.linear(x, first.weight) + d[1] * F.linear(x, second.weight) + first.bias
    by_hand = by_hand + 2 * F.linear(F.linear(x, layer.lora_A["task"].weight), layer.lora_B["task"].weight)
    close(outputs(layer, x), by_hand.detach())
