"""Tasks in sequence are learned without touching earlier ones, also on a bank that grows with them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import layers_of as named_layers
from models import outputs, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from recast_peft import (
    BiasConfig,
    RecastConfig,
    RecastConfigError,
    RecastLayer,
    RecastSequenceError,
    TaskPool,
    get_recast_model,
    grow_bias_bank,
)
from recast_peft.analysis.sequence import Growth, learn_in_sequence
from recast_peft.parts.bias_part import bias_coefficients


class TinyModel(nn.Module):
    """Two layers that share a bank, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make_tasks(*names: str) -> dict[str, tuple[Tensor, Tensor]]:
    tasks = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(48, 6, generator=generator)
        tasks[name] = (x, (x @ torch.randn(6, 3, generator=generator)).argmax(-1))
    return tasks


def train(model: PeftModel, task: tuple[Tensor, Tensor]) -> None:
    x, y = task
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def evaluate(model: nn.Module, task: tuple[Tensor, Tensor]) -> float:
    return (model(task[0]).argmax(-1) == task[1]).float().mean().item()


CONFIG = RecastConfig(target_modules=["0", "1"], modules_to_save=["head"])


def rough_training(model: PeftModel, task: Any) -> None:
    raise AssertionError("nothing is to be trained")


class TestLearningInSequence:
    def test_forgets_nothing(self) -> None:
        tasks = make_tasks("one", "two", "three")
        model, matrix = learn_in_sequence(TinyModel(), tasks, train, evaluate, config=CONFIG, progress=False)
        assert list(model.peft_config) == ["one", "two", "three"]
        assert model.active_adapter == "three"
        assert np.isnan(matrix.values[np.triu_indices(3, 1)]).all()
        assert matrix.summary()["forgetting"] == 0.0
        assert matrix.summary()["backward_transfer"] == 0.0
        for i, name in enumerate(tasks):
            model.set_adapter(name)
            assert evaluate(model, tasks[name]) == matrix.values[2, i] > 0.6
        model.set_adapter("one")
        assert evaluate(model, tasks["two"]) < matrix.values[2, 1]

    def test_measures_forward_transfer_if_asked(self) -> None:
        tasks = make_tasks("one", "two")
        backbone = TinyModel()
        expected = {name: evaluate(backbone, task) for name, task in tasks.items()}
        _, matrix = learn_in_sequence(backbone, tasks, train, evaluate, config=CONFIG, evaluate_unseen=True, progress=False)
        assert dict(zip(matrix.tasks, matrix.baseline, strict=True)) == expected
        assert not np.isnan(matrix.values).any()
        assert "forward_transfer" in matrix.summary()

    def test_a_pool_beside_it_may_be_used_meanwhile(self) -> None:
        model = get_recast_model(TinyModel(), CONFIG, "zero")
        pool = TaskPool(get_recast_model(model.unload(), RecastConfig(target_modules=["0", "1"]), "zero"))
        pool.add("other", RecastConfig(target_modules=["0", "1"], num_classes=2))
        pool.activate("other")

        def measure(model: nn.Module, task: tuple[Tensor, Tensor]) -> float:
            pool.deactivate()
            model.set_adapter("two" if "two" in model.peft_config else "one")
            return evaluate(model, task)

        model, matrix = learn_in_sequence(
            pool.model, make_tasks("one", "two"), train, measure, config=RecastConfig(num_classes=3), progress=False
        )
        assert matrix.learned == 2

    def test_evaluates_unseen_tasks_with_the_last_one_learned(self) -> None:
        seen: list[tuple[str, bool, bool]] = []

        def note(model: nn.Module, task: Any) -> float:
            if isinstance(model, PeftModel):
                seen.append((str(model.active_adapter), model.training, torch.is_grad_enabled()))
            return 0.5

        tasks = make_tasks("one", "two", "three")
        options = {"config": CONFIG, "evaluate_unseen": True, "progress": False}
        learn_in_sequence(TinyModel(), tasks, lambda model, task: None, note, **options)
        assert [entry[0] for entry in seen] == ["one", "one", "one", "one", "two", "two", "one", "two", "three"]
        assert {entry[1:] for entry in seen} == {(False, False)}

    def test_trains_the_new_task_alone(self) -> None:
        trained: list[list[str]] = []

        def note(model: PeftModel, task: Any) -> None:
            assert model.training
            trained.append([name for name, p in model.named_parameters() if p.requires_grad])

        learn_in_sequence(TinyModel(), make_tasks("one", "two"), note, evaluate, config=CONFIG, progress=False)
        assert all(name.split(".")[-1] == "one" or ".one." in name for name in trained[0])
        assert all(name.split(".")[-1] == "two" or ".two." in name for name in trained[1])
        assert len(trained[0]) == len(trained[1]) == 4

    def test_goes_on_with_a_model_that_has_tasks(self) -> None:
        model = get_recast_model(TinyModel(), CONFIG, adapter_name="first")
        before = {k: v.clone() for k, v in model.state_dict().items() if ".first." in k}
        same, matrix = learn_in_sequence(model, make_tasks("one"), train, evaluate, config={"one": CONFIG}, progress=False)
        assert same is model
        assert matrix.learned == 1
        assert before
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())

    @pytest.mark.parametrize("fails", [False, True], ids=["learned", "interrupted"])
    def test_leaves_every_module_in_its_mode(self, fails: bool) -> None:
        """A model that was given in evaluation mode would else drop out what it should not; a frozen norm would be updated."""

        def interrupted(model: PeftModel, task: Any) -> None:
            assert model.training
            assert model.get_base_model().layers[1].training
            if fails:
                raise KeyboardInterrupt

        model = TinyModel().eval()
        model.layers[0].train()
        config = RecastConfig(target_modules=["0", "1"], num_classes=3, head_module="head")
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            learn_in_sequence(model, make_tasks("a", "b"), interrupted, evaluate, config=config, progress=False)
        assert {name for name, module in model.named_modules() if module.training} == {"layers.0.base_layer"}

    def test_an_error_has_the_model_whose_tasks_were_learned(self) -> None:
        def second_fails(model: PeftModel, task: Any) -> None:
            if model.active_adapter == "two":
                raise KeyboardInterrupt
            randomise(model, "one")

        backbone, tasks = TinyModel(), make_tasks("one", "two")
        names, x = list(backbone.state_dict()), tasks["one"][0]
        plain = outputs(backbone, x)
        with pytest.raises(KeyboardInterrupt) as caught:
            learn_in_sequence(backbone, tasks, second_fails, evaluate, config=CONFIG, progress=False)
        model = caught.value.model  # type: ignore[attr-defined]
        model.set_adapter("one")
        assert not torch.equal(outputs(model, x), plain)
        model.delete_adapter("two")
        learn_in_sequence(model, {"two": tasks["two"]}, lambda m, t: None, evaluate, config=CONFIG, progress=False)
        assert torch.equal(outputs(model.unload(), x), plain)
        assert list(backbone.state_dict()) == names

    def test_does_not_change_the_config_it_was_given(self) -> None:
        config = RecastConfig(target_modules=["0", "1"])
        learn_in_sequence(TinyModel(), make_tasks("one", "two"), lambda m, t: None, evaluate, config=config, progress=False)
        assert config.groups is None

    @pytest.mark.parametrize("which", ["one", "two"])
    def test_notices_training_that_deletes_a_task(self, which: str) -> None:
        def delete(model: PeftModel, task: Any) -> None:
            if which in model.peft_config and "two" in model.peft_config:
                model.delete_adapter(which)

        with pytest.raises(RecastSequenceError, match=f"training deleted the task '{which}'"):
            learn_in_sequence(TinyModel(), make_tasks("one", "two"), delete, evaluate, config=CONFIG, progress=False)

    def test_notices_training_that_changes_the_pretrained_model(self) -> None:
        def all_of_it(model: PeftModel, task: Any) -> None:
            model.requires_grad_(True)
            train(model, task)

        with pytest.raises(RecastSequenceError, match=r"training changed the pretrained model.*layers\.0\.weight"):
            learn_in_sequence(TinyModel(), make_tasks("one"), all_of_it, evaluate, config=CONFIG, progress=False)

        def past_torch(model: PeftModel, task: Any) -> None:
            model.get_base_model().layers[1].base_layer.weight.data *= 1.01

        def exchanged(model: PeftModel, task: Any) -> None:
            model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()}, assign=True)

        for change in (past_torch, exchanged):
            with pytest.raises(RecastSequenceError, match=r"training changed the pretrained model.*layers\.1\.weight"):
                learn_in_sequence(TinyModel(), make_tasks("one"), change, evaluate, config=CONFIG, progress=False)

        def merged_meanwhile(model: PeftModel, task: Any) -> None:
            train(model, task)
            model.merge_adapter()
            model.unmerge_adapter()
            model.to(torch.float64).to(torch.float32)

        config = RecastConfig(target_modules=["0", "1"], bias="all")
        learn_in_sequence(TinyModel(), make_tasks("one"), merged_meanwhile, evaluate, config=config, progress=False)

    def test_notices_training_that_touches_an_earlier_task(self) -> None:
        def rough(model: PeftModel, task: Any) -> None:
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, RecastLayer):
                        module.recast_coefficients["one"].add_(1.0)

        with pytest.raises(RecastSequenceError, match="changed the earlier task 'one'"):  # that the model has already
            options = {"config": CONFIG, "progress": False}
            learn_in_sequence(get_recast_model(TinyModel(), CONFIG, "one"), make_tasks("two"), rough, evaluate, **options)
        with pytest.raises(RecastSequenceError, match="changed the earlier task 'one'"):
            learn_in_sequence(TinyModel(), make_tasks("one", "two"), rough, evaluate, config=CONFIG, progress=False)

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (None, "accuracy on 'one' after 'one': None; a finite number is expected. Does evaluate end with return"),
            ({"accuracy": 0.5}, "accuracy': 0.5}; a finite number"),
            ((1, 2), "finite number"),
        ],
    )
    def test_refuses_what_evaluate_returns_if_it_is_no_number(self, returned: Any, message: str) -> None:
        with pytest.raises(RecastSequenceError, match=message):
            learn_in_sequence(TinyModel(), make_tasks("one"), train, lambda *_: returned, config=CONFIG, progress=False)

    def test_refuses_names_that_are_taken(self) -> None:
        model = get_recast_model(TinyModel(), CONFIG, adapter_name="one")
        with pytest.raises(RecastSequenceError, match="'one' already"):
            learn_in_sequence(model, make_tasks("two", "one"), train, evaluate, progress=False)
        assert list(model.peft_config) == ["one"]

    def test_refuses_tasks_without_names(self) -> None:
        with pytest.raises(RecastSequenceError, match=r"tasks=\['one'\]: expected a dictionary"):
            learn_in_sequence(TinyModel(), ["one"], rough_training, evaluate)  # type: ignore[arg-type]

    def test_refuses_names_that_cannot_be_stored_before_it_starts(self) -> None:
        with pytest.raises(RecastConfigError, match="without slashes"):
            learn_in_sequence(TinyModel(), make_tasks("one", "t/wo"), rough_training, evaluate, progress=False)

    def test_refuses_a_task_without_a_config(self) -> None:
        with pytest.raises(RecastSequenceError, match="'two'"):
            learn_in_sequence(TinyModel(), make_tasks("one", "two"), train, evaluate, config={"one": CONFIG}, progress=False)

    def test_refuses_an_accuracy_that_is_no_number(self) -> None:
        with pytest.raises(RecastSequenceError, match="finite"):
            learn_in_sequence(
                TinyModel(), make_tasks("one"), lambda m, t: None, lambda m, t: float("nan"), config=CONFIG, progress=False
            )

    def test_shows_progress_that_can_be_turned_off(self, capsys: pytest.CaptureFixture[str]) -> None:
        for progress in (False, True):
            learn_in_sequence(TinyModel(), make_tasks("one"), train, evaluate, config=CONFIG, progress=progress)
            assert ("tasks" in capsys.readouterr().err) is progress


@torch.no_grad()
def logits(model: nn.Module, task: tuple[Tensor, Tensor]) -> Tensor:
    return model(task[0])


def plain_lora(model: nn.Module, task: tuple[Tensor, Tensor]) -> PeftModel:
    """The task learned with a LoRA on the plain model."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["head"]))
    train(adapted, task)
    return adapted


def layers_of(model: nn.Module) -> list[RecastLayer]:
    return list(named_layers(model).values())


class TestGrowingInSequence:
    NAMES = ("one", "two", "three", "four", "five")

    def grown(self, model: nn.Module | None = None, names: tuple[str, ...] = NAMES, **fields: Any) -> tuple[Any, ...]:
        """Five tasks with growth after every second one; logits of each task right after it was learned."""
        tasks = make_tasks(*names)
        first: dict[str, Tensor] = {}

        def note(model: nn.Module, task: Any) -> float:
            name = next(name for name in tasks if tasks[name] is task)
            first.setdefault(name, logits(model, task))
            assert torch.equal(logits(model, task), first[name])  # each time it is evaluated again
            return evaluate(model, task)

        growth = Growth(plain_lora, RecastConfig(target_modules=["0", "1"], group_size=1), **fields)
        options = {"config": CONFIG, "grow": growth, "grow_every": 2, "progress": False}
        learned, matrix = learn_in_sequence(model or TinyModel(), tasks, train, note, **options)
        return learned, matrix, growth, tasks, first

    @pytest.mark.parametrize("rank", [None, 2])
    def test_old_tasks_stay_to_the_last_bit(self, rank: int | None) -> None:
        torch.manual_seed(0)
        model, matrix, growth, tasks, first = self.grown(num_templates=2, rank=rank)
        counts = {name: len(layers_of(model)[0].recast_coefficients[name][0]) for name in tasks}
        assert counts == {"one": 2, "two": 2, "three": 3, "four": 3, "five": 5}
        assert growth.bank.version == 2
        for j, name in enumerate(tasks):
            assert len(set(matrix.values[j:, j])) == 1
            model.set_adapter(name)
            assert torch.equal(logits(model, tasks[name]), first[name])
        assert matrix.summary()["forgetting"] == 0.0
        assert not torch.equal(first["one"], first["two"])

    def test_tasks_after_the_growth_use_the_new_templates(self) -> None:
        model, *_ = self.grown(num_templates=1)
        for name in ("three", "five"):
            assert all(layer.recast_coefficients[name][0, -1] != 0 for layer in layers_of(model))

    def test_one_stored_bank_serves_all_versions(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        backbone = TinyModel()
        model, _, growth, tasks, first = self.grown(copy.deepcopy(backbone), num_templates=2, rank=2)
        stored = model.base_model.save_bank(tmp_path / "bank", "five")
        assert stored.fingerprint == growth.bank.fingerprint
        assert growth.bank.mimicry["sources"] == ["adapter 'default'"] * 4
        model.save_pretrained(tmp_path)
        for name in tasks:
            loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / name).eval()
            assert torch.equal(logits(loaded, tasks[name]), first[name])

    def test_goes_on_from_a_bank_and_a_model_with_tasks(self) -> None:
        model, _, growth, *_ = self.grown(num_templates=1)
        before = growth.bank
        assert before is not None
        same, _, again, *_ = self.grown(model, ("six", "seven", "eight"), bank=before, num_templates=1)
        assert same is model
        assert again.bank.version == before.version + 1
        assert layers_of(model)[0].recast_bank["six"].fingerprint == before.fingerprint
        assert layers_of(model)[0].recast_bank["eight"].fingerprint == again.bank.fingerprint

    def test_tasks_with_a_lora_part_are_sources_themselves(self) -> None:
        own_lora = LoraConfig(r=1, target_modules=["0", "1"])
        freer = RecastConfig(target_modules=["0", "1"], modules_to_save=["head"], lora_config=own_lora)
        tasks = make_tasks("one", "two", "three", "four")
        configs = {"one": freer, "two": CONFIG, "three": CONFIG, "four": CONFIG}
        growth = Growth(config=RecastConfig(target_modules=["0", "1"], group_size=1))
        model, matrix = learn_in_sequence(
            TinyModel(), tasks, train, evaluate, config=configs, grow=growth, grow_every=2, progress=False
        )
        assert growth.bank is not None
        assert growth.bank.mimicry["sources"] == ["adapter 'one'"]  # the others move within the span of the banks
        assert matrix.summary()["forgetting"] == 0.0
        for layer in layers_of(model):
            merged = copy.deepcopy(model).merge_and_unload(adapter_names=["one"])
            moved = merged.get_submodule(layer.module_name).weight - layer.pretrained_weight
            template = growth.bank.groups[layer.module_name].grown.dense()[0]
            assert torch.cosine_similarity(template.flatten(), moved.flatten(), dim=0).abs() > 0.9999
            assert layer.recast_coefficients["three"].shape == (1, 2)

    def test_a_task_may_add_nothing(self) -> None:
        growth = Growth(lambda model, task: None)
        tasks = make_tasks("one", "two")
        model, _ = learn_in_sequence(TinyModel(), tasks, train, evaluate, config=CONFIG, grow=growth, progress=False)
        assert growth.bank is None
        assert model.peft_config["two"].bank is None

    def test_what_interrupts_the_growth_leaves_its_sources_for_the_next_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*args: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        growth, plain, tasks = Growth(plain_lora, CONFIG), TinyModel(), make_tasks("one")
        model, _ = learn_in_sequence(TinyModel(), tasks, train, evaluate, config=CONFIG, progress=False)
        growth.learn(plain, tasks["one"], model, "one")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("recast_peft.analysis.sequence.grow_bank", interrupted)
            growth.grow(plain)
        assert growth.bank is None
        growth.grow(plain)
        assert growth.bank is not None
        growth.grow(plain)  # there is nothing new
        assert growth.bank.version == 1

    def test_the_source_is_learned_on_a_plain_copy(self) -> None:
        backbone = TinyModel()
        weights = {name: value.clone() for name, value in backbone.state_dict().items()}
        seen = []

        def source(model: nn.Module, task: Any) -> None:
            assert not isinstance(model, PeftModel)
            seen.append(all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()))
            with torch.no_grad():
                model.layers[0].weight.zero_()

        tasks = make_tasks("one", "two")
        learn_in_sequence(backbone, tasks, train, evaluate, config=CONFIG, grow=Growth(source), progress=False)
        assert seen == [True, True]

    def test_a_bank_of_biases_grows_likewise(self) -> None:
        names = ("one", "two", "three", "four", "five")
        tasks, first = make_tasks(*names), {}
        backbone = TinyModel()
        seen: list[dict[str, Tensor]] = []

        def biases(model: nn.Module, task: Any) -> nn.Module:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("layers.") and name.endswith("bias"))
            train(model, task)
            seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
            return model

        def note(model: nn.Module, task: Any) -> float:
            name = next(name for name in tasks if tasks[name] is task)
            first.setdefault(name, logits(model, task))
            assert torch.equal(logits(model, task), first[name])
            return evaluate(model, task)

        growth = Growth(biases, of="biases")
        options = {"config": CONFIG, "grow": growth, "grow_every": 2, "progress": False}
        model, matrix = learn_in_sequence(copy.deepcopy(backbone), tasks, train, note, **options)
        assert matrix.summary()["forgetting"] == 0.0
        counts = [
            {k: len(p) for k, p in bias_coefficients(model, name).items()} if name in model.peft_config else None
            for name in names
        ]
        # sources: one and two after the second task; three and four after the fourth
        assert counts == [{}, {}, *[{"layers.0.bias": 2, "layers.1.bias": 2}] * 2, {"layers.0.bias": 4, "layers.1.bias": 4}]
        assert growth.bank is not None
        assert (growth.bank.version, growth.bank.is_of_biases) == (2, True)
        plain = dict(backbone.named_parameters())
        for moved in seen[:4]:  # every source lies in what the templates span
            for group in growth.bank.groups.values():
                templates = group.grown.tensors[0]
                move = torch.cat([moved[f"{m}.bias"] - plain[f"{m}.bias"].detach() for m in group.members])
                solved = torch.linalg.lstsq(templates.T, move[:, None]).solution
                torch.testing.assert_close((templates.T @ solved)[:, 0], move, rtol=1e-3, atol=1e-5)

    def test_growth_of_biases_says_what_it_needs(self) -> None:
        for fields in ({}, {"source": plain_lora, "rank": 2}, {"source": plain_lora, "config": CONFIG}):
            with pytest.raises(RecastConfigError, match="needs source="):
                Growth(of="biases", **fields)
        with pytest.raises(RecastConfigError, match="expected 'weights' or 'biases'"):
            Growth(of="norms")
        for fields in ({"num_templates": 1.5}, {"rank": 0}, {"plain_templates": "no"}, {"source": "lora"}):
            with pytest.raises(RecastConfigError, match=f"{next(iter(fields))}=.*: expected"):
                Growth(**fields)
        moved = {name: value + 1 for name, value in TinyModel().state_dict().items()}
        bank = grow_bias_bank(TinyModel(), [moved])
        with pytest.raises(RecastConfigError, match="starts from a bank that is of biases"):
            Growth(plain_lora, bank=bank)
        config = RecastConfig(target_modules=["0"], partners=[BiasConfig(bank=bank)])
        growth = Growth(plain_lora, of="biases")
        with pytest.raises(RecastConfigError, match="names the bank"):
            learn_in_sequence(TinyModel(), make_tasks("one"), rough_training, evaluate, config=config, grow=growth)

    def test_wrong_arguments_are_refused_before_anything_is_trained(self) -> None:
        tasks, growth = make_tasks("one"), Growth(plain_lora)
        for every in (0, True):
            with pytest.raises(RecastConfigError, match="grow_every"):
                learn_in_sequence(TinyModel(), tasks, rough_training, evaluate, grow=growth, grow_every=every)
        with pytest.raises(RecastConfigError, match="none of the tasks has a LoRA part"):
            learn_in_sequence(TinyModel(), tasks, rough_training, evaluate, config=CONFIG, grow=Growth())
        config = RecastConfig(bank="somewhere")
        with pytest.raises(RecastConfigError, match="names the bank"):
            learn_in_sequence(TinyModel(), tasks, rough_training, evaluate, config=config, grow=growth)
