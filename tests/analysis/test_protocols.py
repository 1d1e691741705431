"""Class-incremental protocols on made data of the shape that the real sets have."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from torch import Tensor, nn
from torchvision.datasets import CIFAR100, cifar
from torchvision.transforms.functional import to_tensor

from recast_peft import RecastConfig, RecastConfigError, RecastSequenceError, TaskPool, get_recast_model
from recast_peft.analysis.class_incremental import IncrementalClassifier
from recast_peft.analysis.protocols import (
    PROTOCOLS,
    ClassTask,
    Protocol,
    Rows,
    answer_routed,
    learn_told,
    learn_untold,
    open_protocol,
    split_tasks,
)

WIDTH = 8


class Made(torch.utils.data.Dataset):
    """Points around a centre for each class; class c has ``counts[c]`` of them."""

    def __init__(self, counts: list[int], seed: int) -> None:
        centres = 3 * torch.randn(len(counts), WIDTH, generator=torch.Generator().manual_seed(0))
        self.targets = [c for c, count in enumerate(counts) for _ in range(count)]
        noise = torch.randn(len(self.targets), WIDTH, generator=torch.Generator().manual_seed(seed))
        self.x = centres[self.targets] + 0.3 * noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.x[number], self.targets[number]


def tasks(counts: list[int] | None = None) -> dict[str, ClassTask]:
    return split_tasks(Protocol(6, 2), Made([20] * 6, 1), Made(counts or [5] * 6, 2))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)]
    return nn.Sequential(*layers)


def train(model: nn.Module, task: ClassTask) -> None:
    x, y = (torch.stack([task.train[i][0] for i in range(len(task.train))]), torch.tensor(task.train.labels))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_classes_come_in_the_order_of_the_field() -> None:
    for name, (classes, increment, count) in {"cifar100-b0-inc10": (100, 10, 10), "imagenet-r-b0-inc20": (200, 20, 10)}.items():
        found = PROTOCOLS[name].tasks()
        assert [len(task) for task in found] == [increment] * count
        assert sorted(number for task in found for number in task) == list(range(classes))
    # np.random.seed(1993); np.random.permutation(100), as the code of iCaRL and its successors draws it
    assert PROTOCOLS["cifar100-b0-inc10"].tasks()[0] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert Protocol(4, 2, seed=None).tasks() == [[0, 1], [2, 3]]
    for fields in ({"classes": 10, "increment": 3}, {"classes": 0, "increment": 1}, {"classes": 4, "increment": True}):
        with pytest.raises(RecastSequenceError, match="divisible"):
            Protocol(**fields)


def test_every_sample_is_in_the_task_of_its_class() -> None:
    made, found = Made([20] * 6, 1), tasks()
    assert list(found) == ["task 0", "task 1", "task 2"]
    for task in found.values():
        for part, count in ((task.train, 20), (task.test, 5)):
            assert len(part) == 2 * count
            assert sorted(part[i][1] for i in range(len(part))) == [0] * count + [1] * count
        x, place = task.train[0]
        nearest = torch.cdist(x[None], made.x).argmin()
        assert made.targets[nearest] == task.classes[place]
    with pytest.raises(RecastSequenceError, match="5 classes, 0 to 4"):
        split_tasks(Protocol(6, 2), Made([20] * 5, 1), Made([5] * 6, 2))


def test_told_each_task_has_its_classifier_and_nothing_is_forgotten() -> None:
    found = tasks()
    config = RecastConfig(target_modules=["0", "2"], head_module="4")
    result = learn_told(backbone(), found, train, config=config, batch_size=7)
    assert config.num_classes is None
    assert result.matrix.summary()["forgetting"] == 0
    assert result.average > 0.95
    routed = answer_routed(result.model, found, batch_size=7)
    assert 1 / 6 < routed.last <= result.last
    for k in range(3):  # routing alone may err: the task that it finds answers as it does when it is told
        assert routed.matrix.values[k, 0] <= result.matrix.values[0, 0]


def test_routing_leaves_the_model_as_it_was() -> None:
    found = tasks()
    model = learn_told(backbone(), found, train, config=RecastConfig(target_modules=["0", "2"], head_module="4")).model
    assert model is not None
    pool = TaskPool(model, like="task 0", slot="routed tasks")
    model.set_adapter("task 1")

    def state() -> tuple:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return list(model.peft_config), model.active_adapters, trained, list(model.state_dict()), model.base_model.task_pool

    before = state()
    answer_routed(model, found)
    assert state() == before
    with pytest.raises(RecastConfigError, match="batch_size=0"):
        answer_routed(model, found, batch_size=0)
    assert state() == before
    assert model.base_model.task_pool == (pool,)


def test_untold_classes_of_all_tasks_are_told_apart() -> None:
    found = tasks()
    result = learn_untold(nn.Identity(), found, classifier=IncrementalClassifier(WIDTH, projections=200))
    assert result.average > 0.95
    assert result.model is None
    assert learn_untold(nn.Identity(), {"task 0": found["task 0"]}).average > 0.95  # a classifier of its own
    # the same classifier by hand
    classifier = IncrementalClassifier(WIDTH, projections=200)
    for task in found.values():
        x, y = zip(*(task.train[i] for i in range(len(task.train))), strict=True)
        classifier.learn(torch.stack(x), torch.tensor(y), classes=list(task.classes))
    made = Made([5] * 6, 2)
    right = [a == b for a, b in zip(classifier.predict(made.x), made.targets, strict=True)]
    assert result.last == pytest.approx(sum(right) / len(right))


def test_untold_a_module_is_asked_in_evaluation_mode_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.9)).train()

    def steps() -> Any:
        return learn_untold(model, tasks(), classifier=IncrementalClassifier(WIDTH, projections=50)).steps

    found = steps()
    assert model.training
    assert int(model[0].num_batches_tracked) == 0
    model.eval()
    assert steps() == found


def test_what_has_no_samples_is_refused() -> None:
    found = tasks()
    with pytest.raises(RecastSequenceError, match="no samples"):
        learn_untold(nn.Identity(), {"task 0": ClassTask([0, 1], [], found["task 0"].test)})
    with pytest.raises(RecastConfigError, match="batch_size=0"):
        learn_untold(nn.Identity(), found, batch_size=0)
    with pytest.raises(RecastSequenceError, match="Subset without targets"):
        split_tasks(Protocol(6, 2), torch.utils.data.Subset(Made([5] * 6, 1), [0]), Made([5] * 6, 2))
    model = learn_told(backbone(), found, train, config=RecastConfig(target_modules=["0", "2"], head_module="4")).model
    assert model is not None
    with pytest.raises(RecastSequenceError, match="at least one"):
        answer_routed(model, {})


def test_steps_count_samples_and_not_tasks() -> None:
    """Of two tasks, one with ten times the test samples, both learned by a classifier that knows the first class alone."""

    class First(IncrementalClassifier):
        def predict(self, features: Tensor) -> list[int | str]:
            return [self.classes[0]] * len(features)

    protocol = Protocol(4, 2, seed=None)
    found = split_tasks(protocol, Made([20] * 4, 1), Made([30, 10, 2, 2], 2))
    result = learn_untold(nn.Identity(), found, classifier=First(WIDTH, projections=50))
    assert result.steps == pytest.approx([30 / 40, 30 / 44])
    assert result.average == pytest.approx((30 / 40 + 30 / 44) / 2)
    assert result.matrix.values[1].tolist() == pytest.approx([0.75, 0.0])


def features(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def test_cifar_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)  # the sums are of the real files
    monkeypatch.setattr(cifar, "check_integrity", lambda *args: True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (100, 3))
    for name, each in (("train", 4), ("test", 2)):
        labels = [number for number in range(100) for _ in range(each)]
        data = np.repeat(colours[labels].astype(np.uint8), 1024, axis=1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {number}" for number in range(100)]}))
    found = open_protocol("cifar100-b0-inc10", tmp_path, to_tensor)
    assert [len(task.train) for task in found.values()] == [40] * 10
    image, label = found["task 3"].test[0]
    colour = colours[found["task 3"].classes[label]]
    assert torch.allclose(image, torch.tensor(colour / 255).view(3, 1, 1).expand(3, 32, 32).float())
    assert learn_untold(features, found, classifier=IncrementalClassifier(3, projections=200)).average > 0.9


@pytest.mark.parametrize("name", ["imagenet-r-b0-inc20", "cub-b0-inc20"])
def test_folders_of_pictures(tmp_path: Path, name: str) -> None:
    for part in ("train", "test"):
        for number in range(200):
            folder = tmp_path / part / f"{number:03d}"
            folder.mkdir(parents=True)
            Pictures.new("RGB", (4, 4), (number, 255 - number, 7)).save(folder / "a.png")
    found = open_protocol(name, tmp_path, to_tensor)
    assert [len(task.classes) for task in found.values()] == [20] * 10
    image, label = found["task 2"].train[5]
    assert image[0, 0, 0] == pytest.approx(found["task 2"].classes[label] / 255)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecastSequenceError, match="known are cifar100-b0-inc10"):
        open_protocol("cifar10", tmp_path, to_tensor)
    for name in PROTOCOLS:
        with pytest.raises(RecastSequenceError, match="do not lie at"):
            open_protocol(name, tmp_path, to_tensor)


def test_rows_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")

    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})

    def rows(each: int) -> Any:
        labels = [number for number in range(4) for _ in range(each)]
        content = {"image": [Pictures.new("RGB", (4, 4), (40 * number, 0, 0)) for number in labels], "label": labels}
        return datasets.Dataset.from_dict(content, features=columns)

    found = split_tasks(Protocol(4, 2), Rows(rows(3), to_tensor), Rows(rows(1), to_tensor))
    task = found["task 1"]
    image, label = task.train[4]
    assert image.shape == (3, 4, 4)
    assert image[0, 0, 0] == pytest.approx(40 * task.classes[label] / 255)


@pytest.mark.parametrize(
    "labels",
    [["cat", "dog"] * 3, [0.5, 1.5] * 3, [None] * 6, [float("nan")] * 6, torch.eye(6), 3],
    ids=["names", "halves", "none", "nan", "one hot", "no list"],
)
def test_labels_that_are_no_whole_numbers_are_refused(labels: Any) -> None:
    made = Made([1] * 6, 1)
    made.targets = labels
    for data in ((made, Made([1] * 6, 1)), (Made([1] * 6, 1), made)):
        with pytest.raises(RecastSequenceError, match="has labels that are no whole numbers"):
            split_tasks(Protocol(6, 2), *data)
    with pytest.raises(RecastSequenceError, match="'label' has labels that are no whole numbers"):
        Rows({"label": labels}, to_tensor)


def test_labels_of_other_kinds_of_whole_numbers() -> None:
    for labels in (np.arange(6), torch.arange(6), [float(number) for number in range(6)]):
        made = Made([1] * 6, 1)
        made.targets = labels  # type: ignore[assignment]
        found = split_tasks(Protocol(6, 2, seed=None), made, Made([1] * 6, 1))
        assert [task.train[1][1] for task in found.values()] == [1, 1, 1]


def test_features_of_another_form_are_refused() -> None:
    for given, what in ((lambda x: (x,), "a tuple"), (lambda x: x[:, None], r"torch.float32 of shape \(40, 1, 8\)")):
        with pytest.raises(RecastSequenceError, match=rf"features gave {what}: expected a tensor \(samples, features\)"):
            learn_untold(given, tasks())  # type: ignore[arg-type, return-value]


def test_what_is_no_dictionary_of_tasks_is_refused() -> None:
    for run in (
        lambda: learn_told(backbone(), [1], train),
        lambda: learn_untold(nn.Identity(), [1]),
        lambda: answer_routed(backbone(), [1]),
    ):
        with pytest.raises(RecastSequenceError, match=r"tasks=\[1\]: expected a dictionary"):
            run()


def test_routing_among_tasks_that_the_model_lacks_is_refused() -> None:
    found = tasks()
    model = get_recast_model(backbone(), RecastConfig(target_modules=["0", "2"], head_module="4", num_classes=2), "task 0")
    with pytest.raises(RecastSequenceError, match="the model has no task 'task 1'"):
        answer_routed(model, found)
    assert list(model.peft_config) == ["task 0"]


def test_testing_draws_no_random_number() -> None:
    """Else what later tasks learn would depend on how many samples were tested before."""
    config = RecastConfig(target_modules=["0"], head_module="4")
    told = learn_told(backbone(), tasks(), lambda model, task: None, config=config)
    before = torch.random.get_rng_state()
    answer_routed(told.model, tasks())  # type: ignore[arg-type]
    learn_untold(nn.Identity(), tasks())
    assert torch.equal(torch.random.get_rng_state(), before)
