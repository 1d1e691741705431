"""Banks of readouts: principal directions of what layers of several blocks read, found again by hand."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import Repeated, small_transformer
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from recast_peft import (
    ReadoutConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    RecastTargetError,
    extend_bank,
    get_recast_model,
    growth_report,
    load_bank,
    readout_bank,
)
from recast_peft.banks.card import made_by


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, **options).eval()


class Constant(nn.Module):
    """Gives the same for every input, but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, x.shape[-1]).expand_as(x) + 1e-8 * x


def small_resnet_of_transformers() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3)).eval()


def pictures(count: int = 30, size: int = 160) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read_by_hand(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """The fourth root of the mean square over positions of what the named layers read, and the model's own features."""
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_hook(lambda m, a, y, n=n: seen.update({n: a[0]})) for n in names]
    features = model(x)
    for handle in handles:
        handle.remove()
    spots = {3: (1,), 4: (2, 3)}
    squares = [seen[n].square().mean(spots[seen[n].ndim]) for n in names]
    return [*((s + s.mean(1, keepdim=True) / 1000) ** 0.25 for s in squares), features]


def templates_of(bank: Any) -> tuple[Tensor, Tensor]:
    group = bank.groups["readout"]
    return group.grown.tensors[0].float(), group.offset


class TestDirections:
    def test_features_are_the_principal_components_of_all_inputs_counted_equally_and_whitened_in_part(self) -> None:
        model, x = vit(), pictures()
        names = [f"blocks.{i}.mlp.fc2" for i in range(6)]  # which read the neurons of the MLP: the most in a block
        bank = readout_bank(model, x, progress=False)
        group = bank.groups["readout"]
        assert group.members == (*names, "head")
        assert group.widths == (model.blocks[0].mlp.fc2.in_features,) * 6 + (64,)  # type: ignore[index, union-attr]
        found = read_by_hand(model, names, x)
        centred = [values - values.mean(0) for values in found]
        counts = [0.5, 0.5, 1, 1, 1, 1, 1]  # the first third of the blocks, the others, the model's own features
        scaled = [n * values / values.norm(dim=1).mean() for n, values in zip(counts, centred, strict=True)]
        flat = torch.cat(scaled, dim=1).double()
        left, sizes, _ = torch.linalg.svd(
            flat, full_matrices=False
        )  # principal components, by numpy's way and not by a Gram matrix
        wanted = left[:, :29] * sizes[:29] ** 0.75  # each divided by the fourth root of its standard deviation
        templates, offset = templates_of(bank)
        assert len(templates) == 29  # thirty examples about their mean have no more directions
        features = torch.cat(found, dim=1) @ templates.T + offset
        assert (features.norm(dim=1).mean() - found[-1].norm(dim=1).mean() / 2).abs() < 1e-4
        scale = found[-1].norm(dim=1).mean() / 2 / wanted.norm(dim=1).mean()
        torch.testing.assert_close(features.abs().double(), (wanted * scale).abs(), atol=2e-4, rtol=1e-3)

    def test_more_examples_than_numbers_give_the_same_components(self) -> None:
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=0).eval()
        x = pictures(500, 32)
        bank = readout_bank(model, x, progress=False)
        names = list(bank.groups["readout"].members[:-1])
        blocks = dict.fromkeys(".".join(name.split(".")[:3]) for name, _ in model.named_modules() if name.count(".") >= 3)
        assert [name.rpartition(".")[0] for name in names] == [block for block in blocks if block.startswith("blocks.")]
        modules = dict(model.named_modules())
        for name in names:  # the last of the layers of its block that read most channels
            convolutions = [
                (n, m.in_channels) for n, m in modules.items() if isinstance(m, nn.Conv2d) and n.startswith(name[:11])
            ]
            assert name == max(reversed(convolutions), key=lambda found: found[1])[0]
        templates, offset = templates_of(bank)
        features = (torch.cat(read_by_hand(model, names, x), dim=1) @ templates.T + offset).double()
        assert features.mean(0).abs().max() < 1e-4
        spread = features.T @ features
        assert torch.all(spread.diagonal().diff() < 1e-4 * spread.diagonal()[0])  # the largest first
        assert (spread - spread.diagonal().diag()).abs().max() < 1e-4 * spread.diagonal()[0]

    def test_a_layer_that_always_reads_the_same_counts_for_nothing(self) -> None:
        model = vit()
        model.blocks[2].mlp.act = Constant()  # type: ignore[index, union-attr]
        names = ["blocks.1.attn.qkv", "blocks.2.mlp.fc2"]
        templates, _ = templates_of(readout_bank(model, pictures(), target_modules=names, progress=False))
        assert templates[:, :64].any()
        assert not templates[:, 64:-64].any()
        assert templates[:, -64:].any()

    def test_what_is_padded_does_not_count(self) -> None:
        model = small_transformer("bert", num_labels=2)
        ids = torch.randint(3, 20, (24, 8), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[:, 5:] = 0
        other = ids.clone()
        other[:, 5:] = 7
        first, second = (readout_bank(model, {"input_ids": i, "attention_mask": mask}, progress=False) for i in (ids, other))
        torch.testing.assert_close(first.groups["readout"].offset, second.groups["readout"].offset, atol=1e-4, rtol=1e-4)
        assert first.groups["readout"].widths == second.groups["readout"].widths

    def test_positions_that_the_model_cuts_off_do_not_count_either(self) -> None:
        class Trimmed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, self.classifier = small_transformer("bert").base_model, nn.Identity()

            def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
                longest = int(mask.sum(1).max())
                states = self.encoder(input_ids=input_ids[:, :longest], attention_mask=mask[:, :longest]).last_hidden_state
                return self.classifier(states[:, 0])

        ids = torch.randint(3, 20, (24, 8), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[::2, 3:], mask[:, 6:] = 0, 0
        other = ids.masked_fill(mask == 0, 7)
        first, second = (readout_bank(Trimmed().eval(), {"input_ids": i, "mask": mask}, progress=False) for i in (ids, other))
        torch.testing.assert_close(first.groups["readout"].offset, second.groups["readout"].offset, atol=1e-4, rtol=1e-4)

    def test_at_most_sixteen_blocks_are_read_evenly_spaced_with_the_last(self) -> None:
        bank = readout_bank(vit(depth=24), pictures(4), progress=False)
        wanted = (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23)
        assert bank.groups["readout"].members[:-1] == tuple(f"blocks.{i}.mlp.fc2" for i in wanted)

    def test_the_innermost_blocks_are_read(self) -> None:
        model = timm.create_model("test_convnext", num_classes=0).eval()  # stages have weights beside their blocks
        members = readout_bank(model, pictures(4, 64), progress=False).groups["readout"].members
        counts = [len(stage.blocks) for stage in model.stages]  # type: ignore[union-attr, arg-type]
        assert members == (*(f"stages.{i}.blocks.{j}.mlp.fc2" for i, n in enumerate(counts) for j in range(n)), "head.fc")

    def test_a_model_without_numbered_blocks_has_its_layers_read(self) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.classifier = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.classifier(self.second(self.first(x).relu()).mean((2, 3)))

        bank = readout_bank(Plain(), pictures(4, 16), progress=False)
        assert bank.groups["readout"].members == ("first", "second", "classifier")
        assert bank.groups["readout"].widths == (3, 8, 4)

    def test_a_layer_that_reads_other_rows_than_samples_is_passed_over(self) -> None:
        class Routed(nn.Module):
            """Gives its widest layer some positions of all samples in one, as experts are given."""

            def __init__(self) -> None:
                super().__init__()
                self.up, self.down, self.wide = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.down(self.up(x).relu()) + self.wide(x[:, :2].flatten(0, 1).repeat(1, 2)).mean()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks, self.classifier = nn.ModuleList(Routed() for _ in range(2)), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = block(x)
                return self.classifier(x.mean(1))

        bank = readout_bank(Model(), torch.randn(5, 3, 4), progress=False)
        assert bank.groups["readout"].members[:-1] == ("blocks.0.down", "blocks.1.down")

    def test_layers_are_chosen_on_few_examples(self) -> None:
        model, sizes = vit(), []
        handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        readout_bank(model, pictures(30, 160), batch_size=20, progress=False)
        handle.remove()
        assert sizes == [8, 20, 10]  # then all of them in batches

    def test_named_modules_are_read(self) -> None:
        bank = readout_bank(vit(), pictures(4), target_modules=["blocks.4.attn.proj", "blocks.1.mlp.fc1"], progress=False)
        assert bank.groups["readout"].members == ("blocks.1.mlp.fc1", "blocks.4.attn.proj", "head")

    @pytest.mark.parametrize("named", [None, ["second"]])
    def test_where_the_classifier_reads_positions_nothing_is_pooled(self, named: list[str] | None) -> None:
        class Tagger(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.classifier = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.classifier(self.second(self.first(x).relu()))

        bank = readout_bank(Tagger(), torch.randn(5, 3, 4), target_modules=named, progress=False)
        assert bank.groups["readout"].pools is False
        assert bank.mimicry["examples"] == 15  # each position is one

    def test_the_model_and_its_mode_are_left_as_they_were(self) -> None:
        model = vit().train()
        before = copy.deepcopy(model.state_dict())
        readout_bank(model, pictures(4), progress=False)
        assert model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


class TestFiles:
    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        bank = readout_bank(vit(), pictures(6), progress=False)
        loaded = load_bank(bank.save(tmp_path / "bank").name or "")
        assert loaded.fingerprint == bank.fingerprint
        assert loaded.is_readout
        assert all(map(torch.equal, templates_of(bank), templates_of(loaded)))
        assert loaded.base_fingerprint == bank.base_fingerprint
        assert made_by(loaded.mimicry) == "a readout of 6 examples, 100 % of whose variance it keeps"

    def test_templates_are_in_half_precision_where_that_holds_them(self) -> None:
        model = vit()
        assert readout_bank(model, pictures(6), progress=False).groups["readout"].grown.tensors[0].dtype == torch.float16  # type: ignore[union-attr]
        with torch.no_grad():
            model.blocks[3].mlp.fc2.weight.mul_(1e-12)  # type: ignore[index, union-attr]
            model.blocks[3].mlp.fc1.weight.mul_(1e12)  # type: ignore[index, union-attr]
        templates = readout_bank(model, pictures(6), progress=False).groups["readout"].grown.tensors[0]  # type: ignore[union-attr]
        assert templates.dtype == torch.float32
        assert templates.all()  # none is rounded to zero

    def test_a_bank_that_does_not_say_how_it_reads_is_refused(self, tmp_path: Path) -> None:
        bank = readout_bank(vit(), pictures(6), progress=False)
        bank = replace(bank, groups={"readout": replace(bank.groups["readout"], pools=None)})
        with pytest.raises(RecastLoadError, match="pools"):
            load_bank(bank.save(tmp_path / "bank").name or "")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda header: header.update(fingerprint="0" * 16), "is not the bank that it says it is"),
            (lambda header: header["groups"]["readout"]["members"].reverse(), "does not say which pretrained weight head"),
        ],
    )
    def test_a_header_that_was_changed_by_hand_is_refused(self, change: Any, message: str, tmp_path: Path) -> None:
        readout_bank(vit(), pictures(6), progress=False).save(tmp_path)
        path = tmp_path / "recast_bank.json"
        header = json.loads(path.read_text())
        del header["checksum"]
        change(header)
        path.write_text(json.dumps(header))
        with pytest.raises(RecastLoadError, match=message):
            load_bank(tmp_path)

    def test_a_readout_has_no_coefficients(self) -> None:
        assert readout_bank(vit(), pictures(6), progress=False).groups["readout"].num_coefficients == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (pictures(1), "two examples or more; given: 1"),
            (pictures(1).repeat(3, 1, 1, 1), "the same for all examples"),
            (pictures(2) * float("nan"), "not finite"),
            ({"x": pictures(2), "attn_mask": torch.ones(3)}, "2, 3 examples: expected as many in each"),
            ([1, 2], "data is list"),
            ({}, "an empty dictionary"),
            (torch.tensor(1.0), "expected a tensor"),
        ],
        ids=["one", "equal", "no numbers", "other lengths", "list", "nothing", "number"],
    )
    def test_data_that_cannot_be_used(self, data: Any, message: str) -> None:
        with pytest.raises(RecastConfigError, match=message):
            readout_bank(vit(), data, progress=False)

    @pytest.mark.parametrize("place", ["blocks.1.mlp.fc2", "head"])
    def test_a_model_that_computes_no_numbers(self, place: str) -> None:
        model = vit()
        model.get_submodule("norm" if place == "head" else "blocks.1.mlp.fc1").bias.data.fill_(float("nan"))  # type: ignore
        with pytest.raises(RecastConfigError, match=f"{re.escape(place)} reads numbers that are not finite"):
            readout_bank(model, pictures(4), target_modules=["blocks.1.mlp.fc2"], head_module="head", progress=False)

    def test_modules_that_are_not_there(self) -> None:
        for names in (["block"], ["blocks.0"], ["norm"], [], 5, "blocks.0.mlp.fc2"):
            with pytest.raises(RecastTargetError, match=re.escape(f"target_modules={names!r}")):
                readout_bank(vit(), pictures(4), target_modules=names, progress=False)  # type: ignore[arg-type]
        with pytest.raises(RecastConfigError, match="batch_size"):
            readout_bank(vit(), pictures(4), batch_size=None, progress=False)  # type: ignore[arg-type]

    def test_modules_that_are_not_called(self) -> None:
        model = vit()
        model.unused = nn.Linear(4, 4)  # type: ignore[assignment]
        with pytest.raises(RecastTargetError, match="unused is not called"):
            readout_bank(model, pictures(4), target_modules=["unused"], progress=False)

    def test_a_layer_of_a_shared_block_has_any_of_its_names(self):
        model, x = nn.Sequential(Repeated(), nn.Identity()), torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        found = [
            readout_bank(model, x, target_modules=[name], head_module="1", progress=False)
            for name in ("0.blocks.0.0", "0.tail.0")
        ]
        assert found[0].groups["readout"].members == ("0.blocks.0.0", "1")
        assert found[0].fingerprint == found[1].fingerprint

    def test_a_classifier_that_begins_with_a_flattening(self) -> None:
        model, x = small_resnet_of_transformers(), {"pixel_values": pictures(4, 32)}
        with pytest.raises(RecastTargetError, match=r"classifier reads \(4, \d+, 1, 1\).*head_module"):
            readout_bank(model, x, progress=False)
        bank = readout_bank(model, x, head_module="classifier.1", progress=False)
        assert bank.groups["readout"].members[-1] == "classifier.1"
        config = RecastConfig(num_classes=2, head_module="classifier.1", partners=[ReadoutConfig(bank=bank)])
        task = get_recast_model(small_resnet_of_transformers(), config)
        assert task(**x).logits.shape == (4, 2)

    def test_a_converted_model(self) -> None:
        with pytest.raises(RecastConfigError, match="readout_bank needs the plain pretrained model"):
            readout_bank(get_recast_model(vit(), RecastConfig()), pictures(4), progress=False)

    def test_it_neither_grows_nor_is_a_bank_of_weights(self) -> None:
        bank = readout_bank(vit(), pictures(4), progress=False)
        with pytest.raises(RecastBankError, match="a readout does not grow"):
            extend_bank(bank, vit(), [vit(1)])
        with pytest.raises(RecastBankError, match="no grown templates"):
            growth_report(bank)
        with pytest.raises(RecastBankError, match=r"partners=\[ReadoutConfig\(bank=...\)\]"):
            get_recast_model(vit(), RecastConfig(bank=bank))
