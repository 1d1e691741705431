"""Does the order of the tasks matter, is anything forgotten, and can the task be found when nobody names it?

    python examples/task_orders.py                       # three tasks in three orders
    python examples/task_orders.py --tasks greek hebrew arrows damage --epochs 7

The same tasks are learned in three orders, with RECAST and, beside it, by fine-tuning the whole backbone from task to task
(each task with a classifier of its own, as RECAST's have). Accuracy after the last task, backward transfer and forgetting
are printed for each order. Then the tasks are put in one pool, and samples of all of them are classified without saying which
task they belong to: the pool routes them by the pretrained model's features.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from glyph_backbone import load_backbone
from glyphs import TASKS, Task, load_task
from peft import PeftModel
from training import Schedule, logits_of, recast_groups, test_accuracy, train_groups

from recast_peft import RecastConfig, TaskPool, split_logits
from recast_peft.analysis.matrix import AccuracyMatrix
from recast_peft.analysis.sequence import learn_in_sequence

FINE_TUNING_LR = 5e-4


def recast(tasks: dict[str, Task], schedule: Schedule) -> tuple[PeftModel, AccuracyMatrix]:
    """The tasks one after the other as RECAST tasks."""

    def train(model: PeftModel, task: Task) -> None:
        images, labels = task.train_images, task.train_labels
        train_groups(model, recast_groups(model, schedule), images, labels, schedule, schedule.epochs, task.name)

    configs = {name: RecastConfig(num_classes=task.num_classes, seed=schedule.seed) for name, task in tasks.items()}
    return learn_in_sequence(load_backbone(), tasks, train, test_accuracy, config=configs)


def fine_tuning(tasks: dict[str, Task], schedule: Schedule) -> AccuracyMatrix:
    """The tasks one after the other in the backbone's own weights, each with its own classifier."""
    backbone, heads = load_backbone(), {}
    matrix = AccuracyMatrix(list(tasks))
    for name, task in tasks.items():
        torch.manual_seed(schedule.seed)
        backbone.reset_classifier(task.num_classes)
        head = [{"params": list(backbone.head.parameters()), "lr": schedule.head_lr}]
        body = [p for n, p in backbone.named_parameters() if not n.startswith("head")]
        groups: list[dict[str, object]] = [*head, {"params": body, "lr": FINE_TUNING_LR}]
        train_groups(backbone, groups, task.train_images, task.train_labels, schedule, schedule.epochs, name)
        heads[name] = copy.deepcopy(backbone.head)
        for other in heads:
            backbone.head = heads[other]
            matrix.record(name, other, test_accuracy(backbone, tasks[other]))
        backbone.head = heads[name]
    return matrix


@torch.no_grad()
def without_being_told(model: PeftModel, tasks: dict[str, Task]) -> dict[str, float]:
    """Share of test images whose task is found, whose class is found then, and whose class is found with the task given."""
    pool = TaskPool(model)
    for name, task in tasks.items():
        pool.add(name, name)
        pool.remember(name, task.train_images, task.train_labels)
    routed = found = told = count = 0
    for name, task in tasks.items():
        for images, labels in zip(task.test_images.split(256), task.test_labels.split(256), strict=True):
            ids = pool.route(images)
            right_task = ids == pool.row(name)
            rows = split_logits(model(images, task_ids=ids))
            right_class = torch.tensor([int(row.argmax()) for row in rows]) == labels
            with pool.use(name):
                told += int((logits_of(model, images).argmax(1) == labels).sum())
            routed += int(right_task.sum())
            found += int((right_task & right_class).sum())
            count += len(labels)
    return {"task found": routed / count, "class found": found / count, "class found, task given": told / count}


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run it; returns what is also written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["handwriting", "arrows", "damage"], choices=list(TASKS))
    parser.add_argument("--train-per-class", type=int, default=40)
    parser.add_argument("--test-per-class", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    schedule = Schedule(epochs=options.epochs, seed=options.seed)
    sizes = {"train_per_class": options.train_per_class, "test_per_class": options.test_per_class}
    tasks = {name: load_task(name, seed=options.seed, **sizes) for name in options.tasks}
    orders = [tuple(tasks), tuple(reversed(tasks)), (*list(tasks)[1:], next(iter(tasks)))]

    print(f"{'order':44}{'method':14}" + "".join(f"{name:>14}" for name in tasks) + f"{'backward':>10}{'forgetting':>12}")
    rows: list[dict[str, object]] = []
    model = None
    for order in orders:
        chosen = {name: tasks[name] for name in order}
        model, matrix = recast(chosen, schedule)
        for method, result in (("RECAST", matrix), ("fine-tuning", fine_tuning(chosen, schedule))):
            final = dict(zip(order, result.values[-1].tolist(), strict=True))
            measures = result.summary()
            shown = "".join(f"{100 * final[name]:>14.1f}" for name in tasks)
            transfer = f"{100 * measures['backward_transfer']:>+10.1f}{100 * measures['forgetting']:>+12.1f}"
            print(f"{', '.join(order):44}{method:14}{shown}{transfer}")
            rows.append({"order": order, "method": method, "final": final, **measures})
    assert model is not None
    shares = without_being_told(model, tasks)
    print("without being told the task: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
    result = {"orders": rows, "routing": shares}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
