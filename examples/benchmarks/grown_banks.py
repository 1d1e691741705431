"""Does a bank grown from other tasks make RECAST's few coefficients stronger?

    python examples/benchmarks/grown_banks.py --output grown_banks_output
    python examples/benchmarks/grown_banks.py --quick                       # shows that it works, no more

Leave one out: each of the demo's tasks is held out in turn. A bank is grown from LoRA adapters of all the others, or learned
together with them, and the task that was held out is learned with its coefficients alone, on the fused projections of all
eight blocks. Beside it stand the probe, RECAST on a plain bank, TinyLoRA, LoRA and full fine-tuning; the learning rate of every
row is found by the same search. A second table holds tasks of another kind than the sources: what is wrong with a letter, and
which font it is of. Runs, sources and learned banks are kept in the output folder: a study that is broken off goes on where
it stood.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' folder

from accuracy import PROBE, collect, lora, make_study, parser, recast, show, tinylora
from glyph_backbone import load_backbone
from glyphs import Task, load_task
from peft import LoraConfig, TinyLoraConfig
from safetensors.torch import load_file, save_file
from study import TUNING_TASKS, Method, NotRun, Study, parameter_groups, part_of_backbone, peft_method, recast_method
from study_tables import Row, row_of, table
from torch import Tensor, nn
from training import Schedule, train_groups

from recast_peft import RecastConfig, StoredBank, get_recast_model, grow_bank, learn_bank, load_bank

TARGETS = ["qkv"]
WIDE = ("qkv", "fc1", "fc2")
SOURCE_RANK = 8
UNRELATED = ("damage", "lettering")
START_LR = 0.15


class Banks:
    """Sources and banks of a study, each made once and kept in a folder.

    Args:
        folder: where they are kept.
        study: says how many images there are, and the schedule.
        tasks: whose adapters are sources.
        steps: of ``learn_bank``.
    """

    def __init__(self, folder: Path, study: Study, tasks: Sequence[str], steps: int) -> None:
        self.folder, self.study, self.tasks, self.steps = folder, study, tuple(tasks), steps
        folder.mkdir(parents=True, exist_ok=True)
        self.grown = lru_cache(maxsize=64)(self._grown)

    def others(self, held_out: str, count: int | None = None) -> list[str]:
        """Tasks that are sources for the one that is held out: those that follow it, in a circle."""
        place = self.tasks.index(held_out) + 1 if held_out in self.tasks else 0
        names = [name for name in (*self.tasks[place:], *self.tasks[:place]) if name != held_out]
        return names[:count]

    def images(self, name: str, seed: int) -> Task:
        """A task's images."""
        return load_task(name, seed, *self.study.sizes)

    def source(self, name: str, seed: int, targets: Sequence[str] = TARGETS) -> dict[str, Tensor]:
        """The weights that a LoRA of a task makes of the backbone."""
        path = self.folder / f"{name}-{seed}{'' if list(targets) == TARGETS else '-' + '-'.join(targets)}.safetensors"
        if not path.is_file():
            start = time.process_time()
            fields = {"r": SOURCE_RANK, "lora_alpha": 2 * SOURCE_RANK, "target_modules": list(targets)}
            method = peft_method("source", LoraConfig, fields, Schedule.lora_lr)
            task, schedule = self.images(name, seed), replace(self.study.schedule, seed=seed)
            backbone = load_backbone()
            torch.manual_seed(seed)
            model = method.build(backbone, task, seed)
            groups = [
                {"params": group["params"], "lr": group["lr"]} for group in parameter_groups(model, method, schedule.head_lr)
            ]
            train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs)
            moved = model.merge_and_unload().state_dict()  # type: ignore[operator]
            endings = tuple(f".{target}.weight" for target in targets)
            save_file({key: value.contiguous() for key, value in moved.items() if key.endswith(endings)}, path)
            self.note(path.name, time.process_time() - start)
        return load_file(path)

    def _grown(
        self,
        held_out: str,
        seed: int,
        count: int | None,
        templates: int | None,
        group_size: int,
        plain: bool,
        targets: Sequence[str] = tuple(TARGETS),
    ) -> StoredBank:
        sources = [self.source(name, seed, targets) for name in self.others(held_out, count)]
        config = RecastConfig(target_modules=list(targets), group_size=group_size)
        return grow_bank(load_backbone(), sources, config, num_templates=templates, plain_templates=plain)

    def learned(self, held_out: str, seed: int) -> StoredBank:
        """The bank grown from all the others, learned further on their images."""
        path = self.folder / f"without-{held_out}-{seed}"
        if not path.is_dir():
            names = self.others(held_out)
            start = time.process_time()
            found = learn_bank(
                load_backbone(),
                {name: len(self.images(name, seed).class_names) for name in names},
                mixed_batches([self.images(name, seed) for name in names], self.steps, self.study.schedule.batch_size, seed),
                self.grown(held_out, seed, None, None, 1, True),
                template_lr=0.02,
                seed=seed,
                checkpoint=path.with_suffix(".pt"),
                progress=False,
            )
            found.bank.save(path)
            self.note(path.name, time.process_time() - start)
        return load_bank(path)

    def note(self, name: str, seconds: float) -> None:
        """Keep what something took."""
        path = self.folder / "seconds.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, name: seconds}, indent=2) + "\n")

    def seconds(self, start: str, targets: Sequence[str] = TARGETS) -> float:
        """Mean processor time of what has a name that starts so; sources of more modules say so in their names."""
        path = self.folder / "seconds.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        suffix = "" if list(targets) == TARGETS else "-".join(targets)
        fitting = [
            value
            for name, value in known.items()
            if name.startswith(start) and (suffix in name if suffix else "qkv" not in name)
        ]
        return statistics.fmean(fitting or [0.0])


def mixed_batches(tasks: Sequence[Task], steps: int, size: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches in which samples of all tasks are mixed, the tasks by number."""
    images = torch.cat([task.train_images for task in tasks])
    labels = torch.cat([task.train_labels for task in tasks])
    numbers = torch.cat([torch.full((len(task.train_labels),), i) for i, task in enumerate(tasks)])
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    while len(rows) < steps:
        rows += torch.randperm(len(images), generator=generator).split(size)[:-1]
    return [(images[part], labels[part], numbers[part]) for part in rows[:steps]]


def on_bank(name: str, settings: dict[str, Any], bank: Callable[[str, int], StoredBank], banks: Banks, lr: float) -> Method:
    """A row of RECAST on a bank that depends on the task and the seed."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        config = RecastConfig(num_classes=task.num_classes, seed=seed, bank=bank(task.name, seed))  # type: ignore[arg-type]
        return get_recast_model(backbone, config)

    made = {"config": "RecastConfig", "sources": list(banks.tasks), "source_rank": SOURCE_RANK, **settings}
    return Method(name, made, build, {"recast_": lr})


def grown_method(name: str, banks: Banks, lr: float, count: int | None = None, plain: bool = False) -> Method:
    """RECAST on a bank grown for every module by itself."""
    settings = {"bank": "grown", "count": count, "plain": plain}
    return on_bank(name, settings, lambda task, seed: banks.grown(task, seed, count, None, 1, plain), banks, lr)


def wide_method(name: str, banks: Banks, lr: float, templates: int) -> Method:
    """RECAST on a bank grown for every module by itself, of the attention and the MLP."""
    settings = {"bank": "grown", "templates": templates, "plain": False, "targets": list(WIDE)}
    return on_bank(name, settings, lambda task, seed: banks.grown(task, seed, None, templates, 1, False, WIDE), banks, lr)


def shared_method(name: str, banks: Banks, lr: float, templates: int) -> Method:
    """RECAST on plain banks of two blocks with grown templates beside the pretrained weights."""
    settings = {"bank": "grown", "templates": templates, "group_size": 2, "plain": True}
    return on_bank(name, settings, lambda task, seed: banks.grown(task, seed, None, templates, 2, True), banks, lr)


def learned_method(name: str, banks: Banks, lr: float) -> Method:
    """RECAST on a bank that was learned together with the other tasks."""
    return on_bank(name, {"bank": "learned", "steps": banks.steps}, banks.learned, banks, lr)


def plain_method(group_size: int) -> Method:
    """RECAST on plain banks."""
    return recast_method(f"plain bank, groups of {group_size}", {"target_modules": TARGETS, "group_size": group_size}, START_LR)


def families_of(banks: Banks, tune: Callable[[Method], Method], seed: int) -> dict[str, Callable[[], list[Method]]]:
    """The rows by family, each when it is asked for, with the learning rates that the search finds.

    Banks of fewer sources or more modules take the rate of the whole one.
    """

    def whole() -> Method:
        return tune(grown_method("grown, all sources", banks, START_LR))

    def fewer() -> list[Method]:
        counts = [count for count in (1, 3) if count < len(banks.tasks) - 1]
        rate = whole().lrs["recast_"]
        return [grown_method(f"grown, {count} source{'s' * (count > 1)}", banks, rate, count) for count in counts]

    def wide() -> list[Method]:
        for name in banks.tasks if not banks.study.only_known else ():
            banks.source(name, seed, WIDE)  # apart from the runs, so that their times are those of a task
        return [wide_method("grown, two components, qkv + fc1 + fc2", banks, whole().lrs["recast_"], 2)]

    def learned() -> list[Method]:
        for name in banks.tasks if not banks.study.only_known else ():
            banks.learned(name, seed)
        return [tune(learned_method("learned, and the module's own weight", banks, START_LR))]

    tiny = {"target_modules": TARGETS, "u": 6}
    return {
        "linear probe": lambda: [tune(PROBE)],
        "grown bank": lambda: [whole()],
        "plain bank": lambda: [tune(plain_method(6))],
        "plain bank, attention and MLP": lambda: [tune(recast(48))],
        "TinyLoRA, attention and MLP": lambda: [tune(tinylora(48))],
        "grown bank, attention and MLP": wide,
        "grown bank and weight": lambda: [
            tune(grown_method("grown, and the module's own weight", banks, START_LR, plain=True))
        ],
        "grown bank, fewer sources": fewer,
        "learned bank": learned,
        "LoRA": lambda: [tune(lora(1)), tune(lora(8))],
        "TinyLoRA": lambda: [tune(peft_method("TinyLoRA, 48, qkv", TinyLoraConfig, tiny, 0.05))],
        "full fine-tuning": lambda: [tune(part_of_backbone("full fine-tuning", "", 1e-3))],
    }


def costs(study: Study, banks: Banks, families: dict[str, list[Method]], rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """What a task costs to keep and to learn, and a bank once: as Markdown."""
    lines = ["| method | bytes of a task | bytes of the bank | seconds to learn a task | seconds for the bank, once |"]
    lines.append("|---" * 5 + "|")
    methods = {method.name: method for members in families.values() for method in members}
    for row in rows:
        settings = methods[row.name].settings
        runs = [study.run(methods[row.name], name, seed) for name in row.gains for seed in seeds[: len(row.gains[name])]]
        taken = statistics.fmean(run.seconds for run in runs)
        size, once = 0, 0.0
        if "bank" in settings:
            count = settings.get("count") or len(banks.tasks) - 1
            targets = tuple(settings.get("targets", TARGETS))
            size = banks.grown(banks.tasks[0], seeds[0], count, settings.get("templates"), 1, True, targets).nbytes
            source = statistics.fmean(banks.seconds(f"{name}-", targets) for name in banks.tasks)
            once = count * source + (banks.seconds("without-") if settings["bank"] == "learned" else 0.0)
        lines.append(f"| {row.name} | {4 * row.numbers:,} | {size:,} | {taken:.1f} | {once:.0f} |")
    return "\n".join(lines)


def unrelated(study: Study, banks: Banks, tune: Callable[[Method], Method], options: argparse.Namespace) -> str:
    """Tasks of another kind than the sources, on plain banks and on the same with grown templates beside: as Markdown."""
    tasks = [name for name in UNRELATED if name not in banks.tasks]
    methods = [PROBE, plain_method(2), shared_method("the same and four grown templates", banks, START_LR, 4)]
    methods = [tune(method) for method in methods]
    for seed in options.seeds:
        for method in methods:
            for name in tasks:
                study.run(method, name, seed)
    rows = [row_of(study, method.name, method, methods[0], tasks, options.seeds) for method in methods]
    return table([row for row in rows if row is not None], methods[1].name)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the study, seed by seed; after each the tables and the picture are written."""
    made = parser(__doc__, "grown_banks_output")
    made.add_argument("--steps", type=int, default=300, help="of learn_bank (default: %(default)s)")
    options = made.parse_args(arguments)
    study = make_study(options)
    if options.quick:
        options.tasks, options.steps = ["arrows", "greek", "hebrew"], 4
    banks = Banks(options.output / "banks", study, options.tasks, options.steps)
    rows: list[Row] = []
    tuning = tuple(options.tasks[:2]) if options.quick else TUNING_TASKS

    def tune(method: Method) -> Method:
        return study.tune(method, tuning)

    for seed in options.seeds:
        so_far = options_up_to(options, seed)
        for name in options.tasks:
            banks.source(name, seed)
        families: dict[str, list[Method]] = {}
        for family, make in families_of(banks, tune, seed).items():
            with suppress(NotRun):
                families[family] = make()
                first = next(iter(families))
                collect(study, {first: families[first], family: families[family]}, so_far)
        rows = collect(study, families, so_far)
        show(rows, options, "A task left out, a bank from the others: mean of the demo's tasks")
        with suppress(NotRun):
            text, other = costs(study, banks, families, rows, so_far.seeds), unrelated(study, banks, tune, so_far)
            print(f"\n{text}\n\n{other}", flush=True)
            (options.output / "costs.md").write_text(text + "\n")
            (options.output / "unrelated.md").write_text(other + "\n")
    return rows


def options_up_to(options: argparse.Namespace, seed: int) -> argparse.Namespace:
    """The options with the seeds up to this one."""
    seeds = options.seeds[: options.seeds.index(seed) + 1]
    return argparse.Namespace(**{**vars(options), "seeds": seeds})


if __name__ == "__main__":
    main()
