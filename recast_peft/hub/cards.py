"""The model card of a task, of a repository of tasks, and of template banks.

A card is made from the files of a folder alone (the config, the file of numbers, the results stored in the config), so that
every way of saving a task writes the same card. What its owner wrote around it is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft.tuners.lora import LoraModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..banks.files import BANK_CONFIG
from ..config import RecastConfig
from ..errors import RecastLoadError
from ..names import COEFFICIENTS, METHOD_NAME, role_of
from ..parts.places import partner_of_entry
from .backbone import hub_repository

CARD_NAME = "README.md"
PAPER = "[RECAST](https://arxiv.org/abs/2411.16870)"
BEGIN, END = "<!-- recast: begin (made from the task's files; write outside of it) -->", "<!-- recast: end -->"
PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
}


def has_task_numbers(folder: str | os.PathLike) -> bool:
    """Whether a task's file of numbers lies in a folder."""
    return _numbers_file(Path(folder)) is not None


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
        subfolder: of the repository.
        results: measured values by name; they go before those in the config.
        license: of the task; None leaves what the card says already, else takes what is known of the backbone.

    Returns:
        the path of the card. Of a card that is there already, the text outside our part and the metadata stay.

    Raises:
        RecastLoadError: if the folder holds no task.
    """
    folder = Path(folder)
    config = read_task_config(folder)
    sizes = task_sizes(folder)
    measured = {**(config.get("results") or {}), **(results or {})}
    data = _card_data(config, measured, license, repo_id or folder.resolve().name)
    title = f"{repo_id.rpartition('/')[2] if repo_id else folder.resolve().name}{f': {subfolder}' if subfolder else ''}"
    where = f'"{repo_id or folder.resolve().name}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    lines = [
        f"# {title}",
        "",
        f"A task learned with {PAPER}: {sizes.coefficients:,} numbers on frozen, shared weight templates of "
        f"{_base_link(config)}{f', with a LoRA part of {sizes.lora:,} numbers' if sizes.lora else ''}"
        f"{f', and {sizes.beside:,} numbers of its own head or other modules' if sizes.beside else ''}.",
        "",
        *_table(_facts(config, sizes)),
        *(["", "## Results", "", *_table(list(measured.items()))] if measured else []),
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
    return _merge_card(folder / CARD_NAME, data, "\n".join(lines))


def write_repository_card(
    folder: str | os.PathLike,
    subfolders: Sequence[str] | None = None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> str:
    """Write the cards of a folder that holds several tasks, one in each subfolder (and one in the folder itself, perhaps).

    Args:
        folder: a folder as ``PeftModel.save_pretrained`` writes it.
        subfolders: those that are meant; None is every one that holds a task.
        repo_id, license: see :func:`write_model_card`.

    Returns:
        the path of the folder's own card.

    Raises:
        RecastLoadError: if there is no task in the folder.
    """
    folder = Path(folder)
    inside = tasks_inside(folder) if subfolders is None else list(subfolders)
    name = repo_id or folder.resolve().name
    for subfolder in inside:
        write_model_card(folder / subfolder, repo_id=name, subfolder=subfolder, license=license)
    has_own = (folder / CONFIG_NAME).is_file()
    if has_own:
        write_model_card(folder, repo_id=repo_id, license=license)
    if not inside:
        if has_own:
            return str(folder / CARD_NAME)
        raise RecastLoadError(f"{folder} holds no task: there is no {CONFIG_NAME} in it or in its subfolders")
    configs = {subfolder: read_task_config(folder / subfolder) for subfolder in inside}
    first = configs[inside[0]]
    rows = []
    for subfolder, config in configs.items():
        sizes = task_sizes(folder / subfolder)
        measured = ", ".join(f"{key} {_shown(value)}" for key, value in (config.get("results") or {}).items())
        rows.append((f"[{subfolder}]({subfolder}/{CARD_NAME})", f"{sizes.all:,}", measured or "-"))
    lines = [
        f"## {'More tasks' if has_own else 'Tasks'} in this repository",
        "",
        "| subfolder | numbers | results |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "```python",
        "from recast_peft import AutoRecastModel",
        "",
        f'model = AutoRecastModel.from_pretrained("{name}", subfolder="{inside[0]}", adapter_name="{inside[0]}")',
        *(f'model.load_adapter("{name}", "{other}", subfolder="{other}")' for other in inside[1:2]),
        "```",
    ]
    if has_own:
        text = _own_part(folder / CARD_NAME)
        return _merge_card(folder / CARD_NAME, {}, "\n".join([text, "", *lines]))
    heading = [f"# {name.rpartition('/')[2]}", "", f"Tasks learned with {PAPER} on {_base_link(first)}.", ""]
    return _merge_card(folder / CARD_NAME, _card_data(first, {}, license, name), "\n".join(heading + lines))


@dataclass(frozen=True)
class _Sizes:
    """Numbers and bytes of a saved task: coefficients, LoRA part, partners, whatever else it holds, its files."""

    coefficients: int
    lora: int
    partners: dict[str, int]
    others: int
    file_bytes: int
    config_bytes: int

    @property
    def all(self) -> int:
        """All numbers of the task."""
        return self.coefficients + self.lora + self.beside

    @property
    def beside(self) -> int:
        """Numbers beside coefficients and LoRA part; a bit of a mask counts as one."""
        return self.others + sum(self.partners.values())

    def of_partners(self) -> str:
        """Each partner with its numbers."""
        units = {"piggyback": "bits"}
        return ", ".join(f"{method} {count:,} {units.get(method, 'numbers')}" for method, count in self.partners.items())


def task_entries(folder: str | os.PathLike) -> dict[str, int]:
    """The keys of a saved task's file, with how many numbers each has.

    Raises:
        RecastLoadError: if there is no such file, or it is damaged.
    """
    file = _numbers_file(Path(folder))
    if file is None:
        raise RecastLoadError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: it is no saved task")
    return _entry_sizes(file)


def _numbers_file(folder: Path) -> Path | None:
    return next((folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()), None)


def task_sizes(folder: Path) -> _Sizes:
    """Numbers and bytes of a saved task."""
    counts = task_entries(folder)
    file = _numbers_file(folder)
    assert file is not None
    coefficients = lora = others = 0
    partners: dict[str, int] = {}
    for key, count in counts.items():
        partner = partner_of_entry(key, count)
        if partner is not None:
            partners[partner[0]] = partners.get(partner[0], 0) + partner[1]
        elif COEFFICIENTS in key:
            coefficients += count
        elif f".{LoraModel.prefix}" in key:
            lora += count
        else:
            others += count
    if not read_task_config(folder).get("train_coefficients", True):
        coefficients = 0  # they are there, at zero
    return _Sizes(coefficients, lora, partners, others, file.stat().st_size, (folder / CONFIG_NAME).stat().st_size)


def _entry_sizes(file: Path) -> dict[str, int]:
    """How many numbers each entry of a file has; the numbers themselves are not read from a safetensors file.

    Raises:
        RecastLoadError: if the file is damaged.
    """
    try:
        if file.name == SAFETENSORS_WEIGHTS_NAME:
            with safe_open(file, framework="pt") as entries:
                return {key: torch.Size(entries.get_slice(key).get_shape()).numel() for key in entries.keys()}  # noqa: SIM118
        return {key: value.numel() for key, value in torch.load(file, map_location="cpu", weights_only=True).items()}
    except (SafetensorError, UnpicklingError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise RecastLoadError(f"{file} is damaged or incomplete: {error}\nNothing was loaded; fetch it again.") from error


def read_task_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        raise RecastLoadError(f"{folder} holds no {CONFIG_NAME}: it is no saved task")
    content = RecastConfig.from_json_file(str(folder / CONFIG_NAME))
    if str(content.get("peft_type")).lower() != METHOD_NAME:
        raise RecastLoadError(
            f"{folder / CONFIG_NAME} is of another method\n  expected: {METHOD_NAME.upper()}\n"
            f"  given:    {content.get('peft_type')}\nLoad it with peft.AutoPeftModel or peft.PeftModel."
        )
    return content


def _base_name(config: Mapping[str, Any]) -> str | None:
    return hub_repository(config.get("backbone")) or config.get("base_model_name_or_path") or None


def _base_link(config: Mapping[str, Any]) -> str:
    repository = hub_repository(config.get("backbone"))
    if repository:
        return f"[{repository}](https://huggingface.co/{repository})"
    name = (config.get("backbone") or {}).get("name") or config.get("base_model_name_or_path")
    return f"`{name}`" if name else "a model that is not named"


def _facts(config: Mapping[str, Any], sizes: _Sizes) -> list[tuple[str, Any]]:
    backbone = config.get("backbone") or {}
    groups: dict[str, list[str]] = config.get("groups") or {}
    members = [member for group in groups.values() for member in group]
    roles = ", ".join(f"`{role}`" for role in dict.fromkeys(map(role_of, members)))
    revision = backbone.get("revision") or config.get("revision")
    built = " ".join(str(backbone[key]) for key in ("library", "class") if backbone.get(key))
    if backbone.get("input_size"):
        built += f", input {'x'.join(map(str, backbone['input_size']))}"
    facts = [
        ("Base model", _base_link(config) + (f", revision `{revision}`" if revision else "")),
        ("Built as", built or None),
        ("Targets", f"{len(members)} modules in {len(groups)} banks: {roles}" if members else None),
        (
            "Numbers trained",
            f"{sizes.all:,} ({sizes.coefficients:,} coefficients{f', {sizes.lora:,} of the LoRA part' if sizes.lora else ''})",
        ),
        ("LoRA part", _lora_facts(config.get("lora_config"))),
        ("Partners", sizes.of_partners() or None),
        ("Bank of biases", _bias_bank(config)),
        ("Size", f"{sizes.file_bytes:,} bytes, and {sizes.config_bytes:,} bytes of config"),
        ("Fidelity of the base", _fidelity(config)),
    ]
    return [(key, value) for key, value in facts if value is not None]


def _bias_bank(config: Mapping[str, Any]) -> str | None:
    banks = [partner.get("bank") for partner in config.get("partners") or () if isinstance(partner, Mapping)]
    return next((f"`{bank.get('name')}`, fingerprint {bank.get('fingerprint')}" for bank in banks if bank), None)


def _lora_facts(lora: Mapping[str, Any] | None) -> str | None:
    if not lora:
        return None
    targets = lora["target_modules"]
    names = f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{name}`" for name in targets)
    return f"{'DoRA' if lora.get('use_dora') else 'LoRA'} of rank {lora['r']} on {names}"


def _fidelity(config: Mapping[str, Any]) -> str:
    """How near the banks come to the pretrained weights."""
    recipes, groups = config.get("recipes") or {}, config.get("groups") or {}
    if not recipes and not config.get("bank"):
        return "exact: with all coefficients at zero the model computes what the pretrained one does"
    if config.get("bank"):
        text = f"stored bank `{config['bank'].get('name')}`"
    else:
        templates = sum(len(recipe["mix"]) for recipe in recipes.values())
        text = f"compressed: {templates} templates stand for {sum(len(groups[b]) for b in recipes)} pretrained weights"
    measured = config.get("fidelity")
    if not measured:
        return text
    return (
        f"{text}; cosine to them {measured['mean_cosine']:.4f} in the mean and {measured['worst_cosine']:.4f} at worst, "
        f"relative error {measured['mean_relative_error']:.3g}"
    )


def _table(rows: Sequence[tuple[str, Any]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {_shown(value)} |" for key, value in rows)]


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _card_data(config: Mapping[str, Any], results: Mapping[str, Any], license: str | None, name: str) -> dict[str, Any]:
    backbone = config.get("backbone") or {}
    base = _base_name(config)
    data: dict[str, Any] = {"library_name": "peft", "tags": sorted({METHOD_NAME, "peft", *_library_tag(backbone)})}
    if _is_on_the_hub(base):
        data.update(base_model=base, base_model_relation="adapter")
        data["tags"] = sorted({*data["tags"], f"base_model:adapter:{base}"})
    if license or backbone.get("license"):
        data["license"] = license or backbone["license"]
        data["_license_is_given"] = license is not None
    built = str(backbone.get("class") or "")
    pipeline = next((task for ending, task in PIPELINES.items() if built.endswith(ending)), None)
    if backbone.get("library") == "timm" and backbone.get("num_classes"):
        pipeline = "image-classification"
    if pipeline:
        data["pipeline_tag"] = pipeline
    if pipeline and isinstance(results.get("accuracy"), (int, float)) and results.get("dataset"):
        data["model-index"] = [_model_index(name, pipeline, results)]
    return data


def _is_on_the_hub(name: Any) -> bool:
    return hub_repository({"library": "transformers", "name": name}) is not None


def _library_tag(backbone: Mapping[str, Any]) -> list[str]:
    return [backbone["library"]] if backbone.get("library") else []


def _model_index(name: str, pipeline: str, results: Mapping[str, Any]) -> dict[str, Any]:
    dataset = str(results["dataset"])
    entry = {
        "task": {"type": pipeline},
        "dataset": {"name": dataset, "type": re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")},
        "metrics": [{"type": "accuracy", "value": results["accuracy"], "name": "accuracy"}],
    }
    return {"name": name, "results": [entry]}


def _merge_card(path: Path, data: Mapping[str, Any], part: str) -> str:
    """Put our part into a card and keep what its owner wrote around it."""
    block = f"{BEGIN}\n\n{part}\n\n{END}"
    own = {key: value for key, value in data.items() if not key.startswith("_")}
    if not path.is_file():
        card = ModelCard(f"---\n{ModelCardData(**own).to_yaml()}\n---\n\n{block}\n")
        card.save(path)
        return str(path)
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    if not _is_on_the_hub(card.data.get("base_model")):
        card.data["base_model"] = None  # PEFT writes paths of this machine there, which the Hub refuses
    for key, value in own.items():
        if key == "tags":
            kept = [tag for tag in card.data.get("tags") or () if not tag.startswith("base_model:")]
            value = sorted({*kept, *value})
        if key == "license" and card.data.get("license") and not data.get("_license_is_given"):
            continue
        card.data[key] = value
    text = card.text
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + block + rest.partition(END)[2]
    elif "[More Information Needed]" in text:  # the untouched template that PEFT and huggingface_hub write
        text = f"\n{block}\n"
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    card.text = text
    card.save(path)
    return str(path)


def _made_by(mimicry: Any) -> str:
    """How a bank was made, in words where its templates were grown or learned."""
    method = mimicry.get("method") if isinstance(mimicry, Mapping) else mimicry
    if method == "grown" and isinstance(mimicry, Mapping):
        sources = list(mimicry["sources"])
        what = "grown from" if "of" not in mimicry else f"of {mimicry['of']}, grown from"
        return f"{what} {len(sources)} source{'s' * (len(sources) > 1)}: {', '.join(sources)}"
    if method == "learned" and isinstance(mimicry, Mapping):
        tasks = ", ".join(mimicry["tasks"])
        start = _made_by(mimicry["start"])
        return f"learned together with the tasks {tasks} in {mimicry['steps']} steps; started from a bank {start}"
    if method == "random":
        return "of random templates"
    return str(mimicry)


def _own_part(path: Path) -> str:
    return ModelCard(path.read_text(encoding="utf-8")).text.partition(BEGIN)[2].partition(END)[0].strip()


def tasks_inside(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / CONFIG_NAME).is_file())


def write_bank_card(
    folder: str | os.PathLike, *, repo_id: str | None = None, base_model: str | None = None, license: str | None = None
) -> str:
    """Write the card of a folder that holds stored template banks; see :func:`write_model_card`.

    Raises:
        RecastLoadError: if the folder holds none.
    """
    folder = Path(folder)
    if not (folder / BANK_CONFIG).is_file():
        raise RecastLoadError(f"{folder} holds no {BANK_CONFIG}: there is no bank in it")
    header = RecastConfig.from_json_file(str(folder / BANK_CONFIG))
    groups: dict[str, dict[str, Any]] = header["groups"]
    members = [member for group in groups.values() for member in group["members"]]
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != CARD_NAME)
    backbone = {"library": "transformers", "name": base_model} if base_model else None
    config = {"backbone": backbone}
    name = repo_id or folder.resolve().name
    facts = [
        ("Base model", _base_link(config)),
        ("Targets", f"{len(members)} modules: {', '.join(f'`{role}`' for role in dict.fromkeys(map(role_of, members)))}"),
        ("Banks", f"{len(groups)}, with {sum(group['templates'] for group in groups.values())} templates"),
        ("Made by", _made_by(header.get("mimicry"))),
        ("Size", f"{size:,} bytes"),
        ("Version", header.get("version")),
        ("Fingerprint", header.get("fingerprint")),
        *(("Holds version", f"{entry['version']}, fingerprint {entry['fingerprint']}") for entry in header.get("history", ())),
    ]
    lines = [
        f"# {name.rpartition('/')[2]}",
        "",
        f"{PAPER} template banks. Tasks name the banks that they were learned on, and fetch them from here.",
        "",
        *_table(facts),
    ]
    data = _card_data(config, {}, license, name)
    data["tags"] = sorted({METHOD_NAME, "peft"} | {tag for tag in data["tags"] if ":" in tag})
    return _merge_card(folder / CARD_NAME, data, "\n".join(lines))
