"""What studies of accuracy share: methods as rows of a table, and runs that are kept in a file.

A method is data: the class of its PEFT configuration with its fields, and learning rates by parameter name. A run trains one
method on one task with one seed; it is kept in a file of JSON lines, found again by everything that determines it. So
scripts share their runs, and a study that was broken off goes on where it stood.

    study = Study(Path("runs.jsonl"))
    lora = peft_method("LoRA r=8", LoraConfig, {"r": 8, "target_modules": ["qkv"]}, lr=3e-3)
    study.run(study.tune(lora), "greek", seed=0).accuracy
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from glyph_backbone import BACKBONE_PATH, load_backbone
from glyphs import Task, load_task
from peft import LoraConfig, get_peft_model
from torch import nn
from training import Schedule, accuracy, features_of, train_groups

from recast_peft import RecastConfig, get_recast_model
from recast_peft.parts.head_building import build_head, find_head

Build = Callable[[nn.Module, Task, int], nn.Module]
Train = Callable[[nn.Module, list[dict[str, object]], Task, Schedule], None]

TUNING_TASKS = ("greek", "operators")
TUNING_STEP = 10**0.5
TUNING_STEPS = 3  # further candidates at most, after the first three
VALIDATION_SHARE = 3  # of every class's training images, one in three
VERSION = 3  # raised when training or evaluation changes, so that earlier runs do not count


def train_by_schedule(model: nn.Module, groups: list[dict[str, object]], task: Task, schedule: Schedule) -> None:
    """The ordinary training of a method."""
    train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs)


@dataclass(frozen=True)
class Method:
    """One row of a study.

    Attributes:
        name: for people; it does not determine a run.
        settings: all that determines the model and its training beside the schedule, as JSON can hold it.
        build: takes a fresh backbone, the task and the seed; returns the model with the parameters that are trained (a
            classifier among them) requiring gradients.
        lrs: learning rates of what is trained beside the classifier: the first key that is part of a parameter's name counts.
        head_lr: of the classifier, where it is not the schedule's.
        head_decay: weight decay of the classifier (AdamW's, which is multiplied by the learning rate).
        epochs: where they are not the schedule's.
        frozen_backbone: whether only the classifier is trained, so that features can be computed once.
        train: another way of training; it must be named in ``settings``.
    """

    name: str
    settings: dict[str, Any]
    build: Build = field(compare=False)
    lrs: dict[str, float]
    head_lr: float | None = None
    head_decay: float = 0.01
    epochs: int | None = None
    frozen_backbone: bool = False
    train: Train = field(default=train_by_schedule, compare=False)

    def scaled(self, factor: float) -> Method:
        """The method with its learning rates multiplied; the probe's is that of its classifier."""
        if self.frozen_backbone:
            return replace(self, head_lr=_rounded((self.head_lr or Schedule.head_lr) * factor))
        return replace(self, lrs={part: _rounded(lr * factor) for part, lr in self.lrs.items()})


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Attributes:
        accuracy: share of the images of the split whose class is found.
        refitted: the same with a classifier that is fitted in closed form to the trained model's features.
        numbers: trained beside the classifier.
        seconds: of processor time, training and evaluation.
    """

    accuracy: float
    refitted: float
    numbers: int
    seconds: float


def _rounded(value: float) -> float:
    """To three digits, so that products of the same factors are the same number."""
    return float(f"{value:.3g}")


# ---- methods ----


def with_head(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
    """Give a backbone a fresh classifier for a task; the same for every method."""
    name = find_head(backbone)
    parent, _, child = name.rpartition(".")
    config = RecastConfig(num_classes=task.num_classes, seed=seed)
    setattr(backbone.get_submodule(parent), child, build_head(backbone, backbone.get_submodule(name), name, config))
    return backbone


def peft_method(name: str, config: type[Any], fields: dict[str, Any], lr: float) -> Method:
    """A method of PEFT by its configuration; random matrices are drawn with the run's seed."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        seeds = {key: seed for key in ("projection_seed", "projection_prng_key") if hasattr(config, key)}
        head = find_head(backbone)
        return get_peft_model(with_head(backbone, task, seed), config(**fields, **seeds, modules_to_save=[head]))

    return Method(name, {"config": config.__name__, **fields}, build, {"": lr})


def recast_method(
    name: str, fields: dict[str, Any], lr: float, lora: dict[str, Any] | None = None, lora_lr: float = 0.0
) -> Method:
    """RECAST by the fields of its configuration; ``lora``: fields of a LoRA that is trained beside it.

    Args:
        name: of the row.
        fields: of :class:`RecastConfig`.
        lr: of the coefficients, in units of a template as large as the pretrained weight.
        lora: fields of ``LoraConfig``.
        lora_lr: of the LoRA's matrices.
    """

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        parts: dict[str, Any] = {"lora_config": LoraConfig(**lora)} if lora else {}
        config = RecastConfig(num_classes=task.num_classes, seed=seed, **fields, **parts)
        return get_recast_model(backbone, config)

    settings = {"config": "RecastConfig", **fields}
    if lora is None:
        return Method(name, settings, build, {"recast_": lr})
    return Method(name, {**settings, "lora_config": lora}, build, {"recast_": lr, "lora_": lora_lr})


def part_of_backbone(name: str, ending: str, lr: float) -> Method:
    """Train those of the backbone's own parameters whose names end so; an empty ending is full fine-tuning."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        for key, parameter in backbone.named_parameters():
            parameter.requires_grad_(key.endswith(ending))
        return with_head(backbone, task, seed)

    return Method(name, {"config": None, "trained": f"*{ending}"}, build, {"": lr})


def linear_probe(name: str = "linear probe", epochs: int = Schedule.probe_epochs) -> Method:
    """A linear classifier on the frozen features; it is cheap, and may train for longer than the schedule says."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        return with_head(backbone.requires_grad_(False), task, seed)

    return Method(name, {"config": None, "trained": None}, build, {}, epochs=epochs, frozen_backbone=True)


# ---- runs ----


def validation_split(task: Task) -> Task:
    """The training images in two parts: the last third of every class takes the place of the test images."""
    held_out = torch.zeros(len(task.train_labels), dtype=torch.bool)
    for label in range(task.num_classes):
        rows = (task.train_labels == label).nonzero().flatten()
        held_out[rows[len(rows) - len(rows) // VALIDATION_SHARE :]] = True
    return replace(
        task,
        train_images=task.train_images[~held_out],
        train_labels=task.train_labels[~held_out],
        test_images=task.train_images[held_out],
        test_labels=task.train_labels[held_out],
    )


@lru_cache(maxsize=12)
def _task(name: str, seed: int, train_per_class: int, test_per_class: int) -> Task:
    return load_task(name, seed, train_per_class, test_per_class)


@cache
def _backbone_digest() -> str:
    return hashlib.sha256(BACKBONE_PATH.read_bytes()).hexdigest()[:12]


def parameter_groups(model: nn.Module, method: Method, head_lr: float) -> list[dict[str, object]]:
    """What is trained, by learning rate: the parts of the method without weight decay, and the classifier.

    Raises:
        ValueError: if a parameter is trained that no key of ``method.lrs`` is part of.
    """
    head: list[nn.Parameter] = []
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in method.lrs}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "head" in name.split("."):
            head.append(parameter)
            continue
        part = next((part for part in method.lrs if part in name), None)
        if part is None:
            raise ValueError(f"{method.name}: {name} is trained, but has no learning rate; there are {method.lrs}")
        parts[part].append(parameter)
    groups: list[dict[str, object]] = [{"params": head, "lr": method.head_lr or head_lr, "weight_decay": method.head_decay}]
    return groups + [{"params": parts[part], "lr": lr, "weight_decay": 0.0} for part, lr in method.lrs.items() if parts[part]]


def train_method(method: Method, task: Task, schedule: Schedule) -> Run:
    """Train a method on a task; accuracy is that on its test images."""
    start = time.process_time()
    torch.manual_seed(schedule.seed)
    model = method.build(load_backbone(), task, schedule.seed)
    groups = parameter_groups(model, method, schedule.head_lr)
    numbers = sum(p.numel() for group in groups[1:] for p in group["params"])  # type: ignore[attr-defined]
    schedule = replace(schedule, epochs=method.epochs or schedule.epochs)
    head = model.get_submodule(find_head(model))
    if method.frozen_backbone:
        task = of_features(model, task)
        method.train(head, groups, task, schedule)
    else:
        method.train(model, groups, task, schedule)
        task = of_features(model, task)
    found = accuracy(head, task.test_images, task.test_labels)
    return Run(found, refitted_accuracy(task), numbers, time.process_time() - start)


def of_features(model: nn.Module, task: Task) -> Task:
    """The task with what reaches the model's classifier, ``(N, features)``, in place of images."""
    train, test = (features_of(model, images) for images in (task.train_images, task.test_images))
    return replace(task, train_images=train, test_images=test)


def refitted_accuracy(task: Task) -> float:
    """Accuracy of linear discriminant analysis on a task of features; its shrinkage is Ledoit and Wolf's."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(task.train_images, task.train_labels)
    return float(fitted.score(task.test_images, task.test_labels))


class NotRun(LookupError):
    """A study that may make no runs lacks one."""


class Study:
    """Runs of methods on tasks, each made once and kept in a file.

    Args:
        path: of the JSON lines; its folder is made. Another script may write to the same file at the same time.
        schedule: of all runs; its seed is not used.
        train_per_class: training images of each class.
        test_per_class: test images of each class.
        only_known: make no runs; one that the file lacks raises :class:`NotRun`.
        say: is told of every run that is made.
    """

    def __init__(
        self,
        path: Path,
        schedule: Schedule = Schedule(),  # noqa: B008 (it cannot be changed)
        train_per_class: int = 40,
        test_per_class: int = 100,
        only_known: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = path
        self.schedule = schedule
        self.sizes = (train_per_class, test_per_class)
        self.only_known = only_known
        self.say = say
        self._runs: dict[str, Run] = {}
        self._read = 0  # bytes of the file
        path.parent.mkdir(parents=True, exist_ok=True)

    def key(self, method: Method, task: str, seed: int, split: str = "test") -> dict[str, Any]:
        """Everything that determines a run."""
        return {
            "version": VERSION,
            "method": method.settings,
            "lrs": method.lrs,
            "head_lr": method.head_lr or self.schedule.head_lr,
            "head_decay": method.head_decay,
            "epochs": method.epochs or self.schedule.epochs,
            "batch_size": self.schedule.batch_size,
            "task": task,
            "train_per_class": self.sizes[0],
            "test_per_class": self.sizes[1],
            "split": split,
            "seed": seed,
            "backbone": _backbone_digest(),
        }

    def run(self, method: Method, task: str, seed: int, split: str = "test") -> Run:
        """The run from the file, or made now.

        Args:
            method: the row.
            task: a key of ``glyphs.TASKS``.
            seed: of the images, their order, the classifier's start and whatever the method draws at random.
            split: ``"test"``, or ``"validation"``: trained without a third of the training images, judged by it.
        """
        key = self.key(method, task, seed, split)
        known = self.known(method, task, seed, split)
        if known is not None:
            return known
        if self.only_known:
            raise NotRun(f"{self.path} has no run of {method.name} on {task} with seed {seed} ({split})")
        images = _task(task, seed, *self.sizes)
        run = train_method(
            method, validation_split(images) if split == "validation" else images, replace(self.schedule, seed=seed)
        )
        line = {"key": key, "name": method.name, **asdict(run)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shares = f"{100 * run.accuracy:.1f}, refitted {100 * run.refitted:.1f}"
        self.say(f"{method.name}, {task}, seed {seed}, {split}: {shares} ({run.seconds:.1f} s)")
        return run

    def known(self, method: Method, task: str, seed: int, split: str = "test") -> Run | None:
        """The run, if the file has it."""
        self._refresh()
        return self._runs.get(_line(self.key(method, task, seed, split)))

    def _refresh(self) -> None:
        """Read what has been added to the file, up to its last whole line."""
        if not self.path.is_file() or self.path.stat().st_size == self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for text in whole.splitlines():
            line = json.loads(text)
            if line["key"].get("version") != VERSION:
                continue
            self._runs[_line(line["key"])] = Run(line["accuracy"], line["refitted"], line["numbers"], line["seconds"])

    def tune(
        self,
        method: Method,
        tasks: Sequence[str] = TUNING_TASKS,
        seed: int = 0,
        split: str = "validation",
        heads: Sequence[tuple[float, float]] = (),
    ) -> Method:
        """The method with its best learning rate, found in the same way for every method.

        Three candidates, a factor of the square root of ten apart, around the rate that the method has; while the best one is
        at an edge, the next one beyond it, at most three times. Several rates of one method are moved together. Where there is
        a choice of ways to train the classifier, the best of them is taken next, and the rate is searched once more with it.

        Args:
            method: with rates to start from.
            tasks: whose mean accuracy decides.
            seed: of the runs.
            split: of the runs that decide; ``"test"`` with a seed whose images judge nothing else.
            heads: learning rates and weight decays of the classifier to choose from.
        """
        means: dict[str, float] = {}

        def mean(candidate: Method) -> float:
            key = _line(self.key(candidate, tasks[0], seed, split))
            if key not in means:
                means[key] = sum(self.run(candidate, task, seed, split).accuracy for task in tasks) / len(tasks)
            return means[key]

        def with_best_rate(method: Method) -> Method:
            steps = {step: method.scaled(TUNING_STEP**step) for step in range(-1 - TUNING_STEPS, 2 + TUNING_STEPS)}
            seen = {0, -1, 1}
            best = max((0, -1, 1), key=lambda step: mean(steps[step]))
            for _ in range(TUNING_STEPS):
                if min(seen) < best < max(seen):
                    break
                seen |= {best - 1, best + 1}
                best = max((best, best - 1, best + 1), key=lambda step: mean(steps[step]))
            return steps[best]

        best = with_best_rate(method)
        if heads:
            best = max((best, *(replace(best, head_lr=lr, head_decay=decay) for lr, decay in heads)), key=mean)
            best = with_best_rate(best)
        return best


def _line(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
