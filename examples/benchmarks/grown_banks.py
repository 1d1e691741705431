"""Does a bank grown from other tasks make RECAST's few coefficients stronger?

    python examples/benchmarks/grown_banks.py --output grown_banks_output
    python examples/benchmarks/grown_banks.py --quick                       # shows that it works, no more

Leave one out: each of the demo's tasks is held out in turn. A bank is grown from adapters of all the others (LoRA for
weights, biases that were trained whole for biases), and the task that was held out is learned with its coefficients alone.
Beside it stand the probe, RECAST on a plain bank, TinyLoRA, LoRA, BitFit and full fine-tuning; learning rates are found by
the search of accuracy.py. Two rows, the probe and LoRA on a backbone whose biases are moved to the mean of the sources',
tell what a bank brings from what any method gains by starting there. Further rows do without earlier tasks: their sources
are practice tasks, made of the characters of the pretraining. A second table holds tasks of another kind than the sources:
what is wrong with a letter, and which font it is of. Runs and sources are kept in the output folder: a study that is broken
off goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import os
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

from accuracy import BIASES, PROBE, REFERENCE, ROWS, collect, lora, make_study, parser, recast, show, tinylora, tuned
from glyph_backbone import load_backbone
from glyphs import Task, load_task, practice_task
from peft import LoraConfig, TinyLoraConfig
from safetensors.torch import load_file, save_file
from study import Method, NotRun, Study, parameter_groups, part_of_backbone, peft_method, recast_method
from study_tables import Row, row_of, table
from torch import Tensor, nn
from training import train_groups

from recast_peft import (
    BiasConfig,
    RecastConfig,
    StoredBank,
    get_recast_model,
    grow_bank,
    grow_bias_bank,
)

TARGETS = ["qkv"]
WIDE = ("qkv", "fc1", "fc2")
MLP = ("fc1", "fc2")
SOURCE_RANK = 8
SOURCES = {"head_lr": 0.01, "head_decay": 10.0, "lora_lr": 3e-3, "bias_lr": 0.0316}
"""How sources are trained: as the search of accuracy.py found for LoRA r=8 and BitFit."""
UNRELATED = ("damage", "lettering")
PRACTICE = tuple(f"practice-{i}" for i in range(5))
"""Sources for whoever has no earlier task: characters of the pretraining, worn more than it shows them."""
START_LR = 0.15


class Banks:
    """Sources and banks of a study, each made once and kept in a folder.

    Args:
        folder: where they are kept.
        study: says how many images there are, and the schedule.
        tasks: whose adapters are sources.
    """

    def __init__(self, folder: Path, study: Study, tasks: Sequence[str]) -> None:
        self.folder, self.study, self.tasks = folder, study, tuple(tasks)
        folder.mkdir(parents=True, exist_ok=True)
        self.grown = lru_cache(maxsize=64)(self._grown)
        self.biases = lru_cache(maxsize=64)(self._biases)

    def others(self, held_out: str, count: int | None = None) -> list[str]:
        """Tasks that are sources for the one that is held out: those that follow it, in a circle."""
        place = self.tasks.index(held_out) + 1 if held_out in self.tasks else 0
        names = [name for name in (*self.tasks[place:], *self.tasks[:place]) if name != held_out]
        return names[:count]

    def images(self, name: str, seed: int) -> Task:
        """A task's images."""
        if name in PRACTICE:
            return practice_task(PRACTICE.index(name), seed, *self.study.sizes)
        return load_task(name, seed, *self.study.sizes)

    def source(self, name: str, seed: int, targets: Sequence[str] = TARGETS) -> dict[str, Tensor]:
        """The weights that a LoRA of a task makes of the backbone."""
        fields = {"r": SOURCE_RANK, "lora_alpha": 2 * SOURCE_RANK, "target_modules": list(targets)}
        method = peft_method("source", LoraConfig, fields, SOURCES["lora_lr"])
        endings = tuple(f".{target}.weight" for target in targets)
        suffix = "" if list(targets) == TARGETS else "-" + "-".join(targets)
        return self._trained(f"{name}-{seed}{suffix}", method, name, seed, endings)

    def bias_source(self, name: str, seed: int) -> dict[str, Tensor]:
        """The biases of the backbone, trained on a task."""
        method = part_of_backbone("source", "bias", SOURCES["bias_lr"])
        return self._trained(f"{name}-{seed}-bias", method, name, seed, (".bias",))

    def _trained(self, file: str, method: Method, name: str, seed: int, endings: tuple[str, ...]) -> dict[str, Tensor]:
        """The parameters of a backbone that a method trained on a task; those whose names end so are kept."""
        path = self.folder / f"{file}.safetensors"
        if not path.is_file():
            start = time.process_time()
            method = replace(method, head_lr=SOURCES["head_lr"], head_decay=SOURCES["head_decay"])
            task, schedule = self.images(name, seed), replace(self.study.schedule, seed=seed)
            torch.manual_seed(seed)
            model = method.build(load_backbone(), task, seed)
            groups = parameter_groups(model, method, schedule.head_lr)
            train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs)
            plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
            kept = {key: value.contiguous() for key, value in plain.state_dict().items() if key.endswith(endings)}
            part = path.with_suffix(f".{os.getpid()}")  # another process may make the same source
            save_file({key: value for key, value in kept.items() if not key.startswith("head.")}, part)
            part.replace(path)
            self.note(path.name, time.process_time() - start)
        return load_file(path)

    def _biases(self, held_out: str, seed: int, count: int | None, templates: int | None, practice: bool) -> StoredBank:
        names = PRACTICE[:count] if practice else self.others(held_out, count)
        return grow_bias_bank(load_backbone(), [self.bias_source(name, seed) for name in names], num_templates=templates)

    def mean_biases(self, held_out: str, seed: int, practice: bool = False) -> dict[str, Tensor]:
        """The mean of the sources' biases."""
        sources = [self.bias_source(name, seed) for name in (PRACTICE if practice else self.others(held_out))]
        return {key: torch.stack([source[key] for source in sources]).mean(0) for key in sources[0]}

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
            if name.startswith(start) and (suffix in name if suffix else "qkv" not in name and "bias" not in name)
        ]
        return statistics.fmean(fitting or [0.0])


def on_bank(name: str, settings: dict[str, Any], bank: Callable[[str, int], StoredBank], banks: Banks, lr: float) -> Method:
    """A row of RECAST on a bank that depends on the task and the seed."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        config = RecastConfig(num_classes=task.num_classes, seed=seed, bank=bank(task.name, seed))  # type: ignore[arg-type]
        return get_recast_model(backbone, config)

    made = {"config": "RecastConfig", "sources": list(banks.tasks), "source_rank": SOURCE_RANK, "trained": SOURCES, **settings}
    return Method(name, made, build, {"recast_": lr})


def bias_method(
    name: str,
    banks: Banks,
    lr: float,
    templates: int | None,
    targets: Sequence[str],
    count: int | None = None,
    practice: bool = False,
) -> Method:
    """RECAST on a bank of biases; without targets the coefficients of biases are alone."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        partner = BiasConfig(bank=banks.biases("" if practice else task.name, seed, count, templates, practice))
        fields = {"target_modules": list(targets or MLP), "group_size": 1, "train_coefficients": bool(targets)}
        return get_recast_model(backbone, RecastConfig(num_classes=task.num_classes, seed=seed, partners=[partner], **fields))

    settings = {"bank": "biases", "count": count, "templates": templates, "targets": list(targets)}
    made = {"config": "RecastConfig", "sources": list(PRACTICE if practice else banks.tasks), "trained": SOURCES, **settings}
    return Method(name, made, build, {"recast_": lr})


def both_method(name: str, banks: Banks, lr: float, templates: int) -> Method:
    """RECAST on a bank of weights and a bank of biases."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        partner = BiasConfig(bank=banks.biases(task.name, seed, None, templates, False))
        bank = banks.grown(task.name, seed, None, None, 1, False)
        config = RecastConfig(num_classes=task.num_classes, seed=seed, bank=bank, partners=[partner])
        return get_recast_model(backbone, config)

    settings = {"bank": "grown", "biases": templates, "count": None, "plain": False, "source_rank": SOURCE_RANK}
    made = {"config": "RecastConfig", "sources": list(banks.tasks), "trained": SOURCES, **settings}
    return Method(name, made, build, {"recast_": lr})


def from_mean(name: str, banks: Banks, method: Method, practice: bool = False) -> Method:
    """A method that starts from a backbone whose biases are the mean of the sources'."""

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        backbone.load_state_dict(banks.mean_biases(task.name, seed, practice), strict=False)
        return method.build(backbone, task, seed)

    sources = list(PRACTICE if practice else banks.tasks)
    settings = {**method.settings, "start": "mean of biases", "sources": sources, "sources trained": SOURCES}
    return replace(method, name=name, settings=settings, build=build)


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


def plain_method(group_size: int) -> Method:
    """RECAST on plain banks."""
    return recast_method(f"plain bank, groups of {group_size}", {"target_modules": TARGETS, "group_size": group_size}, START_LR)


def with_rates_of(found: Method, methods: Sequence[Method]) -> list[Method]:
    """Methods with the rates that the search found for another one."""
    return [replace(m, lrs=found.lrs, head_lr=found.head_lr, head_decay=found.head_decay) for m in methods]


def grown_rows(banks: Banks, tune: Callable[[Method], Method], seed: int) -> dict[str, Callable[[], list[Method]]]:
    """Rows of weights; banks of fewer sources, or of more modules, take the rates of the whole one."""
    names = banks.tasks if not banks.study.only_known else ()

    def whole() -> Method:
        return tune(grown_method("grown, qkv, all sources", banks, START_LR))

    def fewer() -> list[Method]:
        counts = [count for count in (1, 3) if count < len(banks.tasks) - 1]
        made = [grown_method(f"grown, qkv, {count} source{'s' * (count > 1)}", banks, START_LR, count) for count in counts]
        return with_rates_of(whole(), made)

    def wide() -> list[Method]:
        for name in names:
            banks.source(name, seed, WIDE)  # apart from the runs, so that their times are those of a task
        return with_rates_of(whole(), [wide_method("grown, qkv + fc1 + fc2, two components", banks, START_LR, 2)])

    def sources() -> list[Method]:
        for name in names:
            banks.source(name, seed)
        return [whole()]

    return {
        "grown bank": sources,
        "grown bank, attention and MLP": wide,
        "grown bank and weight": lambda: [
            tune(grown_method("grown, qkv, and the module's own weight", banks, START_LR, plain=True))
        ],
        "grown bank, fewer sources": fewer,
    }


def bias_rows(banks: Banks, tune: Callable[[Method], Method], seed: int) -> dict[str, Callable[[], list[Method]]]:
    """Rows of biases; one of 48 numbers is searched, and the others take its rates."""

    def biases() -> list[Method]:
        for name in banks.tasks if not banks.study.only_known else ():
            banks.bias_source(name, seed)
        most = tune(bias_method("biases, four templates, and the MLP's own weights", banks, 0.05, 4, MLP))
        others = [
            bias_method("biases, all templates, alone", banks, 0.05, None, ()),
            *(bias_method(f"biases, {n} template{'s' * (n > 1)}, and fc1's own", banks, 0.05, n, ["fc1"]) for n in (1, 3)),
            bias_method("biases, all templates, and fc1's own", banks, 0.05, None, ["fc1"]),
            bias_method("biases of one source, and fc1's own", banks, 0.05, None, ["fc1"], 1),
            bias_method("biases of three sources, and fc1's own", banks, 0.05, None, ["fc1"], 3),
        ]
        both = both_method("grown, qkv, all sources, and one template of biases", banks, START_LR, 1)
        return [most, *with_rates_of(most, others), tune(both)]

    def moved() -> list[Method]:
        probe = from_mean("linear probe, biases moved to the sources' mean", banks, PROBE)
        return [tune(probe), *with_rates_of(tune(lora(8)), [from_mean(f"{REFERENCE}, biases moved likewise", banks, lora(8))])]

    def practised() -> list[Method]:
        for name in PRACTICE if not banks.study.only_known else ():
            banks.bias_source(name, seed)
        most = tune(bias_method("biases, four templates, and the MLP's own weights", banks, 0.05, 4, MLP))
        own = "fc1's own, practice tasks alone"
        rows = [
            bias_method("biases, four templates, and the MLP's own, practice tasks alone", banks, 0.05, 4, MLP, None, True),
            bias_method(f"biases, 1 template, and {own}", banks, 0.05, 1, ["fc1"], None, True),
            bias_method(f"biases, all templates, and {own}", banks, 0.05, None, ["fc1"], None, True),
        ]
        return with_rates_of(most, rows)

    def moved_by_practice() -> list[Method]:
        probe = from_mean("linear probe, biases moved to the practice tasks' mean", banks, PROBE, True)
        beside = from_mean(f"{REFERENCE}, biases moved to the practice tasks' mean", banks, lora(8), True)
        return [*with_rates_of(tune(PROBE), [probe]), *with_rates_of(tune(lora(8)), [beside])]

    return {
        "bank of biases": biases,
        "biases moved to the mean": moved,
        "bank of biases, practice": practised,
        "biases moved to practice's mean": moved_by_practice,
    }


def families_of(banks: Banks, tune: Callable[[Method], Method], seed: int) -> dict[str, Callable[[], list[Method]]]:
    """The rows by family, each when it is asked for, with the learning rates that the search finds."""
    tiny = {"target_modules": TARGETS, "u": 6}
    return {
        "linear probe": lambda: [tune(PROBE)],
        "LoRA": lambda: [tune(lora(1)), tune(lora(8))],
        "plain bank, attention and MLP": lambda: [tune(recast(48))],
        "plain bank and own biases": lambda: [tune(BIASES)],
        "plain bank": lambda: [tune(plain_method(6))],
        "TinyLoRA, attention and MLP": lambda: [tune(tinylora(48))],
        "TinyLoRA": lambda: [tune(peft_method("TinyLoRA on qkv, 48", TinyLoraConfig, tiny, 0.05))],
        **bias_rows(banks, tune, seed),
        **grown_rows(banks, tune, seed),
        "BitFit": lambda: [tune(ROWS["BitFit"][0])],
        "full fine-tuning": lambda: [tune(ROWS["full fine-tuning"][0])],
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
        if settings.get("bank") == "biases":
            count = settings["count"] or len(banks.tasks) - 1
            practice = settings["sources"] == list(PRACTICE)
            size = banks.biases(banks.tasks[0], seeds[0], count, settings["templates"], practice).nbytes
            once = count * banks.seconds("", ["bias"])
        elif "bank" in settings:
            count = settings.get("count") or len(banks.tasks) - 1
            targets = tuple(settings.get("targets", TARGETS))
            size = banks.grown(banks.tasks[0], seeds[0], count, settings.get("templates"), 1, True, targets).nbytes
            source = statistics.fmean(banks.seconds(f"{name}-", targets) for name in banks.tasks)
            once = count * source
        if "biases" in settings:
            size += banks.biases(banks.tasks[0], seeds[0], None, settings["biases"], False).nbytes
            once += (len(banks.tasks) - 1) * banks.seconds("", ["bias"])
        lines.append(f"| {row.name} | {4 * row.numbers:,} | {size:,} | {taken:.1f} | {once:.0f} |")
    return "\n".join(lines)


def unrelated(study: Study, banks: Banks, tune: Callable[[Method], Method], options: argparse.Namespace) -> str:
    """Tasks of another kind than the sources, on plain banks and on the same with grown templates beside: as Markdown."""
    tasks = [name for name in UNRELATED if name not in banks.tasks]
    methods = [
        PROBE,
        plain_method(2),
        shared_method("the same and four grown templates", banks, START_LR, 4),
        bias_method("biases, four templates, and the MLP's own weights", banks, 0.05, 4, MLP),
        lora(8),
    ]
    methods = [tune(method) for method in methods]
    practised = bias_method("the same, practice tasks alone", banks, 0.05, 4, MLP, None, True)
    methods[-1:-1] = with_rates_of(methods[-2], [practised])
    for seed in options.seeds:
        for method in methods:
            for name in tasks:
                study.run(method, name, seed)
    rows = [row_of(study, method.name, method, methods[0], tasks, options.seeds) for method in methods]
    return table([row for row in rows if row is not None], REFERENCE)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the study, seed by seed; after each the tables and the picture are written."""
    made = parser(__doc__, "grown_banks_output")
    made.add_argument("--families", nargs="+", help="only these rows, by family, beside the probe and LoRA (default: all)")
    options = made.parse_args(arguments)
    study = make_study(options)
    if options.quick:
        options.tasks = ["arrows", "greek", "hebrew"]
    banks = Banks(options.output / "banks", study, options.tasks)
    rows: list[Row] = []

    def tune(method: Method) -> Method:
        found = tuned(study, {method.name: [method]}, options)
        if not found:
            raise NotRun(f"the search for {method.name} has not been made")
        return found[method.name][0]

    for seed in options.seeds:
        so_far = options_up_to(options, seed)
        families: dict[str, list[Method]] = {}
        for family, make in families_of(banks, tune, seed).items():
            if options.families is not None and family not in ("linear probe", "LoRA", *options.families):
                continue
            with suppress(NotRun):
                families[family] = make()
                first = next(iter(families))
                collect(study, {first: families[first], family: families[family]}, so_far)
        rows = collect(study, families, so_far)
        show(rows, options, "A task left out, a bank from the others: mean of the demo's tasks")
        with suppress(NotRun):
            made_of = {"costs.md": costs(study, banks, families, rows, so_far.seeds)}
            if options.families is None:
                made_of["unrelated.md"] = unrelated(study, banks, tune, so_far)
            for name, text in made_of.items():
                print(f"\n{text}", flush=True)
                (options.output / name).write_text(text + "\n")
    return rows


def options_up_to(options: argparse.Namespace, seed: int) -> argparse.Namespace:
    """The options with the seeds up to this one."""
    seeds = options.seeds[: options.seeds.index(seed) + 1]
    return argparse.Namespace(**{**vars(options), "seeds": seeds})


if __name__ == "__main__":
    main()
