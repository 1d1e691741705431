"""Tasks trained by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import IDS, bert, call, learn, numbers
from peft import PeftModel, TaskType
from torch import Tensor
from transformers import Trainer, TrainingArguments

from recast_peft import RecastConfig, get_recast_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore:Already found a `peft_config`")


class Sums(torch.utils.data.Dataset):
    """Is the first token larger than the second?"""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 20, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": (ids[0] > ids[1]).long()}


class TestTrainer:
    def arguments(self, folder: Path, **options: Any) -> TrainingArguments:
        options = {"max_steps": 6, "save_strategy": "no", **options}
        return TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            learning_rate=0.05,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            **options,
        )

    @pytest.mark.parametrize("templates", [None, 1])
    def test_trains_the_coefficients_and_the_head_alone(self, tmp_path: Path, templates: int | None) -> None:
        config = RecastConfig(task_type=TaskType.SEQ_CLS, num_templates=templates)
        model = get_recast_model(bert(), config)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer = Trainer(model, self.arguments(tmp_path), train_dataset=Sums())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 6
        assert all(loss == loss for loss in losses)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert all("recast_coefficients" in n or "modules_to_save" in n for n in moved)
        assert any("recast_coefficients" in n for n in moved)

    @pytest.mark.parametrize("others", [[], ["cars"], ["default"]])
    def test_ends_with_the_best_checkpoint_whatever_the_task_s_name(self, tmp_path: Path, others: list[str]) -> None:
        model = get_recast_model(bert(), RecastConfig(num_classes=2), "flowers")
        for seed, name in enumerate(others):
            model.add_adapter(name, RecastConfig(num_classes=3))
            learn(model, name, seed)
        before = {name: numbers(model, name) for name in others}
        states: list[dict[str, Tensor]] = []

        def best_in_the_middle(_: Any) -> dict[str, float]:
            states.append(numbers(model, "flowers"))
            return {"score": [0.1, 0.9, 0.5][len(states) - 1]}

        options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        arguments = self.arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="score", **options)
        trainer = Trainer(model, arguments, train_dataset=Sums(), eval_dataset=Sums(), compute_metrics=best_in_the_middle)
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
        ended = numbers(model, "flowers")
        assert any("classifier" in name for name in ended)
        assert all(torch.equal(value, states[1][name]) for name, value in ended.items())
        assert not any(torch.equal(value, states[2][name]) for name, value in ended.items())
        assert list(model.peft_config) == ["flowers", *others]
        assert all(torch.equal(v, before[task][name]) for task in others for name, v in numbers(model, task).items())

    @pytest.mark.parametrize("others", [[], ["cars"], ["default"]])
    def test_resumes_a_task_of_any_name_with_its_head(self, tmp_path: Path, others: list[str]) -> None:
        def train(resume: Path | None = None, **options: Any) -> dict[str, Tensor]:
            model = get_recast_model(bert(), RecastConfig(num_classes=2), "flowers")
            for name in others:
                model.add_adapter(name, RecastConfig(num_classes=3))
            arguments = self.arguments(tmp_path, max_steps=4, seed=3, lr_scheduler_type="constant", **options)
            Trainer(model, arguments, train_dataset=Sums()).train(resume_from_checkpoint=resume and str(resume))
            assert list(model.peft_config) == ["flowers", *others]
            assert model.active_adapters == ["flowers"]
            return numbers(model, "flowers")

        whole = train(save_strategy="steps", save_steps=2)
        resumed = train(tmp_path / "checkpoint-2")
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value)
        halfway = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-2" / "flowers", "flowers")
        assert not any(torch.equal(value, whole[name]) for name, value in numbers(halfway, "flowers").items())

    def test_alone_has_a_task_s_files_in_the_root_of_a_folder(self, tmp_path: Path) -> None:
        model = get_recast_model(bert(), RecastConfig(num_classes=2), "flowers").eval()
        learn(model, "flowers", 0)
        for folder in ("mine", "checkpoint-7"):
            model.save_pretrained(tmp_path / folder)
            assert (tmp_path / folder / "flowers" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "mine" / "adapter_model.safetensors").exists()
        loaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-7").eval()
        assert torch.equal(call(loaded, input_ids=IDS), call(model, input_ids=IDS))
        other = get_recast_model(bert(), RecastConfig(num_classes=2), "cars").eval()
        other.load_adapter(tmp_path / "checkpoint-7", "default")  # PEFT's meaning, where the root is no copy of its own task
        other.set_adapter("default")
        assert torch.equal(call(other, input_ids=IDS), call(model, input_ids=IDS))
        PeftModel.save_pretrained(model, str(tmp_path / "checkpoint-8"))
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            model.load_adapter(tmp_path / "checkpoint-8", "default")

    def test_evaluates_the_task_that_was_switched_to(self, tmp_path: Path) -> None:
        model = get_recast_model(bert(), RecastConfig(num_classes=2), "flowers")
        model.add_adapter("cars", RecastConfig(num_classes=4))
        trainer = Trainer(model, self.arguments(tmp_path), eval_dataset=Sums())
        rows = [Sums()[i] for i in range(len(Sums()))]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        losses = {}
        for seed, name in enumerate(("flowers", "cars")):
            learn(model, name, seed)
            model.set_adapter(name)
            losses[name] = torch.nn.functional.cross_entropy(call(model.eval(), input_ids=batch["input_ids"]), batch["labels"])
        assert losses["flowers"] != pytest.approx(losses["cars"].item(), rel=0.01)
        for name in ("flowers", "cars", "flowers"):
            model.set_adapter(name)
            assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[name].item(), rel=1e-4)

    def test_resumes_from_a_checkpoint(self, tmp_path: Path) -> None:
        def train(**options: Any) -> dict[str, Tensor]:
            model = get_recast_model(bert(), RecastConfig(task_type=TaskType.SEQ_CLS))
            resume = options.pop("resume", None)
            arguments = self.arguments(tmp_path / "run", seed=3, lr_scheduler_type="constant", **options)
            Trainer(model, arguments, train_dataset=Sums()).train(resume_from_checkpoint=resume)
            return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        whole = train(max_steps=4, save_strategy="steps", save_steps=2)
        resumed = train(max_steps=4, resume=str(tmp_path / "run" / "checkpoint-2"))
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value)

    def test_can_load_the_best_checkpoint_at_the_end(self, tmp_path: Path) -> None:
        model = get_recast_model(bert(), RecastConfig(task_type=TaskType.SEQ_CLS))
        arguments = self.arguments(
            tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True
        )
        trainer = Trainer(model, arguments, train_dataset=Sums(), eval_dataset=Sums())
        trainer.train()
        best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
