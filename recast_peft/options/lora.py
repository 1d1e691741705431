"""The config of a task's LoRA part: which of PEFT's ``LoraConfig`` fields make sense in it, and how it is stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftType

from ..validation import (
    Check,
    Unexpected,
    did_you_mean,
    flag,
    indices,
    names_or_pattern,
    number,
    optional,
    patterns,
    share,
    shown,
    whole_number,
)

MOST_RANK = 65_536

# what the RecastConfig around it says for the whole task
OWNED_BY_TASK = ("bias", "modules_to_save", "inference_mode")
# what is stored once, with the task
_NOT_STORED = ("inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type")

_WRITES = "it writes into the pretrained weights, which are the templates of all tasks"
WRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
REFUSED_INITS = {
    **dict.fromkeys(WRITING_INITS, _WRITES),
    "eva": "PEFT fills it in from data for a LoRA of its own only; it would stay at an ordinary start",
}
REFUSED_FIELDS = {
    "kasa_config": _WRITES,
    "layer_replication": "it changes the layers of the model, which all tasks share",
    "target_parameters": "it parametrises weights that no module calls; name modules with target_modules",
    "trainable_token_indices": "token embeddings are trained with modules_to_save of the RecastConfig",
    "ensure_weight_tying": "tied modules belong to no one layer; untie them, or leave them out",
    "alora_invocation_tokens": "PEFT finds the tokens that switch it on for a LoRA of its own only",
    "arrow_config": "it chooses among several LoRAs, and a task has one",
    "monteclora_config": "its weights are drawn anew in each call, and its loss term is PEFT's own LoRA's",
    "use_bdlora": "it is for layers that are spread over devices",
    "use_qalora": "it is for quantized layers",
    "megatron_config": "it is for layers of Megatron",
}


def checked_lora_config(value: Any, task_type: Any, is_stored: bool = False) -> LoraConfig:
    """A copy of the config of a LoRA part, from an object or from what a file holds.

    Of a task that was stored (``is_stored``) PEFT passes over fields that a later version of it has, with a warning.

    Raises:
        ValueError: saying what was expected instead; the caller names the field.
    """
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("the fields of a LoraConfig by their names")
        unknown = [name for name in value if name not in LoraConfig.__dataclass_fields__]
        if unknown and not is_stored:
            near = did_you_mean(unknown[0], LoraConfig.__dataclass_fields__)
            raise ValueError(f"the fields of a LoraConfig, which has no {', '.join(map(shown, unknown[:5]))}{near}")
        kind = value.get("peft_type", PeftType.LORA)
        if str(getattr(kind, "value", kind)) != PeftType.LORA.value:
            raise ValueError(f"a LoraConfig, and this is a config of {kind}")
        try:
            config = LoraConfig.from_peft_type(**{**copy.deepcopy(dict(value)), "peft_type": PeftType.LORA})
        except Exception as error:  # PEFT's own checks meet whatever a file holds
            raise ValueError(f"the fields of a LoraConfig: {error}") from error
    elif type(value) is LoraConfig:
        config = copy.deepcopy(value)
    else:
        raise ValueError(f"a LoraConfig, a dictionary of its fields, or None, not a {type(value).__name__}")
    for name, check in _CHECKS.items():
        try:
            check(getattr(config, name))
        except Unexpected as error:
            raise ValueError(f"{error} as its {name}, not {shown(getattr(config, name))}") from error
    _check_fields(config, task_type)
    config.inference_mode = False
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    return config


def _check_fields(config: LoraConfig, task_type: Any) -> None:
    for name in OWNED_BY_TASK:
        if getattr(config, name) not in (None, False, "none", [], ()):
            raise ValueError(
                f"no {name} in it: {name}={getattr(config, name)!r} is given to the RecastConfig, for the whole task"
            )
    if config.task_type not in (None, task_type):
        raise ValueError(
            f"no other task_type in it\n  of the RecastConfig: {task_type}\n  of the LoraConfig:   {config.task_type}"
        )
    init = config.init_lora_weights
    for prefix, reason in REFUSED_INITS.items():
        if isinstance(init, str) and init.lower().startswith(prefix):
            raise ValueError(
                f"another init_lora_weights than {init!r}: {reason}. True, 'gaussian', 'orthogonal' and 'mica' work"
            )
    for name, reason in REFUSED_FIELDS.items():
        if getattr(config, name, None):
            raise ValueError(f"no {name} in it: {reason}")
    if config._custom_modules:
        raise ValueError("no custom modules in it: they cannot be stored with the task")


def _by_pattern(check: Check) -> Check:
    """Values by regular expressions that match names of modules."""

    def of_all(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Unexpected("a dictionary by names or regular expressions")
        for pattern, inner in value.items():
            names_or_pattern([pattern] if not isinstance(pattern, str) else pattern)
            check(inner)
        return value

    return of_all


def _flag_or_text(value: Any) -> bool | str:
    if not isinstance(value, (bool, str)):
        raise Unexpected("True, False or the name of a way")
    return value


_CHECKS: dict[str, Check] = {
    "init_lora_weights": _flag_or_text,
    "r": whole_number(1, MOST_RANK),
    "lora_alpha": number,
    "lora_dropout": share,
    "target_modules": optional(names_or_pattern),
    "exclude_modules": optional(names_or_pattern),
    "layers_to_transform": optional(indices),
    "layers_pattern": optional(patterns),
    "rank_pattern": _by_pattern(whole_number(1, MOST_RANK)),
    "alpha_pattern": _by_pattern(number),
    "use_dora": flag,
    "use_rslora": flag,
    "lora_bias": flag,
    "fan_in_fan_out": flag,
}


def stored_lora_config(config: LoraConfig) -> dict[str, Any]:
    """The config as ``adapter_config.json`` holds it: plain values, without what is unset or stored with the task.

    ``LoraConfig(**stored)`` (or PEFT, reading it from a file) gives an equal config back.
    """
    fields = {name: _plain(value) for name, value in config.to_dict().items() if name not in _NOT_STORED}
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, PeftType) else value
