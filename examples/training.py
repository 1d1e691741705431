"""The training loop that the demo and the benchmarks share: one schedule for all methods, a learning rate for each.

AdamW, cosine schedule with a short warm-up, gradient norm clipped to 1. A method is a function that takes a backbone and a
task and returns the trained model with the numbers that it trained beside the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from glyphs import Task
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from recast_peft import RecastConfig, get_recast_model
from recast_peft.parts.head_building import build_head, find_head


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the training images; the probe, which is cheap, takes ``probe_epochs``.
        probe_epochs: for the linear probe.
        batch_size: images in a step.
        head_lr: learning rate of every classifier.
        head_decay: weight decay of every classifier (AdamW's, which is multiplied by the learning rate).
        coefficient_lr: of RECAST's coefficients, in units of a template as large as the pretrained weight.
        lora_lr: of LoRA's matrices.
        seed: of the order of the images and of fresh weights.
    """

    epochs: int = 7
    probe_epochs: int = 60
    batch_size: int = 64
    head_lr: float = 1e-2
    head_decay: float = 1e-2
    coefficient_lr: float = 0.05
    lora_lr: float = 3e-3
    seed: int = 0


def train_groups(
    model: nn.Module,
    groups: list[dict[str, object]],
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    epochs: int,
    progress: str | None = None,
) -> None:
    """Train parameter groups of a model on images ``(N, ...)`` with labels ``(N,)``."""
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-2)
    total = epochs * math.ceil(len(images) / schedule.batch_size)
    warm_up = max(1, total // 10)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))

    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    generator = torch.Generator().manual_seed(schedule.seed)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    model.train()
    # without a terminal there is no bar (None), and without a name neither
    with tqdm(total=total, desc=progress, disable=True if progress is None else None, leave=False) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(schedule.batch_size):
                optimiser.zero_grad()
                loss = F.cross_entropy(logits_of(model, images[rows]), labels[rows])
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                decay.step()
                bar.update()
    model.eval()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores ``(N, classes)``, of a timm model or of one of transformers."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose class is found."""
    model.eval()
    right = [(logits_of(model, part).argmax(1) == want).sum() for part, want in zip(images.split(256), labels.split(256))]  # noqa: B905
    return float(sum(right)) / len(images)


def test_accuracy(model: nn.Module, task: Task) -> float:
    """Accuracy on a task's test images."""
    return accuracy(model, task.test_images, task.test_labels)


test_accuracy.__test__ = False  # type: ignore[attr-defined]  # not a test


@torch.no_grad()
def features_of(backbone: nn.Module, images: Tensor) -> Tensor:
    """What reaches the classifier of a frozen backbone, ``(N, features)``."""
    caught: list[Tensor] = []
    head = backbone.get_submodule(find_head(backbone))
    handle = head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        for part in images.split(256):
            backbone.eval()(part)
    finally:
        handle.remove()
    return torch.cat(caught)


def train_probe(backbone: nn.Module, task: Task, schedule: Schedule, progress: str | None = None) -> tuple[float, int]:
    """A linear classifier on the frozen features: test accuracy, and 0 further numbers.

    It is trained for ``epochs`` like the other methods and, separately, for ``probe_epochs``. The better of the two on the
    test images counts: a choice in the probe's favour, so that no method looks better than it by its schedule alone.
    """
    train, test = (features_of(backbone, images) for images in (task.train_images, task.test_images))
    best = 0.0
    for epochs in (schedule.epochs, schedule.probe_epochs):
        torch.manual_seed(schedule.seed)
        head = nn.Linear(train.shape[1], task.num_classes)
        groups: list[dict[str, object]] = [
            {"params": list(head.parameters()), "lr": schedule.head_lr, "weight_decay": schedule.head_decay}
        ]
        train_groups(head, groups, train, task.train_labels, schedule, epochs, progress)
        best = max(best, accuracy(head, test, task.test_labels))
    return best, 0


def lora_targets(model: nn.Module) -> str | list[str]:
    """The projections that LoRA adapts: a fused one where there is one, else query and value."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in (["qkv"], ["query", "value"], ["q_proj", "v_proj"]):
        if leaves.issuperset(names):
            return names
    return "all-linear"


def make_lora(
    backbone: nn.Module, classes: int, rank: int, schedule: Schedule
) -> tuple[nn.Module, list[dict[str, object]], int]:
    """A LoRA model with a fresh classifier, its parameter groups, and the numbers it trains beside the classifier."""
    name = find_head(backbone)
    parent, _, child = name.rpartition(".")
    torch.manual_seed(schedule.seed)
    fresh = build_head(backbone, backbone.get_submodule(name), name, RecastConfig(num_classes=classes, seed=schedule.seed))
    setattr(backbone.get_submodule(parent), child, fresh)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_targets(backbone), modules_to_save=[name])
    model = get_peft_model(backbone, config)
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    groups = [
        {"params": lora, "lr": schedule.lora_lr},
        {"params": head, "lr": schedule.head_lr, "weight_decay": schedule.head_decay},
    ]
    return model, groups, sum(p.numel() for p in lora)


def train_lora(
    make_backbone: Callable[[], nn.Module], task: Task, schedule: Schedule, rank: int = 8, progress: str | None = None
) -> tuple[nn.Module, float, int]:
    """PEFT's LoRA: the model, its test accuracy, and the numbers it trained beside the classifier."""
    model, groups, numbers = make_lora(make_backbone(), task.num_classes, rank, schedule)
    train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs, progress)
    return model, test_accuracy(model, task), numbers


def recast_groups(model: nn.Module, schedule: Schedule) -> list[dict[str, object]]:
    """Parameter groups of the active RECAST task: coefficients and classifier, each with its own learning rate."""
    coefficients = [p for n, p in model.named_parameters() if p.requires_grad and "recast_" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "recast_" not in n]
    return [
        {"params": coefficients, "lr": schedule.coefficient_lr, "weight_decay": 0.0},
        {"params": head, "lr": schedule.head_lr, "weight_decay": schedule.head_decay},
    ]


def train_recast(
    make_backbone: Callable[[], nn.Module],
    task: Task,
    schedule: Schedule,
    config: RecastConfig | None = None,
    progress: str | None = None,
) -> tuple[nn.Module, float, int]:
    """RECAST on a fresh backbone: the model, its test accuracy, and the numbers it trained beside the classifier."""
    config = config or RecastConfig(num_classes=task.num_classes, seed=schedule.seed)
    model = get_recast_model(make_backbone(), config)
    groups = recast_groups(model, schedule)
    train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs, progress)
    numbers = sum(p.numel() for p in groups[0]["params"])  # type: ignore[attr-defined]
    return model, test_accuracy(model, task), numbers
