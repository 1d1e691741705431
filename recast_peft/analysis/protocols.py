"""Class-incremental benchmarks as the field runs them: classes come in tasks, and after each all classes so far are tested.

    data = open_protocol("cifar100-b0-inc10", "data", transform)    # or split_tasks() of data sets of your own
    told = learn_told(model, data, train)                           # the task of a test sample is known
    routed = answer_routed(told.model, data)                        # it is found by the pool, whose task then answers
    closed = learn_untold(features, data)                           # one classifier of all classes, in closed form (RanPAC)

"B0-Inc10" means: no classes before the first task, ten classes a task. The order of the classes is the one that the field draws
with seed 1993 (Rebuffi et al., CVPR 2017, and the implementations after it), the figure is the average incremental accuracy:
the mean over the steps of the accuracy on the test samples of all classes so far.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..config import RecastConfig, checked_config
from ..errors import RecastSequenceError
from ..mimicry.features import device_of, evaluating
from ..planning.groups import by_key
from ..pool.pool import TaskPool
from ..validation import COUNT, check_arguments, function, is_count, of_type, optional, shown
from .class_incremental import IncrementalClassifier
from .matrix import AccuracyMatrix
from .sequence import learn_in_sequence


@dataclass(frozen=True)
class Protocol:
    """Which classes come when.

    Attributes:
        classes: how many there are.
        increment: how many a task brings.
        seed: of their order; None is the order of their numbers.
    """

    classes: int
    increment: int
    seed: int | None = 1993

    def __post_init__(self) -> None:
        if not is_count(self.classes) or not is_count(self.increment) or self.classes % self.increment:
            raise RecastSequenceError(
                f"classes={self.classes!r}, increment={self.increment!r}: expected whole numbers, the first divisible by the "
                "other"
            )

    def tasks(self) -> list[list[int]]:
        """The classes of each task, in the order in which they come."""
        order = range(self.classes) if self.seed is None else np.random.RandomState(self.seed).permutation(self.classes)
        numbers = [int(number) for number in order]
        return [numbers[start : start + self.increment] for start in range(0, self.classes, self.increment)]


PROTOCOLS = {
    "cifar100-b0-inc10": Protocol(100, 10),
    "imagenet-r-b0-inc20": Protocol(200, 20),
    "cub-b0-inc20": Protocol(200, 20),
}


@dataclass(frozen=True)
class ClassTask:
    """One task: its classes, and samples whose labels are places among them.

    Attributes:
        classes: numbers of the classes in the whole data set.
        train, test: ``(image, label)`` by number.
    """

    classes: list[int]
    train: Any
    test: Any


@dataclass(frozen=True)
class ProtocolResult:
    """What a run gives.

    Attributes:
        matrix: accuracy on the test samples of every task after every task.
        steps: after each task, the accuracy on the test samples of all classes so far.
        model: the model with the tasks, where some were learned.
    """

    matrix: AccuracyMatrix
    steps: list[float]
    model: PeftModel | None = None

    @property
    def average(self) -> float:
        """Average incremental accuracy: the mean of the steps."""
        return sum(self.steps) / len(self.steps)

    @property
    def last(self) -> float:
        """Accuracy on all classes at the end."""
        return self.steps[-1]


# ---------------------------------------------------------------- data


class _Part(Dataset):
    """Samples of some classes; labels are places among them."""

    def __init__(self, data: Any, places: Sequence[int], classes: Sequence[int], labels: Sequence[int]) -> None:
        self._data, self._places = data, list(places)
        at = {number: place for place, number in enumerate(classes)}
        self.labels = [at[labels[place]] for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self._data[self._places[number]][0], self.labels[number]


class Rows(Dataset):
    """A data set of Hugging Face's ``datasets`` as ``(image, label)`` by number.

    Args:
        data: one split, with a column of images and one of whole numbers.
        transform: of an image.
        image: name of the column of images.
        label: name of the column of labels.
    """

    def __init__(self, data: Any, transform: Callable[[Any], Tensor], image: str = "image", label: str = "label") -> None:
        self._data, self._transform, self._image = data, transform, image
        self.targets = _labels(f"the column {label!r}", data[label])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self._transform(self._data[number][self._image]), self.targets[number]


def split_tasks(protocol: Protocol, train: Any, test: Any) -> dict[str, ClassTask]:
    """The tasks of a protocol, by their names in the order of learning.

    Args:
        protocol: which classes come when.
        train, test: data sets of torchvision (with ``targets``), or ``Rows``.

    Raises:
        RecastSequenceError: if labels are no whole numbers, a class has no samples, or there is one that the protocol does not
            know.
    """
    parts: list[list[_Part]] = []
    for what, data in (("train", train), ("test", test)):
        if not hasattr(data, "targets"):
            raise RecastSequenceError(
                f"{what} is a {type(data).__name__} without targets: expected a data set of torchvision, or Rows"
            )
        labels = _labels(what, data.targets)
        if {*labels} != {*range(protocol.classes)}:
            raise RecastSequenceError(
                f"{what} has other classes than the protocol\n"
                f"  samples of: {len({*labels})} classes, {min(labels, default=-1)} to {max(labels, default=-1)}\n"
                f"  expected:   {protocol.classes} classes, 0 to {protocol.classes - 1}"
            )
        by_class = by_key(range(len(labels)), labels.__getitem__)
        parts.append([_Part(data, [p for number in task for p in by_class[number]], task, labels) for task in protocol.tasks()])
    tasks = zip(protocol.tasks(), *parts, strict=True)
    return {f"task {i}": ClassTask(classes, first, second) for i, (classes, first, second) in enumerate(tasks)}


def _labels(what: str, given: Any) -> list[int]:
    """Labels as whole numbers."""
    try:
        found = [(int(label), label) for label in given]
        if all(bool(number == label) for number, label in found):
            return [number for number, _ in found]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise RecastSequenceError(
        f"{what} has labels that are no whole numbers: {shown(given)}\nGive the number of each sample's class, from 0 on."
    )


def open_protocol(name: str, root: str | os.PathLike, transform: Callable[[Any], Tensor]) -> dict[str, ClassTask]:
    """The tasks of a known protocol from files on this machine; nothing is downloaded.

    Args:
        name: one of ``PROTOCOLS``.
        root: for CIFAR-100 the folder that torchvision calls ``root``; for the others a folder with ``train`` and ``test``, a
            folder of pictures for each class in both, as the field splits them.
        transform: of an image.

    Raises:
        RecastSequenceError: if there is no such protocol, torchvision is missing, or the files are not there.
    """
    if name not in PROTOCOLS:
        raise RecastSequenceError(f"there is no protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    try:
        from torchvision.datasets import CIFAR100, ImageFolder
    except ImportError as error:
        raise RecastSequenceError("the data sets are read by torchvision: pip install torchvision") from error
    try:
        if name.startswith("cifar100"):
            data = [CIFAR100(str(root), train=train, transform=transform) for train in (True, False)]
        else:
            data = [ImageFolder(str(Path(root) / part), transform=transform) for part in ("train", "test")]
    except (RuntimeError, OSError) as error:
        raise RecastSequenceError(f"the data of {name} do not lie at {os.fspath(root)!r}: {error}") from error
    return split_tasks(PROTOCOLS[name], *data)


# ---------------------------------------------------------------- runs


def learn_told(
    model: nn.Module,
    tasks: Mapping[str, ClassTask],
    train: Callable[[PeftModel, ClassTask], Any],
    *,
    config: RecastConfig | None = None,
    batch_size: int = 64,
) -> ProtocolResult:
    """Learn each task as an adapter with a classifier of its own; at the test the task of a sample is told.

    Args:
        model: backbone.
        tasks: as ``split_tasks`` gives them.
        train: any training loop; the new task is active and alone trainable.
        config: of every task, but for the number of classes; None is ``RecastConfig()``.
        batch_size: samples that are tested together.
    """
    _check_tasks(tasks)
    configs = {name: checked_config(config).as_chosen(num_classes=len(task.classes)) for name, task in tasks.items()}

    def evaluate(model: nn.Module, task: ClassTask) -> float:
        return _accuracy((_logits(model(x)).argmax(1) == y) for x, y in _batches(task.test, batch_size, model))

    learned, matrix = learn_in_sequence(model, tasks, train, evaluate, config=configs)
    return _result(matrix, tasks, learned)


def learn_untold(
    features: Callable[[Tensor], Tensor],
    tasks: Mapping[str, ClassTask],
    *,
    classifier: IncrementalClassifier | None = None,
    batch_size: int = 64,
) -> ProtocolResult:
    """Tell all classes so far apart by a classifier in closed form; no task is told, and no gradient is needed.

    Args:
        features: what makes ``(samples, features)`` of images, such as a frozen backbone without its classifier; a module is
            called in evaluation mode.
        tasks: as ``split_tasks`` gives them.
        classifier: to be taught; None is a fresh one with random features.
        batch_size: samples that are computed together.
    """
    _check_tasks(tasks)
    check_arguments(function, features=features)
    check_arguments(optional(of_type(IncrementalClassifier)), classifier=classifier)
    matrix = AccuracyMatrix(list(tasks))
    tested: dict[str, tuple[Tensor, Tensor]] = {}
    for name, task in tasks.items():
        x, y = _features(features, task.train, batch_size)
        classifier = classifier or IncrementalClassifier(x.shape[1])
        classifier.learn(x, y, classes=list(task.classes))
        tested[name] = _features(features, task.test, batch_size)
        for other, (known, labels) in tested.items():
            found = classifier.predict(known)
            right = [tasks[other].classes[place] == number for place, number in zip(labels.tolist(), found, strict=True)]
            matrix.record(name, other, sum(right) / len(right))
    return _result(matrix, tasks)


def answer_routed(model: PeftModel, tasks: Mapping[str, ClassTask], *, batch_size: int = 64) -> ProtocolResult:
    """Find the task of each sample by a pool's ``route``, and let that task answer; no task is told.

    Args:
        model: with the tasks under their names, as ``learn_told`` gives it; it is left as it is.
        tasks: as ``split_tasks`` gives them.
        batch_size: samples that are computed together.
    """
    _check_tasks(tasks)
    matrix = AccuracyMatrix(list(tasks))
    lacking = [name for name in tasks if isinstance(model, PeftModel) and name not in model.peft_config]
    if lacking:
        raise RecastSequenceError(f"the model has no task {lacking[0]!r}; it has {', '.join(model.peft_config)}")
    seen: list[str] = []
    with _pool_for_a_while(model, matrix.tasks[0]) as pool, evaluating(model), torch.no_grad():
        for name, task in tasks.items():
            pool.add(name, name)
            pool.remember(name, *_all(task.train, batch_size, model))
            seen.append(name)
            classes_of = {int(number): tasks[known].classes for number, known in zip(pool.ids(seen), seen, strict=True)}
            for other in seen:
                own, batches = tasks[other].classes, _batches(tasks[other].test, batch_size, model)
                matrix.record(name, other, _accuracy(_is_right(pool, x, classes_of, own, y) for x, y in batches))
    return _result(matrix, tasks, model)


def _check_tasks(tasks: Any) -> None:
    if not isinstance(tasks, Mapping):
        raise RecastSequenceError(f"tasks={shown(tasks)}: expected a dictionary of tasks by name, as split_tasks gives it")
    for name, task in tasks.items():
        check_arguments(of_type(ClassTask), **{f"tasks[{name!r}]": task})


@contextmanager
def _pool_for_a_while(model: PeftModel, like: str) -> Iterator[TaskPool]:
    """A pool that is taken out of the model when the block ends, also by an error."""
    slot, configs = "routed tasks", getattr(model, "peft_config", {})
    while slot in configs:
        slot += "'"
    try:
        yield TaskPool(model, like=like, slot=slot)
    finally:
        if slot in configs:
            model.delete_adapter(slot)


def _is_right(pool: TaskPool, x: Tensor, classes_of: Mapping[int, Sequence[int]], own: Sequence[int], labels: Tensor) -> Tensor:
    """Whether the task that the pool finds for a sample gives its class; labels are places among ``own`` classes."""
    tasks = pool.route(x)
    places = _logits(pool.model(x, task_ids=tasks)).argmax(1)
    answers = zip(tasks.tolist(), places.tolist(), labels.tolist(), strict=True)
    return torch.tensor([classes_of[task][place] == own[label] for task, place, label in answers])


def _batches(data: Any, size: int, model: nn.Module | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    check_arguments(COUNT, batch_size=size)
    if not len(data):
        raise RecastSequenceError("a task has no samples: expected at least one to learn from, and one to test")
    for x, y in DataLoader(data, batch_size=size, generator=torch.Generator()):  # else it draws from the global one
        yield (x, y) if model is None else (x.to(device_of(model)), y.to(device_of(model)))


def _all(data: Any, size: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    x, y = zip(*_batches(data, size, model), strict=True)
    return torch.cat(x), torch.cat(y)


def _features(features: Callable[[Tensor], Tensor], data: Any, size: int) -> tuple[Tensor, Tensor]:
    model = features if isinstance(features, nn.Module) else None
    with nullcontext() if model is None else evaluating(model), torch.no_grad():
        found = [(_checked(features(x)), y) for x, y in _batches(data, size, model)]
    return torch.cat([x for x, _ in found]), torch.cat([y.cpu() for _, y in found])


def _checked(features: Any) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2:
        is_tensor = isinstance(features, Tensor)
        given = f"{features.dtype} of shape {tuple(features.shape)}" if is_tensor else f"a {type(features).__name__}"
        raise RecastSequenceError(f"features gave {given}: expected a tensor (samples, features)")
    return features.cpu()


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def _accuracy(right: Iterator[Tensor]) -> float:
    return float(torch.cat(list(right)).double().mean())


def _result(matrix: AccuracyMatrix, tasks: Mapping[str, ClassTask], model: PeftModel | None = None) -> ProtocolResult:
    sizes = np.array([len(task.test) for task in tasks.values()], dtype=float)
    steps = [float((matrix.values[k, : k + 1] * sizes[: k + 1]).sum() / sizes[: k + 1].sum()) for k in range(len(sizes))]
    return ProtocolResult(matrix, steps, model)
