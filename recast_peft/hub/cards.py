"""The model card of a task, and of a repository of tasks.

A card is made from the files of a folder alone (the config, the file of numbers, the results stored in the config), so that
every way of saving a task writes the same card. What its owner wrote around it is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import RecastConfig
from ..names import role_of
from ..options.record import hub_repository
from ..storage.cards import (
    CARD_NAME,
    PAPER,
    card_data,
    code,
    data_of_bases,
    hub_link,
    merge_card,
    one_line,
    own_parts,
    plain_text,
    quoted,
    read_card,
    table,
)
from ..storage.json_reader import Fields
from ..storage.pairs import seal
from ..storage.paths import is_hub_name
from ..tasks.files import SAVED_PARTNERS
from ..validation import a_path, check_arguments, is_number, optional, text
from .task_files import TaskSizes, has_task_numbers, read_task_config, task_sizes, tasks_inside

PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
}


def write_card_of_saved_task(folder: str | os.PathLike) -> None:
    """Where a task's numbers lie beside a config that was just written: give them a checksum, and write the model card."""
    numbers = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if numbers.is_file():
        partners = [partner["method"] for partner in read_task_config(Path(folder)).get("partners") or ()]
        seal(numbers, Path(folder, CONFIG_NAME), {SAVED_PARTNERS: ", ".join(sorted(partners))})
    if has_task_numbers(folder):
        write_model_card(folder)


def write_model_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> str:
    """Write the model card of a saved task, beside its files.

    Args:
        folder: a saved task: ``adapter_config.json`` and its file of numbers.
        repo_id: where it will lie, for the lines that say how to load it; None is the folder's own name.
        subfolder: subfolder of the repository.
        results: measured values by name; they go before those in the config.
        license: licence of the task; None leaves what the card says already, else takes what is known of the backbone.

    Returns:
        the path of the card. Of a card that is there already, the text outside our part and the metadata stay.

    Raises:
        RecastLoadError: if the folder holds no task.
        RecastConfigError: if a result is neither a finite number nor a text, nor made of these.
    """
    check_arguments(a_path, folder=folder)
    check_arguments(optional(text), repo_id=repo_id, subfolder=subfolder, license=license)
    folder = Path(folder)
    config = read_task_config(folder)
    sizes = task_sizes(folder)
    given = RecastConfig(results=results).results  # type: ignore[arg-type]
    measured = {**dict(config.object("results", None) or {}), **(given or {})}
    name = repo_id or folder.resolve().name
    where = quoted(name) + (f", subfolder={quoted(subfolder)}" if subfolder else "")
    if _is_made_from_a_path(config):
        where += f", backbone={quoted(_backbone(config).get('name'))}"
    lines = [
        f"# {plain_text(name.rpartition('/')[2] if repo_id else name)}{f': {plain_text(subfolder)}' if subfolder else ''}",
        "",
        f"A task learned with {PAPER}: {sizes.coefficients:,} numbers {_templates(config)} of "
        f"{_base_link(config)}{f', with a LoRA part of {sizes.lora:,} numbers' if sizes.lora else ''}"
        f"{f', and {sizes.beside:,} numbers of its own head or other modules' if sizes.beside else ''}.",
        "",
        *table(_facts(config, sizes)),
        *(["", "## Results", "", *table([(plain_text(k), plain_text(v)) for k, v in measured.items()])] if measured else []),
        "",
        "## How to load",
        "",
        "```python",
        "from recast_peft import AutoRecastModel",
        "",
        f"model = AutoRecastModel.from_pretrained({where})",
        "```",
        "",
        "Or, on a backbone of your own making: `peft.PeftModel.from_pretrained(backbone, ...)` after `import recast_peft`.",
    ]
    data = _card_data(config, measured, license, name)
    return merge_card(folder / CARD_NAME, data, "\n".join(lines), license_is_given=license is not None)


def write_repository_card(
    folder: str | os.PathLike,
    subfolders: Sequence[str] | None = None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    lies: Callable[[str], bool] | None = None,
) -> str:
    """Write the cards of a folder of tasks, one in each subfolder, in the folder itself, or both.

    Args:
        folder: a folder as ``PeftModel.save_pretrained`` writes it.
        subfolders: those that are meant; None is every one that holds a task.
        repo_id, license: see :func:`write_model_card`.
        lies: says whether a file lies where the folder's files will be put; tasks there that the folder's own card lists stay
            in the list. None is nowhere.

    Returns:
        the path of the folder's own card.
    """
    folder = Path(folder)
    inside = tasks_inside(folder) if subfolders is None else list(subfolders)
    name = repo_id or folder.resolve().name
    before = _bases(folder / CARD_NAME)
    for subfolder in inside:
        write_model_card(folder / subfolder, repo_id=name, subfolder=subfolder, license=license)
    card, has_own = folder / CARD_NAME, (folder / CONFIG_NAME).is_file()
    if has_own:
        write_model_card(folder, repo_id=repo_id, license=license)
    kept = _listed(card, lambda subfolder: lies is not None and lies(f"{subfolder}/{CONFIG_NAME}"))
    rows = {**kept, **{subfolder: _row(folder, subfolder) for subfolder in inside}}
    if not rows:
        return str(card)
    first, *others = dict.fromkeys([*inside, *kept])
    has_root = has_own or (lies is not None and lies(CONFIG_NAME))
    lines = [
        f"## {'More tasks' if has_root else 'Tasks'} in this repository",
        "",
        "| subfolder | numbers | results |",
        "|---|---|---|",
        *rows.values(),
        "",
        "```python",
        "from recast_peft import AutoRecastModel",
        "",
        f"model = AutoRecastModel.from_pretrained({quoted(name)}, subfolder={quoted(first)}, adapter_name={quoted(first)})",
        *(f"model.load_adapter({quoted(name)}, {quoted(o)}, subfolder={quoted(o)})" for o in others[:1]),
        "```",
    ]
    configs = [read_task_config(folder / place) for place in ([""] if has_own else []) + inside]
    if not (kept or (has_root and not has_own)):
        before = []
    if not has_root:
        links = dict.fromkeys([*map(_base_link, configs), *map(hub_link, before)])
        heading = f"# {plain_text(name.rpartition('/')[2])}\n\nTasks learned with {PAPER} on {', '.join(links)}."
        merge_card(card, _card_data(configs[0], {}, license, name), heading, license_is_given=license is not None)
    bases = [*filter(is_hub_name, dict.fromkeys([*map(_base, configs), *before]))]
    return merge_card(card, data_of_bases(bases) if len(bases) > 1 else {}, "\n".join(lines), "tasks")


def _bases(card: Path) -> list[str]:
    """The base models that a card names."""
    named: Any = read_card(card).data.get("base_model") if card.is_file() else None
    return [base for base in (named if isinstance(named, list) else [named]) if is_hub_name(base)]


def _row(folder: Path, subfolder: str) -> str:
    """A task in the list of a repository."""
    results: Any = read_task_config(folder / subfolder).object("results", None) or {}
    measured = ", ".join(f"{plain_text(key)} {plain_text(value)}" for key, value in results.items())
    link = f"({subfolder}/{CARD_NAME})" if _link(subfolder) == subfolder else f"(<{_link(subfolder)}/{CARD_NAME}>)"
    return f"| [{plain_text(subfolder)}]{link} | {task_sizes(folder / subfolder).all:,} | {measured or '-'} |"


def _listed(card: Path, still_lies: Callable[[str], bool]) -> dict[str, str]:
    """The rows of a card's list of tasks, by the subfolder, of those that are still there."""
    rows = re.finditer(rf"^\| \[.+?\]\(<?([^<>()\s]+)/{CARD_NAME}>?\) \| .+ \|$", own_parts(card).get("tasks", ""), re.M)
    return {subfolder: row[0] for row in rows if still_lies(subfolder := unquote(row[1]))}


def _link(subfolder: str) -> str:
    """A subfolder as the target of a link."""
    return re.sub(r"[^\w./~-]", lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), subfolder, flags=re.ASCII)


# ---------------------------------------------------------------- facts


def _backbone(config: Fields) -> Fields:
    return config.object("backbone", None) or Fields({}, config.what)


def _is_made_from_a_path(config: Fields) -> bool:
    """Whether the backbone was built from files of the machine, which a task's file cannot name."""
    name = _backbone(config).get("name")
    is_folder = isinstance(name, str) and bool(name) and not is_hub_name(name)
    return is_folder and _backbone(config).get("library") == "transformers"


def _base(config: Fields) -> Any:
    return hub_repository(_backbone(config)) or config.get("base_model_name_or_path")


def _base_link(config: Fields) -> str:
    repository = hub_repository(_backbone(config))
    name = repository or _backbone(config).get("name") or config.get("base_model_name_or_path")
    return "a model that is not named" if not name else hub_link(name) if repository else code(name)


def _facts(config: Fields, sizes: TaskSizes) -> list[tuple[str, str]]:
    backbone = _backbone(config)
    groups = config.object("groups", None) or Fields({}, config.what)
    members = [member for bank in groups for member in groups.texts(bank)]
    roles = ", ".join(code(role) for role in dict.fromkeys(map(role_of, members)))
    revision = backbone.get("revision") or config.get("revision")
    built = " ".join(plain_text(backbone[key]) for key in ("library", "class") if backbone.get(key))
    size = backbone.get("input_size")
    if isinstance(size, list) and size:
        built += f", input {'x'.join(map(plain_text, size))}"
    facts = [
        ("Base model", _base_link(config) + (f", revision {code(revision)}" if revision else "")),
        ("Built as", built or None),
        ("Targets", f"{len(members)} modules in {len(groups)} banks: {roles}" if members else None),
        (
            "Numbers trained",
            f"{sizes.all:,} ({sizes.coefficients:,} coefficients{f', {sizes.lora:,} of the LoRA part' if sizes.lora else ''})",
        ),
        ("LoRA part", _lora_facts(config.object("lora_config", None))),
        ("Partners", sizes.of_partners() or None),
        *_partner_banks(config),
        ("Size", f"{sizes.file_bytes:,} bytes, and {sizes.config_bytes:,} bytes of config"),
        ("Fidelity of the base", _fidelity(config, groups)),
    ]
    return [(key, value) for key, value in facts if value is not None]


def _templates(config: Fields) -> str:
    directions = config.get("num_directions")
    if directions is None:
        return "on frozen, shared weight templates"
    return f"between {plain_text(directions)} main directions of weights"


def _partner_banks(config: Fields) -> Iterator[tuple[str, str | None]]:
    """The stored banks that parts beside the coefficients are on."""
    partners = config.get("partners")
    for partner in partners if isinstance(partners, list) else ():
        bank = partner.get("bank") if isinstance(partner, Mapping) else None
        if isinstance(bank, Mapping):
            kind = "Bank of biases" if partner.get("method") == "bias" else f"Bank of the {plain_text(partner.get('method'))}"
            yield kind, f"{code(bank.get('name'))}, fingerprint {plain_text(bank.get('fingerprint'))}"


def _lora_facts(lora: Fields | None) -> str | None:
    if not lora:
        return None
    targets = lora.get("target_modules")
    names = ", ".join(map(code, targets)) if isinstance(targets, list) else code(targets)
    return f"{'DoRA' if lora.get('use_dora') else 'LoRA'} of rank {plain_text(lora.get('r'))} on {names}"


def _fidelity(config: Fields, groups: Fields) -> str:
    """How near the banks come to the pretrained weights."""
    recipes, bank = config.object_by_name("recipes", {}) if config.get("recipes") else {}, config.get("bank")
    if not recipes and not bank:
        return "exact: with all coefficients at zero the model computes what the pretrained one does"
    if bank:
        text = f"stored bank {code(bank.get('name') if isinstance(bank, Mapping) else bank)}"
    else:
        templates = sum(len(recipe["mix"]) for recipe in recipes.values() if isinstance(recipe.get("mix"), list))
        members = sum(len(groups.texts(name, [])) for name in recipes)
        text = f"compressed: {templates} templates stand for {members} pretrained weights"
    measured = config.object("fidelity", None)
    if not measured:
        return text
    return (
        f"{text}; cosine to them {measured.number('mean_cosine'):.4f} in the mean and {measured.number('worst_cosine'):.4f} at "
        f"worst, relative error {measured.number('mean_relative_error'):.3g}"
    )


# ---------------------------------------------------------------- metadata


def _card_data(config: Fields, results: Mapping[str, Any], license: str | None, name: str) -> dict[str, Any]:
    backbone = _backbone(config)
    library = backbone.get("library")
    own = one_line(backbone["license"]) if backbone.get("license") else None
    data = card_data(_base(config), license or own, *([one_line(library)] if library else []))
    built = str(backbone.get("class") or "")
    pipeline = next((task for ending, task in PIPELINES.items() if built.endswith(ending)), None)
    if library == "timm" and backbone.get("num_classes"):
        pipeline = "image-classification"
    if pipeline:
        data["pipeline_tag"] = pipeline
    accuracy: Any = results.get("accuracy")
    if pipeline and is_number(accuracy) and results.get("dataset"):
        data["model-index"] = [_model_index(name, pipeline, one_line(results["dataset"]), accuracy)]
    return data


def _model_index(name: str, pipeline: str, dataset: str, accuracy: float) -> dict[str, Any]:
    entry = {
        "task": {"type": pipeline},
        "dataset": {"name": dataset, "type": re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")},
        "metrics": [{"type": "accuracy", "value": accuracy, "name": "accuracy"}],
    }
    return {"name": one_line(name), "results": [entry]}
