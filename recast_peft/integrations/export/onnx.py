"""ONNX: one graph whose task is an input, or that holds a table of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ...composition.compose import without_autocast
from ...errors import RecastConfigError
from ...pool.pool import TaskPool
from ...storage.atomic import staged_folder
from ...validation import check_is_no_folder
from .graph import INPUT, prepare
from .layers import AUTO
from .program import Shapes, trace
from .tasks import metadata

LARGEST = 1 << 30  # bytes of weights up to which they lie in the graph's own file; protobuf has no more than two of these
NEEDED = ("onnx", "onnxscript")
OURS = {"args", "kwargs", "f", "input_names", "output_names", "dynamo", "dynamic_axes", "external_data"}


@without_autocast()
def export_onnx(
    model: PeftModel | TaskPool,
    path: str | Path,
    example: Any,
    tasks: str | Sequence[str] = INPUT,
    *,
    way: str = AUTO,
    dynamic_shapes: Shapes | None = None,
    **options: Any,
) -> Path:
    """Write a model as one ONNX graph for all of its tasks.

    With ``tasks="input"`` the graph takes a task beside the model's own inputs: ``coefficients`` ``(numbers per task,)``, and
    the tensors of its classifier (of any number of classes) and norms, as ``export_task`` writes them. With a table the graph
    takes ``rows`` ``(samples,)``, a task for each sample; row -1 is the pretrained model.

    Args:
        model: a model with RECAST tasks, or a ``TaskPool``.
        path: path of the graph. Of a large model the weights lie beside it, in ``<name>.data``.
        example: inputs of the model: a tensor, a tuple, or a dictionary by argument.
        tasks: ``"input"``; ``"table"`` for all tasks of the pool (or model); or a list of those in the table.
        way: how targets with several templates compute: ``"weight"`` composes the weight in each call; ``"output"`` mixes
            products, which stays fast and exact when the graph is quantised; ``"auto"`` takes what costs less for inputs like
            the example. Tables take ``"output"``.
        dynamic_shapes: names of the dimensions that may differ from call to call; as for ``export_program``.
        options: for ``torch.onnx.export``, such as ``opset_version``.

    Returns:
        the path. Outputs have the names that the model gives them (``output`` of one tensor); one that has an input's name has
        ``_output`` behind it.

    Raises:
        RecastConfigError: if an argument cannot be used, or onnx or onnxscript is not installed.
        RecastBankError: if a task has what a graph cannot express (partners, masks, trained biases, a compressed bank,
            quantised weights, a LoRA part that is more than two factors), or is merged; nothing is written.
    """
    check_is_no_folder(path, "model.onnx")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise RecastConfigError(f"{' and '.join(missing)} is not installed: pip install onnx onnxscript (the extra `export`)")
    if ours := OURS.intersection(options):
        raise RecastConfigError(f"{sorted(ours)[0]} is what export_onnx itself gives to torch.onnx.export: leave it out")
    prepared = prepare(model, example, tasks, way, dynamic_shapes)
    prepared.graph.stack_templates()
    target = Path(path)
    program, taken = trace(prepared), [*prepared.task_inputs(), *prepared.inputs]
    with torch.no_grad():
        made = torch.onnx.export(
            program,
            input_names=taken,
            output_names=[f"{name}_output" if name in taken else name for name in prepared.outputs],
            dynamo=True,
            **{"verbose": False, **options},
        )
    assert made is not None
    wanted, written = options.get("opset_version"), made.model.graph.opset_imports.get("")
    if wanted not in (None, written):  # torch logs it, and gives what it has
        raise _cannot_be(wanted, f"this graph can only be written in version {written}")
    if hasattr(made, "rename_axes"):  # torch names them s0, s1, ...
        inputs: dict[Any, Any] = {value.name: value for value in made.model.graph.inputs}
        axes = [(inputs[name].shape[dim], new) for name, dims in prepared.dynamic.items() for dim, new in dims.items()]
        made.rename_axes({str(old): new for old, new in axes if not isinstance(old, int)})
    for node in made.model.graph:  # where in whose files it was traced
        node.metadata_props.clear()
    made.model.metadata_props.update(metadata(prepared.source, prepared.names))
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with staged_folder(target.parent) as folder:
        made.save(folder / target.name, external_data=size > LARGEST)
        if wanted is not None:
            _check(folder / target.name, wanted)
    return target


def _check(path: Path, version: int) -> None:
    """Refuse a graph in another version than torch's own, which was converted to no valid one."""
    from onnx import checker

    try:
        checker.check_model(str(path))
    except checker.ValidationError as error:
        raise _cannot_be(version, f"this graph cannot be written in it ({str(error).partition(chr(10))[0]})") from error


def _cannot_be(version: int, why: str) -> RecastConfigError:
    return RecastConfigError(
        f"opset_version={version}: {why}. Nothing was written; take a version that torch.onnx.export knows, or leave it out."
    )
