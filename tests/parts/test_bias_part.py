"""Coefficients of biases in a model: merged, undone, beside other tasks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from grown_biases import WIDTHS, X, by_hand, config, grown, learn_offsets, offsets, on, source
from models import layers_of, outputs, randomise, tiny_vit
from partner_cases import CASES, ON_BIASES, is_partners, learn, learned, partner_tensors
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_peft import (
    BiasConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    create_recast_optimizer,
    extend_bank,
    get_recast_model,
    load_bank,
)
from recast_peft.names import modules_of
from recast_peft.parts.bias_part import TaskBiases
from recast_peft.parts.partner import TaskPartners


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.endswith("bias") and not is_partners(n)}


@pytest.mark.parametrize("grows", [False, True], ids=["one each", "of a bank"])
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_coefficients_keep_their_precision_in_a_model_of_any_dtype(
    grows: bool, dtype: torch.dtype, expected: torch.dtype
) -> None:
    """As coefficients of weights do: steps below 1/256 would be lost, and what a file holds rounded for good."""
    model = on(grown()) if grows else learned(ON_BIASES[0])
    before = {key: value.detach().clone() for key, value in offsets(model).items()}
    assert before
    after = offsets(model.to(dtype))
    assert {value.dtype for value in after.values()} == {expected}
    assert all(torch.equal(after[key], value.to(expected)) for key, value in before.items())


@pytest.mark.parametrize("name", ON_BIASES)
class TestMergingBiases:
    def test_gives_the_live_output_and_goes_back_to_the_same_tensors(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        before = {n: (p.data_ptr(), p.detach().clone()) for n, p in biases(model).items()}
        live = outputs(model, inputs)
        for _ in range(3):
            model.merge_adapter(safe_merge=True)
            torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
            moved = [n for n, p in biases(model).items() if not torch.equal(p, before[n][1])]
            assert len(moved) == CASES[name].numbers
            model.merge_adapter()  # what is merged is not merged twice
            torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
            model.unmerge_adapter()
            assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in biases(model).items())
            assert torch.equal(outputs(model, inputs), live)

    def test_unloading_a_merged_model_gives_the_pretrained_one(self, name):
        model = learned(name)
        model.merge_adapter()
        plain = model.unload()
        assert torch.equal(outputs(plain, CASES[name].inputs()), outputs(CASES[name].build(), CASES[name].inputs()))

    def test_of_two_tasks_adds_what_both_change(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        parts = [partner_tensors(model, task) for task in ("first", "second")]
        pretrained = {n: p.detach().clone() for n, p in biases(model).items()}
        model.merge_adapter(["first"])
        model.merge_adapter(["second"])
        for key in parts[0]:
            place = key.partition(":")[0]
            (own,) = [n for n in pretrained if f"{place}.b" in n]
            expected = pretrained[own] * (1 + parts[0][key] + parts[1][key])
            torch.testing.assert_close(biases(model)[own].detach(), expected)

    def test_ends_where_another_task_is_put_in_force_or_added(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        model.add_adapter("bare", RecastConfig(target_modules=list(CASES[name].targets)))
        randomise(model, "bare", seed=4)
        inputs, before, live = CASES[name].inputs(), {n: p.detach().clone() for n, p in biases(model).items()}, {}
        for task in ("first", "second", "bare"):
            model.set_adapter(task)
            live[task] = outputs(model, inputs)
        for task in ("second", "bare"):
            model.set_adapter("first")
            model.merge_adapter()
            with pytest.warns(UserWarning, match="Unmerging the model first"):
                model.set_adapter(task)
            assert torch.equal(outputs(model, inputs), live[task])
        model.set_adapter("first")
        model.merge_adapter()
        merged = outputs(model, inputs)
        model.add_adapter("third", CASES[name].config)
        assert torch.equal(outputs(model, inputs), merged)  # a task is put in beside it, and changes nothing
        model.unmerge_adapter()
        assert torch.equal(outputs(model, inputs), live["first"])
        assert all(torch.equal(p, before[n]) for n, p in biases(model).items())

    def test_is_undone_where_tasks_are_switched_off(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        live = outputs(model, inputs)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), outputs(CASES[name].build(), inputs))
        assert torch.equal(outputs(model, inputs), live)

    def test_that_fails_leaves_no_bias_merged(self, name):
        model = learned(name)
        before = {n: p.detach().clone() for n, p in biases(model).items()}
        for layer in layers_of(model).values():
            layer.recast_coefficients["default"].data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert all(torch.equal(p, before[n]) for n, p in biases(model).items())

    def test_moves_with_the_model(self, name):
        model = learned(name)
        model.merge_adapter()
        model.to(torch.float64)
        inputs = CASES[name].inputs().double()
        model.unmerge_adapter()
        expected = learned(name).to(torch.float64)
        torch.testing.assert_close(outputs(model, inputs), outputs(expected, inputs))


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
        learn_offsets(model, "new", 2)
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
        with pytest.raises(RecastConfigError, match="expected one of 'weights', 'biases', 'readout'"):
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
        learn_offsets(model, "two", 2)
        model.add_adapter("other", config(grown((5, 6))))
        learn_offsets(model, "other", 3)
        holders = [h for h in modules_of(model, TaskPartners) if isinstance(h, TaskBiases)]
        assert len(holders) == 20
        assert all(len(set(holder.templates)) == 2 and len(holder.templates) == 3 for holder in holders)
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
        assert all({t.bank.fingerprint for t in holder.templates} == {bank.fingerprint} for holder in holders)
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
        assert not modules_of(plain, TaskPartners)

    def test_a_copy_has_coefficients_of_its_own(self) -> None:
        model = on(grown())
        twin = copy.deepcopy(model)
        before = outputs(model, X)
        learn_offsets(twin, seed=9)
        assert torch.equal(outputs(model, X), before)
        torch.testing.assert_close(outputs(twin, X), outputs(by_hand(grown(), twin).eval(), X), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        bank = grown()
        model = get_recast_model(tiny_vit().to(dtype), config(bank)).eval()
        learn_offsets(model)
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
        model = on(grown(depth=1), depth=1)
        wanted = outputs(model, X)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), wanted, rtol=1e-5, atol=1e-5)


def test_biases_that_modules_share_are_merged_each_with_its_own_change() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain[1].bias = plain[0].bias
    shared, x = plain[0].bias, torch.randn(3, 4)
    expected = copy.deepcopy(plain)
    model = get_recast_model(plain, RecastConfig(target_modules=["0", "1"], partners=[BiasConfig(target_modules=["0", "1"])]))
    for holder, factor in zip(modules_of(model, TaskPartners), (0.5, -2.0), strict=True):
        holder.modules_to_save["default"].offset.data.fill_(factor)
        expected[int(holder.place)].bias = nn.Parameter((1 + factor) * shared.detach())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected(x))
        model.double()
        torch.testing.assert_close(model(x.double()), expected.double()(x.double()))
        model.unmerge_adapter()
        assert plain[0].base_layer.bias is plain[1].base_layer.bias is shared
        assert shared.dtype == torch.float64
