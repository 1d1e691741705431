"""How a backbone is built from what is written down of it with a task (tasks/backbone.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from ..errors import RecastConfigError, RecastError, RecastLoadError
from ..planning.candidates import total_bytes
from ..planning.heads import timm_classifiers
from ..storage.cards import one_line
from ..storage.transfer import commit_of
from ..tasks.backbone import SOURCE_KEYWORDS, WEIGHT_FILES
from ..validation import listed
from .sizes import HALF, QUARTER, SINGLE, most_numbers, on_meta, told_in_advance
from .trusted import HUB_PREFIX, SIZES, NotBuilt, class_count, hub_name, timm_arguments, timm_name, timm_repository

HOW_TO_PASS = "Pass backbone=: the model itself, keyword arguments for building it, or the path of a checkpoint."
HOW_TO_BUILD = "Build the model yourself and pass it as backbone="


def build_backbone(
    description: Mapping[str, Any] | None,
    given: nn.Module | Mapping[str, Any] | str | os.PathLike | None = None,
    **hub_kwargs: Any,
) -> tuple[nn.Module, list[str]]:
    """Build the backbone that a task names.

    Args:
        description: description of :func:`describe_backbone`, as it was stored with the task.
        given: a model, which is used as it is; keyword arguments for ``timm.create_model`` or for the transformers class's
            ``from_pretrained``, which go before the recorded ones; or the path of a local checkpoint (for timm a file or
            folder, for transformers a folder).
        hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Returns:
        the model, and the names of its parameters that came from no checkpoint (such as a new classifier).

    Raises:
        RecastLoadError: if the task does not say which backbone it belongs to, or it cannot be built.
        RecastConfigError: if ``given`` is none of the above.
    """
    if isinstance(given, nn.Module):
        return given, []
    if given is not None and not isinstance(given, (Mapping, str, os.PathLike)):
        raise RecastConfigError(
            f"backbone={given!r}: expected a model, a dictionary of keyword arguments, or the path of a checkpoint"
        )
    if not description:
        raise RecastLoadError(
            "the task does not say which backbone it belongs to (only timm and transformers models can be found again). "
            f"{HOW_TO_BUILD}"
        )
    builder = _BUILDERS.get(str(description.get("library")))
    if builder is None:
        raise RecastLoadError(
            f"the task's backbone is of library {description.get('library')!r}; known are {', '.join(_BUILDERS)}. "
            f"{HOW_TO_BUILD}"
        )
    own = dict(given) if isinstance(given, Mapping) else {}
    path = None if given is None or isinstance(given, Mapping) else os.fspath(given)
    try:
        return builder(dict(description), own, path, hub_kwargs)
    except RecastError:
        raise
    except NotBuilt as error:
        raise RecastLoadError(
            f"the backbone of the task, {description.get('name')!r} ({description['library']}, class "
            f"{description.get('class')}), cannot be built: {error}\n{HOW_TO_PASS}"
        ) from error
    except Exception as error:
        raise RecastLoadError(
            f"the backbone of the task cannot be built\n  backbone: {description.get('name')!r} "
            f"({description['library']}, class {description.get('class')}, revision {description.get('revision')})\n"
            f"  reason: {type(error).__name__}: {error}\n"
            f"{HOW_TO_PASS}"
        ) from error


def _build_transformers(
    description: dict[str, Any], own: dict[str, Any], path: str | None, hub_kwargs: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    import transformers

    if path is not None and not os.path.isdir(path):
        raise NotBuilt(f"backbone={path!r} is not a folder, as a transformers checkpoint is")
    if path is not None and os.path.isfile(os.path.join(path, CONFIG_NAME)):  # transformers would put it on the model, unasked
        raise NotBuilt(f"backbone={path!r} has an adapter in it ({CONFIG_NAME}), merge that first")
    if not (path or description.get("name")):
        raise NotBuilt("it was made from a configuration, without pretrained weights")
    model_class = getattr(transformers, str(description.get("class")), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise NotBuilt("its class is not one of transformers' own")
    name = hub_name(description["name"]) if path is None else path
    revision = description.get("revision") if path is None else None
    classes = None if "num_labels" in own else class_count(description)
    defaults = {"revision": revision, "num_labels": classes, "ignore_mismatched_sizes": True}
    keywords = {**{k: v for k, v in {**defaults, **hub_kwargs}.items() if v is not None}, **own}
    if path is None and "device_map" not in own:
        _check_config(model_class, name, keywords)
    loaded: Any = model_class.from_pretrained(name, output_loading_info=True, **keywords)
    model, info = loaded
    mismatched = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info.get("mismatched_keys", ())]
    return model, sorted({*info.get("missing_keys", ()), *mismatched})


def _check_config(model_class: type[PreTrainedModel], name: str, keywords: Mapping[str, Any]) -> None:
    """Refuse a repository whose config asks for more numbers than this machine holds, in half precision.

    What a checkpoint does not have in the config's shapes would be made anew, so that any small repository can ask for it.

    Raises:
        NotBuilt: if it does, or if that cannot be told.
    """
    names = ("revision", "num_labels", "token", "cache_dir", "local_files_only")
    chosen = {key: keywords[key] for key in names if key in keywords}
    config = model_class.config_class.from_pretrained(name, **chosen)  # type: ignore[union-attr]
    is_quantised = "quantization_config" in keywords or getattr(config, "quantization_config", None) is not None
    with told_in_advance():  # transformers too builds on the meta device what it loads
        on_meta(lambda: model_class(config), most_numbers(QUARTER if is_quantised else HALF))


def _build_timm(
    description: dict[str, Any], own: dict[str, Any], path: str | None, hub_kwargs: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    try:
        import timm
    except ImportError as error:
        raise NotBuilt("timm is not installed (pip install timm)") from error

    missing = [key for key in description.get("arguments_left_out", ()) if key not in own]
    if missing:
        raise NotBuilt(f"its arguments {', '.join(missing)} could not be written down; pass them")
    chosen = timm_arguments(description, own)
    name, source = _timm_weights(description, own, path, timm.list_models(), hub_kwargs)
    keywords = {**chosen, **own, **source}
    cache = {key: value for key, value in keywords.items() if key == "cache_dir"}
    _check_bytes(name, chosen, {**{key: value for key, value in own.items() if key not in SOURCE_KEYWORDS}, **cache})
    model = _created(name, keywords)
    for key, actual in (("class", type(model).__name__), ("global_pool", getattr(model, "global_pool", None))):
        if key in description and key not in own and description[key] != actual:
            raise RecastLoadError(
                f"timm builds another {key} for {name} than the task was learned on\n  task:  {description[key]}\n"
                f"  built: {actual}\nPass backbone={{{key!r}: {description[key]!r}}}, or the model itself."
            )
    pretrained: Any = model.pretrained_cfg
    is_new = "checkpoint_path" not in keywords and getattr(model, "num_classes", None) not in (0, pretrained.get("num_classes"))
    return model, [key for key in model.state_dict() if is_new and key.startswith(_prefixes_of_classifiers(model))]


def _timm_weights(
    description: dict[str, Any], own: Mapping[str, Any], path: str | None, registered: list[str], hub_kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name for ``timm.create_model``, and the keywords that say where the weights come from beside the caller's own."""
    if path is not None:
        if not os.path.exists(path):
            raise NotBuilt(f"there is no checkpoint at backbone={path!r}")
        if os.path.isdir(path):
            return f"local-dir:{Path(path)}", {"pretrained": True}
        return timm_name(description["architecture"], registered), {"checkpoint_path": str(Path(path))}
    if not (SOURCE_KEYWORDS - {"cache_dir"}) & set(own):
        name, found = _timm_source(description, timm_name(str(description["name"]), registered), hub_kwargs)
        cache = {} if hub_kwargs.get("cache_dir") is None else {"cache_dir": hub_kwargs["cache_dir"]}
        return name, {**found, "pretrained": True, **cache}
    from_file = "pretrained" not in own and "checkpoint_path" in own
    return timm_name(description["architecture"] if from_file else str(description["name"]), registered), {}


def _prefixes_of_classifiers(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in timm_classifiers(model))


def _check_bytes(name: str, chosen: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse sizes of a file, each of them allowed, that together make a model of another order, as by tables of positions.

    Args:
        name: timm's.
        chosen: arguments of the file.
        own: the caller's.

    Raises:
        NotBuilt: naming the arguments and what they would take, or if that is not known.
    """
    import timm

    sizes = {key: value for key, value in chosen.items() if key in SIZES}
    with told_in_advance():
        if name.startswith(HUB_PREFIX):  # a repository's config may choose anything
            on_meta(lambda: timm.create_model(name, **{**chosen, **own}), most_numbers(SINGLE))
        if not sizes:
            return
        with torch.device("meta"):
            usual, asked = (total_bytes(timm.create_model(name, **{**more, **own})) for more in ({}, chosen))
    if asked > 4 * usual + 2**30:
        given = ", ".join(f"{one_line(key)}={one_line(value)}" for key, value in sizes.items())
        raise NotBuilt(
            f"a task's file chose {given}, which makes a model of {asked / 2**30:,.1f} GiB, where {one_line(name)} has "
            f"{usual / 2**30:,.1f} GiB. If it is right, pass them as backbone={{...}}"
        )


def _created(name: str, keywords: dict[str, Any]) -> nn.Module:
    """timm's model; into one without a classifier a checkpoint is loaded without that of the checkpoint, and nothing else."""
    import timm

    if keywords.get("num_classes") != 0 or "checkpoint_path" not in keywords:
        return timm.create_model(name, **keywords)
    file = str(keywords["checkpoint_path"])
    model = timm.create_model(name, **{key: value for key, value in keywords.items() if key != "checkpoint_path"})
    heads = _prefixes_of_classifiers(model)
    keys = timm.models.load_checkpoint(model, file, strict=False)
    odd = [] if keys is None else [*keys.missing_keys, *(k for k in keys.unexpected_keys if not k.startswith(heads))]
    if odd:
        raise RecastLoadError(f"the checkpoint {file} is of another model: it lacks or has besides {listed(odd, 4)}")
    return model


def _timm_source(description: dict[str, Any], name: str, hub_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name for ``timm.create_model`` and further keywords, with the files fetched at the recorded revision."""
    if description.get("file"):
        raise NotBuilt(
            f"its weights lay in a file, {one_line(description['file'])}: a task's file is not followed to paths of this "
            "machine. If you trust it, pass the path as backbone="
        )
    if timm_repository(description) is None:
        import timm

        if timm.is_model_pretrained(name) and getattr(timm.get_pretrained_cfg(name), "url", None):
            return name, {}  # weights that timm fetches from elsewhere than the Hub
        raise NotBuilt("timm has no pretrained weights of that name")
    pinned = _fetch_timm(description, name.startswith(HUB_PREFIX), hub_kwargs)
    if name.startswith(HUB_PREFIX):
        return f"{HUB_PREFIX}{pinned}", {}
    return name, {"pretrained_cfg_overlay": {"hf_hub_id": pinned}}


def _fetch_timm(description: dict[str, Any], with_config: bool, hub_kwargs: dict[str, Any]) -> str:
    """Fetch a timm repository's files, and name it with their commit.

    timm takes neither a token nor a revision for names of its own. So the files are fetched here, and timm then finds them
    in the cache by their commit.
    """
    repository, revision = str(description["repository"]), description.get("revision")
    from_cache_alone = hub_kwargs.get("local_files_only") or is_offline_mode()
    for alternatives in (("config.json",) if with_config else (), WEIGHT_FILES):
        for file in alternatives:
            try:
                path = hf_hub_download(repository, file, revision=revision, **hub_kwargs)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not from_cache_alone:
                    raise  # the Hub did not answer: asking again for another file would only take longer
                continue  # an older format, or another name, that timm knows
            revision = commit_of(path) or revision
            break
    return f"{repository}@{revision}" if revision else repository


_BUILDERS: dict[str, Callable[..., tuple[nn.Module, list[str]]]] = {
    "timm": _build_timm,
    "transformers": _build_transformers,
}
