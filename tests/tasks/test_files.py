"""A task's files are small and exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import KINDS, converted, layers_of, outputs, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from saved_tasks import CONFIG, WEIGHTS, rewrite, rewrite_config, save
from torch import Tensor, nn

from recast_peft import BiasConfig, RecastConfig, RecastConfigError, RecastLoadError, get_recast_model


class TestTheFiles:
    def test_hold_the_coefficients_by_the_names_of_the_plain_model(self, tmp_path: Path) -> None:
        model = save(tmp_path)
        entries = load_file(tmp_path / WEIGHTS)
        assert set(entries) == {f"base_model.model.blocks.{i}.attn.qkv.recast_coefficients" for i in range(4)}
        for name, layer in layers_of(model).items():
            entry = entries[f"base_model.model.{name}.recast_coefficients"]
            assert torch.equal(entry, layer.recast_coefficients["default"])
            assert entry.dtype == torch.float32

    def test_hold_the_head_and_nothing_else_beside_them(self, saved: Path) -> None:
        names = {name for name in load_file(saved / WEIGHTS) if "recast" not in name}
        assert names == {"base_model.model.head.weight", "base_model.model.head.bias"}

    def test_of_a_vit_small_take_at_most_four_kilobytes(self, tmp_path: Path) -> None:
        timm = pytest.importorskip("timm")
        model = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32)
        task = get_recast_model(model, RecastConfig(target_modules=["qkv"]))
        randomise(task)
        task.save_pretrained(tmp_path)
        sizes = {name: (tmp_path / name).stat().st_size for name in (WEIGHTS, CONFIG)}
        assert task.get_nb_trainable_parameters()[0] == 24
        assert sum(sizes.values()) <= 4096, sizes

    def test_come_back_to_the_last_bit(self, saved: Path) -> None:
        model = save(saved, modules_to_save=["head"])
        loaded = PeftModel.from_pretrained(tiny_vit(), saved).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert not torch.equal(outputs(loaded, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_are_the_same_bytes_again_after_a_round(self, saved: Path, tmp_path: Path) -> None:
        PeftModel.from_pretrained(tiny_vit(), saved, is_trainable=True).save_pretrained(tmp_path)
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()

    @given(
        st.integers(1, 5),
        st.integers(1, 4),
        st.integers(1, 3),
        st.sampled_from([None, 1, 2]),
        st.sampled_from([["qkv"], "all-attention", "all-mlp", "all-linear", None]),
        st.integers(0, 100),
    )
    def test_bring_any_task_back(
        self, tmp_path_factory: Any, depth: int, size: int, sets: int, templates: int | None, targets: Any, seed: int
    ) -> None:
        folder = tmp_path_factory.mktemp("any")
        templates = None if templates is None else min(templates, size)
        model = converted(
            depth=depth, group_size=size, num_coefficient_sets=sets, num_templates=templates, target_modules=targets
        )
        randomise(model, seed=seed)
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_vit(depth=depth), folder).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))
        assert loaded.peft_config["default"].groups == model.peft_config["default"].groups

    def test_honour_the_groups_of_the_task_and_not_the_size_in_the_config(self, tmp_path: Path) -> None:
        model = save(tmp_path, group_size=3)
        rewrite_config(tmp_path, group_size=1)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    def test_honour_the_groups_of_the_task_beside_others(self, tmp_path: Path) -> None:
        model = save(tmp_path, group_size=4)
        other = converted(group_size=1)
        other.load_adapter(tmp_path, "second")
        other.set_adapter("second")
        assert torch.equal(outputs(other, vit_input()), outputs(model, vit_input()))

    def test_can_be_those_of_a_merged_model(self, saved: Path, tmp_path: Path) -> None:
        model = PeftModel.from_pretrained(tiny_vit(), saved).eval()
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        assert (tmp_path / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()

    def test_can_be_old_pickles(self, tmp_path: Path) -> None:
        model = converted()
        randomise(model)
        model.save_pretrained(tmp_path, safe_serialization=False)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    def test_can_be_loaded_without_memory_first(self, saved: Path) -> None:
        ordinary = PeftModel.from_pretrained(tiny_vit(), saved).eval()
        model = PeftModel.from_pretrained(tiny_vit(), saved, low_cpu_mem_usage=True).eval()
        assert not any(p.is_meta for p in model.parameters())
        assert torch.equal(outputs(model, vit_input()), outputs(ordinary, vit_input()))

    @pytest.mark.parametrize("bias", ["all", "recast_only"])
    def test_hold_the_biases_that_were_asked_for(self, tmp_path: Path, bias: str) -> None:
        model = converted(bias=bias)
        trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
        assert all(("qkv" in name) for name in trained) == (bias == "recast_only")
        randomise(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter += 0.25
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    def test_can_be_read_in_another_process_without_this_library_s_model(self, saved: Path) -> None:
        assert isinstance(PeftConfig.from_pretrained(saved), RecastConfig)


class TestAStateDict:
    def test_goes_out_and_in(self) -> None:
        first, second = converted(), converted()
        randomise(first)
        result = set_peft_model_state_dict(second, get_peft_model_state_dict(first))
        assert not result.unexpected_keys
        assert torch.equal(outputs(first, vit_input()), outputs(second, vit_input()))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda e: e.pop(next(iter(e))), r"missing: .*blocks\.0\.attn\.qkv"),
            (lambda e: e.update({"base_model.model.blocks.9.attn.qkv.recast_coefficients": torch.zeros(1, 2)}), "unexpected"),
            (lambda e: e.update({next(iter(e)): torch.zeros(2, 2)}), r"wrongly shaped: .*\(2, 2\) given, \(1, 2\) expected"),
            (lambda e: next(iter(e.values())).fill_(float("nan")), "not finite"),
        ],
    )
    def test_that_does_not_fit_is_refused(self, change: Callable, message: str) -> None:
        model = converted()
        randomise(model)
        entries = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
        change(entries)
        live = outputs(model, vit_input())
        with pytest.raises(RecastLoadError, match=message):
            set_peft_model_state_dict(model, entries)
        assert torch.equal(outputs(model, vit_input()), live)


class Nested(nn.Module):
    """A model with a part named base_layer inside another part, as a wrapper around timm's DLA."""

    def __init__(self) -> None:
        super().__init__()
        self.dla = nn.ModuleDict({"base_layer": nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), "level": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dla["level"](self.dla["base_layer"](x)))


def test_a_part_of_the_model_named_base_layer_is_no_layer_of_a_tuner(tmp_path: Path) -> None:
    model = get_recast_model(seeded(Nested), RecastConfig(target_modules="all-linear")).eval()
    randomise(model)
    expected = outputs(model, vit_input())
    assert not torch.allclose(expected, outputs(seeded(Nested), vit_input()), atol=1e-3)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {
        f"base_model.model.dla.{name}.recast_coefficients" for name in (*(f"base_layer.{i}" for i in range(3)), "level")
    }
    assert torch.equal(outputs(PeftModel.from_pretrained(seeded(Nested), tmp_path).eval(), vit_input()), expected)
    plain = copy.deepcopy(model).merge_and_unload()
    assert plain.state_dict().keys() == Nested().state_dict().keys()
    torch.testing.assert_close(outputs(plain, vit_input()), expected)
    back = model.unload()
    assert all(torch.equal(value, seeded(Nested).state_dict()[name]) for name, value in back.state_dict().items())


def test_a_nested_attention_is_stored_by_its_plain_names(tmp_path: Path) -> None:
    kind = KINDS["multi-head attention"]
    model = get_recast_model(seeded(kind.build), RecastConfig(target_modules=kind.targets))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {
        f"base_model.model.attns.{i}.{leaf}recast_coefficients" for i in range(2) for leaf in ("", "out_proj.")
    }


def test_loading_changes_no_weight_of_the_base(saved: Path) -> None:
    plain = tiny_vit()
    before = copy.deepcopy(plain.state_dict())
    back = PeftModel.from_pretrained(plain, saved).unload()
    # a module that is saved whole stays that of the task (PEFT's rule for all its methods)
    assert all(torch.equal(v, before[k]) for k, v in back.state_dict().items() if not k.startswith("head"))


def test_many_entries_at_fault_are_counted(tmp_path: Path) -> None:
    save(tmp_path, depth=6)
    rewrite(tmp_path, lambda entries: {k: torch.zeros(3, 3) for k in entries})
    with pytest.raises(RecastLoadError, match=r"wrongly shaped: .*\.\.\. \(6 in all\)"):
        PeftModel.from_pretrained(tiny_vit(depth=6), tmp_path)


@pytest.mark.parametrize("owned", [None, ["word_embeddings"]])
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_resized_embeddings_are_stored_with_the_task_and_come_back(owned: list[str] | None, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}

    def bert() -> nn.Module:
        return seeded(lambda: BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)))

    def resized() -> nn.Module:
        model = bert()
        model.resize_token_embeddings(24)
        return model

    model = get_recast_model(resized(), RecastConfig(target_modules=["query"], modules_to_save=owned)).eval()
    model.add_adapter("v1.2", RecastConfig(target_modules=["query"]))
    randomise(model)
    ids = torch.arange(16, 24)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.requires_grad
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        for name, folder in {"default": tmp_path, "v1.2": tmp_path / "v1.2"}.items():
            model.set_adapter(name)
            loaded = PeftModel.from_pretrained(resized(), folder).eval()
            loaded.load_adapter(folder, "again")
            for again in ("default", "again"):
                loaded.set_adapter(again)
                assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_numbers_are_not_put_into_a_task_that_is_merged(tmp_path: Path) -> None:
    model = converted().eval()
    randomise(model, size=0.2)
    numbers = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    model.merge_adapter()
    before = outputs(model, vit_input())
    with pytest.raises(RecastConfigError, match="'default' is merged: call unmerge_adapter"):
        set_peft_model_state_dict(model, numbers)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, vit_input()), before)


class NamedLikeWrappers(nn.Module):
    """Modules whose names are those that PEFT's layers and containers give to what is inside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("base_layer", "original_module", "modules_to_save")})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.block.values():
            x = module(x)
        return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "all"},
        {"target_modules": ["modules_to_save"], "modules_to_save": ["base_layer", "original_module"]},
        {"partners": [BiasConfig(target_modules=["base_layer", "original_module", "modules_to_save"])]},
        {"lora_config": LoraConfig(r=1)},
    ],
    ids=str,
)
def test_modules_may_be_called_as_PEFTs_wrappers_call_what_is_inside(options: dict, tmp_path: Path) -> None:
    config = {"target_modules": ["base_layer", "original_module", "modules_to_save"], **options}
    model = get_recast_model(seeded(NamedLikeWrappers), RecastConfig(**config))
    with torch.no_grad():
        for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * (place + 1))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values()) == trained
    x = torch.ones(1, 4)
    loaded = PeftModel.from_pretrained(seeded(NamedLikeWrappers), tmp_path)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert not torch.allclose(outputs(loaded, x), outputs(seeded(NamedLikeWrappers), x))
