"""Templates and coefficients learned together: against plain arithmetic, and resumed to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import KINDS, layers_of, outputs, seeded, tiny_vit
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recast_peft import (
    LearnedBank,
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    StoredBank,
    extend_bank,
    fit_bank,
    get_recast_model,
    grow_bank,
    growth_report,
    learn_bank,
    load_bank,
    random_bank,
)

TARGETS = ["qkv", "fc1"]
TASKS = ("red", "blue", "green")
OWN = {name: 3 for name in TASKS}


class DroppingVit(nn.Module):
    """A model that draws random numbers while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.vit(x)))


def config(**fields: Any) -> RecastConfig:
    return RecastConfig(**{"target_modules": TARGETS, "group_size": 1, **fields})


def task_data(name: str, samples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(TASKS.index(name))
    x = torch.randn(samples, 5, 8, generator=generator)
    return x, (x.mean(1) @ torch.randn(8, 3, generator=generator)).argmax(-1)


def one_by_one() -> list[tuple[Tensor, Tensor, str]]:
    return [(*task_data(name), name) for name in TASKS]


def mixed() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches in which the samples of all tasks stand side by side."""
    data = [task_data(name) for name in TASKS]
    x, y = torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data])
    ids = torch.arange(len(TASKS)).repeat_interleave(12)
    return [(x[part], y[part], ids[part]) for part in torch.arange(36).view(12, 3).T]


def start(**fields: Any) -> StoredBank:
    return random_bank(tiny_vit(), config(), **{"num_templates": 2, "seed": 3, **fields})


def grown_start() -> StoredBank:
    sources = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        weights = {name: w for name, w in tiny_vit().state_dict().items() if name.endswith((".qkv.weight", ".fc1.weight"))}
        sources.append({n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items()})
    return grow_bank(tiny_vit(), sources, config())


def learned(bank: StoredBank | None = None, batches: Iterable[Any] | None = None, **fields: Any) -> LearnedBank:
    fields = {"steps": 30, "progress": False, **fields}
    return learn_bank(tiny_vit(), OWN, batches or one_by_one(), bank or start(), **fields)


def numbers(found: LearnedBank) -> dict[str, Tensor]:
    """Everything that was learned, by name."""
    result = {f"loss {i}": torch.tensor(loss, dtype=torch.float64) for i, loss in enumerate(found.losses)}
    for name, group in found.bank.groups.items():
        assert group.grown is not None
        result.update({f"{name} {i}": t for i, t in enumerate(group.grown.tensors)})
    for task, state in found.states.items():
        result.update({f"{task} {key}": value for key, value in state.items()})
    return result


def task_loss(model: PeftModel, name: str) -> float:
    model.set_adapter(name)
    x, y = task_data(name)
    return float(F.cross_entropy(outputs(model.eval(), x), y))


class TestLearning:
    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("plain", [True, False])
    def test_is_that_of_plain_arithmetic(self, rank: int | None, plain: bool) -> None:
        """Three steps of Adam on plain tensors: coefficients, templates and heads, from weights W + sum d T."""
        plain_model = tiny_vit().double()
        bank = random_bank(plain_model, config(), num_templates=2, rank=rank, plain_templates=plain, seed=3)
        batches = [(x.double(), y, ids) for x, y, ids in mixed()]
        rates = {"lr": 0.02, "coefficient_lr": 0.1, "template_lr": 0.3}
        found = learn_bank(plain_model, OWN, batches, bank, progress=False, **rates)
        base = {name: value.clone() for name, value in plain_model.state_dict().items()}
        parts = {
            n: [t.clone().requires_grad_() for t in g.grown.tensors] for n, g in bank.groups.items() if g.grown is not None
        }
        offsets = {(n, t): torch.zeros(2 + plain, requires_grad=True) for n in parts for t in TASKS}
        headed = get_recast_model(tiny_vit().double(), RecastConfig(target_modules=["qkv"], num_classes=3)).get_base_model()
        fresh = headed.head.modules_to_save["default"].state_dict()
        heads = {t: {k: v.clone().requires_grad_() for k, v in fresh.items()} for t in TASKS}

        def weights_of(task: str) -> dict[str, Tensor]:
            weights = dict(base)
            for name, tensors in parts.items():
                own = base[f"{name}.weight"]
                templates = list(tensors[0] if rank is None else tensors[0] @ tensors[1])
                templates = [own, *templates] if plain else templates
                weights[f"{name}.weight"] = own + sum(o * t for o, t in zip(offsets[name, task], templates, strict=True))
            return {**weights, **{f"head.{k}": v for k, v in heads[task].items()}}

        flat = [
            {"params": list(offsets.values()), "base": 0.1},
            *({"params": [t], "base": 0.3 * float(t.detach().square().mean().sqrt())} for ts in parts.values() for t in ts),
            {"params": [v for head in heads.values() for v in head.values()], "base": 0.02},
        ]
        optimizer = torch.optim.Adam(flat, lr=1.0)
        wanted = []
        for step, (x, y, ids) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * 0.5 * (1 + math.cos(math.pi * step / 3))
            logits = torch.stack(
                [torch.func.functional_call(plain_model, weights_of(TASKS[i]), (x[s : s + 1],))[0] for s, i in enumerate(ids)]
            )
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in flat for p in group["params"]], 1.0)  # type: ignore[misc]
            optimizer.step()
            wanted.append(float(loss.detach()))
        assert found.losses == pytest.approx(wanted, abs=1e-7)
        model = found.apply_to(tiny_vit().double()).eval()
        for task in TASKS:
            model.set_adapter(task)
            for name, layer in layers_of(model).items():
                moved = weights_of(task)[f"{name}.weight"] - base[f"{name}.weight"]
                assert moved.abs().max() > 1e-3
                assert torch.allclose(layer.get_delta_weight(task), moved, atol=1e-6)
            x = task_data(task)[0].double()
            assert torch.allclose(outputs(model, x), torch.func.functional_call(plain_model, weights_of(task), (x,)), atol=1e-5)

    @pytest.mark.parametrize("bank", [start, grown_start])
    def test_serves_every_task(self, bank: Callable[[], StoredBank]) -> None:
        found = learned(bank(), steps=60)
        fresh = get_recast_model(tiny_vit(), RecastConfig(target_modules=TARGETS, num_classes=3), "red")
        before = task_loss(fresh, "red")
        model = found.apply_to(tiny_vit())
        assert all(task_loss(model, name) < 0.8 * before for name in TASKS)
        assert len({float(layer.recast_coefficients["red"][0, -1]) for layer in layers_of(model).values()}) > 1

    def test_leaves_model_and_bank_as_they_were(self) -> None:
        model, bank = tiny_vit(), start()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = learn_bank(model, OWN, one_by_one(), bank, steps=5, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert list(model.state_dict()) == list(before)
        assert bank.fingerprint == start().fingerprint != found.bank.fingerprint
        for name, group in bank.groups.items():
            again = start().groups[name].grown
            assert group.grown is not None
            assert again is not None
            assert torch.equal(group.grown.tensors[0], again.tensors[0])

    def test_a_new_task_trains_its_coefficients_alone(self) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(bank=learned().bank))
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"recast_coefficients"}
        x, _ = task_data("red")
        assert torch.equal(outputs(model.eval(), x), outputs(tiny_vit(), x))

    def test_coefficients_are_about_one(self) -> None:
        found = learned(steps=60)
        for name in found.bank.groups:
            rows = torch.cat([state[f"base_model.model.{name}.recast_coefficients"] for state in found.states.values()])
            sizes = rows[:, 1:].square().mean(0).sqrt()
            assert ((sizes > 0.7) & (sizes < 1.42)).all()

    def test_batches_may_name_tasks_in_three_ways(self) -> None:
        numbered = mixed()
        named = [(x, y, [TASKS[i] for i in ids]) for x, y, ids in numbered]
        assert learned(batches=named, steps=4).losses == learned(batches=numbered, steps=4).losses
        alone = one_by_one()
        spelled = [(x, y, [name] * len(y)) for x, y, name in alone]
        assert learned(batches=spelled, steps=4).losses == learned(batches=alone, steps=4).losses
        assert learned(batches=iter(alone), steps=3).losses == learned(batches=alone, steps=3).losses

    def test_classifiers_of_different_sizes(self) -> None:
        sizes = {"red": 3, "blue": 5}
        x, y = task_data("red")
        both = (torch.cat([x, x]), torch.cat([y, y + 2]), ["red"] * 12 + ["blue"] * 12)
        found = learn_bank(tiny_vit(), sizes, [both], start(), steps=25, progress=False)
        assert found.losses[-1] < found.losses[0]
        model = found.apply_to(tiny_vit()).eval()
        for name, classes in sizes.items():
            model.set_adapter(name)
            assert outputs(model, x).shape == (12, classes)

    def test_inputs_by_name_and_a_loss_of_ones_own(self) -> None:
        seen = []

        def squared(output: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels.shape)
            return (output - F.one_hot(labels, 3)).square().mean()

        batches = [({"x": x}, y, name) for x, y, name in one_by_one()]
        found = learn_bank(tiny_vit(), TASKS, batches, start(), steps=9, loss=squared, progress=False)
        assert found.losses[-1] < found.losses[0]
        assert len(seen) == 9
        assert all(not [key for key in state if "head" in key] for state in found.states.values())

    @pytest.mark.parametrize("kind", ["conv2d", "transformers Conv1D", "conv1d"])
    def test_other_kinds_of_modules(self, kind: str) -> None:
        entry = KINDS[kind]
        model, x = seeded(entry.build), entry.inputs()
        bank = random_bank(model, RecastConfig(target_modules=entry.targets, group_size=1), num_templates=2, rank=2)
        goals = {"red": torch.zeros(()), "blue": torch.ones(())}
        batches = [(x, torch.full((len(x),), i), name) for i, name in enumerate(goals)]

        def distance(output: Tensor, labels: Tensor) -> Tensor:
            return (output - labels.view(-1, *[1] * (output.ndim - 1))).square().mean()

        found = learn_bank(model, list(goals), batches, bank, steps=40, loss=distance, progress=False)
        applied = found.apply_to(seeded(entry.build)).eval()
        for name, goal in goals.items():
            applied.set_adapter(name)
            assert (outputs(applied, x) - goal).square().mean() < 0.9 * (outputs(model, x) - goal).square().mean()

    def test_progress_can_be_turned_off(self, capsys: pytest.CaptureFixture[str]) -> None:
        for progress in (True, False):
            learned(steps=3, progress=progress)
            assert ("learning a bank" in capsys.readouterr().err) is progress


class TestWhatComesOut:
    def test_bank_and_tasks_are_saved_and_loaded(self, tmp_path: Path) -> None:
        found = learned()
        assert found.bank.mimicry == {
            "method": "learned",
            "tasks": list(TASKS),
            "steps": 30,
            "start": {"method": "random", "num_templates": 2, "rank": None, "seed": 3},
        }
        model = found.apply_to(tiny_vit(), found.bank.save(tmp_path / "bank"))
        model.save_pretrained(tmp_path / "tasks")
        assert load_bank(tmp_path / "bank").mimicry == found.bank.mimicry
        x, _ = task_data("red")
        for name in TASKS:
            model.set_adapter(name)
            loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "tasks" / name).eval()
            assert torch.equal(outputs(loaded, x), outputs(model.eval(), x))
        again = model.base_model.save_bank(tmp_path / "again")
        assert (again.fingerprint, again.mimicry) == (found.bank.fingerprint, found.bank.mimicry)

    def test_it_can_be_learned_further_and_extended(self) -> None:
        found = learned(steps=12)
        further = learned(found.bank, steps=3)
        assert further.bank.mimicry["start"] == found.bank.mimicry
        weights = {n: w + 0.1 * w.flip(0) for n, w in tiny_vit().state_dict().items()}
        newer = extend_bank(found.bank, tiny_vit(), [weights])
        assert newer.version == 2
        assert {g.num_grown for g in growth_report(newer).groups} == {3}
        assert all(len(g.energy) == 3 for g in growth_report(newer).groups)

    def test_the_energy_is_that_of_the_tasks(self) -> None:
        found = learned(start(plain_templates=False), steps=20)
        for group in growth_report(found.bank).groups:
            assert 0 < group.energy[0] < group.energy[1]
            assert group.energy[1] == pytest.approx(1, abs=1e-4)

    def test_other_banks_and_taken_names_are_refused(self) -> None:
        found = learned(steps=3)
        with pytest.raises(RecastBankError, match="with another bank"):
            found.apply_to(tiny_vit(), start())
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=TARGETS), "blue")
        with pytest.raises(RecastConfigError, match="'blue' already"):
            found.apply_to(model)
        assert list(model.peft_config) == ["blue"]
        with pytest.raises(RecastBaseMismatchError):
            found.apply_to(tiny_vit(seed=5))


class Broken(Exception):
    """The run is broken off."""


class TestResuming:
    def run(self, batches: Iterable[Any], checkpoint: Path | None, stop: int | None = None, **fields: Any) -> LearnedBank:
        calls = 0

        def loss(output: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Broken
            return F.cross_entropy(output, labels)

        fields = {"steps": 17, "checkpoint": checkpoint, "checkpoint_every": 3, "loss": loss, "progress": False, **fields}
        model = seeded(DroppingVit)
        bank = random_bank(model, config(), num_templates=2, rank=2)
        return learn_bank(model, {name: 3 for name in TASKS}, batches, bank, **fields)

    def batches(self, kind: str) -> Iterable[Any]:
        if kind == "a list":
            return mixed()
        if kind == "an iterator":
            return iter(mixed() * 6)
        samples = [(x[i], y[i], t) for t, (x, y) in enumerate(map(task_data, TASKS)) for i in range(len(y))]
        own = torch.Generator().manual_seed(8) if kind == "a loader with its own generator" else None
        return DataLoader(samples, batch_size=8, shuffle=True, generator=own)  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", ["a list", "an iterator", "a loader", "a loader with its own generator"])
    @pytest.mark.parametrize("stop", [5, 12])
    def test_gives_the_same_to_the_last_bit(self, kind: str, stop: int, tmp_path: Path) -> None:
        whole = self.run(self.batches(kind), None)
        torch.manual_seed(stop)  # what was drawn elsewhere does not matter
        with pytest.raises(Broken):
            self.run(self.batches(kind), tmp_path / "run.pt", stop)
        torch.manual_seed(stop + 1)
        resumed = self.run(self.batches(kind), tmp_path / "run.pt")
        assert len(set(whole.losses)) == 17
        wanted, found = numbers(whole), numbers(resumed)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
        assert resumed.bank.fingerprint == whole.bank.fingerprint

    def test_a_finished_run_is_read_back(self, tmp_path: Path) -> None:
        whole = self.run(mixed(), tmp_path / "run.pt")

        def never(output: Tensor, labels: Tensor) -> Tensor:
            raise AssertionError("nothing is left to be trained")

        again = self.run(mixed(), tmp_path / "run.pt", loss=never)
        assert again.bank.fingerprint == whole.bank.fingerprint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt"]

    def test_leaves_the_callers_random_numbers_alone(self) -> None:
        before = torch.get_rng_state()
        self.run(mixed(), None)
        assert torch.equal(torch.get_rng_state(), before)

    def test_another_runs_checkpoint_is_refused(self, tmp_path: Path) -> None:
        self.run(mixed(), tmp_path / "run.pt", steps=4)
        for fields, named in (({"steps": 5}, "steps"), ({"steps": 4, "lr": 0.5}, "rates"), ({"steps": 4, "seed": 1}, "seed")):
            with pytest.raises(RecastLoadError, match=f"another run: {named} differs"):
                self.run(mixed(), tmp_path / "run.pt", **fields)
        (tmp_path / "run.pt").write_bytes(b"no checkpoint")
        with pytest.raises(RecastLoadError, match="damaged"):
            self.run(mixed(), tmp_path / "run.pt", steps=4)

    def test_fewer_batches_than_the_checkpoint_saw_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Broken):
            self.run(mixed(), tmp_path / "run.pt", 6)
        with pytest.raises(RecastConfigError, match="has seen 3 batches, and now there are 2"):
            self.run(mixed()[:2], tmp_path / "run.pt")


class TestRefusals:
    @pytest.mark.parametrize("tasks", [[], "red", ["red", "red"]])
    def test_tasks(self, tasks: Any) -> None:
        with pytest.raises(RecastConfigError, match="names that differ"):
            learn_bank(tiny_vit(), tasks, one_by_one(), start(), progress=False)

    def test_tasks_that_own_more(self) -> None:
        lora = LoraConfig(target_modules=["qkv"])
        for fields in ({"train_norms": True}, {"bias": "all"}, {"modules_to_save": ["head"]}, {"lora_config": lora}):
            with pytest.raises(RecastConfigError, match="nothing else"):
                learn_bank(tiny_vit(), {"red": RecastConfig(**fields)}, one_by_one(), start(), progress=False)

    def test_batches(self) -> None:
        x, y, _ = one_by_one()[0]
        cases: list[tuple[Any, str]] = [
            ([(x, y)], "a batch is"),
            ([x], "a batch is"),
            ([(x, y, "yellow")], "names the task 'yellow'"),
            ([(x, y, ["red"])], "do not fit it"),
            ([(x, y, torch.full((12,), 3))], "do not fit it"),
        ]
        for batches, message in cases:
            with pytest.raises(RecastConfigError, match=message):
                learned(batches=batches)
        with pytest.raises(RecastConfigError, match="ended after 3 of 30"):
            learned(batches=iter(one_by_one()))
        with pytest.raises(RecastConfigError, match="give steps="):
            learned(batches=iter(one_by_one()), steps=None)

    def test_numbers(self) -> None:
        for fields in ({"steps": 0}, {"steps": True}, {"checkpoint_every": 0}):
            with pytest.raises(RecastConfigError, match="at least 1"):
                learned(**fields)
        for fields in ({"num_templates": 0}, {"rank": 0}):
            with pytest.raises(RecastConfigError, match="at least 1"):
                start(**fields)

    def test_models_and_banks(self) -> None:
        converted = get_recast_model(tiny_vit(), config())
        with pytest.raises(RecastConfigError, match="plain pretrained model"):
            learn_bank(converted, OWN, one_by_one(), start())
        with pytest.raises(RecastConfigError, match="plain pretrained model"):
            random_bank(converted, config())
        with pytest.raises(RecastConfigError, match="half precision"):
            learn_bank(tiny_vit().bfloat16(), OWN, one_by_one(), start())
        fitted = fit_bank(
            tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry={"method": "gradient", "steps": 2})
        )
        with pytest.raises(RecastBankError, match="the bank has none"):
            learn_bank(tiny_vit(), OWN, one_by_one(), fitted)
        with pytest.raises(RecastBaseMismatchError):
            learn_bank(tiny_vit(seed=4), OWN, one_by_one(), start())
