"""The command line: look at a plan, look at a saved task, export a task as a plain checkpoint.

recast-peft plan vit_small_patch16_224 --target-modules qkv
recast-peft inspect user/task
recast-peft verify folder
recast-peft versions pool.safetensors --roll-back
recast-peft merge user/task --output plain
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_model
from torch import nn

from ._version import __version__
from .auto import AutoRecastModel
from .config import RecastConfig
from .errors import RecastConfigError, RecastError, shortened
from .hub.backbone import HOW_TO_BUILD, HOW_TO_PASS
from .hub.sizes import without_numbers
from .hub.task_files import task_sizes
from .hub.transfer import fetch_task
from .hub.verify import ERROR, INFO, WARNING, verify_folder
from .integrations.serving.start import serve_folder
from .planning.roles import SHORTHANDS
from .pool.files import describe_pool
from .storage.atomic import staged_folder
from .storage.cards import one_line
from .storage.versions import roll_back, version_path, versions
from .tasks.plan import plan_recast
from .validation import did_you_mean

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PIPE_WAS_CLOSED, INTERRUPTED = 141, 130  # as of programs that a shell stops for it
WEIGHTS_FILE = "model.safetensors"
_IN_PYTHON = {  # what a message advises, and what to do instead where there is no Python
    HOW_TO_PASS: "Give the path of a checkpoint with --backbone.",
    HOW_TO_BUILD: "Use AutoRecastModel.from_pretrained(name, backbone=model) in Python.",
}
CLASSIFIERS = ("Sequence", "Image", "Audio")  # kinds of transformers' classes that a plan with --num-classes is for
# of RecastConfig, whole numbers
FIELDS = ("num_classes", "group_size", "num_groups", "num_templates", "num_directions", "max_coefficients")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of this library are printed without a traceback.

    Returns:
        the exit status: 0, 1 after an error, 3 if ``verify`` found nothing worse than warnings, 130 after an interruption,
        141 if nobody read the output.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # names that its encoding does not have are shown as escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = options.run(options) or 0
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python writes the rest at its end
        return PIPE_WAS_CLOSED
    except (RecastError, OSError) as error:
        print(f"recast-peft {options.command}: {_printable(_as_options(str(error), options))}", file=sys.stderr)
        return 1


def _as_options(text: str, options: argparse.Namespace) -> str:
    """An error of the library in the words of the command line: its options in place of fields and keyword arguments."""
    for said, instead in _IN_PYTHON.items():
        text = text.replace(said, instead)
    text = re.sub(r"\bRecastConfig\((\w+=.*?)\)(?=: )", r"\1", text)
    for name in set(vars(options)) - {"command", "run", "model", "task", "folder"}:
        option = f"--{name.replace('_', '-')}"
        text = re.sub(rf"(?<![\w-]){name}=(?=['\"\w\[-])", f"{option} ", text)
        text = re.sub(rf"(?<![\w-]){name}=", option, text)
        if "_" in name:
            text = re.sub(rf"(?<![\w-]){name}(?!\w)", option, text)
    return text


def _printable(value: Any) -> str:
    """A text from a file without what would steer a terminal; the lines stay."""
    return "\n".join(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", line) for line in shortened(str(value)).split("\n"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recast-peft", description="RECAST tasks for PEFT.")
    parser.add_argument("--version", action="version", version=f"recast-peft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    plan = commands.add_parser("plan", help="show what converting a model would do; no weights are loaded")
    plan.add_argument("model", help="a timm name, or a transformers name or folder")
    plan.add_argument("--target-modules", nargs="+", help=f"names, a regular expression, or {', '.join(SHORTHANDS)}")
    plan.add_argument("--exclude-modules", nargs="+", help="names, or a regular expression")
    for field in FIELDS:
        plan.add_argument(f"--{field.replace('_', '-')}", type=int)
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="show what a saved task or a packed pool is; no model is built")
    inspect.add_argument("task", help="a folder, a name on the Hub, or the file of a pool")
    inspect.add_argument("--subfolder")
    inspect.add_argument("--revision")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify", help="check tasks, banks, compressed models and pools in a folder: 0 fine, 1 unusable, 3 warnings"
    )
    verify.add_argument("folder", type=Path)
    verify.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    verify.set_defaults(run=_verify)

    kept = commands.add_parser("versions", help="list what a file of tasks was before (pool.save(path, keep=...)), or go back")
    kept.add_argument("file", type=Path)
    about = "put a version in the file's place (without a number the latest); the present one becomes the latest version"
    kept.add_argument("--roll-back", nargs="?", type=int, default=False, metavar="NUMBER", help=about)
    kept.set_defaults(run=_versions)

    merge = commands.add_parser("merge", help="write a task's model as a plain checkpoint, which needs this library no more")
    merge.add_argument("task", help="a folder, or a name on the Hub")
    merge.add_argument("--subfolder")
    merge.add_argument("--revision")
    merge.add_argument("--backbone", help="a local checkpoint of the backbone, where the task's own record is not enough")
    merge.add_argument("--output", type=Path, required=True, help="a new folder")
    merge.set_defaults(run=_merge)

    serve = commands.add_parser("serve", help="answer requests of all tasks in a folder over HTTP")
    serve.add_argument("folder", type=Path, help="of saved tasks, one in a folder each")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--tokens", type=Path, help="JSON of tenants by token; without it anybody sees all tasks")
    serve.add_argument("--backbone", help="a local checkpoint of the backbone, where the tasks' own record is not enough")
    serve.add_argument("--head-dtype", help="in which classifiers are kept in memory, such as float16")
    serve.add_argument("--max-batch", type=int, default=32, help="most requests that are computed together")
    serve.add_argument("--max-queue", type=int, default=1024, help="most requests that wait")
    serve.add_argument("--max-body", type=int, default=16 << 20, help="bytes of a request")
    serve.add_argument("--timeout", type=float, default=30.0, help="seconds that a request may wait")
    serve.add_argument("--reload-seconds", type=float, default=5.0, help="how often the folder is looked at")
    serve.set_defaults(run=_serve)
    return parser


def _serve(options: argparse.Namespace) -> None:
    given = {key: value for key, value in vars(options).items() if key not in ("command", "run", "folder")}
    serve_folder(options.folder, **given)


def _plan(options: argparse.Namespace) -> None:
    named = {field: _names_or_pattern(getattr(options, field)) for field in ("target_modules", "exclude_modules")}
    config = RecastConfig(**named, **{field: getattr(options, field) for field in FIELDS})
    print(plan_recast(_untrained(options.model, has_classes=options.num_classes is not None), config))


def _names_or_pattern(given: list[str] | None) -> Any:
    """What ``target_modules`` is given: one text that is no name is a shorthand or a regular expression."""
    return given[0] if given is not None and len(given) == 1 and not given[0].isidentifier() else given


def _untrained(name: str, *, has_classes: bool) -> nn.Module:
    """A model with the shapes of the named one and no numbers; one of transformers with a classifier where asked."""
    if Path(name, CONFIG_NAME).is_file():
        raise RecastConfigError(f"{name} is a saved task, not a model: recast-peft inspect {name} shows what it is")
    near = ""
    try:
        import timm

        if timm.is_model(name):
            return without_numbers(lambda: timm.create_model(name))
        near = did_you_mean(name, timm.list_models())
    except ImportError:
        pass  # transformers alone, then
    import transformers
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers has many kinds for a config that it cannot read
        raise RecastConfigError(f"{name!r} is known neither to timm nor to transformers{near}\n{error}") from error
    own: Any = getattr(transformers, str((config.architectures or [""])[0]), None)
    is_model = isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
    if is_model and (not has_classes or "Classification" in own.__name__):
        build: Callable[[Any], nn.Module] = own
    else:
        autos = (getattr(transformers, f"AutoModelFor{kind}Classification") for kind in CLASSIFIERS if has_classes)
        fitting = (auto for auto in autos if type(config) in auto._model_mapping)
        build = next(fitting, AutoModel).from_config
    try:
        return without_numbers(lambda: build(config))
    except Exception as error:  # of its numbers
        raise RecastConfigError(
            f"transformers cannot build the model that the config of {name!r} describes\n{error}"
        ) from error


def _hub_options(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key in ("subfolder", "revision") if (value := getattr(options, key)) is not None}


def _partner_banks(config: RecastConfig) -> list[tuple[str, str]]:
    banks = config.partner_banks.items()
    return [(f"bank of {'biases' if method == 'bias' else method}", bank["name"] or "in memory") for method, bank in banks]


def _inspect(options: argparse.Namespace) -> None:
    path = Path(options.task)
    if path.is_file() and _hub_options(options):
        named = ", ".join(f"--{option}" for option in _hub_options(options))
        raise RecastConfigError(f"{path} is a file, in which {named} says nothing: leave it out, or give a folder")
    if path.is_file() and path.name not in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        _print_lines(describe_pool(path))
        return
    folder = fetch_task(path.parent if path.is_file() else options.task, **_hub_options(options))
    config = RecastConfig.from_pretrained(str(folder))
    sizes = task_sizes(folder)
    members = [member for group in (config.groups or {}).values() for member in group]
    backbone = config.backbone or {}
    lines = [
        ("base model", backbone.get("name") or config.base_model_name_or_path or "not named"),
        ("target modules", f"{len(members)} in {len(config.groups or {})} banks"),
        ("banks", "stored" if config.bank_reference else "compressed" if config.recipes else "exact"),
        ("coefficients", f"{sizes.coefficients:,}"),
        *([("LoRA part", f"{sizes.lora:,} numbers")] if sizes.lora else []),
        *([("partners", sizes.of_partners())] if sizes.partners else []),
        *_partner_banks(config),
        ("further numbers", f"{sizes.others:,}"),
        ("classes", config.num_classes if config.num_classes is not None else "the model's own head"),
        ("size", f"{sizes.file_bytes:,} bytes, and {sizes.config_bytes:,} bytes of config"),
    ]
    _print_lines(lines)
    for name, group in (config.groups or {}).items():
        print(f"  {one_line(name)}: {len(group)} modules")


def _print_lines(lines: Sequence[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name.ljust(width)}  {one_line(value)}" for name, value in lines))


def _verify(options: argparse.Namespace) -> int:
    findings = verify_folder(options.folder)
    for finding in findings:
        if finding.level != INFO or not options.quiet:
            print(_printable(f"{finding.level.ljust(7)}  {finding.place}: {finding.text}"))
    levels = {finding.level for finding in findings}
    return 1 if ERROR in levels else 3 if WARNING in levels else 0


def _versions(options: argparse.Namespace) -> None:
    if options.roll_back is not False:  # None is given without a number
        print(f"version {roll_back(options.file, options.roll_back)} is in the place of {options.file}")
    elif not versions(options.file):
        if not options.file.is_file():
            missing = "it is a folder; give the file of a pool" if options.file.is_dir() else "there is no such file"
            raise RecastConfigError(f"{options.file}: {missing}")
        print(f"{options.file} has no version before this one: it keeps some if it is saved with keep=")
    for number in versions(options.file):
        seen = version_path(options.file, number).stat()
        when = datetime.fromtimestamp(seen.st_mtime).isoformat(" ", "seconds")
        print(f"{number}  {when}  {seen.st_size:,} bytes")


def _merge(options: argparse.Namespace) -> None:
    if options.output.is_file() or (options.output.is_dir() and any(options.output.iterdir())):
        what = "a file" if options.output.is_file() else "not empty"
        raise RecastConfigError(f"--output {options.output} is {what}; nothing was written. Give a new folder.")
    model = AutoRecastModel.from_pretrained(options.task, backbone=options.backbone, **_hub_options(options))
    plain = model.merge_and_unload(safe_merge=True)
    with staged_folder(options.output) as folder:
        _save(plain, folder)
    print(f"the merged model is in {options.output}")


def _save(plain: Any, folder: Path) -> None:
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(folder)
    elif (pretrained := getattr(plain, "pretrained_cfg", None)) is not None:
        from timm.models import save_for_hf

        named = {key: value for key, value in pretrained.items() if key == "label_names" and value}
        save_for_hf(plain, str(folder), model_config=named, safe_serialization=True)
    else:
        save_model(plain, str(folder / WEIGHTS_FILE))


if __name__ == "__main__":
    sys.exit(main())
