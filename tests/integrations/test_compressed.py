"""A compressed model: stored and loaded without its pretrained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fitted_models import FIELDS, X, fitted
from models import outputs, randomise, tiny_vit
from torch import nn

from recast_peft import (
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    get_recast_model,
    load_compressed_model,
    save_compressed_model,
)
from recast_peft.banks.files import BANK_WEIGHTS


class TestCompressedModel:
    @pytest.mark.parametrize("name", ["typo", ""])
    def test_of_an_unknown_task_is_not_stored(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(RecastConfigError, match=f"the model has no RECAST task '{name}'; its tasks: default"):
            save_compressed_model(fitted(), tmp_path / "model", name)
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize("keep", [False, True])
    def test_is_stored_without_the_released_weights(self, tmp_path: Path, keep: bool) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(**FIELDS, keep_base_weights=keep)).eval()
        randomise(model)
        save_compressed_model(model, tmp_path / "model")
        model.save_pretrained(tmp_path / "task")
        with torch.device("meta"):
            empty: nn.Module = tiny_vit()
        loaded = load_compressed_model(empty, tmp_path / "model").eval()
        loaded.load_adapter(tmp_path / "task", "task")
        loaded.set_adapter("task")
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        plain_bytes = sum(p.numel() * 4 for p in tiny_vit().parameters())
        held = sum(p.numel() * 4 for n, p in loaded.named_parameters() if "coefficients" not in n)
        saved = 4 * (2 * 3 * 8 * 8 + 2 * 8 * 16)  # one of two weights in each of two groups, for qkv and fc1
        assert held == plain_bytes - saved
        stored = (tmp_path / "model" / "recast_backbone.safetensors", tmp_path / "model" / BANK_WEIGHTS)
        assert sum(p.stat().st_size for p in stored) < plain_bytes - saved + 6000  # the files' headers

    def test_trains_and_merges(self, tmp_path: Path) -> None:
        save_compressed_model(fitted(), tmp_path)
        model = load_compressed_model(tiny_vit(seed=9), tmp_path)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(5):
            loss = model(X).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        after = outputs(model.eval(), X)
        torch.testing.assert_close(outputs(model.merge_and_unload(), X), after)

    def test_is_refused_for_another_architecture(self, tmp_path: Path) -> None:
        save_compressed_model(fitted(), tmp_path)
        with pytest.raises(RecastLoadError, match="another shape|does not fit"):
            load_compressed_model(tiny_vit(width=16), tmp_path)
        with pytest.raises(RecastLoadError, match="another architecture"):
            load_compressed_model(tiny_vit(depth=6), tmp_path)
        (tmp_path / "recast_backbone.safetensors").unlink()
        with pytest.raises(RecastLoadError, match="recast_backbone.safetensors is not there"):
            load_compressed_model(tiny_vit(), tmp_path)

    def test_beside_another_bank_is_refused(self, tmp_path: Path) -> None:
        save_compressed_model(fitted(), tmp_path)
        fitted(seed=1).save_bank(tmp_path)  # over the bank of the compressed model
        with pytest.raises(RecastLoadError, match="belongs to another bank"):
            load_compressed_model(tiny_vit(), tmp_path)

    def test_that_fails_leaves_the_backbone_as_it_was(self, tmp_path: Path) -> None:
        save_compressed_model(fitted(), tmp_path)
        plain = tiny_vit(seed=9)
        before = {name: (id(p), p.clone()) for name, p in plain.named_parameters()}
        with pytest.raises(RecastConfigError):
            load_compressed_model(plain, tmp_path, adapter_name="a.b/../c")
        after = dict(plain.named_parameters())
        assert after.keys() == before.keys()
        assert all(id(after[name]) == identity and torch.equal(after[name], p) for name, (identity, p) in before.items())

    def test_stores_tied_weights_once(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 500,
        }
        config = LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
        model = get_recast_model(LlamaForCausalLM(config), RecastConfig(num_templates=1)).eval()
        save_compressed_model(model, tmp_path)
        assert (tmp_path / "recast_backbone.safetensors").stat().st_size < 4 * 16 * 500 * 2
        loaded = load_compressed_model(LlamaForCausalLM(config).eval(), tmp_path).eval()
        tokens = torch.arange(5)[None]
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
        base = loaded.get_base_model()
        assert base.lm_head.weight is base.model.embed_tokens.weight

    def test_is_not_stored_while_merged(self, tmp_path: Path) -> None:
        model = fitted()
        model.merge_adapter()
        with pytest.raises(RecastBankError, match="unmerge_adapter"):
            save_compressed_model(model, tmp_path)
