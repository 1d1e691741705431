"""Banks of biases: principal components of what sources did to the biases, and tasks of a few coefficients on them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hub_server import HubServer
from models import layers_of, outputs, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from recast_peft import (
    AutoRecastModel,
    BiasConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastHubError,
    RecastLoadError,
    RecastTargetError,
    StoredBank,
    TaskPool,
    convert_to_lora,
    create_recast_optimizer,
    extend_bank,
    get_recast_model,
    grow_bank,
    grow_bias_bank,
    growth_report,
    load_bank,
    plan_recast,
    push_bank_to_hub,
    push_task_to_hub,
)
from recast_peft.banks.files import BANK_CONFIG
from recast_peft.cli import main
from recast_peft.composition.kinds import KINDS
from recast_peft.parts.bias_part import TaskBiases
from recast_peft.parts.partner import partner_holders

X = vit_input(4)
MEMBERS = ("norm", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
WIDTHS = (8, 24, 8, 16, 8)  # of the biases of a block of tiny_vit


def source(seed: int, build: Callable[[], nn.Module] = tiny_vit, size: float = 0.3) -> dict[str, Tensor]:
    """The model with every bias moved at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, parameter in build().named_parameters():
        move = size * torch.randn(parameter.shape, generator=generator) if name.endswith("bias") else 0.0
        moved[name] = parameter.detach() + move
    return moved


def grown(seeds: tuple[int, ...] = (0, 1, 2), **fields: Any) -> StoredBank:
    return grow_bias_bank(tiny_vit(), [source(seed) for seed in seeds], **fields)


def config(bank: Any, **fields: Any) -> RecastConfig:
    given = {"target_modules": ["fc1"], "group_size": 1, "partners": [BiasConfig(bank=bank)], **fields}
    return RecastConfig(**given)


def offsets(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """A task's coefficients of biases by the module that owns them."""
    key = f".modules_to_save.{name}.offset"
    return {
        n.split("recast_partners.")[1].split(".bias")[0].replace("/", "."): p
        for n, p in model.named_parameters()
        if n.endswith(key)
    }


def on(bank: Any, name: str = "default", seed: int = 1, **fields: Any) -> PeftModel:
    """A task with random numbers on a bank."""
    model = get_recast_model(tiny_vit(), config(bank, **fields), name).eval()
    learn(model, name, seed)
    return model


def learn(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    randomise(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in offsets(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def by_hand(bank: StoredBank, model: PeftModel, name: str = "default") -> nn.Module:
    """A plain model whose biases and weights of fc1 are put together by plain arithmetic."""
    plain = tiny_vit()
    own = offsets(model, name)
    with torch.no_grad():
        for block in range(4):
            group = bank.groups[f"blocks.{block}"]
            mixed = sum(c * t for c, t in zip(own[group.members[0]], group.grown.tensors[0], strict=True))
            for member, part in zip(group.members, mixed.split(list(WIDTHS)), strict=True):
                plain.get_submodule(member).bias += part
            layer = model.get_base_model().blocks[block].mlp.fc1
            plain.blocks[block].mlp.fc1.weight *= 1 + layer.recast_coefficients[name].mean()
    return plain


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
            (template,) = bank.groups["blocks.1"].biases()["blocks.1.mlp.fc2"]
            torch.testing.assert_close(template.abs(), wanted.abs(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fields", [{"num_templates": 0}, {"group_size": 0}, {"group_size": True}])
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

    def test_the_report(self) -> None:
        report = growth_report(grown(num_templates=2))
        assert report.num_coefficients == 8
        assert [group.members for group in report.groups] == [5] * 4
        assert "8 numbers per task" in str(report)


class Encoder(BertModel):
    """BERT that puts out its last hidden states."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).last_hidden_state


class BatchNorms(nn.Module):
    """Two layers of a convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, bias=False), "norm": nn.BatchNorm2d(3)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["norm"](layer["conv"](x)))
        return x


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


class TestTasks:
    def test_a_fresh_task_changes_nothing(self) -> None:
        model = get_recast_model(tiny_vit(), config(grown())).eval()
        assert torch.equal(outputs(model, X), outputs(tiny_vit().eval(), X))
        own = offsets(model)
        assert {name: tuple(p.shape) for name, p in own.items()} == {f"blocks.{i}.norm": (3,) for i in range(4)}
        assert model.get_nb_trainable_parameters()[0] == 4 * 3 + 4

    def test_composing(self) -> None:
        bank = grown()
        model = on(bank)
        torch.testing.assert_close(outputs(model, X), outputs(by_hand(bank, model).eval(), X), rtol=1e-5, atol=1e-5)

    def test_gradients_are_those_of_plain_autograd(self) -> None:
        bank = grown()
        model = on(bank).double()
        own, x = offsets(model), X.double()
        model(x).square().sum().backward()
        plain = by_hand(bank, model).double()
        start = {n: p.detach() for n, p in tiny_vit().double().named_parameters()}
        mixes = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
        biases = {}
        for group in bank.groups.values():
            mixed = mixes[group.members[0]] @ group.grown.tensors[0].double()
            for member, part in zip(group.members, mixed.split(list(WIDTHS)), strict=True):
                biases[f"{member}.bias"] = start[f"{member}.bias"] + part
        torch.func.functional_call(plain, biases, (x,)).square().sum().backward()
        for name, parameter in own.items():
            torch.testing.assert_close(parameter.grad, mixes[name].grad, rtol=1e-6, atol=1e-8)

    def test_merge_and_exact_unmerge(self) -> None:
        bank = grown()
        model = on(bank)
        before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters() if n.endswith("bias")}
        live = outputs(model, X)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, X), live, rtol=1e-5, atol=1e-5)
        wanted = by_hand(bank, model).blocks[2].attn.proj.bias
        torch.testing.assert_close(model.get_base_model().blocks[2].attn.proj.bias, wanted, rtol=1e-6, atol=1e-6)
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert (parameter.data_ptr(), True) == (before[name][0], torch.equal(parameter, before[name][1]))
        assert torch.equal(outputs(model, X), live)
        alone = model.merge_and_unload()
        torch.testing.assert_close(outputs(alone.eval(), X), live, rtol=1e-5, atol=1e-5)

    def test_a_task_is_reloaded_from_a_file_of_its_numbers(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        model = on(bank, "flowers")
        model.save_pretrained(tmp_path)
        entries = load_file(tmp_path / "flowers" / "adapter_model.safetensors")
        assert sum(t.numel() for t in entries.values()) == 4 * 3 + 4
        again = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "flowers"), "flowers").eval()
        assert torch.equal(outputs(again, X), outputs(model, X))
        (partner,) = again.peft_config["flowers"].partners
        assert partner == BiasConfig(bank={"name": str(tmp_path / "bank"), "fingerprint": bank.fingerprint})
        cheap = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "flowers"), "flowers", low_cpu_mem_usage=True).eval()
        assert torch.equal(outputs(cheap, X), outputs(model, X))

    def test_a_bank_in_memory_is_stored_by_the_models_own_verb(self, tmp_path: Path) -> None:
        first = grown()
        model = on(first, "old")
        model.add_adapter("new", config(extend_bank(first, tiny_vit(), [source(8)])))
        learn(model, "new", 2)
        stored = model.base_model.save_bank(tmp_path / "bank", "new", of="biases")
        assert (stored.version, load_bank(tmp_path / "bank").fingerprint) == (2, stored.fingerprint)
        model.save_pretrained(tmp_path)
        for name in ("old", "new"):
            model.set_adapter(name)
            again = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / name), name).eval()
            assert torch.equal(outputs(again, X), outputs(model, X))
            assert again.peft_config[name].partners[0].bank["name"] == str(tmp_path / "bank")
        model.add_adapter("plain", RecastConfig(target_modules=["fc1"]))
        with pytest.raises(RecastBankError, match="'plain' is on no bank of biases"):
            model.base_model.save_bank(tmp_path / "none", "plain", of="biases")
        with pytest.raises(RecastConfigError, match="expected 'weights' or 'biases'"):
            model.base_model.save_bank(tmp_path / "none", of="norms")
        assert not (tmp_path / "none").exists()

    def test_a_bank_given_by_name_is_stored_with_its_fingerprint(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        given = config(str(tmp_path / "bank"))
        assert given.partners[0].bank_reference == {"name": str(tmp_path / "bank"), "fingerprint": None}
        model = get_recast_model(tiny_vit(), given)
        assert model.peft_config["default"].partner_bank("bias")["fingerprint"] == bank.fingerprint

    def test_tasks_on_one_bank_share_its_templates(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        model = on(bank, "one")
        model.add_adapter("two", config(bank))
        learn(model, "two", 2)
        model.add_adapter("other", config(grown((5, 6))))
        learn(model, "other", 3)
        holders = [h for h in partner_holders(model) if isinstance(h, TaskBiases)]
        assert len(holders) == 20
        assert all(len(holder.banks) == 2 for holder in holders)
        wanted = {"one": by_hand(bank, model, "one"), "two": by_hand(bank, model, "two")}
        wanted["other"] = by_hand(grown((5, 6)), model, "other")
        for name, plain in wanted.items():
            model.set_adapter(name)
            torch.testing.assert_close(outputs(model, X), outputs(plain.eval(), X), rtol=1e-5, atol=1e-5)
        names = ["two", "other", "one", "__base__"]
        with torch.no_grad():
            mixed = model(X, adapter_names=names)
        plains = [*(wanted[name] for name in names[:3]), tiny_vit()]
        for row, plain in enumerate(plains):
            torch.testing.assert_close(mixed[row], outputs(plain.eval(), X)[row], rtol=1e-5, atol=1e-5)
        model.set_adapter("two")
        model.merge_adapter(["one", "two"])
        both = tiny_vit().blocks[0].mlp.fc2.bias + sum(
            wanted[n].blocks[0].mlp.fc2.bias - tiny_vit().blocks[0].mlp.fc2.bias for n in ("one", "two")
        )
        torch.testing.assert_close(model.get_base_model().blocks[0].mlp.fc2.bias, both, rtol=1e-6, atol=1e-6)
        model.unmerge_adapter()
        model.delete_adapter("other")
        assert all(list(holder.banks) == [bank.fingerprint] for holder in holders)
        assert sorted(offsets(model, "two")) == [f"blocks.{i}.norm" for i in range(4)]

    def test_beside_a_task_with_a_coefficient_for_each_bias(self) -> None:
        bank = grown()
        model = on(bank, "bank")
        model.add_adapter("plain", RecastConfig(target_modules=["fc1"], group_size=1, partners=["bias"]))
        own = offsets(model, "plain")
        assert len(own) == 16  # qkv, proj, fc1, fc2; norms are no default place of it
        before = tiny_vit().blocks[0].attn.qkv.bias.detach()
        with torch.no_grad():
            own["blocks.0.attn.qkv"].fill_(0.5)
        model.merge_adapter(["plain", "bank"])
        wanted = by_hand(bank, model, "bank").blocks[0].attn.qkv.bias + 0.5 * before
        torch.testing.assert_close(model.get_base_model().blocks[0].attn.qkv.bias, wanted, rtol=1e-6, atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(model.get_base_model().blocks[0].attn.qkv.bias, before)

    def test_a_task_is_added_while_another_is_merged(self) -> None:
        bank = grown()
        model = on(bank, "one")
        model.merge_adapter()
        model.add_adapter("two", config(bank))  # the merged bias is not the pretrained one; the bank fits nevertheless
        model.unmerge_adapter()
        model.set_adapter("two")
        assert torch.equal(outputs(model, X), outputs(tiny_vit().eval(), X))

    def test_disabled_and_unloaded_the_model_is_the_pretrained_one(self) -> None:
        model = on(grown())
        with model.disable_adapter():
            assert torch.equal(outputs(model, X), outputs(tiny_vit().eval(), X))
        plain = model.unload()
        assert torch.equal(outputs(plain.eval(), X), outputs(tiny_vit().eval(), X))
        assert not partner_holders(plain)

    def test_a_copy_has_coefficients_of_its_own(self) -> None:
        model = on(grown())
        twin = copy.deepcopy(model)
        before = outputs(model, X)
        learn(twin, seed=9)
        assert torch.equal(outputs(model, X), before)
        torch.testing.assert_close(outputs(twin, X), outputs(by_hand(grown(), twin).eval(), X), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        bank = grown()
        model = get_recast_model(tiny_vit().to(dtype), config(bank)).eval()
        learn(model)
        wanted = outputs(by_hand(bank, model).to(dtype).eval(), X.to(dtype))
        # two roundings of bfloat16 in each of four blocks
        close = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(outputs(model, X.to(dtype)), wanted, **close)

    def test_training_moves_the_coefficients_alone(self) -> None:
        model = get_recast_model(tiny_vit(), config(grown())).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = create_recast_optimizer(model, lr=1e-3, coefficient_lr=0.05)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert {rates[id(p)] for p in offsets(model).values()} == {0.05}
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), torch.tensor([0, 1, 2, 0]))
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
        assert sum(dict(model.named_parameters())[n].numel() for n in moved) == 16

    def test_compiled(self) -> None:
        model = on(grown())
        wanted = outputs(model, X)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), wanted, rtol=1e-5, atol=1e-5)


class TestRefusals:
    def test_another_model(self) -> None:
        with pytest.raises(RecastBankError, match=r"made for other pretrained biases; blocks\.0"):
            get_recast_model(tiny_vit(seed=5), config(grown()))
        wide = seeded(lambda: nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3)])}))
        with pytest.raises(RecastBankError, match=r"does not fit the model at blocks\.0\.norm\n.*8 numbers\n.*no such bias"):
            get_recast_model(wide, config(grown(), target_modules=["0"]))

    def test_a_failed_task_leaves_the_model_as_it_was(self) -> None:
        model = tiny_vit(seed=5)
        names = [n for n, _ in model.named_modules()]
        with pytest.raises(RecastBankError):
            get_recast_model(model, config(grown()))
        assert [n for n, _ in model.named_modules()] == names

    def test_the_wrong_kind_of_bank(self, tmp_path: Path) -> None:
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"], init_lora_weights=False))
        weights = grow_bank(tiny_vit(), [lora], RecastConfig(target_modules=["qkv"], group_size=1))
        with pytest.raises(RecastBankError, match=r"holds templates of weights: give it as RecastConfig\(bank=...\)"):
            get_recast_model(tiny_vit(), config(weights))
        with pytest.raises(RecastBankError, match=r"holds templates of biases: give it as RecastConfig\(partners="):
            get_recast_model(tiny_vit(), RecastConfig(bank=grown()))

    def test_places_and_a_bank(self) -> None:
        with pytest.raises(RecastConfigError, match="the bank says which modules take part; give one of the two"):
            BiasConfig(bank=grown(), target_modules=["fc1"])
        for wrong in (3, {"name": None, "fingerprint": None}, {"nme": "x"}):
            with pytest.raises(RecastConfigError, match=r"BiasConfig\(bank="):
                BiasConfig(bank=wrong)

    def test_a_bank_that_is_gone(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        model = on(bank)
        model.save_pretrained(tmp_path / "task")
        moved = tmp_path / "elsewhere"
        (tmp_path / "bank").rename(moved)
        with pytest.raises(RecastBankError, match=r"config\.partners = \[BiasConfig\(bank=load_bank"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"))
        handed = RecastConfig.from_pretrained(str(tmp_path / "task"))
        handed.partners = [BiasConfig(bank=load_bank(moved))]
        again = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"), config=handed).eval()
        assert torch.equal(outputs(again, X), outputs(model, X))
        other = RecastConfig.from_pretrained(str(tmp_path / "task"))
        other.partners = [BiasConfig(bank=grown((7, 8, 9)))]
        with pytest.raises(RecastBankError, match=f"bank of the task: {bank.fingerprint}"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"), config=other)

    def test_a_damaged_task_file(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        on(bank).save_pretrained(tmp_path / "task")
        grown((0, 1)).save(tmp_path / "bank")  # another bank under the name
        with pytest.raises(RecastBankError, match=bank.fingerprint):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "task"))

    def test_a_damaged_bank_file(self, tmp_path: Path) -> None:
        grown().save(tmp_path)
        described = json.loads((tmp_path / BANK_CONFIG).read_text().replace('"widths"', '"breadths"'))
        with pytest.raises(RecastLoadError, match="is not what was written"):
            (tmp_path / BANK_CONFIG).write_text(json.dumps(described))
            load_bank(tmp_path)
        described.pop("checksum")
        (tmp_path / BANK_CONFIG).write_text(json.dumps(described))
        with pytest.raises(RecastLoadError, match="has no 'widths'"):
            load_bank(tmp_path)

    def test_what_takes_coefficients_alone(self) -> None:
        model = on(grown(), "one")
        with pytest.raises(RecastConfigError, match="partners bias"):
            convert_to_lora(model, 4, "one")


def filled(bank: Any, *names: str) -> TaskPool:
    """A pool of tasks with random numbers."""
    pool = TaskPool(get_recast_model(tiny_vit(), config(bank)).eval())
    for seed, name in enumerate(names):
        row = pool.add(name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            pool.table[row].copy_(0.3 * torch.randn(pool.numbers_per_task, generator=generator))
    return pool


def of_pool(pool: TaskPool, bank: StoredBank, name: str) -> nn.Module:
    """A plain model of a pool's task, by plain arithmetic on the row."""
    model = get_recast_model(tiny_vit(), config(bank))
    values = pool.coefficients(name)
    with torch.no_grad():
        for place, parameter in offsets(model).items():
            parameter.copy_(values[f"{place}.bias"])
        for module, layer in layers_of(model).items():
            layer.recast_coefficients["default"].copy_(values[module][None])
    return by_hand(bank, model).eval()


class TestPools:
    @pytest.mark.parametrize("merge", [False, True])
    def test_one_task_after_the_other(self, merge: bool) -> None:
        bank = grown()
        pool = filled(bank, "one", "two")
        assert pool.numbers_per_task == 16
        bias = pool.model.get_base_model().blocks[0].mlp.fc1.bias
        pretrained = bias.detach().clone()
        storage = set()
        for name in ("one", "two", "one"):
            pool.activate(name, merge=merge)
            torch.testing.assert_close(outputs(pool.model, X), outputs(of_pool(pool, bank, name), X), rtol=1e-5, atol=1e-5)
            storage.add(bias.data_ptr())
            assert torch.equal(bias, pretrained) == (not merge)
        assert len(storage) == 1  # a task is merged in place of the one before
        pool.deactivate()
        assert torch.equal(bias, pretrained)
        assert torch.equal(outputs(pool.model, X), outputs(tiny_vit().eval(), X))

    @pytest.mark.parametrize("merged", [None, "slot", "ordinary"])
    def test_a_task_for_each_sample(self, merged: str | None) -> None:
        bank = grown()
        pool = filled(bank, "one", "two")
        model = pool.model
        if merged == "slot":
            pool.activate("two", merge=True)
        elif merged == "ordinary":
            learn(model, "default")
            model.set_adapter("default")
            model.merge_adapter(["default"])
        wanted = [of_pool(pool, bank, "two"), tiny_vit().eval(), of_pool(pool, bank, "one"), of_pool(pool, bank, "two")]
        with torch.no_grad():
            found = model(X, task_ids=pool.ids(["two", None, "one", "two"]))
        for row, plain in enumerate(wanted):
            torch.testing.assert_close(found[row], outputs(plain, X)[row], rtol=1e-4, atol=1e-4)

    def test_images_and_norms_of_convolutional_networks(self) -> None:
        """Where the bias does not lie along the last dimension."""
        plain = seeded(BatchNorms)
        sources = [{n: p for n, p in source(i, lambda: seeded(BatchNorms)).items()} for i in range(2)]
        bank = grow_bias_bank(plain, sources)
        fields = {"target_modules": ["conv"], "group_size": 1, "partners": [BiasConfig(bank=bank)]}
        pool = TaskPool(get_recast_model(seeded(BatchNorms), RecastConfig(**fields)).eval())
        for seed, name in enumerate(("one", "two")):
            row = pool.add(name)
            pool.table.data[row] = torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(seed))
        x = images()
        with torch.no_grad():
            both = pool.model(x, task_ids=pool.ids(["one", "two"]))
            for row, name in enumerate(("one", "two")):
                with pool.use(name):
                    torch.testing.assert_close(pool.model(x)[row], both[row], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(both, outputs(plain.eval(), x), atol=1e-2)

    def test_gradients_of_a_mixed_batch_are_those_of_the_tasks_alone(self) -> None:
        bank = grown()
        pool = filled(bank, "one", "two")
        model = pool.model.double()
        pool.requires_grad_()
        x = X.double()
        model(x, task_ids=pool.ids(["one", "one", "two", "two"])).square().sum().backward()
        for name, rows in (("one", slice(0, 2)), ("two", slice(2, 4))):
            alone = get_recast_model(tiny_vit(), config(bank)).double()
            with torch.no_grad():
                for place, parameter in offsets(alone).items():
                    parameter.copy_(pool.coefficients(name)[f"{place}.bias"])
                for module, layer in layers_of(alone).items():
                    layer.recast_coefficients["default"].copy_(pool.coefficients(name)[module][None])
            alone(x[rows]).square().sum().backward()
            for place, parameter in offsets(alone).items():
                found = pool.table.grad[pool.row(name), pool.part_of(f"{place}.bias")]
                torch.testing.assert_close(found, parameter.grad, rtol=1e-6, atol=1e-8)

    def test_tasks_are_put_in_from_everywhere(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        model = on(bank, "first")
        model.save_pretrained(tmp_path)
        pool = TaskPool(get_recast_model(tiny_vit(), config(bank), "layout").eval())
        pool.add("folder", tmp_path / "first")
        pool.model.load_adapter(str(tmp_path / "first"), "adapter")
        pool.add("adapter")
        pool.remove("adapter")
        pool.add("adapter", "adapter")
        pool.add("entries", load_file(tmp_path / "first" / "adapter_model.safetensors"))
        pool.add("fresh", config(bank))
        plain = RecastConfig(target_modules=["fc1"], group_size=1)
        without = get_recast_model(tiny_vit(), plain, "without")
        randomise(without, "without")
        without.save_pretrained(tmp_path)
        pool.add("without", tmp_path / "without")  # no coefficients of biases: zeros
        for name in ("folder", "adapter", "entries"):
            with pool.use(name):
                assert torch.equal(outputs(pool.model, X), outputs(model, X))
        with pool.use("without"):
            torch.testing.assert_close(outputs(pool.model, X), outputs(without.eval(), X), rtol=1e-5, atol=1e-5)
        pool.save(tmp_path / "pool.safetensors")
        again = TaskPool(get_recast_model(tiny_vit(), config(bank)).eval())
        assert again.load(tmp_path / "pool.safetensors") == pool.names
        assert torch.equal(again.table[:5], pool.table[:5])

    def test_tasks_on_an_earlier_version(self, tmp_path: Path) -> None:
        first = grown().save(tmp_path / "bank")
        model = on(first, "old")
        model.save_pretrained(tmp_path)
        second = extend_bank(first, tiny_vit(), [source(8)]).save(tmp_path / "bank")
        pool = TaskPool(get_recast_model(tiny_vit(), config(second)).eval())
        pool.add("old", tmp_path / "old")
        assert {len(v) for name, v in pool.coefficients("old").items() if name.endswith("bias")} == {4}
        with pool.use("old"):
            torch.testing.assert_close(outputs(pool.model, X), outputs(model, X), rtol=1e-5, atol=1e-5)

    def test_other_biases_are_refused(self, tmp_path: Path) -> None:
        bank = grown().save(tmp_path / "bank")
        other = on(grown((5, 6)).save(tmp_path / "other"), "other")
        other.save_pretrained(tmp_path)
        pool = TaskPool(get_recast_model(tiny_vit(), config(bank)).eval())
        for given in (tmp_path / "other", config(grown((5, 6))), config(bank, partners=["bias"])):
            with pytest.raises(RecastBankError, match="coefficients of biases that are not the pool's"):
                pool.add("other", given)
        plain = TaskPool(get_recast_model(tiny_vit(), RecastConfig(target_modules=["fc1"], group_size=1)).eval())
        with pytest.raises(RecastBankError, match=r"are not the pool's\n  task: those of the bank .*\n  pool: none"):
            plain.add("other", tmp_path / "other")
        pool.save(tmp_path / "pool.safetensors")
        with pytest.raises(RecastBankError, match="coefficients of biases that are not the pool's"):
            plain.load(tmp_path / "pool.safetensors")
        assert (len(pool), len(plain)) == (0, 0)

    def test_a_coefficient_for_each_bias(self) -> None:
        fields = {"target_modules": ["fc1"], "group_size": 1, "partners": ["bias"]}
        model = get_recast_model(tiny_vit(), RecastConfig(**fields), "first").eval()
        learn(model, "first")
        pool = TaskPool(model)
        assert pool.numbers_per_task == 4 + 16
        pool.add("copy", "first")
        wanted = outputs(model, X)
        with pool.use("copy", merge=True):
            torch.testing.assert_close(outputs(model, X), wanted, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            mixed = model(X, task_ids=pool.ids(["copy", None, "copy", None]))
        torch.testing.assert_close(mixed[0::2], wanted[0::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[1::2], outputs(tiny_vit().eval(), X)[1::2], rtol=1e-5, atol=1e-5)

    def test_compiled(self) -> None:
        """Another task, or other tasks in a batch, compile nothing anew."""
        pool = filled(grown(), "one", "two")
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(pool.model, backend=counter)
        wanted = {}
        for name in ("one", "two"):
            pool.activate(name)
            with torch.no_grad():
                wanted[name] = compiled(X)
                torch.testing.assert_close(wanted[name], pool.model(X), rtol=1e-5, atol=1e-5)
        once = counter.frame_count
        pool.activate("one")
        with torch.no_grad():
            assert torch.equal(compiled(X), wanted["one"])
        assert counter.frame_count == once == 1


class TestArithmetic:
    def test_a_weighted_sum(self) -> None:
        bank = grown()
        model = on(bank, "one")
        model.add_adapter("two", config(bank))
        learn(model, "two", 2)
        model.base_model.add_weighted_adapter(["one", "two"], [0.25, -1.5], "mix")
        own = [offsets(model, name) for name in ("one", "two", "mix")]
        for place, values in own[2].items():
            torch.testing.assert_close(values, 0.25 * own[0][place] - 1.5 * own[1][place], rtol=1e-6, atol=1e-6)
        model.set_adapter("mix")
        torch.testing.assert_close(outputs(model, X), outputs(by_hand(bank, model, "mix").eval(), X), rtol=1e-5, atol=1e-5)
        pool = filled(bank, "one", "two")
        row = pool.add_weighted_adapter(["one", "two"], [0.25, -1.5], "mix")
        torch.testing.assert_close(pool.table[row], 0.25 * pool.table[0] - 1.5 * pool.table[1])

    def test_other_banks_are_refused(self) -> None:
        model = on(grown(), "one")
        model.add_adapter("two", config(grown((5, 6, 7))))
        model.add_adapter("three", RecastConfig(target_modules=["fc1"], group_size=1))
        for other in ("two", "three"):
            with pytest.raises(RecastBankError, match="tasks on different banks"):
                model.base_model.add_weighted_adapter(["one", other], [1, 1], "mix")
            assert "mix" not in model.peft_config


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
        learn(model)
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


@pytest.mark.parametrize(
    ("name", "channels"), [(name, k.channels) for k in KINDS if "norm" in k.name and not k.reads_sum for name in k.names]
)
def test_norms_of_timm_may_be_named(name: str, channels: int) -> None:
    """The bias of each kind of norm, moved by a coefficient, is that of a plain norm with the moved bias."""
    kind = getattr(timm.layers.norm, name.rpartition(".")[2])
    made = {"GroupNorm": lambda: kind(6, num_groups=2)}.get(kind.__name__, lambda: kind(6))
    build = lambda: nn.Sequential(nn.Conv2d(3, 6, 1), made())  # noqa: E731
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    if channels == -1:
        build = lambda: nn.Sequential(nn.Linear(3, 6), made())  # noqa: E731
        x = x.movedim(1, -1)
    torch.manual_seed(1)
    plain = build().eval()
    nn.init.uniform_(plain[1].bias, 0.5, 1.5)
    fields = {"target_modules": ["0"], "partners": [BiasConfig(target_modules=["1"])]}
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(**fields)).eval()
    with torch.no_grad():
        offsets(model)["1"].fill_(0.5)
        plain[1].bias *= 1.5
        torch.testing.assert_close(model(x), plain(x))
