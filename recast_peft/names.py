"""How modules, roles, blocks, tasks and the entries of files are called, and nothing else."""

from __future__ import annotations

import re

from torch import nn

from .errors import RecastConfigError

METHOD_NAME = "recast"
PREFIX = "recast_"
COEFFICIENTS = f"{PREFIX}coefficients"
MODEL_PREFIX = "base_model.model."  # of every entry of a task's file
BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter" in a mixed batch

# Children of the backbone that hold what tasks share or own beside its modules.
BANK_CONTAINER, PARTNER_CONTAINER = "recast_banks", "recast_partners"


def check_adapter_name(name: str) -> None:
    """Refuse a task name that PEFT cannot store.

    Raises:
        RecastConfigError: if the name is empty, holds a dot, is PEFT's name for no adapter, or would be confused with the
            names of parameters.
    """
    if not isinstance(name, str) or not name:
        raise RecastConfigError(f"adapter_name={name!r}: expected a name that is not empty")
    if "." in name:
        raise RecastConfigError(f"adapter_name={name!r}: a name must hold no dot, which separates the parts of keys")
    if name == BASE_ADAPTER:
        raise RecastConfigError(f"adapter_name={name!r}: this is the name of the model without any task")
    if name in PREFIX or hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict, name):
        raise RecastConfigError(
            f"adapter_name={name!r}: PEFT cannot tell this name from names of its own (the prefix {PREFIX!r}, or an "
            "attribute of the containers that hold the coefficients); choose another one"
        )


def plain_name(name: str) -> str:
    """A module's name in the plain model: without what PEFT and wrappers put in.

    >>> plain_name("attn.base_layer.out_proj")
    'attn.out_proj'
    >>> plain_name("dla.base_layer.0.base_layer.weight")
    'dla.base_layer.0.weight'
    """
    name = re.sub(r"(^|\.)(_fsdp_wrapped_module|_orig_mod)(?=\.|$)", "", name).removeprefix(".")
    prefix = MODEL_PREFIX if name.startswith(MODEL_PREFIX) else ""
    # timm's DLA has a base_layer of its own: nothing wraps the model itself, so a first part of that name is the model's, and
    # tuners wrap modules with a weight, which have no numbered children
    return prefix + re.sub(r"\.(base_layer(?!\.\d)|original_module)(?=\.|$)", "", name.removeprefix(prefix))


def block_of(name: str) -> str:
    """The block that a module stands in: its name up to the last number that is not its own last part.

    >>> block_of("blocks.11.attn.qkv"), block_of("blocks.3.mlp.0"), block_of("conv1")
    ('blocks.11', 'blocks.3', 'conv1')
    """
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=None)
    return name if last is None else ".".join(parts[: last + 1])


def role_of(name: str) -> str:
    """A module's name with its numbers taken out: layers with one role differ in depth alone.

    >>> role_of("blocks.11.attn.qkv")
    'blocks.*.attn.qkv'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def bank_name(members: list[str]) -> str:
    """A name for the bank of these members: common parts once, the others in braces.

    >>> bank_name(["blocks.0.attn.qkv", "blocks.1.attn.qkv"])
    'blocks.{0,1}.attn.qkv'
    """
    columns = zip(*(member.split(".") for member in members), strict=False)
    if len({member.count(".") for member in members}) > 1:
        return "{" + ",".join(members) + "}"
    return ".".join(parts[0] if len(set(parts)) == 1 else "{" + ",".join(dict.fromkeys(parts)) + "}" for parts in columns)


def place_key(place: str) -> str:
    return place.replace(".", "/")  # a module's name holds no dot
