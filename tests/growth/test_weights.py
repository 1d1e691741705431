"""Banks that grow: principal components of what sources did to the weights, beside the pretrained weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from grown_weights import EVERY_FORM, TARGETS, X, composed_by_hand, config, fitted_bank, grown, lora, on
from hub_server import HubServer
from models import layers_of, outputs, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from recast_peft import (
    BiasConfig,
    PracticeTask,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    StoredBank,
    TaskPool,
    compress_adapters,
    convert_to_lora,
    extend_bank,
    fit_bank,
    get_recast_model,
    grow_bank,
    grow_bias_bank,
    growth_report,
    load_bank,
    load_compressed_model,
    plan_recast,
    practice_bank,
    push_bank_to_hub,
    push_task_to_hub,
    random_bank,
    readout_bank,
    save_compressed_model,
)
from recast_peft.growth.sources import task_vectors
from recast_peft.mimicry import DataAware, Gradient


class TestGrowing:
    def test_all_components_span_the_sources(self) -> None:
        bank = grown()
        targets = {t.name: t for t in plan_recast(tiny_vit(), config()).candidates}
        vectors = [task_vectors(tiny_vit(), lora(seed), targets) for seed in range(3)]
        for group in bank.groups.values():
            assert group.grown is not None
            assert len(group.grown) == 3
            basis = torch.stack([t.flatten() for t in group.grown.dense()], 1).double()
            for vector in vectors:
                move = vector[group.members[0]].flatten().double()
                found = basis @ torch.linalg.lstsq(basis, move[:, None]).solution
                assert torch.allclose(found[:, 0], move, atol=1e-5)

    def test_a_group_shares_its_templates(self) -> None:
        bank = grow_bank(tiny_vit(), [lora(0), lora(1)], config(group_size=2), num_templates=3)
        group = next(iter(bank.groups.values()))
        assert len(group.members) == 2
        assert group.num_templates == 5
        model = on(bank)
        assert torch.allclose(outputs(model, X), outputs(composed_by_hand(bank, model), X), atol=1e-5)

    def test_modules_that_no_source_moved(self) -> None:
        only_qkv = lora(0, targets=["qkv"])
        with_plain = grow_bank(tiny_vit(), [only_qkv], config())
        without = grow_bank(tiny_vit(), [only_qkv], config(), plain_templates=False)
        assert {g.num_templates for n, g in with_plain.groups.items() if "fc1" in n} == {1}
        assert not [name for name in without.groups if "fc1" in name]
        with pytest.raises(RecastBankError, match="none of the 1 sources moved"):
            grow_bank(tiny_vit(), [tiny_vit()], config())

    def test_without_a_config_no_two_modules_share_templates(self) -> None:
        assert {len(group.members) for group in grow_bank(tiny_vit(), [lora(0)]).groups.values()} == {1}

    @pytest.mark.parametrize("fields", [{"num_templates": 0}, {"rank": 0}, {"rank": True}])
    def test_wrong_numbers_are_refused(self, fields: dict) -> None:
        with pytest.raises(RecastConfigError, match="at least 1"):
            grown(**fields)

    def test_a_switch_that_is_none_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="plain_templates='no': expected True or False"):
            grown(plain_templates="no")


class TestExtending:
    def versions(self, **fields: object) -> tuple[StoredBank, StoredBank]:
        first = grown(seeds=(0, 1), num_templates=2, **fields)
        return first, extend_bank(first, tiny_vit(), [lora(2), lora(3)], num_templates=2)

    @pytest.mark.parametrize("rank", [None, 2])
    def test_the_first_templates_stay(self, rank: int | None) -> None:
        first, second = self.versions(rank=rank)
        assert second.version == 2
        assert second.fingerprint != first.fingerprint
        for name, group in second.groups.items():
            old = first.groups[name].grown
            assert group.grown is not None
            assert old is not None
            assert len(group.grown) == 4
            assert all(torch.equal(a[: len(old)], b) for a, b in zip(group.grown.tensors, old.tensors, strict=True))
        earlier = second.at(first.fingerprint)
        assert earlier is not None
        assert StoredBank(earlier.groups).fingerprint == first.fingerprint

    def test_new_templates_are_new_directions(self) -> None:
        first = grown(seeds=(0, 1))
        with pytest.warns(UserWarning, match="spans all that the 2 sources moved: it stays version 1"):
            assert extend_bank(first, tiny_vit(), [lora(0), lora(1)]) is first
        second = extend_bank(first, tiny_vit(), [lora(1), lora(2)])
        assert {len(g.grown) for g in second.groups.values()} == {3}
        assert all(g.grown.energy[-1] == pytest.approx(1, abs=1e-5) for g in second.groups.values())

    @pytest.mark.parametrize("rank", [None, 2])
    def test_an_old_task_works_on_the_newer_bank_to_the_last_bit(self, tmp_path: Path, rank: int | None) -> None:
        first, second = self.versions(rank=rank)
        model = on(first.save(tmp_path / "bank"))
        model.save_pretrained(tmp_path / "old")
        wanted = outputs(model, X)
        second.save(tmp_path / "bank")  # in place of the first
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "old").eval()
        assert torch.equal(outputs(loaded, X), wanted)
        newer = on(load_bank(tmp_path / "bank"), "new", seed=6)  # and beside a task on the new version
        newer.load_adapter(tmp_path / "old", "old")
        newer.set_adapter("old")
        assert torch.equal(outputs(newer.eval(), X), wanted)
        pool = TaskPool(newer, like="new")  # and in a pool of the new version, with zeros for the new templates
        pool.add("from the file", tmp_path / "old")
        pool.add("from the model", "old")
        for name in pool:
            assert all(not row[-2:].any() for row in pool.coefficients(name).values())
            with pool.use(name):
                assert torch.equal(outputs(newer, X), wanted)

    def test_what_cannot_be_extended(self) -> None:
        with pytest.raises(RecastBankError, match="no grown templates"):
            extend_bank(fitted_bank(), tiny_vit(), [lora(0)])
        with pytest.raises(RecastBankError, match="other pretrained weights"):
            extend_bank(grown(), tiny_vit(seed=5), [lora(0)])
        with pytest.raises(RecastBankError, match="none of the 1 sources moved what the bank has templates for"):
            extend_bank(grown(), tiny_vit(), [lora(0, targets=["fc2"])])
        with pytest.raises(RecastConfigError, match="at least one source"):
            extend_bank(grown(), tiny_vit(), [])
        with pytest.raises(RecastConfigError, match="bank is a str: expected a StoredBank"):
            extend_bank("bank", tiny_vit(), [lora(0)])  # type: ignore[arg-type]


class TestWithTheRest:
    def test_a_model_that_calls_all_its_children(self) -> None:
        plain = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
        source = {name: value + 0.1 for name, value in plain.state_dict().items()}
        targets = RecastConfig(target_modules=["0", "2"], group_size=1)
        model = on(grow_bank(plain, [source], targets), model=copy.deepcopy(plain))
        weights = {name: layer.compose(["default"]) for name, layer in layers_of(model).items()}
        hidden = torch.tanh(nn.functional.linear(X, weights["0"], plain[0].bias))
        assert torch.allclose(outputs(model, X), nn.functional.linear(hidden, weights["2"], plain[2].bias), atol=1e-6)
        assert not torch.allclose(outputs(model, X), outputs(plain, X), atol=1e-2)

    def test_a_budget_that_the_bank_exceeds_is_refused(self) -> None:
        bank = grown()
        numbers = growth_report(bank).num_coefficients
        assert plan_recast(tiny_vit(), RecastConfig(bank=bank, max_coefficients=numbers)).num_coefficients == numbers == 32
        with pytest.raises(RecastConfigError, match="needed:  32\n  allowed: 31"):
            get_recast_model(tiny_vit(), RecastConfig(bank=bank, max_coefficients=31))

    @pytest.mark.parametrize(("sharing", "numbers"), [("roles", 16), ("blocks", 16), ("all", 8)])
    def test_coefficients_may_be_shared(self, sharing: str, numbers: int, tmp_path: Path) -> None:
        bank = grow_bank(tiny_vit(), [lora(0), lora(1)], config(group_size=2), num_templates=2).save(tmp_path / "bank")
        model = get_recast_model(tiny_vit(), RecastConfig(bank=bank, coefficient_sharing=sharing)).eval()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers
        randomise(model)
        assert torch.allclose(outputs(model, X), outputs(composed_by_hand(bank, model), X), atol=1e-5)
        model.save_pretrained(tmp_path / "task")
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task").eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        assert (
            sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values() if p.ndim == 2 and len(p) == 1) == numbers
        )

    def test_a_compressed_model_is_no_form_of_it(self, tmp_path: Path) -> None:
        with pytest.raises(RecastBankError, match="adds to the pretrained weights"):
            save_compressed_model(on(grown()), tmp_path / "model")
        assert not (tmp_path / "model").exists()
        grown().save(tmp_path / "bank")
        with pytest.raises(RecastLoadError):
            load_compressed_model(tiny_vit(), tmp_path / "bank")

    @EVERY_FORM
    def test_a_lora_beside_it(self, fields: dict) -> None:
        task = on(grown(**fields), "task")
        both = get_peft_model(task.base_model.model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).eval()
        plain = tiny_vit()
        with torch.no_grad():
            for name, layer in layers_of(task).items():
                delta = layer.get_delta_weight("task")
                added = both.base_model.model.get_submodule(name).get_delta_weight("default")
                assert added.abs().max() > 1e-3
                plain.get_parameter(f"{name}.weight").add_(delta + added)
        wanted = outputs(plain, X)
        assert torch.allclose(outputs(both, X), wanted, atol=1e-5)
        both.merge_adapter()
        assert torch.allclose(outputs(both, X), wanted, atol=1e-5)
        both.unmerge_adapter()
        for name, layer in layers_of(task).items():
            assert torch.equal(layer.pretrained_weight, tiny_vit().get_parameter(f"{name}.weight"))

    def test_low_rank_templates_make_a_lora_without_error(self) -> None:
        """Two templates of rank 1 and no pretrained weight among them: what a task adds has rank 2."""
        model = on(grown(num_templates=2, rank=1, plain_templates=False))
        _, state, report = convert_to_lora(model, 2)
        assert report.worst_relative_error < 1e-5
        lora_model = get_peft_model(tiny_vit(), LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)).eval()
        lora_model.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False)
        assert torch.allclose(outputs(lora_model, X), outputs(model, X), atol=1e-5)
        _, _, report = convert_to_lora(on(grown(num_templates=2, rank=1)), 2)  # the pretrained weight has full rank
        assert report.worst_relative_error > 0.1


class TestOnTheHub:
    def card(self, hub: HubServer, name: str) -> str:
        return hub.repositories[name].find("main").files["README.md"].decode()

    def test_bank_and_task_are_pushed_and_found(self, hub: HubServer, tmp_path: Path) -> None:
        lora(0).save_pretrained(tmp_path / "private" / "flowers")
        bank = grow_bank(tiny_vit(), [tmp_path / "private" / "flowers", (lora(1), "default"), tiny_vit(3)], config(), rank=2)
        push_bank_to_hub(bank, "ada/bank", base_model="ada/vit")
        card = self.card(hub, "ada/bank")
        assert "| Made by | grown from 3 sources: flowers, adapter 'default', weights of TinyVit |" in card
        assert str(tmp_path) not in card
        assert f"| Fingerprint | {bank.fingerprint} |" in card
        model = on(load_bank("ada/bank"))
        push_task_to_hub(model, "ada/birds")
        assert "stored bank `ada/bank`" in self.card(hub, "ada/birds")
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), "ada/birds").eval(), X), outputs(model, X))

    def test_an_older_task_finds_its_version_in_a_newer_bank(self, hub: HubServer) -> None:
        first = grown(seeds=(0, 1), rank=2)
        push_bank_to_hub(first, "ada/bank")
        old = on(load_bank("ada/bank"))
        push_task_to_hub(old, "ada/old")
        second = extend_bank(load_bank("ada/bank"), tiny_vit(), [lora(2)])
        push_bank_to_hub(second, "ada/bank")
        card = self.card(hub, "ada/bank")
        assert "| Version | 2 |" in card
        assert f"| Holds version | 1, fingerprint {first.fingerprint} |" in card
        assert "grown from 3 sources" in card
        assert load_bank("ada/bank").fingerprint == second.fingerprint != first.fingerprint
        again = PeftModel.from_pretrained(tiny_vit(), "ada/old").eval()
        assert torch.equal(outputs(again, X), outputs(old, X))
        again.add_adapter("new", RecastConfig(bank=load_bank("ada/bank")))
        assert {layer.recast_bank["new"].version for layer in layers_of(again).values()} == {2}

    def test_by_the_models_own_verb(self, hub: HubServer) -> None:
        model = on(grown(rank=2))
        stored = model.base_model.push_bank_to_hub("ada/bank")
        assert load_bank("ada/bank").mimicry == stored.mimicry == grown(rank=2).mimicry
        assert model.peft_config["default"].bank_reference["fingerprint"] == stored.fingerprint


MAKERS = {
    "grow_bank": lambda model: grow_bank(model, [lora(0)], config()),
    "extend_bank": lambda model: extend_bank(grow_bank(model, [lora(0)], config()), model, [lora(1)]),
    "grow_bias_bank": lambda model: grow_bias_bank(model, [{k: v + 1 for k, v in model.state_dict().items()}]),
    "compress_adapters": lambda model: compress_adapters(model, [lora(0)], num_templates=1).bank,
    "random_bank": random_bank,
    "fit_bank": lambda model: fit_bank(model, RecastConfig(num_templates=1, mimicry=Gradient(steps=2, progress=False))),
    "load_bank": lambda model: load_bank(random_bank(model).save(tempfile.mkdtemp()).name),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_bank_that_is_made_inside_inference_mode_can_be_trained_on(maker: str) -> None:
    model = tiny_vit()
    with torch.inference_mode():
        bank = MAKERS[maker](model)
    fields = {"partners": [BiasConfig(bank=bank)]} if bank.is_of_biases else {"bank": bank}
    task = get_recast_model(model, RecastConfig(**fields))
    task(X).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in task.parameters())


def practised(model: nn.Module) -> StoredBank:
    class Signs:
        def make(self, data: Tensor, generator: torch.Generator) -> PracticeTask:
            return PracticeTask("signs", data, (data.mean((1, 2)) > 0).long())

    return practice_bank(model, vit_input(64), Signs(), tasks=1, epochs=1, progress=False)


OTHERS = {
    "low rank": lambda model: extend_bank(grow_bank(model, [lora(0)], config(), rank=1), model, [lora(1)]),
    "data_aware": lambda model: fit_bank(
        model, RecastConfig(num_templates=1, mimicry=DataAware(distill_steps=2, progress=False)), [vit_input(8)]
    ),
    "readout_bank": lambda model: readout_bank(model, vit_input(64), progress=False),
    "practice_bank": practised,
}


@pytest.mark.parametrize("maker", [*MAKERS, *OTHERS])
def test_autocast_around_it_does_not_matter(maker: str) -> None:
    make = {**MAKERS, **OTHERS}[maker]
    wanted = make(tiny_vit())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make(tiny_vit())
    assert found.fingerprint == wanted.fingerprint
    assert found.base_fingerprint == wanted.base_fingerprint


def test_a_random_bank_does_not_depend_on_the_default_dtype() -> None:
    model, wanted = tiny_vit(), random_bank(tiny_vit()).fingerprint
    torch.set_default_dtype(torch.float64)
    try:
        assert random_bank(model).fingerprint == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_compressed_model_that_is_converted_under_autocast_has_the_same_templates() -> None:
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            made.append(get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], group_size=2, num_templates=1)))
    first, second = (model.state_dict() for model in made)
    assert any("templates" in key for key in first)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
