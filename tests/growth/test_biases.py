"""Banks of biases: principal components of what sources did to the biases, and tasks of a few coefficients on them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from grown_biases import MEMBERS, WIDTHS, BatchNorms, X, by_hand, config, grown, images, learn_offsets, offsets, on, source
from hub_server import HubServer
from models import outputs, seeded, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from recast_peft import (
    AutoRecastModel,
    BiasConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastHubError,
    RecastTargetError,
    StoredBank,
    TaskPool,
    extend_bank,
    get_recast_model,
    grow_bias_bank,
    load_bank,
    plan_recast,
    push_bank_to_hub,
    push_task_to_hub,
)
from recast_peft.cli import main
from recast_peft.parts.bias_part import bias_coefficients


def moves_of(group: Any, sources: list[dict[str, Tensor]], build: Callable[[], nn.Module] = tiny_vit) -> Tensor:
    """The task vectors ``(sources, numbers)`` of a group."""
    plain = dict(build().named_parameters())
    return torch.stack([torch.cat([s[f"{m}.bias"] - plain[f"{m}.bias"].detach() for m in group.members]) for s in sources])


class TestGrowing:
    def test_groups_are_the_blocks_with_their_norms(self) -> None:
        bank = grown()
        assert list(bank.groups) == [f"blocks.{i}" for i in range(4)]
        for i, group in enumerate(bank.groups.values()):
            assert group.members == tuple(f"blocks.{i}.{m}" for m in MEMBERS)
            assert group.widths == WIDTHS
            assert group.num_coefficients == group.num_templates == 3
        assert bank.is_of_biases
        assert bank.nbytes == 4 * 3 * 4 * sum(WIDTHS)

    def test_components_are_those_of_the_singular_values(self) -> None:
        sources = [source(i) for i in range(3)]
        for group in grow_bias_bank(tiny_vit(), sources).groups.values():
            moves = moves_of(group, sources).double()
            _, values, right = torch.linalg.svd(moves, full_matrices=False)
            templates = group.grown.tensors[0].double()
            size = moves.square().sum(1).mean().sqrt()
            torch.testing.assert_close(templates.norm(dim=1), size.expand(3), rtol=1e-5, atol=0)
            cosines = (templates / size * right).sum(1).abs()
            torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.double), rtol=0, atol=1e-5)
            shares = values.square().cumsum(0) / values.square().sum()
            torch.testing.assert_close(torch.tensor(group.grown.energy, dtype=torch.double), shares, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("kind", ["vit", "bert", "convnext", "batch norms"])
    def test_a_source_can_be_reached(self, kind: str) -> None:
        bert = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
        build, x, targets = {
            "vit": (tiny_vit, X, ["fc1"]),
            "bert": (lambda: seeded(lambda: Encoder(bert)), torch.arange(12).view(2, 6), ["query"]),
            "convnext": (lambda: seeded(lambda: timm.create_model("test_convnext", num_classes=0)), images(), ["fc1"]),
            "batch norms": (lambda: seeded(BatchNorms), images(), ["conv"]),
        }[kind]
        inside = {n for n, _ in build().named_parameters() if any(part.isdecimal() for part in n.split("."))}
        plain = dict(build().named_parameters())
        sources = [{n: p if n in inside else plain[n].detach() for n, p in source(i, build).items()} for i in range(2)]
        bank = grow_bias_bank(build(), sources)
        fields = {"target_modules": targets, "group_size": 1, "partners": [BiasConfig(bank=bank)]}
        model = get_recast_model(build(), RecastConfig(**fields)).eval()
        own = offsets(model)
        wanted = build().eval()
        wanted.load_state_dict(sources[1], strict=False)
        moved = {f"{m}.bias" for group in bank.groups.values() for m in group.members}
        assert moved == {n for n in inside if n.endswith("bias") and not torch.equal(sources[1][n], plain[n])}
        with torch.no_grad():
            for group in bank.groups.values():
                target = moves_of(group, sources, build)[1]
                solved = torch.linalg.lstsq(group.grown.tensors[0].T, target[:, None]).solution[:, 0]
                own[group.members[0]].copy_(solved)
            assert not torch.allclose(outputs(build().eval(), x), outputs(wanted, x), atol=1e-2)
            torch.testing.assert_close(outputs(model, x), outputs(wanted, x), rtol=1e-4, atol=1e-4)

    def test_blocks_may_share(self) -> None:
        bank = grown(group_size=3, num_templates=2)
        assert {name: group.num_templates for name, group in bank.groups.items()} == {"blocks.{0,1,2}": 2, "blocks.3": 2}
        model = on(bank)
        assert sorted(offsets(model)) == ["blocks.0.norm", "blocks.3.norm"]
        plan = plan_recast(tiny_vit(), config(bank))
        assert sum(plan.parts["bias"].values()) == 4
        assert len(plan.parts["bias"]) == 4 * len(MEMBERS)

    def test_modules_may_be_named(self) -> None:
        bank = grown(target_modules=["fc1", "norm"])
        assert bank.groups["blocks.2"].members == ("blocks.2.norm", "blocks.2.mlp.fc1")
        with pytest.raises(RecastTargetError, match="names no module"):
            grown(target_modules=["fc3"])
        with pytest.raises(RecastTargetError, match="has no bias"):
            grow_bias_bank(nn.ModuleDict({"one": nn.Linear(2, 2, bias=False)}), [{}], target_modules=["one"])

    def test_a_bias_that_no_source_moved_takes_no_part(self) -> None:
        moved = source(0)
        plain = dict(tiny_vit().named_parameters())
        kept = {n: plain[n].detach() if "norm" in n or "blocks.3" in n else p for n, p in moved.items()}
        bank = grow_bias_bank(tiny_vit(), [kept])
        assert list(bank.groups) == ["blocks.0", "blocks.1", "blocks.2"]
        assert bank.groups["blocks.0"].members == tuple(f"blocks.0.{m}" for m in MEMBERS[1:])

    def test_adapters_that_trained_biases_are_sources(self, tmp_path: Path) -> None:
        """A LoRA with bias="all", a RECAST task with coefficients of biases, and a task on a bank of biases."""
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"], bias="all"))
        task = get_recast_model(tiny_vit(), RecastConfig(target_modules=["fc1"], partners=["bias"]))
        with torch.no_grad():
            lora.base_model.model.blocks[1].mlp.fc2.bias += 0.5
            offsets(task)["blocks.1.mlp.fc2"].fill_(2.0)
        lora.save_pretrained(tmp_path / "lora")
        on_bank = on(grown(), train_coefficients=False)
        pretrained = tiny_vit().blocks[1].mlp.fc2.bias.detach()
        composed = by_hand(grown(), on_bank).blocks[1].mlp.fc2.bias.detach() - pretrained
        for given, wanted in ((tmp_path / "lora", torch.full((8,), 0.5)), (task, 2 * pretrained), (on_bank, composed)):
            bank = grow_bias_bank(tiny_vit(), [given])
            (template,) = bank.groups["blocks.1"].by_member()["blocks.1.mlp.fc2"]
            torch.testing.assert_close(template.abs(), wanted.abs(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fields", [{"num_templates": 0}, {"group_size": 0}, {"group_size": True}, {"group_size": None}])
    def test_wrong_numbers_are_refused(self, fields: dict) -> None:
        with pytest.raises(RecastConfigError, match="whole number of at least 1"):
            grown(**fields)

    def test_sources_that_moved_no_bias_are_refused(self) -> None:
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"]))
        with pytest.raises(RecastBankError, match=r'none of the 1 sources moved a bias.*\n.*\n.*bias="all"'):
            grow_bias_bank(tiny_vit(), [lora])
        with pytest.raises(RecastConfigError, match="at least one source"):
            grow_bias_bank(tiny_vit(), [])
        with pytest.raises(RecastConfigError, match="plain pretrained model"):
            grow_bias_bank(on(grown()).get_base_model(), [source(0)])
        with pytest.raises(RecastBankError, match=r"does not fit the model: blocks\.0\.norm has another shape"):
            grow_bias_bank(tiny_vit(), [{"blocks.0.norm.bias": torch.zeros(9)}])


class Encoder(BertModel):
    """BERT that puts out its last hidden states."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).last_hidden_state


class TestExtending:
    def test_an_old_task_works_on_the_newer_bank_to_the_last_bit(self, tmp_path: Path) -> None:
        first = grown().save(tmp_path / "bank")
        model = on(first, "old")
        model.save_pretrained(tmp_path)
        second = extend_bank(load_bank(tmp_path / "bank"), tiny_vit(), [source(8), source(9)])
        assert (second.version, second.at(first.fingerprint).fingerprint) == (2, first.fingerprint)
        for name, group in second.groups.items():
            old = first.groups[name].grown.tensors[0]
            new = group.grown.tensors[0]
            assert torch.equal(new[:3], old)
            assert len(new) == 5
            torch.testing.assert_close(old @ new[3:].T, torch.zeros(3, 2), rtol=0, atol=1e-4)
        second.save(tmp_path / "bank")
        again = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "old"), "old").eval()
        assert torch.equal(outputs(again, X), outputs(model, X))
        again.add_adapter("new", config(load_bank(tmp_path / "bank")))
        assert {tuple(p.shape) for p in offsets(again, "new").values()} == {(5,)}
        # a stored task takes its own version of a bank that is handed over
        handed = RecastConfig.from_pretrained(str(tmp_path / "old"))
        handed.partners = [BiasConfig(bank=load_bank(tmp_path / "bank"))]
        again = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "old"), "old", config=handed).eval()
        assert torch.equal(outputs(again, X), outputs(model, X))

    def test_the_new_source_can_be_reached(self) -> None:
        second = extend_bank(grown(), tiny_vit(), [source(8)])
        for group in second.groups.values():
            move = moves_of(group, [source(8)])[0]
            templates = group.grown.tensors[0]
            solved = torch.linalg.lstsq(templates.T, move[:, None]).solution
            torch.testing.assert_close((templates.T @ solved)[:, 0], move, rtol=1e-4, atol=1e-5)

    def test_other_biases_are_refused(self) -> None:
        with pytest.raises(RecastBankError, match="made for other pretrained biases"):
            extend_bank(grown(), tiny_vit(seed=5), [source(8)])


class TestOnTheHub:
    def test_bank_and_task_are_pushed_and_found(self, hub: HubServer, tmp_path: Path) -> None:
        bank = grown()
        push_bank_to_hub(bank, "ada/biases", base_model="ada/vit")
        card = hub.repositories["ada/biases"].find("main").files["README.md"].decode()
        assert "| Made by | of biases, grown from 3 sources: a state dict, a state dict, a state dict |" in card
        model = on(load_bank("ada/biases"))
        push_task_to_hub(model, "ada/birds")
        card = hub.repositories["ada/birds"].find("main").files["README.md"].decode()
        assert "| Partners | bias 12 numbers |" in card
        assert f"| Bank of biases | `ada/biases`, fingerprint {bank.fingerprint} |" in card
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), "ada/birds").eval(), X), outputs(model, X))

    def test_a_private_bank_opens_with_the_tasks_token(self, hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
        config_of = ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
        )
        torch.manual_seed(0)
        backbone = ViTModel(config_of).eval()
        backbone.save_pretrained(tmp_path / "vit")
        bank = grow_bias_bank(backbone, [source(i, lambda: copy.deepcopy(backbone)) for i in range(2)])
        push_bank_to_hub(bank, "ada/biases", private=True)
        loaded = ViTModel.from_pretrained(tmp_path / "vit").eval()
        model = get_recast_model(loaded, RecastConfig(partners=[BiasConfig(bank=load_bank("ada/biases"))])).eval()
        learn_offsets(model)
        model.save_pretrained(tmp_path / "task")
        token = os.environ["HF_TOKEN"]
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RecastHubError, match="private or gated"):
            AutoRecastModel.from_pretrained(tmp_path / "task", backbone=backbone, cache_dir=tmp_path / "fresh")
        again = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=backbone, token=token, cache_dir=tmp_path / "fresh")
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state)
        assert again.peft_config["default"].partner_bank("bias")["name"] == "ada/biases"


def test_inspect_names_the_bank(tmp_path: Path, capsys: Any) -> None:
    bank = grown().save(tmp_path / "bank")
    on(bank).save_pretrained(tmp_path / "task")
    assert main(["inspect", str(tmp_path / "task")]) == 0
    shown = capsys.readouterr().out
    assert f"bank of biases   {tmp_path / 'bank'}\n" in shown
    assert "partners         bias 12 numbers\n" in shown


IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(9))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=64).double().eval()


def cnn() -> nn.Module:
    """Norms with an activation inside, and running statistics that are not those of a fresh model."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "bn" in name and value.is_floating_point():
            value.data += 0.2 * torch.rand(value.shape, generator=generator).double()
    return model


NORMED = {"vit": vit, "cnn": cnn}


def moved_norms(make: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    norms = ("norm", "bn")
    state = make().state_dict()
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator).double()
        for name, value in state.items()
        if name.endswith(("weight", "bias")) and value.ndim == 1 and any(norm in name for norm in norms)
    }


def bank_of_scales(make: Any, **fields: Any) -> StoredBank:
    return grow_bias_bank(make(), [moved_norms(make, 0), moved_norms(make, 1)], scales=True, **fields)


def task_on(make: Any, stored: StoredBank, name: str = "task", seed: int = 3) -> PeftModel:
    model = get_recast_model(make(), RecastConfig(group_size=1, partners=[BiasConfig(bank=stored)]), name).eval()
    draw_offsets(model, name, seed)
    return model


@torch.no_grad()
def draw_offsets(model: nn.Module, task: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("offset") and f".{task}." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def moved_by_hand(make: Any, model: nn.Module, task: str, stored: StoredBank) -> Tensor:
    """The plain model with its norms moved by the task's coefficients."""
    plain, owned = make(), bias_coefficients(model, task)
    for group in stored.groups.values():
        offset = owned[f"{group.members[0]}.bias"]
        for member, templates in group.by_member().items():
            parameter = plain.get_parameter(member if member.endswith(".weight") else f"{member}.bias")
            parameter += offset.double() @ templates.double()
    return plain(IMAGES.double())


@pytest.mark.parametrize("kind", NORMED)
class TestScales:
    def test_live_and_merged_are_the_moved_norms(self, kind: str) -> None:
        make = NORMED[kind]
        stored = bank_of_scales(make)
        assert any(member.endswith(".weight") for group in stored.groups.values() for member in group.members)
        model = task_on(make, stored)
        with torch.no_grad():
            wanted = moved_by_hand(make, model, "task", stored)
            assert not torch.allclose(wanted, make()(IMAGES.double()), rtol=1e-2)
            torch.testing.assert_close(model(IMAGES.double()), wanted, rtol=1e-6, atol=1e-6)
            model.merge_adapter()
            torch.testing.assert_close(model(IMAGES.double()), wanted, rtol=1e-6, atol=1e-6)
            model.unmerge_adapter()
            with model.disable_adapter():
                assert torch.equal(model(IMAGES.double()), make()(IMAGES.double()))
        torch.testing.assert_close(model.merge_and_unload()(IMAGES.double()), wanted, rtol=1e-6, atol=1e-6)

    def test_in_bfloat16(self, kind: str) -> None:
        make = NORMED[kind]
        stored = bank_of_scales(make)
        model = task_on(lambda: make().bfloat16(), stored)
        with torch.no_grad():
            found = model(IMAGES.bfloat16())
            wanted = moved_by_hand(make, model, "task", stored)
        assert found.dtype == torch.bfloat16
        assert (found - wanted).norm() < 0.05 * wanted.norm()

    def test_a_fresh_task_changes_nothing(self, kind: str) -> None:
        make = NORMED[kind]
        fresh = get_recast_model(make(), RecastConfig(group_size=1, partners=[BiasConfig(bank=bank_of_scales(make))])).eval()
        with torch.no_grad():
            assert torch.equal(fresh(IMAGES.double()), make()(IMAGES.double()))

    def test_a_pool_whatever_is_merged(self, kind: str) -> None:
        make = NORMED[kind]
        stored = bank_of_scales(make)
        model = task_on(make, stored)
        model.add_adapter("other", RecastConfig(group_size=1, partners=[BiasConfig(bank=stored)]))
        draw_offsets(model, "other", 7)
        pool = TaskPool(model)
        for name in ("task", "other"):
            pool.add(name, name)
        wanted = {name: moved_by_hand(make, model, name, stored) for name in ("task", "other")}
        with torch.no_grad():
            for merge in (False, True):
                pool.activate("other", merge=merge)
                found = model(IMAGES.double(), task_ids=pool.ids(["task", "other", "task"]))
                for row, name in enumerate(("task", "other", "task")):
                    torch.testing.assert_close(found[row], wanted[name][row], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(model(IMAGES.double()), wanted["other"], rtol=1e-4, atol=1e-4)
            pool.activate("task", merge=True)
            torch.testing.assert_close(model(IMAGES.double()), wanted["task"], rtol=1e-4, atol=1e-4)

    def test_saved_loaded_and_trained(self, kind: str, tmp_path: Path) -> None:
        make = NORMED[kind]
        model = task_on(make, bank_of_scales(make).save(tmp_path / "bank"))
        model(IMAGES.double()).square().mean().backward()
        offsets = [p for n, p in model.named_parameters() if n.endswith("offset") and p.requires_grad]
        assert offsets
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in offsets)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path / "task", "task").eval()
        with torch.no_grad():
            assert torch.equal(again(IMAGES.double()), model(IMAGES.double()))

    def test_extended(self, kind: str) -> None:
        make = NORMED[kind]
        more = extend_bank(bank_of_scales(make, num_templates=1), make(), [moved_norms(make, 5)])
        assert more.version == 2
        model = task_on(make, more)
        with torch.no_grad():
            torch.testing.assert_close(model(IMAGES.double()), moved_by_hand(make, model, "task", more), rtol=1e-6, atol=1e-6)


def test_a_scale_of_zero_stays() -> None:
    def dead() -> nn.Module:
        model = cnn()
        with torch.no_grad():
            model.get_submodule("blocks.0.0.bn1").weight[0] = 0.0
        return model

    stored = bank_of_scales(dead)
    model = task_on(dead, stored)
    with torch.no_grad():
        assert torch.isfinite(model(IMAGES.double())).all()
        torch.testing.assert_close(model(IMAGES.double()), moved_by_hand(dead, model, "task", stored), rtol=1e-6, atol=1e-6)
