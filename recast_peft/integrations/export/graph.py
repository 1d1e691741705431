"""The model as a graph that takes a task: a copy of its modules (not of its numbers), with ours replaced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RecastBankError, RecastConfigError, RecastError
from ...holders import unwrapped_module
from ...layer import RecastLayer
from ...names import PARTNER_CONTAINER, modules_of
from ...parts.bias_part import bias_holders
from ...parts.head import TaskHead
from ...parts.lora import PartLayer
from ...parts.lora_strength import part_layers
from ...parts.partner import detach_partners
from ...parts.precision import dtypes_of
from ...parts.readout import readout_holders
from ...parts.saved import TaskNorm
from ...parts.wrapper import TaskModule
from ...validation import check_arguments, one_of
from .example import ROWS, as_arguments, described, dynamic_dimensions, named_arguments
from .layers import AUTO, WAYS, ClassifierTable, Given, TaskedBias, TaskedLayer, TaskedModule, TemplateStack
from .lora import TaskedPart
from .tasks import COEFFICIENTS, GraphTask, Source, check_exportable, check_model, source_of

INPUT, TABLE = "input", "table"


class TaskGraph(nn.Module):
    """A model whose task is given with each call.

    Args:
        model: the plain model, with modules of layers.py in it.
        biases: what hangs on these modules.
        given: what these look the task up in.
        table: coefficients ``(1 + tasks, numbers per task)``, first those of the pretrained model; None takes one task as an
            input.
    """

    table: Tensor | None
    base: Tensor
    followed: Tensor | None

    def __init__(self, model: nn.Module, biases: Sequence[TaskedBias], given: Given, table: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.biases = nn.ModuleList(biases)
        self.stacks = nn.ModuleList()
        device = next(model.parameters()).device
        self.register_buffer("table", None if table is None else table.to(device))
        held: list[TaskedLayer | TaskedBias] = [*self.layers(), *biases]
        mixed = list({one.name: one for one in held}.values())  # biases may share their coefficients
        self.names, self.sizes = [one.name for one in mixed], [len(one.base_factors) for one in mixed]
        self.register_buffer("base", torch.cat([one.base_factors for one in mixed])[None].to(device))
        followed = torch.cat([one.followed for one in mixed])
        in_order = torch.equal(followed, torch.arange(1, len(followed) + 1))
        self.register_buffer("followed", None if in_order else followed.to(device))
        self._held = (given,)

    def forward(self, task: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs by name.

        Args:
            task: the tensors of a task by name, as ``export_task`` writes them; of a table ``(samples,)`` numbers of tasks, of
                which -1 is the pretrained model.
            args: of the model.
            kwargs: of the model.
        """
        given = self._held[0]
        try:
            if self.table is None:
                given.row, given.owned, given.rows = task[COEFFICIENTS][None], task, None
            else:
                rows = task + 1  # of the table, whose first row is the pretrained model's
                rows = torch.where(rows < 0, len(self.table), rows)  # beyond its end, where every runtime refuses it
                given.row, given.owned, given.rows = self.table[rows], {}, rows
            given.factors = self._factors(given.row)
            return named_outputs(self.model(*args, **kwargs))
        finally:
            given.row, given.factors, given.owned, given.rows = torch.empty(0), {}, {}, None

    def _factors(self, row: Tensor) -> dict[str, Tensor]:
        """What the templates of every target and bias are multiplied by, for all of them at once."""
        if self.followed is None:
            row = row[:, : self.base.shape[1]]  # behind them are the factors of a LoRA part
        else:
            row = torch.nn.functional.pad(row, (1, 0))[:, self.followed]
        return dict(zip(self.names, (row + self.base).split(self.sizes, dim=1), strict=True))

    def name_arguments(self, names: Iterable[str]) -> None:
        """Let the forward pass have arguments of these names beside the task, as torch.export looks them up."""
        forward = self.forward

        def named(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return forward(*args, **kwargs)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("task", *names)])  # type: ignore
        self.forward = named  # type: ignore[method-assign]

    def layers(self) -> list[TaskedLayer]:
        """The target modules as the graph has them."""
        return modules_of(self, TaskedLayer)

    def stack_templates(self) -> None:
        """Let the templates of weights that are composed lie in one tensor a bank."""
        stacks: dict[tuple, TemplateStack] = {}
        for layer in self.layers():
            layer.stack_templates(stacks)
        self.stacks.extend(stacks.values())


def named_outputs(output: Any) -> dict[str, Tensor]:
    """What a model gives, as tensors by name; caches and whatever else is no tensor is left out.

    Raises:
        RecastConfigError: if no tensor is left.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        named: Mapping[Any, Any] = output
    elif isinstance(output, (tuple, list)):
        named = {f"output_{place}": value for place, value in enumerate(output)}
    else:  # a data class
        named = getattr(output, "__dict__", {})
    tensors = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RecastConfigError(
            f"the model gives no tensor but a {type(output).__name__}: expected a tensor, or several by name or in a row"
        )
    return tensors


# ---------------------------------------------------------------- what is exported


@dataclass
class Prepared:
    """Everything that an exporter needs."""

    graph: TaskGraph  # the module to trace
    task: Any  # what stands for a task in the example: tensors by name, or rows
    args: tuple[Any, ...]  # positional arguments of the example
    kwargs: dict[str, Any]  # keyword arguments of the example
    arguments: list[str]  # names of the model's arguments in the example, positional ones first
    inputs: dict[str, Tensor]  # the example's tensors by the names that they have as inputs of the graph
    dynamic: dict[str, dict[int, str]]  # of these and the task's tensors: names of the dimensions that may differ by call
    asked: set[str]  # the names of those that the user gave
    outputs: list[str]  # names of the outputs
    source: Source  # where the tasks come from
    names: list[str]  # the tasks

    def task_inputs(self) -> dict[str, Tensor]:
        """The task's tensors by the names of the graph's inputs."""
        return {ROWS: self.task} if isinstance(self.task, Tensor) else self.task


def prepare(
    model: Any,
    example: Any,
    tasks: str | Sequence[str] = INPUT,
    way: str = AUTO,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
) -> Prepared:
    """Check everything, and build the graph; the model is not touched and nothing is written.

    Args:
        model, example, tasks, way: as for ``export_program``.
        dynamic_shapes: by argument, in place of what ``dynamic_dimensions`` says.

    Raises:
        RecastConfigError: if an argument cannot be used.
        RecastBankError: if a task has what a graph cannot express.
    """
    check_arguments(one_of(*WAYS), way=way)
    if isinstance(tasks, str) and tasks not in (INPUT, TABLE):
        raise RecastConfigError(f"tasks={tasks!r}: expected {INPUT!r}, {TABLE!r}, or a list of names")
    source, names = source_of(model, None if isinstance(tasks, str) else tasks)
    args, kwargs = as_arguments(example)
    arguments = named_arguments(source.backbone, args, kwargs)
    kwargs = {name: kwargs[name] for name in arguments if name in kwargs}  # torch names what a graph takes in this order
    inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    check_exportable(source.backbone, source.adapter, source.config)
    check_model(source.backbone)
    with torch.no_grad():
        given, device = Given(), next(source.backbone.parameters()).device
        if tasks == INPUT:
            names = []
            graph = TaskGraph(*_tasked_model(source, given, way, None), given)
            task: Any = {name: value.to(device) for name, value in source.example().tensors().items()}
        else:
            if not names:
                raise RecastConfigError("there is no task for a table: put some into the pool, or name tasks of the model")
            read = [source.task(name) for name in names]
            table = torch.stack([torch.zeros(source.layout.width), *(one.row for one in read)])
            graph = TaskGraph(*_tasked_model(source, given, way, read), given, table)
            task = torch.arange(len(next(iter(inputs.values()))), device=device) % len(names)
        graph.eval()
        graph.name_arguments(arguments)
        outputs = _outputs_of(graph, task, args, kwargs, inputs)
    dynamic = dynamic_dimensions(inputs, dynamic_shapes or {})
    dynamic.update(_dimensions_of_task(graph, task))
    asked = {name for dims in (dynamic_shapes or {}).values() for name in dims.values()}
    return Prepared(graph, task, args, kwargs, list(arguments), inputs, dynamic, asked, outputs, source, names)


def _outputs_of(graph: TaskGraph, task: Any, args: tuple, kwargs: dict[str, Any], inputs: Mapping[str, Tensor]) -> list[str]:
    """The names of a graph's outputs, by a call with the example."""
    try:
        return list(graph(task, *args, **kwargs))
    except (RecastError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RecastConfigError(
            f"the model cannot be called with the example ({described(inputs)}): {type(error).__name__}: {error}"
        ) from error


def _dimensions_of_task(graph: TaskGraph, task: Any) -> dict[str, dict[int, str]]:
    if isinstance(task, Tensor):
        return {ROWS: {0: "batch"}}
    heads = [f"{module.place}." for module in modules_of(graph, TaskedModule) if module.has_classes]
    return {name: {0: "classes"} if name.startswith(tuple(heads)) else {} for name in task}


# ---------------------------------------------------------------- the copy


def _tasked_model(source: Source, given: Given, way: str, read: list[GraphTask] | None) -> tuple[nn.Module, list[TaskedBias]]:
    """A copy of the model whose targets, and whose modules that the task owns, look at what is given; and biases, likewise."""
    held = {id(tensor): tensor for tensor in (*source.backbone.parameters(), *source.backbone.buffers())}
    model: nn.Module = copy.deepcopy(source.backbone, held).eval()
    holders, readouts = bias_holders(model, source.adapter), readout_holders(model, source.adapter)
    detach_partners(model)
    stand_ins = StandIns(source, model, given, way, read)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, (RecastLayer, TaskModule, PartLayer)):
                parent._modules[key] = stand_ins.of(child)
    model._modules.pop(PARTNER_CONTAINER, None)
    layers = {id(module.base): module for module in modules_of(model, TaskedLayer)}
    biases = [TaskedBias(holder, source.adapter, source.layout.slices, given) for holder in holders]
    for bias, holder in zip(biases, holders, strict=True):
        host = holder.hosts[0]
        bias.attach(host, layers.get(id(host), host))
    for readout in readouts:
        readout.stay(model, source.adapter)
    return model, biases


class StandIns:
    """What stands for the modules of a copy of the model, each made once."""

    def __init__(self, source: Source, model: nn.Module, given: Given, way: str, read: list[GraphTask] | None) -> None:
        self.source, self.given, self.way, self.read = source, given, way, read
        self.own = {name for task in read or [source.example()] for name in task.owned}
        self.parts = {id(one.get_base_layer()): one for one in part_layers(model, source.adapter)}
        self.made: dict[int, nn.Module] = {}

    def of(self, module: Any) -> nn.Module:
        """What stands for a module; the module itself, if the task has nothing there."""
        if isinstance(module, PartLayer):  # around a plain module, or around or inside a layer of ours
            return self.of(next(iter(module.recast_beside), module.get_base_layer()))
        if id(module) not in self.made:
            self.made[id(module)] = self._make(module)
        return self.made[id(module)]

    def _make(self, module: Any) -> nn.Module:
        if isinstance(module, TaskModule):
            return self._owned(module)
        source, plain, made = self.source, module, module
        if isinstance(module, RecastLayer):
            plain = made = module.get_base_layer()
            if source.adapter in module.recast_coefficients:
                bank, columns = module.recast_bank[source.adapter], source.layout.slices[module.module_name]
                made = TaskedLayer(module, bank, columns, self.given, self.way)
        if id(plain) not in self.parts:
            return made
        return TaskedPart(made, self.parts[id(plain)], source.adapter, source.layout.slices, self.given)

    def _owned(self, module: Any) -> nn.Module:
        if not any(name.startswith(f"{module.module_name}.") for name in self.own):
            return self.of(module.original_module)
        if self.read is not None:
            return _classifiers(module, self.read, self.given)
        like = self.source.owned_module(module)
        has_classes = isinstance(module, TaskHead) and type(like) is nn.Linear and like.out_features > 1
        made = TaskedModule(module.module_name, like, self.given, has_classes)
        if isinstance(module, TaskNorm):
            made.dtypes.update(dtypes_of(unwrapped_module(module.original_module)))
        return made


def _classifiers(module: Any, read: list[GraphTask], given: Given) -> ClassifierTable:
    """The model's own classifier, or NaN if it has none, and those of a table's tasks.

    Raises:
        RecastBankError: if a task has no linear one.
    """
    place = module.module_name
    base = module.original_module
    states = [{k.removeprefix(f"{place}."): v for k, v in task.owned.items() if k.startswith(f"{place}.")} for task in read]
    own = base.state_dict() if type(base) is nn.Linear else {}
    states = [state or own for state in states]
    for task, state in zip(read, states, strict=True):
        if "weight" not in state or set(state) - {"weight", "bias"} or state["weight"].ndim != 2:
            has = ", ".join(state) or "none, nor has the model a linear one"
            raise RecastBankError(
                f"a table holds linear classifiers alone; task {task.name!r} has {has} at {place}: export it with tasks='input'"
            )
    classes = max(len(state["weight"]) for state in (*states, *([own] if own else [])))
    features = states[0]["weight"].shape[1]
    weights = torch.zeros(len(states) + 1, classes, features)
    biases = torch.full((len(states) + 1, classes), float("-inf"))
    for row, state in enumerate([own or {"weight": torch.full((classes, features), float("nan"))}, *states]):
        weights[row, : len(state["weight"])] = state["weight"]
        biases[row, : len(state["weight"])] = state.get("bias", torch.zeros(1))
    return ClassifierTable(weights, biases, given).to(next(base.parameters(), weights).device)
