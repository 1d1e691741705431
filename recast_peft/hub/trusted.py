"""What of a backbone's description is believed when it was read from a file that anybody may have written.

A repository on the Hub, or a name that timm has in its list, and of the arguments those that fit pretrained weights to a task.
A path, an address or a place to write to is the caller's to give; see the docs on trust.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..storage.cards import one_line
from ..storage.paths import is_hub_name, is_repository
from ..tasks.backbone import SOURCE_KEYWORDS

HUB_PREFIX = "hf-hub:"
MOST_CLASSES = 100_000
# keywords of timm's models that a file may choose, with the largest whole number for each: they change neither what is
# executed nor, by much, what is allocated
ARGUMENTS = {
    "num_classes": MOST_CLASSES,
    "img_size": 4096,
    "in_chans": 256,
    "patch_size": 256,
    "window_size": 256,
    "output_stride": 64,
    "reg_tokens": 256,
    **dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"), 1),
    **dict.fromkeys(("patch_drop_rate", "head_drop_rate", "init_values", "bn_eps", "bn_momentum", "head_init_scale"), 1),
    **dict.fromkeys(("global_pool", "pool_type", "act_layer", "norm_layer", "pos_embed", "weight_init", "embed_type"), 0),
    **dict.fromkeys(("class_token", "no_embed_class", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"), 1),
    **dict.fromkeys(("qkv_bias", "qk_norm", "final_norm", "fc_norm", "pre_norm", "use_fc_norm", "use_head_norm"), 1),
    **dict.fromkeys(("always_partition", "aa_layer", "use_rot_pos_emb"), 1),
}

SIZES = ("img_size", "in_chans", "patch_size", "window_size", "output_stride", "reg_tokens")  # those that allocate


class NotBuilt(Exception):
    """Why a backbone is not built from a description; the caller says what to do."""


def hub_name(name: Any) -> str:
    """The name of a repository on the Hub, as a transformers model was loaded from it.

    Raises:
        NotBuilt: if it is anything else, such as a path.
    """
    if not is_hub_name(name):
        raise NotBuilt(
            f"it was loaded from {one_line(name)}, which is no name on the Hub: a task's file is not followed to paths of this "
            "machine or other addresses. If you trust what lies there, pass the path as backbone="
        )
    return str(name)


def timm_name(name: Any, registered: Collection[str]) -> str:
    """A name of timm's own list, or ``hf-hub:`` with a repository.

    Raises:
        NotBuilt: if it is anything else, such as ``local-dir:`` with a path.
    """
    text = str(name)
    if text.startswith(HUB_PREFIX):
        repository, _, revision = text.removeprefix(HUB_PREFIX).partition("@")
        if is_repository(repository) and re.fullmatch(r"[\w./-]*", revision):
            return text
    elif text.partition(".")[0] in registered and re.fullmatch(r"[\w.-]+", text):
        return text
    if text.startswith(("local-dir:", "/", ".", "~")) or "\\" in text or "://" in text:
        raise NotBuilt(
            f"it was loaded from {one_line(text)}: a task's file is not followed to paths of this machine or other addresses. "
            "If you trust what lies there, pass the path as backbone="
        )
    raise NotBuilt(f"timm knows no model {one_line(text)!r}")


def timm_repository(description: Mapping[str, Any]) -> str | None:
    """The repository that a timm model's weights are in.

    Raises:
        NotBuilt: if it is no name of one.
    """
    repository = description.get("repository")
    if repository in (None, ""):
        return None
    if not is_repository(repository):
        raise NotBuilt(f"its repository is {one_line(repository)!r}, which is no name on the Hub")
    return str(repository)


def timm_arguments(description: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that a file may choose.

    Args:
        description: description of the file.
        given: arguments that the caller gives; those of the file do not matter then.

    Raises:
        NotBuilt: naming the first argument, or value, that is not the file's to choose.
    """
    recorded = description.get("arguments") or {}
    if not isinstance(recorded, Mapping):
        raise NotBuilt("its arguments are no dictionary")
    chosen = {key: value for key, value in recorded.items() if key not in SOURCE_KEYWORDS and key not in given}
    for key, value in chosen.items():
        if not (key in ARGUMENTS and _is_small(value, ARGUMENTS[key])):
            raise NotBuilt(
                f"a task's file may not choose {one_line(key)}={one_line(value)}. If it is right, pass backbone={{"
                f"{one_line(key)!r}: ...}}"
            )
    return chosen


def _is_small(value: Any, most: int) -> bool:
    if isinstance(value, list):
        return len(value) <= 4 and all(_is_small(v, most) for v in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w.-]{0,64}", value) is not None
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, (int, float)) and abs(value) <= max(most, 1)


def class_count(description: Mapping[str, Any]) -> int | None:
    """The classes of the model's own head.

    Raises:
        NotBuilt: if it is no small number.
    """
    count = description.get("num_classes")
    if count is not None and not (isinstance(count, int) and 0 <= count <= MOST_CLASSES):
        raise NotBuilt(f"a task's file may not choose num_classes={one_line(count)}. If it is right, pass it with backbone=")
    return count
