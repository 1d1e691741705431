"""How modules, roles, blocks, tasks and the entries of files are called, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from .errors import RecastConfigError
from .validation import check_is_module

METHOD_NAME = "recast"
PREFIX = "recast_"
COEFFICIENTS = f"{PREFIX}coefficients"
MODEL_PREFIX = "base_model.model."  # of every entry of a task's file
BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter" in a mixed batch

# Children of the backbone that hold what tasks share or own beside its modules.
BANK_CONTAINER, PARTNER_CONTAINER = "recast_banks", "recast_partners"


# What lies beside the folders of tasks, for good or for a moment: a task of such a name could not be saved there, or is taken
# for what a killed process left and removed.
_TAKEN = re.compile(r"readme\.md|adapter_config\.json|adapter_model\.(safetensors|bin)|\.versions|\..*\.(part|waiting)", re.I)
MOST_BYTES = 255  # of a file's name

# Children by which wrappers hold what they wrap: torch.compile, activation checkpointing and offloading, FSDP.
COMPILED = "_orig_mod"
_WRAPPED = (COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPED_BY_CLASS = ("DistributedDataParallel", "DataParallel", "AveragedModel", "DeepSpeedEngine")  # as ``module``
_WRAPPER_PARTS = re.compile(rf"(^|\.)({'|'.join(_WRAPPED)})(?=\.|$)")


Kind = TypeVar("Kind")  # of modules


def check_adapter_name(name: str) -> None:
    """Refuse a task name that is no plain name of a folder; any other name works everywhere (``RecastConfigError``)."""
    if not isinstance(name, str) or not name or name.isspace():
        raise RecastConfigError(f"adapter_name={name!r}: expected a name that is not empty")
    if "/" in name or "\\" in name or name in (".", "..") or not name.isprintable():
        raise RecastConfigError(
            f"adapter_name={name!r}: a task is saved in a folder of its name, so it must be the plain name of one, without "
            "slashes, control characters or '..'"
        )
    if len(name.encode(errors="surrogatepass")) > MOST_BYTES:
        raise RecastConfigError(f"adapter_name={name[:20]!r}...: a name has at most {MOST_BYTES} bytes")
    if name == BASE_ADAPTER:
        raise RecastConfigError(f"adapter_name={name!r}: this is the name of the model without any task")
    if _TAKEN.fullmatch(name):  # some file systems do not tell upper case from lower
        raise RecastConfigError(f"adapter_name={name!r}: a file of this name lies beside the folders of tasks")


def without_wrappers(name: str) -> str:
    """A name without what wrappers of torch put in.

    >>> without_wrappers("_orig_mod.blocks.0._checkpoint_wrapped_module.base_layer.weight")
    'blocks.0.base_layer.weight'
    """
    return _WRAPPER_PARTS.sub("", name).removeprefix(".")


def spellings(name: str) -> tuple[str, ...]:
    """What an entry of a file may be called in the plain model, the likeliest first: a module may be called ``base_layer``.

    >>> spellings("base_layer.base_layer.bias")
    ('base_layer.base_layer.bias', 'base_layer.bias', 'base_layer.bias')
    """
    name = without_wrappers(name)
    before, found, after = name.rpartition(".base_layer.")
    return name, f"{before}.{after}" if found else name, plain_name(name)


def entry_key(key: str) -> str:
    """The key of a task's entry as its file has it, with PEFT's beginning once.

    A state dict of a model without a tuner around it has none, and transformers' ``save_pretrained`` wrote it twice with 0.1.
    """
    return f"{MODEL_PREFIX}{key.removeprefix(MODEL_PREFIX).removeprefix(MODEL_PREFIX)}"


def plain_name(name: str) -> str:
    """A module's name in the plain model: without what PEFT and wrappers put in.

    >>> plain_name("attn.base_layer.out_proj")
    'attn.out_proj'
    >>> plain_name("dla.base_layer.0.base_layer.weight")
    'dla.base_layer.0.weight'
    >>> plain_name("blocks.0._checkpoint_wrapped_module.mlp.fc1")
    'blocks.0.mlp.fc1'
    """
    name = without_wrappers(name)
    prefix = MODEL_PREFIX if name.startswith(MODEL_PREFIX) else ""
    # timm's DLA has a base_layer of its own: nothing wraps the model itself, so a first part of that name is the model's, and
    # tuners wrap modules with a weight, which have no numbered children
    return prefix + re.sub(r"\.(base_layer(?!\.\d)|original_module)(?=\.|$)", "", name.removeprefix(prefix))


class StandIn(nn.Module):
    """Takes the place of a module in a graph, and holds it as its child ``base``."""


def held_name(module: nn.Module) -> str | None:
    """The name under which a wrapper that adds no weights holds what it wraps; None for a module that is no such wrapper."""
    children = module._modules
    if not children:
        return None
    if isinstance(module, StandIn):
        return "base"
    for name in ("module",) if type(module).__name__ in _WRAPPED_BY_CLASS else _WRAPPED:
        if children.get(name) is not None:
            return name
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """What wrappers that add no weights hold: of torch.compile, activation checkpointing, offloading, FSDP and DDP.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    check_is_module(module)
    while (name := held_name(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def modules_of(model: nn.Module, *kinds: type[Kind]) -> list[Kind]:
    """The modules of a model that are of some kinds, each once, in the order of ``model.modules()``.

    A verb goes through its model many times, and torch makes a name for every module on the way, which takes most of its time.
    """
    check_is_module(model)
    found: dict[nn.Module, None] = {}
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                ahead.extend(reversed(module._modules.values()))
    return [module for module in found if isinstance(module, kinds)]


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


def lies_in(name: str, others: Iterable[str]) -> bool:
    """Whether a module is one of others, or lies in one of them.

    >>> lies_in("head.fc", ["head"]), lies_in("header", ["head"])
    (True, False)
    """
    return any(name == other or name.startswith(f"{other}.") for other in others)


def ends_in(name: str, endings: Iterable[str]) -> bool:
    """Whether a module or parameter is meant by one of several names in a list, as PEFT takes them: whole, or its last parts.

    >>> ends_in("blocks.0.attn.qkv", ["attn.qkv"]), ends_in("blocks.0.attn.qkv", ["kv"])
    (True, False)
    """
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def outermost(names: Iterable[str]) -> list[str]:
    """The modules that lie in none of the others, each once, in their order."""
    each = dict.fromkeys(names)
    return [name for name in each if not lies_in(name, each.keys() - {name})]


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
