"""torch's own exports: an ``ExportedProgram``, and a package that AOTInductor compiles for C++."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from ...composition.compose import without_autocast
from ...errors import RecastConfigError, RecastError
from ...pool.pool import TaskPool
from ...storage.atomic import staged_folder
from ...validation import check_is_no_folder
from .example import described
from .graph import INPUT, Prepared, prepare
from .layers import AUTO

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TRIES = 3  # of a trace: torch says what bounds a dimension needs

Shapes = Mapping[str, Mapping[int, str]]


@without_autocast()
def export_program(
    model: PeftModel | TaskPool,
    example: Any,
    tasks: str | Sequence[str] = INPUT,
    *,
    way: str = AUTO,
    dynamic_shapes: Shapes | None = None,
) -> ExportedProgram:
    """``torch.export`` of a model whose task is given with each call: ``program.module()(task, *inputs)``.

    Args:
        model: a model with RECAST tasks, or a ``TaskPool``.
        example: inputs of the model: a tensor, a tuple, or a dictionary by argument.
        tasks: ``"input"``: a call is given the tensors of a task by name, as ``export_task`` returns and writes them.
            ``"table"``, or a list of names: these tasks are inside, and a call is given ``(samples,)`` rows; row -1 is the
            pretrained model.
        way: how targets with several templates compute: ``"weight"`` composes the weight in each call, ``"output"`` mixes
            products, ``"auto"`` takes what costs less for inputs like the example.
        dynamic_shapes: names of the dimensions that may differ from call to call, by argument and dimension. Left out, an
            argument has ``{0: "batch"}``, and token ids and masks ``{0: "batch", 1: "sequence"}``; those of another length than
            the first, as of a decoder, ``{1: "<argument>_sequence"}``.

    Returns:
        the program, whose outputs are a dictionary of tensors by name (``"output"`` of a model that gives one tensor).

    Raises:
        RecastConfigError: if an argument cannot be used.
        RecastBankError: if a task has what a graph cannot express, or is merged.
    """
    return trace(prepare(model, example, tasks, way, dynamic_shapes))


@without_autocast()
def export_aoti(
    model: PeftModel | TaskPool,
    path: str | Path,
    example: Any,
    tasks: str | Sequence[str] = INPUT,
    *,
    way: str = AUTO,
    dynamic_shapes: Shapes | None = None,
    inductor_configs: dict[str, Any] | None = None,
) -> Path:
    """Compile what ``export_program`` gives with AOTInductor, for this machine's kind of processor or GPU.

    It needs a C++ compiler. ``torch._inductor.aoti_load_package(path)`` loads it in Python, ``AOTIModelPackageLoader`` in C++.

    Args:
        model: as for ``export_program``.
        path: path of the package, which ends with ``.pt2``.
        example: as for ``export_program``.
        tasks: as for ``export_program``.
        way: as for ``export_program``.
        dynamic_shapes: as for ``export_program``.
        inductor_configs: options of the compiler.

    Returns:
        the path.

    Raises:
        RecastConfigError: if an argument cannot be used.
        RecastBankError: if a task has what a graph cannot express, or is merged; nothing is written.
    """
    check_is_no_folder(path, "model.pt2")
    target = Path(path)
    program = export_program(model, example, tasks, way=way, dynamic_shapes=dynamic_shapes)
    with staged_folder(target.parent) as folder:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / target.name), inductor_configs=inductor_configs
        )
    return target


def trace(prepared: Prepared) -> ExportedProgram:
    """``torch.export`` of a prepared graph.

    Raises:
        RecastConfigError: if torch cannot trace the model, or only with a size that the user wants to differ.
    """
    from torch._dynamo.exc import UserError
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

    names = sorted({name for dims in prepared.dynamic.values() for name in dims.values()})
    known = {name: torch.export.Dim(name) for name in names}
    shapes = {argument: {d: known[name] for d, name in dims.items()} for argument, dims in prepared.dynamic.items()}
    task = prepared.task_inputs()
    of_task: Any = {name: shapes[name] for name in task} if isinstance(prepared.task, dict) else shapes[next(iter(task))]
    of_call: Any = {"task": of_task, **{name: shapes.get(name) for name in prepared.arguments}}
    for attempt in range(TRIES):
        try:
            with torch.no_grad():
                return torch.export.export(
                    prepared.graph, (prepared.task, *prepared.args), prepared.kwargs, dynamic_shapes=of_call, strict=False
                )
        except UserError as error:  # a sequence is at most as long as the model's table of positions
            if attempt + 1 == TRIES or "Suggested fixes" not in str(error):
                raise _untraceable(prepared, error) from error
            said = str(error).split("Suggested fixes")[1].split("\n\n")[0]  # what comes behind is no fix
            _tell_of_fixed(prepared, dict(re.findall(r"^\s*(\w+) = (\d+)$", said, re.MULTILINE)))
            of_call = refine_dynamic_shapes_from_suggested_fixes(f"Suggested fixes{said}", of_call)
        except (RecastError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _untraceable(prepared, error) from error
    raise AssertionError


def _tell_of_fixed(prepared: Prepared, fixed: Mapping[str, str]) -> None:
    """Refuse or warn of dimensions that should differ from call to call and have one size in the graph, by their names."""
    if not fixed:
        return
    sizes = ", ".join(f"{name}={size}" for name, size in fixed.items())
    said = f"the model allows no other size than the example's in some dimensions ({sizes})"
    if prepared.asked & fixed.keys():
        raise RecastConfigError(f"{said}: leave these out of dynamic_shapes, and the graph takes inputs of that size alone")
    warnings.warn(f"{said}: the graph takes inputs of that size alone", stacklevel=5)


def _untraceable(prepared: Prepared, error: Exception) -> RecastConfigError:
    return RecastConfigError(
        f"torch.export makes no graph of the model with the example ({described(prepared.inputs)}). A graph has no branches "
        f"that depend on numbers, and its inputs fit each other. {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    )
