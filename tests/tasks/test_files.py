"""A task's files are small and exact, and a damaged one gives a clear error and leaves the model as it was."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KINDS, converted, layers_of, outputs, randomise, seeded, state, tiny_vit, vit_input
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_peft import RecastBaseMismatchError, RecastConfig, RecastError, RecastLoadError, RecastTargetError, get_recast_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task on qkv of a tiny transformer, with a head of its own."""
    folder = tmp_path_factory.mktemp("task")
    save(folder, modules_to_save=["head"])
    return folder


def save(folder: Path, randomised: bool = True, **config: Any) -> PeftModel:
    model = converted(**config)
    if randomised:
        randomise(model)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1
    model.save_pretrained(folder)
    return model


def copied(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for name in (WEIGHTS, CONFIG):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    entries = load_file(folder / WEIGHTS)
    entries = change(entries) or entries
    save_file(entries, folder / WEIGHTS)
    return folder


def rewrite_config(folder: Path, **fields: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def refused(
    folder: Path, error: type[Exception] | tuple[type[Exception], ...] = RecastError, match: str | None = None
) -> Exception:
    """Loading into a plain model, and beside another task, fails with ``error`` and changes nothing."""
    plain = tiny_vit()
    before, start = state(plain), outputs(plain, vit_input())
    with pytest.raises(error, match=match) as first:
        PeftModel.from_pretrained(plain, folder)
    assert state(plain) == before
    assert torch.equal(outputs(plain, vit_input()), start)
    model = converted()
    randomise(model, seed=9)
    before, live = state(model), outputs(model, vit_input())
    with pytest.raises(error, match=match):
        model.load_adapter(folder, "second")
    assert state(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(outputs(model, vit_input()), live)
    return first.value


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


KEY = "base_model.model.blocks.2.attn.qkv.recast_coefficients"


class TestADamagedFile:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda e: e.pop(KEY), r"(?s)does not fit.*missing: .*blocks\.2\.attn\.qkv.*Nothing was loaded"),
            (lambda e: e.clear(), "missing"),
            (lambda e: e.pop("base_model.model.head.bias"), r"missing: base_model\.model\.head\.bias"),
            (lambda e: e.update(foreign=torch.zeros(3)), "unexpected: .*foreign"),
            (
                lambda e: e.update({"base_model.model.blocks.1.mlp.fc1.weight": torch.zeros(16, 8)}),
                r"unexpected: .*fc1\.weight",
            ),
            (lambda e: e.update({"base_model.model.blocks.1.mlp.fc1.bias": torch.zeros(16)}), r"unexpected: .*fc1\.bias"),
            (lambda e: e.update({"base_model.model.blocks.2.attn.lora_A": torch.zeros(3)}), "unexpected: .*lora_A"),
            (lambda e: e.update({KEY: e[KEY].T.contiguous()}), r"\(2, 1\) given, \(1, 2\) expected"),
            (lambda e: e.update({KEY: torch.zeros(0)}), "wrongly shaped"),
            (lambda e: e.update({KEY: torch.tensor([[0.0, float("nan")]])}), "not finite: .*blocks.2"),
            (lambda e: e.update({KEY: torch.tensor([[float("inf"), 0.0]])}), "not finite"),
            (lambda e: e.update({"base_model.model.head.weight": torch.zeros(4, 8)}), r"\(4, 8\) given, \(3, 8\) expected"),
            (
                lambda e: {k.replace("blocks", "layers"): v for k, v in e.items()},
                r"(?s)missing: .*blocks.*unexpected: .*layers",
            ),
        ],
    )
    def test_says_what_is_wrong(self, saved: Path, tmp_path: Path, change: Callable, message: str) -> None:
        folder = copied(saved, tmp_path)
        entries = load_file(folder / WEIGHTS)
        replaced = change(entries)
        save_file(replaced if isinstance(replaced, dict) and replaced else entries, folder / WEIGHTS)
        refused(folder, RecastLoadError, message)

    @pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
    @pytest.mark.parametrize("keep", [0, 1, 7, 60, 0.3, 0.7, -1])
    def test_that_was_cut_off_is_refused(self, saved: Path, tmp_path: Path, name: str, keep: float) -> None:
        folder = copied(saved, tmp_path)
        content = (folder / name).read_bytes()
        end = int(keep * len(content)) if isinstance(keep, float) else keep
        (folder / name).write_bytes(content[:end])
        refused(folder, (RecastError, ValueError, TypeError) if name == CONFIG else RecastLoadError)

    def test_that_is_missing_is_refused(self, saved: Path, tmp_path: Path) -> None:
        folder = copied(saved, tmp_path)
        (folder / WEIGHTS).unlink()
        refused(folder, RecastLoadError, f"its numbers are missing, there is no {WEIGHTS} in its folder")

    def test_of_another_format_is_refused(self, saved: Path, tmp_path: Path) -> None:
        folder = copied(saved, tmp_path)
        (folder / WEIGHTS).write_bytes(b"<html>404</html>" * 10)
        refused(folder, RecastLoadError, "damaged or incomplete")

    @settings(max_examples=40)
    @given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def test_with_a_flipped_bit_never_ends_in_a_bare_error(
        self, saved: Path, tmp_path_factory: Any, place: float, bit: int
    ) -> None:
        folder = copied(saved, tmp_path_factory.mktemp("flipped"))
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        (folder / WEIGHTS).write_bytes(bytes(content))
        plain = tiny_vit()
        before = state(plain)
        try:
            PeftModel.from_pretrained(plain, folder)
        except RecastError:
            assert state(plain) == before


class TestADamagedConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"groups": "blocks"}, "groups"),
            ({"groups": {"x": "blocks.0.attn.qkv"}}, "groups"),
            ({"groups": {"x": [1, 2]}}, "groups"),
            ({"groups": {"x": ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]}}, "differ in shape"),
            ({"groups": {"x": ["blocks.0.attn.qkv", "blocks.0.attn.nothing"]}}, "does not have"),
            ({"groups": {"x": ["blocks.0.norm"]}}, "vector"),
            ({"groups": {"x": ["blocks.0.attn.qkv"]}}, "unexpected|wrongly shaped"),
            ({"num_coefficient_sets": 2}, r"\(2, 2\) expected"),
            ({"num_coefficient_sets": "1"}, "num_coefficient_sets"),
            ({"num_templates": 1}, r"\(1, 1\) expected"),
            ({"recipes": {"x": {}}}, "no such bank"),
            ({"base_fingerprint": {"blocks.0.attn.qkv": "???"}}, "not a fingerprint"),
            ({"base_fingerprint": {"blocks.0.attn.qkv": 5}}, "base_fingerprint"),
            ({"base_fingerprint": [1]}, "base_fingerprint"),
            ({"target_modules": 5}, "target_modules"),
            ({"modules_to_save": "head"}, "modules_to_save"),
            ({"modules_to_save": None}, "unexpected"),
            ({"bias": 5}, "bias"),
            ({"mimicry": 5}, "mimicry"),
            ({"seed": "x"}, "seed"),
            ({"keep_base_weights": 3}, "keep_base_weights"),
        ],
    )
    def test_is_refused_by_name(self, saved: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
        refused(rewrite_config(copied(saved, tmp_path), **fields), RecastError, message)

    @pytest.mark.parametrize("value", [None, 7, "NOT_A_METHOD", []])
    def test_of_an_unknown_type_is_refused_by_PEFT(self, saved: Path, tmp_path: Path, value: Any) -> None:
        folder = rewrite_config(copied(saved, tmp_path), peft_type=value)
        with pytest.raises((ValueError, KeyError, TypeError)):
            PeftModel.from_pretrained(tiny_vit(), folder)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_with_values_of_any_type_never_ends_in_a_bare_error(
        self, saved: Path, tmp_path_factory: Any, data: st.DataObject
    ) -> None:
        folder = copied(saved, tmp_path_factory.mktemp("odd"))
        stored = json.loads((folder / CONFIG).read_text())
        own = sorted(set(stored) - set(PeftConfig.__dataclass_fields__))
        values = st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-2, 9)
            | st.floats(-2, 2)
            | st.sampled_from(["", "head", "all-linear", "é"]),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["mix", "x"]), inner, max_size=2),
            max_leaves=4,
        )
        field = data.draw(st.sampled_from(own))
        rewrite_config(folder, **{field: data.draw(values)})
        plain = tiny_vit()
        before = state(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                PeftModel.from_pretrained(plain, folder)
            except RecastError:
                assert state(plain) == before


class TestTheBase:
    def test_with_other_weights_is_refused_by_name(self, saved: Path) -> None:
        plain = tiny_vit(seed=1)
        before = state(plain)
        with pytest.raises(
            RecastBaseMismatchError, match=r"(?s)all of them differ.*blocks\.0\.attn\.qkv.*fingerprint"
        ) as caught:
            PeftModel.from_pretrained(plain, saved)
        assert "fingerprint of the model" in str(caught.value)
        assert state(plain) == before

    def test_of_which_one_module_differs_is_refused_by_its_name(self, saved: Path) -> None:
        plain = tiny_vit()
        with torch.no_grad():
            plain.blocks[2].attn.qkv.weight += 0.05 * torch.randn(24, 8)
        with pytest.raises(RecastBaseMismatchError, match=r"1 of 4 differ, the first is blocks\.2\.attn\.qkv"):
            PeftModel.from_pretrained(plain, saved)

    def test_with_two_modules_exchanged_is_refused(self, saved: Path) -> None:
        plain = tiny_vit()
        blocks = plain.blocks
        blocks[0].attn.qkv.weight, blocks[1].attn.qkv.weight = blocks[1].attn.qkv.weight, blocks[0].attn.qkv.weight
        with pytest.raises(RecastBaseMismatchError, match="2 of 4"):
            PeftModel.from_pretrained(plain, saved)

    def test_of_a_converted_model_is_checked_too(self, saved: Path) -> None:
        model = get_recast_model(tiny_vit(seed=1), RecastConfig(target_modules=["qkv"]))
        model.merge_adapter()
        before = state(model)
        with pytest.raises(RecastBaseMismatchError):
            model.load_adapter(saved, "second")
        assert state(model) == before

    @pytest.mark.parametrize("learned", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_in_another_dtype_is_accepted(self, tmp_path: Path, learned: torch.dtype, loaded: torch.dtype) -> None:
        model = get_recast_model(tiny_vit().to(learned), RecastConfig(target_modules=["qkv"]))
        randomise(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_vit().to(loaded), tmp_path).eval()
        expected = outputs(model.float().eval(), vit_input())
        result = outputs(again, vit_input().to(loaded)).float()
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.03)

    @pytest.mark.parametrize("templates", [None, 1])
    def test_in_another_dtype_of_a_compressed_task_is_accepted(self, tmp_path: Path, templates: int | None) -> None:
        save(tmp_path, num_templates=templates)
        again = PeftModel.from_pretrained(tiny_vit().bfloat16(), tmp_path)
        assert layers_of(again)

    def test_that_is_shallower_is_refused(self, saved: Path) -> None:
        with pytest.raises(RecastTargetError, match=r"1 of 4 target modules.*blocks\.3"):
            PeftModel.from_pretrained(tiny_vit(depth=3), saved)

    def test_that_is_wider_is_refused(self, saved: Path) -> None:
        with pytest.raises(RecastError):
            PeftModel.from_pretrained(tiny_vit(width=16), saved)

    def test_is_not_asked_for_where_nothing_was_learned_yet(self, tmp_path: Path) -> None:
        save(tmp_path, randomised=False)
        with pytest.warns(UserWarning, match="not learned anything yet"):
            PeftModel.from_pretrained(tiny_vit(seed=1), tmp_path)

    def test_of_which_a_weight_is_not_finite_is_refused(self) -> None:
        plain = tiny_vit()
        plain.blocks[1].attn.qkv.weight.data[0, 0] = float("nan")
        before = state(plain)
        with pytest.raises(RecastLoadError, match="infinite or undefined"):
            get_recast_model(plain, RecastConfig(target_modules=["qkv"]))
        assert state(plain) == before

    def test_has_the_fingerprint_of_its_pretrained_weights_even_while_merged(self, tmp_path: Path) -> None:
        model = converted()
        randomise(model)
        model.merge_adapter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PEFT unmerges it
            model.add_adapter("second", RecastConfig(target_modules=["qkv"]))
        randomise(model, "second", 2)
        model.save_pretrained(tmp_path)
        assert PeftModel.from_pretrained(tiny_vit(), tmp_path / "second")


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


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_resized_embeddings_are_stored_with_the_task_and_come_back(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}

    def bert() -> nn.Module:
        return seeded(lambda: BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes)))

    def resized() -> nn.Module:
        model = bert()
        model.resize_token_embeddings(24)
        return model

    model = get_recast_model(resized(), RecastConfig(target_modules=["query"])).eval()
    randomise(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(resized(), tmp_path).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
