"""Torch's multi-head attention as a wrapped module."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from every_kind import build
from models import Attention, AttentionNet, Chain, layers_of, outputs, randomise, reference_model, seeded, vit_input
from torch import nn

from recast_peft import RecastBankError, RecastConfig, get_recast_model


class TestMultiHeadAttention:
    def attention(self, **options: Any) -> tuple[nn.Module, Any]:
        plain = seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2, **options), nn.MultiheadAttention(8, 2, **options)))
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=["0", "1"]))
        randomise(model)
        return plain, model

    def test_is_targeted_with_both_of_its_projections(self) -> None:
        _, model = self.attention()
        assert sorted(layers_of(model)) == ["0", "0.out_proj", "1", "1.out_proj"]

    @pytest.mark.parametrize("merge", [False, True])
    def test_is_taken_out_with_what_a_task_owns_whole_in_it(self, merge: bool) -> None:
        plain = seeded(lambda: AttentionNet(True))
        config = RecastConfig(target_modules=["0", "1"], modules_to_save=["attns.0.out_proj"])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        own = model.get_base_model().attns[0].out_proj.modules_to_save["default"]
        own.weight.data += 0.3
        left = model.merge_and_unload() if merge else model.unload()
        assert {type(module) for module in left.modules()} == {type(module) for module in plain.modules()}
        changed = {key for key, value in left.state_dict().items() if not torch.equal(value, plain.state_dict()[key])}
        assert changed == ({"attns.0.out_proj.weight"} if merge else set())

    def test_is_taken_out_with_the_tasks_that_are_named(self) -> None:
        _, model = self.attention()
        model.add_adapter("other", RecastConfig(target_modules=["0", "1"]))
        randomise(model, "other", 3)
        twin = copy.deepcopy(model)
        twin.set_adapter("other")
        wanted, found = twin.merge_and_unload().state_dict(), model.merge_and_unload(adapter_names=["other"]).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())

    def test_reads_the_output_projection_of_the_tasks_that_are_merged_or_of_the_batch(self) -> None:
        """It never calls it."""
        plain = seeded(lambda: nn.Sequential(OrderedDict(body=AttentionNet(True), head=nn.Linear(8, 8))))
        model = get_recast_model(plain, RecastConfig(target_modules=["head"]), "plain").eval()
        model.add_adapter("own", RecastConfig(target_modules=["head"], modules_to_save=["attns.0.out_proj"]))
        x, seen = torch.randn(2, 5, 8), {}
        model.get_base_model().body.attns[0].out_proj.modules_to_save["own"].weight.data += 0.3
        for name in ("own", "plain"):
            model.set_adapter(name)
            seen[name] = outputs(model, x)
        assert not torch.allclose(seen["own"], seen["plain"], atol=1e-2)
        model.merge_adapter(["own"])
        assert torch.equal(outputs(model, x), seen["own"])
        model.unmerge_adapter()
        assert torch.equal(outputs(model, x), seen["plain"])
        assert torch.equal(outputs(model, x, adapter_names=["own", "own"]), seen["own"])
        assert torch.equal(outputs(model, x, adapter_names=["plain", "__base__"]), seen["plain"])
        with pytest.raises(RecastBankError, match=r"the model reads body\.attns\.0\.out_proj instead of calling it"):
            outputs(model, x, adapter_names=["plain", "own"])

    def test_can_leave_out_the_output_projection(self) -> None:
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
        model = get_recast_model(model, RecastConfig(target_modules=["0"], exclude_modules=["out_proj"]))
        assert sorted(layers_of(model)) == ["0"]

    def test_can_target_the_output_projection_alone(self) -> None:
        plain = seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2)))
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=["out_proj"]))
        assert sorted(layers_of(model)) == ["0.out_proj"]
        randomise(model)
        x = torch.randn(3, 2, 8)
        expected = reference_model(plain, model)[0](x, x, x)[0]
        torch.testing.assert_close(model.base_model.model[0](x, x, x)[0], expected, rtol=1e-5, atol=1e-6)

    def test_has_no_weight_where_the_module_has_none(self) -> None:
        _, model = self.attention()
        assert not hasattr(layers_of(model)["0"], "weight")

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "call",
        [
            {},
            {"need_weights": False},
            {"average_attn_weights": False},
            {"is_causal": True, "attn_mask": True},
            {"key_padding_mask": True},
        ],
        ids=str,
    )
    def test_takes_every_argument(self, batch_first: bool, bias: bool, call: dict[str, Any]) -> None:
        plain, model = self.attention(batch_first=batch_first, bias=bias)
        query, key = torch.randn(4, 4, 8), torch.randn(4, 4, 8)
        call = dict(call)
        if "attn_mask" in call:
            call["attn_mask"] = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
        if "key_padding_mask" in call:
            call["key_padding_mask"] = torch.tensor([[False, False, True, True]] * 4)
        expected = reference_model(plain, model)[1](query, key, key, **call)
        result = model.base_model.model[1](query, key, key, **call)
        for mine, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("mask", [False, True])
    def test_in_an_encoder_layer_is_not_passed_over_by_the_fast_path(self, mask: bool) -> None:
        plain, model, inputs = build("torch's transformer encoder")
        randomise(model)
        padding = torch.tensor([[False] * 5, [False, False, False, True, True]]) if mask else None
        expected = reference_model(plain, model).encoder(inputs, src_key_padding_mask=padding)
        with torch.no_grad():
            result = model.base_model.model.encoder(inputs, src_key_padding_mask=padding)
        keep = slice(None) if padding is None else ~padding
        torch.testing.assert_close(result[keep], expected[keep], rtol=1e-5, atol=1e-5)


def test_attention_in_a_module_of_ones_own_works() -> None:
    plain = seeded(lambda: Chain([Attention(8), Attention(8)]))
    model = get_recast_model(copy.deepcopy(plain), RecastConfig()).eval()
    assert len(layers_of(model)) == 4
    randomise(model)
    x = vit_input()
    torch.testing.assert_close(outputs(model, x), outputs(reference_model(plain, model), x), rtol=1e-5, atol=1e-6)
