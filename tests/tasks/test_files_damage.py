"""A damaged file gives a clear error and leaves the model as it was."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import converted, state, tiny_vit
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from saved_tasks import CONFIG, WEIGHTS, copied, refused, rewrite, rewrite_config, save
from torch import nn

from recast_peft import ReadoutConfig, RecastConfig, RecastError, RecastLoadError, TaskPool, get_recast_model, readout_bank

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


class TestAFileWhoseConfigSaysSomethingElse:
    @pytest.mark.parametrize("bias", ["all", "recast_only"])
    def test_every_bias_is_there_or_none(self, tmp_path: Path, bias: str) -> None:
        """A missing one would stay what it is in the model, in silence."""
        save(tmp_path, bias=bias)
        rewrite(tmp_path, lambda e: {k: v for k, v in e.items() if not k.endswith("blocks.1.attn.qkv.base_layer.bias")})
        refused(tmp_path, RecastLoadError, r"missing: .*blocks\.1\.attn\.qkv\.bias")

    @pytest.mark.parametrize("config", [{"num_classes": 3}, {"modules_to_save": ["head"]}], ids=["a classifier", "a module"])
    def test_a_bias_of_its_own_is_there_under_a_name_that_the_model_has(self, tmp_path: Path, config: dict[str, Any]) -> None:
        model = save(tmp_path, **config)
        rewrite(tmp_path, lambda e: {k: v for k, v in e.items() if not k.endswith("head.bias")})
        before = state(model)
        with pytest.raises(RecastLoadError, match=r"missing: base_model\.model\.head\.bias"):
            model.load_adapter(tmp_path, "default")
        with pytest.raises(RecastLoadError, match=r"missing: base_model\.model\.head\.bias"):
            set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
        assert state(model) == before

    def test_a_partner_without_numbers_of_its_own_is_still_named(self, tmp_path: Path) -> None:
        def vit() -> nn.Module:
            torch.manual_seed(0)
            return timm.create_model("test_vit", num_classes=0).eval()

        bank = readout_bank(vit(), torch.randn(20, 3, 160, 160), progress=False).save(tmp_path / "bank")
        config = RecastConfig(num_classes=3, partners=[ReadoutConfig(bank=bank)], init_weights=False)
        model = get_recast_model(vit(), config, "task").eval()
        model.save_pretrained(tmp_path)
        rewrite_config(tmp_path / "task", partners=None)
        match = "other partners in its config than it was saved with\n  config:     none\n  saved with: readout"
        with pytest.raises(RecastLoadError, match=match):
            PeftModel.from_pretrained(vit(), tmp_path / "task", "task")
        with pytest.raises(RecastLoadError, match=match):
            TaskPool(get_recast_model(vit(), RecastConfig(num_classes=3)), like="default").add("task", tmp_path / "task")
        rewrite(tmp_path / "task", dict)  # a file without what the metadata say, as earlier versions wrote it
        PeftModel.from_pretrained(vit(), tmp_path / "task", "task")

    def test_coefficients_that_are_shared_are_equal(self, tmp_path: Path) -> None:
        save(tmp_path)
        rewrite_config(tmp_path, coefficient_sharing="all")
        refused(tmp_path, RecastLoadError, "are one tensor there, and the file has other numbers for each")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: None, "None, no tensor"),
        (lambda value: value.tolist(), "no tensor"),
        (lambda value: value.numpy(), "no tensor"),
        (lambda value: {"nested": value}, "no tensor"),
        (lambda value: value.to("meta"), "on the meta device and holds no numbers"),
        (lambda value: value.to_sparse(), r"layout torch\.sparse_coo"),
    ],
)
def test_a_state_dict_with_something_else_than_numbers_sets_nothing(damage: Any, message: str) -> None:
    model = converted(num_classes=3)
    numbers = {key: torch.ones_like(value) for key, value in get_peft_model_state_dict(model).items()}
    before, last = state(model), list(numbers)[-1]
    with pytest.raises(RecastLoadError, match=rf"task 'default': {last} is .*{message}"):
        set_peft_model_state_dict(model, {**numbers, last: damage(numbers[last])})
    with pytest.raises(RecastLoadError, match="5 is no name of an entry"):
        set_peft_model_state_dict(model, {**numbers, 5: torch.ones(1)})
    assert state(model) == before


@pytest.mark.parametrize("given", ["", "x", "x" * 100_000, "/etc/passwd", "QUJD"])
@pytest.mark.parametrize("field", ["base_fingerprint", "surroundings_fingerprint"])
def test_what_is_no_fingerprint_is_told_with_the_field_and_shortly(field: str, given: str, tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields[field] = {**fields[field], next(iter(fields[field])): given} if field == "base_fingerprint" else given
    file.write_text(json.dumps(fields))
    message = rf"(?s)the task at '.*': {field}.*=.* is not a fingerprint|RecastConfig\({field}=.*expected a text of 1 to 2,000"
    with pytest.raises(RecastError, match=message) as raised:
        PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert len(str(raised.value)) < 1000
