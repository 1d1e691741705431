"""Sources of grown banks: read from everywhere, compared with the pretrained weights, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_weights import TARGETS, config, grown, lora, on
from llamas import llama
from models import TinyVit, layers_of, move, randomise, seeded, tiny_vit
from peft import IA3Config, LoHaConfig, LoraConfig, PolyConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from recast_peft import (
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastTargetError,
    compress_adapters,
    extend_bank,
    get_recast_model,
    grow_bank,
    plan_recast,
)
from recast_peft.growth.sources import task_vectors


class TestSources:
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

    @pytest.mark.parametrize("missing", ["lora_A", "lora_B", "blocks.1.attn.qkv.lora_A", ""])
    def test_a_lora_of_which_a_part_is_missing_is_refused(self, missing: str, tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        kept = {key: tensor for key, tensor in load_file(file).items() if missing not in key}
        save_file(kept or {"nothing": torch.zeros(1)}, file)
        for make in (
            lambda: grow_bank(tiny_vit(), [tmp_path], config()),
            lambda: compress_adapters(tiny_vit(), [tmp_path], num_templates=1),
        ):
            with pytest.raises(RecastBankError, match=rf"lacks .*{missing or 'lora_'}"):
                make()

    def test_an_adapter_for_more_layers_is_refused(self, tmp_path: Path) -> None:
        for name, depth in (("right", 1), ("wrong", 2)):
            layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
            get_peft_model(layers, LoraConfig(target_modules=["0", "1"][:depth])).save_pretrained(tmp_path / name)
        plain = nn.ModuleList([nn.Linear(3, 3)])
        with pytest.raises(RecastBankError, match=r"wrong' does not fit the model, which has no place for .*\.1\.lora_A"):
            grow_bank(plain, [tmp_path / "wrong"], RecastConfig(target_modules=["0"], group_size=1))
        for folders in (["wrong"], ["right", "wrong"]):
            with pytest.raises(RecastBankError, match="wrong' does not fit the model"):
                compress_adapters(plain, [tmp_path / name for name in folders], num_templates=1)

    @pytest.mark.parametrize("source", [None, 3, ("folder", "name"), (tiny_vit(), "name"), (lora(0),), (lora(0), "default", 1)])
    def test_what_is_no_source_is_refused(self, source: Any) -> None:
        with pytest.raises(RecastConfigError, match="a source is a .*: expected an adapter"):
            grow_bank(tiny_vit(), [lora(0), source], config())

    @pytest.mark.parametrize("value", [1, torch.zeros(2).numpy()])
    def test_a_state_dict_of_no_tensors_is_refused(self, value: Any) -> None:
        with pytest.raises(RecastConfigError, match=f"a source holds a {type(value).__name__} at 'head.weight'"):
            grow_bank(tiny_vit(), [{**tiny_vit().state_dict(), "head.weight": value}], config())

    def test_wrong_sources_are_refused(self, tmp_path: Path) -> None:
        for sources in ([], str(tmp_path), lora(0), None, 3, (one for one in [lora(0)])):
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
        state = {key: value * float("nan") for key, value in tiny_vit().state_dict().items()}
        with pytest.raises(RecastBankError, match=f"not finite at {name.removesuffix('.weight')}"):
            grow_bank(tiny_vit(), [lora(0), state], config())
        with pytest.raises(RecastConfigError, match="grow_bank: model is a str; an nn.Module is expected"):
            grow_bank("vit", [lora(0)], config())  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_small_moves_survive_a_model_in_half_precision(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """A LoRA moves weights by less than their last digit; merged in half precision most of it would be gone."""
        source = get_peft_model(tiny_vit().to(dtype), LoraConfig(r=2, target_modules=["qkv"]))
        move(source, seed=0, size=0.005)
        source.save_pretrained(tmp_path)
        targets = {t.name: t for t in plan_recast(tiny_vit().to(dtype), config(target_modules=["qkv"])).candidates}
        for given in ((source, "default"), tmp_path):
            vectors = task_vectors(tiny_vit().to(dtype), given, targets)
            for name, vector in vectors.items():
                layer = source.get_base_model().get_submodule(name)
                wanted = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # lora_alpha 8, rank 2
                assert torch.allclose(vector, wanted.float(), atol=1e-6)
        assert next(source.get_base_model().blocks.parameters()).dtype == dtype

    def test_what_else_is_merged_is_refused(self) -> None:
        source = lora(0)
        source.add_adapter("other", LoraConfig(target_modules=["qkv"], init_lora_weights=False))
        wanted = grow_bank(tiny_vit(), [(source, "default")], config()).fingerprint
        source.merge_adapter(["default"])
        assert grow_bank(tiny_vit(), [(source, "default")], config()).fingerprint == wanted
        for merged in (["other"], ["default", "other"]):
            source.unmerge_adapter()
            source.merge_adapter(merged)
            with pytest.raises(RecastBankError, match=r"'other' is merged .*: call unmerge_adapter\(\) first"):
                grow_bank(tiny_vit(), [(source, "default")], config())

    def test_an_adapter_on_another_base_is_refused(self) -> None:
        torch.manual_seed(9)
        other = get_peft_model(TinyVit(), LoraConfig(r=2, target_modules=TARGETS))
        move(other, seed=0)
        for make in (
            lambda: grow_bank(tiny_vit(), [other], config()),
            lambda: compress_adapters(tiny_vit(), [other], num_templates=1),
        ):
            with pytest.raises(
                RecastBankError, match="stands on other pretrained weights than the model's: blocks.0.attn.qkv differs"
            ):
                make()
        assert grow_bank(tiny_vit().bfloat16(), [lora(0)], config())  # the same base in another dtype
        started = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"))
        move(started, seed=0)
        assert grow_bank(tiny_vit(), [started], config())  # what wrote into its base is compared as a whole

    @pytest.mark.parametrize(
        "method",
        [LoHaConfig(r=2, target_modules=TARGETS), IA3Config(target_modules=TARGETS, feedforward_modules=[])],
        ids=["loha", "ia3"],
    )
    def test_any_adapter_for_more_layers_is_refused(self, method: Any, tmp_path: Path) -> None:
        get_peft_model(tiny_vit(depth=5), method).save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match=r"does not fit the model, which has no place for .*blocks\.4"):
            grow_bank(tiny_vit(depth=4), [tmp_path], config())

    def test_layers_that_an_adapter_puts_elsewhere_are_refused(self, tmp_path: Path) -> None:
        made = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])  # layer 2 is a copy of layer 0
        source = get_peft_model(llama(), made)
        move(source, seed=0)
        source.save_pretrained(tmp_path)
        for given in (source, tmp_path):
            with pytest.raises(RecastBankError, match="has layer_replication="):
                grow_bank(llama(), [given], RecastConfig(target_modules=["q_proj"], group_size=1))
            with pytest.raises(RecastBankError, match="has layer_replication="):
                compress_adapters(llama(), {"a": given}, num_templates=1)

    @pytest.mark.parametrize(
        "changed",
        [
            {"peft_type": "FOO"},
            {"peft_type": None},
            {"r": "8"},
            {"target_modules": 3},
            {"lora_alpha": None},
            {"alpha_pattern": ["a"]},
        ],
        ids=str,
    )
    def test_a_config_that_peft_cannot_read_is_refused(self, changed: dict[str, Any], tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
        self.refused_by_both(tmp_path)

    def test_matrices_that_cannot_be_read_are_refused(self, tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path, safe_serialization=False)
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        self.refused_by_both(tmp_path)

    def test_an_adapter_for_another_class_is_refused(self, tmp_path: Path) -> None:
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match="cannot be read: .*prepare_inputs_for_generation"):
            grow_bank(llama().model, [tmp_path], RecastConfig(target_modules=["q_proj"]))

    @staticmethod
    def refused_by_both(folder: Path) -> None:
        with pytest.raises(RecastBankError, match=f"'{folder}' cannot be read"):
            grow_bank(tiny_vit(), [folder], config())
        with pytest.raises(RecastBankError, match=f"'{folder}' cannot be read"):
            compress_adapters(tiny_vit(), [folder], num_templates=1)

    def test_what_cannot_be_merged_is_refused(self) -> None:
        mixed = get_peft_model(tiny_vit(), PolyConfig(r=2, target_modules=TARGETS, n_tasks=1))
        with pytest.raises(RecastBankError, match="'default' of type POLY cannot be merged"):
            grow_bank(tiny_vit(), [mixed], config())

    def test_a_module_with_adapters_in_it_is_refused(self) -> None:
        """Its state dict has other names where the adapters are: it would seem to have moved nothing there."""
        injected = inject_adapter_in_model(LoraConfig(target_modules=["fc2"], init_lora_weights=False), tiny_vit())
        for source in (injected, on(grown()).get_base_model()):
            with pytest.raises(RecastBankError, match="TinyVit has adapters in it: give the PeftModel around it"):
                grow_bank(tiny_vit(), [lora(0), source], config(target_modules=["qkv", "fc2"]))

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
    def test_wrappers_do_not_matter(self, wrap: Any, tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path)
        wanted = grow_bank(tiny_vit(), [tmp_path], config()).fingerprint
        assert grow_bank(wrap(tiny_vit()), [tmp_path], config()).fingerprint == wanted
        assert grow_bank(tiny_vit(), [wrap(lora(0).merge_and_unload())], config()).fingerprint == wanted
        found = compress_adapters(wrap(tiny_vit()), {"a": tmp_path}, num_templates=1)
        assert found.bank.fingerprint == compress_adapters(tiny_vit(), {"a": tmp_path}, num_templates=1).bank.fingerprint

    def test_no_random_number_is_drawn(self, tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path)
        plain, before = tiny_vit(), torch.random.get_rng_state()
        grow_bank(plain, [tmp_path], config())
        compress_adapters(plain, {"a": tmp_path}, num_templates=1)
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "adapted",
    [lambda: lora(1), lambda: lora(1).get_base_model(), lambda: on(grown())],
    ids=["peft model", "module", "model with a task"],
)
def test_a_model_with_adapters_is_not_plain(adapted: Any, tmp_path: Path) -> None:
    lora(0).save_pretrained(tmp_path)
    model, bank = adapted(), grown()
    keys = list(model.state_dict())
    for make in (
        lambda: grow_bank(model, [tmp_path], config()),
        lambda: compress_adapters(model, [tmp_path], num_templates=1),
        lambda: extend_bank(bank, model, [tmp_path]),
    ):
        with pytest.raises(RecastConfigError, match="needs the plain pretrained model"):
            make()
    assert list(model.state_dict()) == keys


def test_a_model_without_numbers_is_refused(tmp_path: Path) -> None:
    lora(0).save_pretrained(tmp_path)
    empty = tiny_vit().to("meta")
    for make in (
        lambda: grow_bank(empty, [tmp_path], config()),
        lambda: compress_adapters(empty, [tmp_path], num_templates=1),
    ):
        with pytest.raises(RecastTargetError, match="on the meta device"):
            make()
