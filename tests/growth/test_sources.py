"""Sources of grown banks: read from everywhere, compared with the pretrained weights, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_weights import TARGETS, config, grown, lora, on
from models import layers_of, randomise, seeded, tiny_vit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from recast_peft import (
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    compress_adapters,
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
        with pytest.raises(RecastConfigError, match="plain pretrained model"):
            grow_bank(on(grown()), [lora(0)], config())
