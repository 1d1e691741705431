"""A task's files are loaded on the base that they were learned on, and on no other."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from models import converted, layers_of, outputs, randomise, state, tiny_vit, vit_input
from peft import PeftModel
from saved_tasks import save

from recast_peft import RecastBaseMismatchError, RecastConfig, RecastError, RecastLoadError, RecastTargetError, get_recast_model


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

    def test_is_asked_for_where_a_probe_learned(self, tmp_path: Path) -> None:
        config = RecastConfig(num_classes=2, train_coefficients=False)
        get_recast_model(tiny_vit(), config).save_pretrained(tmp_path)
        with pytest.raises(RecastBaseMismatchError, match="learned on other pretrained weights"):
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
