"""Which modules a model calls, and of which it reads a tensor by itself, by the code of its forward methods.

What is hung on a module as a hook acts where the module is called. Some models take a bias and compute with it themselves:
``F.linear(x, self.proj.weight, self.proj.bias)``.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from ..names import plain_name
from ..options.partner import PartnerCandidate

_METADATA = ("dtype", "device", "shape", "ndim", "requires_grad")
_ITEM = "*"
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def why_unheard(candidate: PartnerCandidate, tensor: str) -> str | None:
    """Why nothing that hangs on a module has an effect: the model reads its tensor and never calls the module; else None."""
    reads, calls = _uses(candidate, tensor)
    return f"{reads[0]} reads its {tensor} and never calls it" if reads and not calls else None


def is_also_read(candidate: PartnerCandidate, tensor: str) -> bool:
    """Whether the model both calls a module and computes with its tensor by itself."""
    reads, calls = _uses(candidate, tensor)
    return bool(reads and calls)


def _uses(candidate: PartnerCandidate, tensor: str) -> tuple[list[str], list[str]]:
    """The classes of the modules around one that read its tensor, and of those that call it or pass it on."""
    names = [name for name, _ in candidate.path[1:]] + [candidate.slot]
    reads, calls = [], []
    for depth, (_, holder) in enumerate(candidate.path):
        chain = tuple(plain_name(".".join(names[depth:])).split("."))
        accesses = _accesses(type(holder))  # type: ignore[arg-type]
        if any(_is_of(access[: len(chain) + 1], (*chain, tensor)) for access in accesses):
            reads.append(type(holder).__name__)
        is_passed = chain[-1].isdecimal() and chain[:-1] in accesses  # with the whole list that it is in
        if is_passed or any(_is_of(access, chain) for access in accesses):
            calls.append(type(holder).__name__)
    return reads, calls


def _is_of(access: tuple[str, ...], chain: tuple[str, ...]) -> bool:
    """Whether what a forward does with attributes is done with these; a loop goes through all items."""
    pairs = zip(access, chain, strict=False)
    return len(access) == len(chain) and all(a == b or (a == _ITEM and b.isdecimal()) for a, b in pairs)


@functools.cache
def _accesses(cls: type) -> frozenset[tuple[str, ...]]:
    """What the forward of a class, and the methods that it uses, do with attributes: ``self.a.b`` is ``("a", "b")``."""
    if cls.__module__ == "torch.nn.modules.transformer":  # computes with what it reads only where nothing has a hook
        return frozenset()
    found: set[tuple[str, ...]] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        function = inspect.unwrap(inspect.getattr_static(cls, waiting.pop()))
        for code in _codes(getattr(function, "__code__", None)):
            found.update(_chains(code))
            named = {name for name in code.co_names if not hasattr(nn.Module, name)} - seen
            used = {name for name in named if inspect.isroutine(inspect.getattr_static(cls, name, None))}
            seen |= used
            waiting.extend(used)
    return frozenset(found)


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Attributes of attributes that a function uses; not those that it only compares with None or asks for their dtype.

    Local variables stand for what was put into them, and that of a loop for the items of a list.
    """
    chain: list[str] = []
    named: dict[str, list[str]] = {}
    following: Any
    instructions = list(dis.get_instructions(code))
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        name = instruction.opname
        if name in _ATTRIBUTE:
            chain.append(instruction.argval)
        elif chain and name == "GET_ITER":
            chain.append(_ITEM)
        elif chain and name == "LOAD_CONST" and following.opname == "BINARY_SUBSCR":
            chain.append(str(instruction.argval))
        elif not (chain and name in ("BINARY_SUBSCR", "FOR_ITER")):
            chain = yield from _flushed(chain, instruction, named)


def _flushed(chain: list[str], instruction: dis.Instruction, named: dict[str, list[str]]) -> Any:
    """Give a chain that ends here, unless a local variable takes it; returns the one that a local variable begins."""
    given = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    variables = list(zip(re.findall("(LOAD|STORE)_FAST", instruction.opname), given, strict=False))
    for what, variable in variables or [("", None)]:
        if what == "STORE":
            named[variable], chain = chain, []
            continue
        if chain and not _asks_only(chain, instruction):
            yield tuple(chain)
        chain = [*named.get(variable, ())] if what else []
    return chain


def _asks_only(chain: list[str], following: dis.Instruction) -> bool:
    is_compared: Any = following.opname.endswith("_NONE") or (following.opname == "LOAD_CONST" and following.argval is None)
    return not set(chain).isdisjoint(_METADATA) or is_compared
