"""A task's own classifier: found in the model, of its own size, stored and swapped with the task.

The container is PEFT's ``ModulesToSaveWrapper``, so that saving, loading, activating, disabling and deleting a task treat its
head as PEFT treats any module that is saved whole. What is added: heads of different sizes, label names that follow the
active task, and prototypes instead of a trained head.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..composition.mixed_batch import current_batch
from ..config import RecastConfig
from ..errors import RecastConfigError, RecastTargetError
from ..mimicry.features import device_of, evaluating
from ..names import BASE_ADAPTER
from ..planning.heads import head_names

TRANSFORMERS_HEADS = ("classifier", "score", "classification_head", "head", "fc")
HEAD_STD = 0.02  # standard deviation of a fresh head's weights


class PrototypeHead(nn.Module):
    """Nearest class mean: logits are negative squared distances to one prototype a class; nothing is trained.

    Shapes:
        input ``(..., features)``, output ``(..., classes)``; prototypes ``(classes, features)``.
    """

    def __init__(self, num_features: int, num_classes: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        empty = torch.zeros(num_classes, num_features, device=device, dtype=dtype)
        self.prototypes = nn.Parameter(empty, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        prototypes = self.prototypes.to(x.dtype)
        return 2 * x @ prototypes.T - prototypes.square().sum(-1) - x.square().sum(-1, keepdim=True)


@dataclass(frozen=True)
class Labels:
    """What a model says of its classes: their number, and their names if there are any."""

    num_classes: int | None
    id2label: dict[int, str] | None = None
    problem_type: str | None = None


@dataclass
class PreparedHead:
    """A task's head, ready to be put in.

    Attributes:
        name: of the module in the plain model.
        module: the new head.
        labels: of the task.
        stored_dtype: in which the head is saved; None is the dtype it is trained in.
    """

    name: str
    module: nn.Module
    labels: Labels
    stored_dtype: torch.dtype | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is stored, by the names that the task file has."""
        return {f"{self.name}.{key}": tuple(value.shape) for key, value in self.module.state_dict().items()}


class TaskHead(ModulesToSaveWrapper):
    """The heads of all tasks in place of the model's own; the active task's is in force, and its label names with it.

    Args:
        module_to_save: the model's own head.
        owner: the model, whose label names follow the active task.
    """

    def __init__(self, module_to_save: nn.Module, owner: nn.Module) -> None:
        nn.Module.__init__(self)
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()
        self._adapters: set[str] = set()
        self._active_adapter = []
        self._disable_adapters = False
        self._owner = (owner,)  # in a tuple: the head is a part of its owner, not the other way round
        self._labels: dict[str, Labels] = {}
        self._base_labels = read_labels(owner)
        self._stored_dtype: dict[str, torch.dtype] = {}
        self.check_module()

    def add(self, adapter_name: str, head: PreparedHead) -> None:
        """Give a task its head."""
        self.modules_to_save[adapter_name] = head.module
        self._adapters.add(adapter_name)
        self._labels[adapter_name] = head.labels
        if head.stored_dtype is not None:
            self._stored_dtype[adapter_name] = head.stored_dtype
        self.original_module.requires_grad_(False)

    def adopt(self, wrapper: ModulesToSaveWrapper) -> None:
        """Take over the modules of a plain wrapper that stood here before."""
        for name, module in wrapper.modules_to_save.items():
            self.modules_to_save[name] = module
            self._adapters.add(name)
        self._active_adapter = wrapper._active_adapter
        self._disable_adapters = wrapper._disable_adapters

    def show(self, slot: str, head: PreparedHead | None) -> None:
        """Put a head in force under the name of a slot; None puts the model's own in force.

        A head like the one in the slot is copied into it, so that a compiled model goes on; another one takes its place.
        """
        if head is None:
            self._active_adapter = []
            self.show_labels()
            return
        present = dict(self.modules_to_save.items()).get(slot)
        if present is not None and present is not head.module and _alike(present, head.module):
            present.load_state_dict(head.module.state_dict())
            self._labels[slot] = head.labels
        elif present is not head.module:
            copied = dataclasses.replace(head, module=copy.deepcopy(head.module).requires_grad_(False))
            self.add(slot, copied)
        self._active_adapter = [slot]
        self.show_labels()

    def prepared(self, name: str, adapter_name: str) -> PreparedHead:
        """A copy of a task's head, to be put elsewhere."""
        module = copy.deepcopy(self.modules_to_save[adapter_name]).requires_grad_(False)
        labels = self._labels.get(adapter_name, self._base_labels)
        return PreparedHead(name, module, labels, self._stored_dtype.get(adapter_name))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Put the head of the task that has one in force, or else the model's own (transformers' verbs ask every head)."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        owners = [name for name in names if name in self._adapters]
        if len(owners) > 1:
            raise _several_owners(owners, type(self).__name__)
        super().set_adapter(owners, inference_mode=inference_mode)
        self._freeze_prototypes()
        self.show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._freeze_prototypes()
        self.show_labels()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        super().delete_adapter(adapter_name, new_active_adapters)
        self._labels.pop(adapter_name, None)
        self._stored_dtype.pop(adapter_name, None)
        self.show_labels()

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        merge = kwargs.get("merge", args[0] if args else False)
        if not merge:  # the model's own head comes back, and its label names with it
            self._active_adapter = []
            self.show_labels()
            return self.original_module
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    def show_labels(self) -> None:
        """Let the model's config name the classes of the head that is in force."""
        active = [] if self.disable_adapters else self.active_adapters
        labels = self._labels.get(active[0]) if active else None
        write_labels(self._owner[0], labels or self._base_labels)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        entries = super().adapter_state_dict(adapter_name, state_dict)
        dtype = self._stored_dtype.get(adapter_name)
        return {k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in entries.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = current_batch()
        if batch is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        x, *rest = args
        parts: list[tuple[list[int], Tensor]] = []
        for key, indices in batch.rows(len(x)).items():
            index = torch.tensor(indices, device=x.device)
            parts.append((indices, self._head_of(key, batch)(x[index], *rest, **kwargs)))
        return join_logits(parts, len(x))

    def _head_of(self, key: str | int, batch: Any) -> Any:
        if isinstance(key, int):
            return batch.pool.head(key) or self.original_module
        if key == BASE_ADAPTER or key not in self.modules_to_save:
            return self.original_module
        return self.modules_to_save[key]

    def _freeze_prototypes(self) -> None:
        for module in self.modules_to_save.values():
            if isinstance(module, PrototypeHead):
                module.prototypes.requires_grad_(False)


def _alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether one module can take over the other's numbers."""
    a, b = first.state_dict(), second.state_dict()
    return type(first) is type(second) and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def join_logits(parts: list[tuple[list[int], Tensor]], samples: int) -> Tensor:
    """Put the logits of several heads in one tensor, padded with -inf to the widest.

    Args:
        parts: the rows and the logits ``(rows, ..., classes)`` of each head.
        samples: rows of the whole batch.

    Returns:
        ``(samples, ..., most classes)``.
    """
    widest = max(logits.shape[-1] for _, logits in parts)
    result = None
    for rows, logits in parts:
        if logits.shape[-1] < widest:
            logits = nn.functional.pad(logits, (0, widest - logits.shape[-1]), value=float("-inf"))
        if result is None:
            result = logits.new_empty((samples, *logits.shape[1:]))
        result = result.index_copy(0, torch.tensor(rows, device=logits.device), logits)
    assert result is not None
    return result


def split_logits(logits: Tensor) -> list[Tensor]:
    """Cut the padding off the logits of a mixed batch: one tensor ``(..., classes)`` a sample."""
    real = torch.isfinite(logits).flatten(1, -2).any(dim=1) if logits.ndim > 2 else torch.isfinite(logits)
    return [row[..., : int(count)] for row, count in zip(logits, real.sum(dim=-1), strict=True)]


# ---------------------------------------------------------------- finding and building


def find_head(model: nn.Module, name: str | None = None) -> str:
    """The name of the module that turns features into class scores.

    Args:
        model: a timm model (``get_classifier``), a transformers model (``classifier``, ``score``, ...) or another one whose
            last head-like module is taken.
        name: given, it only has to exist.

    Raises:
        RecastTargetError: if there is none, or several.
    """
    modules = {key.replace(".original_module", ""): m for key, m in model.named_modules() if ".modules_to_save." not in key}
    if name is not None:
        if name not in modules:
            raise RecastTargetError(f"head_module={name!r}: the model has no such module; top level: {_top_level(model)}")
        return name
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        if isinstance(classifier, (tuple, list)):
            raise RecastTargetError(
                f"the model has {len(classifier)} classifiers; name the one that the task replaces with head_module="
            )
        inner = classifier.original_module if isinstance(classifier, ModulesToSaveWrapper) else classifier
        for key, module in modules.items():
            if key and (module is classifier or module is inner):
                return key
    for key in TRANSFORMERS_HEADS:
        if isinstance(modules.get(key), nn.Module):
            return key
    found = [key for key in modules if key in head_names(model) and isinstance(modules[key], nn.Linear)]
    if len(found) != 1:
        raise RecastTargetError(
            f"num_classes was given, but the model's classifier is not known ({len(found)} modules look like one: {found}): "
            f"name it with head_module=; top level: {_top_level(model)}"
        )
    return found[0]


def prepare_head(model: nn.Module, config: RecastConfig) -> PreparedHead | None:
    """Build the head that a config asks for; the model is not touched.

    Returns:
        None if the config asks for none.

    Raises:
        RecastTargetError: if the model's classifier cannot be found or replaced.
    """
    if config.num_classes is None:
        return None
    name = find_head(model, config.head_module)
    original: nn.Module = model.get_submodule(name)
    if isinstance(original, ModulesToSaveWrapper):
        original = original.original_module
    module = build_head(model, original, name, config)
    module.train(original.training)
    stored = None if config.head_dtype is None else getattr(torch, config.head_dtype)
    return PreparedHead(name, module, Labels(config.num_classes, config.id2label), stored)


def build_head(model: nn.Module, original: nn.Module, name: str, config: RecastConfig) -> nn.Module:
    """A head for ``config.num_classes`` classes in place of ``original``.

    A linear layer or a 1x1 convolution is replaced; of a larger head the last such layer in it; an identity (a backbone
    without classifier) by a linear layer on the backbone's features.
    """
    assert config.num_classes is not None
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(original, nn.Identity):
        features = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
        if not isinstance(features, int):
            raise RecastTargetError(f"head {name!r} is an identity and the model does not say its num_features")
        return _fresh(nn.Linear(features, config.num_classes, device=reference.device, dtype=reference.dtype), config)
    last_name, last = _last_layer(original)
    if last is None:
        raise RecastTargetError(
            f"head {name!r} is a {type(original).__name__} without a linear layer or convolution to replace; "
            "name another module with head_module="
        )
    new = _resized(last, name, config)
    if last is original:
        return new
    if config.head_type == "prototypes":
        raise RecastTargetError(f"head {name!r} is a {type(original).__name__}; prototypes need a single linear layer there")
    whole = copy.deepcopy(original)
    parent, _, child = last_name.rpartition(".")
    setattr(whole.get_submodule(parent), child, new)
    return whole


def _last_layer(module: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d | None]:
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else ("", None)


def _resized(layer: nn.Linear | nn.Conv2d, name: str, config: RecastConfig) -> nn.Module:
    assert config.num_classes is not None
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if config.head_init == "copy":
        if layer.weight.shape[0] != config.num_classes:
            raise RecastTargetError(
                f"head_init='copy': the head has other classes than the task\n  head {name}: {layer.weight.shape[0]}\n"
                f"  num_classes: {config.num_classes}\nUse head_init='fresh'."
            )
        return copy.deepcopy(layer)
    if isinstance(layer, nn.Conv2d):
        options = {"stride": layer.stride, "padding": layer.padding, "bias": layer.bias is not None}
        new: nn.Module = nn.Conv2d(layer.in_channels, config.num_classes, layer.kernel_size, **options, **like)  # type: ignore
        return _fresh(new, config)
    return _fresh(nn.Linear(layer.in_features, config.num_classes, bias=layer.bias is not None, **like), config)


def _fresh(layer: nn.Module, config: RecastConfig) -> nn.Module:
    if config.head_type == "prototypes":
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return PrototypeHead(weight.shape[1], weight.shape[0], weight.device, weight.dtype)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        values = torch.randn(layer.weight.shape, generator=generator) * HEAD_STD  # type: ignore[arg-type]
        layer.weight.copy_(values)  # type: ignore[operator, union-attr]
        if layer.bias is not None:
            layer.bias.zero_()  # type: ignore[operator, union-attr]
    return layer


def task_head(model: nn.Module, name: str) -> TaskHead:
    """The container of all tasks' heads; it is put in place of the model's own head if it is not there yet."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    present = getattr(parent, child)
    if isinstance(present, TaskHead):
        return present
    if isinstance(present, ModulesToSaveWrapper):
        wrapper = TaskHead(present.original_module, model)
        wrapper.adopt(present)
    else:
        wrapper = TaskHead(present, model)
        wrapper.train(present.training)
    setattr(parent, child, wrapper)
    return wrapper


def install_head(model: nn.Module, adapter_name: str, head: PreparedHead, active: bool, inference_mode: bool) -> None:
    """Put a task's head into the model; it is in force if ``active``."""
    wrapper = task_head(model, head.name)
    wrapper.add(adapter_name, head)
    if active:
        wrapper.set_adapter([adapter_name], inference_mode=inference_mode)
    else:
        head.module.requires_grad_(False)


def check_one_owner(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Refuse to put several tasks in force at once that own the same module, such as a classifier each.

    Raises:
        RecastConfigError: naming the tasks and the module.
    """
    if len(adapter_names) < 2:
        return
    for name, module in model.named_modules():
        owners = [n for n in adapter_names if n in module._adapters] if isinstance(module, AuxiliaryTrainingWrapper) else []
        if len(owners) > 1:
            raise _several_owners(owners, f"{type(module).__name__} {name!r}")


def _several_owners(owners: Sequence[str], place: str) -> RecastConfigError:
    return RecastConfigError(
        f"Only one adapter can be set at a time for {place}, got {', '.join(owners)}, which have a module of their own there: "
        "activate one of them, give each sample its own task (adapter_names=, or a TaskPool), or combine them into a new one "
        "(add_weighted_adapter)"
    )


# ---------------------------------------------------------------- labels


def read_labels(model: nn.Module) -> Labels:
    """What a model says of its classes now."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "id2label"):
        return Labels(getattr(model, "num_classes", None))
    return Labels(config.num_labels, dict(config.id2label or {}), getattr(config, "problem_type", None))


def write_labels(model: nn.Module, labels: Labels) -> None:
    """Make a model say of its classes what ``labels`` says: transformers' config and ``num_labels``, timm's ``num_classes``."""
    if labels.num_classes is None:
        return
    if "num_classes" in model.__dict__:
        model.num_classes = labels.num_classes  # type: ignore[assignment]
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "id2label"):
        return
    names = labels.id2label or {i: f"LABEL_{i}" for i in range(labels.num_classes)}
    config.id2label = dict(names)
    config.label2id = {name: i for i, name in names.items()}
    # transformers guesses the kind of loss at the first batch and keeps the guess in the config: each task has its own
    config.problem_type = labels.problem_type
    if "num_labels" in model.__dict__:
        model.num_labels = labels.num_classes  # type: ignore[assignment]


# ---------------------------------------------------------------- prototypes


def fit_prototypes(model: nn.Module, batches: Iterable[Any], adapter_name: str | None = None) -> Tensor:
    """Set a task's prototypes to the mean features of its classes.

    Args:
        model: a PEFT model with a task made with ``head_type="prototypes"``.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (given to the model by name).
        adapter_name: the task; None is the active one.

    Returns:
        ``(classes, features)`` the prototypes.

    Raises:
        RecastTargetError: if the task has no prototypes or is not in force, a label is none of its classes, or a class has
            no example.
    """
    heads = [m for m in model.modules() if isinstance(m, TaskHead)]
    name = adapter_name or (heads[0].active_adapters[0] if heads and heads[0].active_adapters else None)
    head = heads[0].modules_to_save[name] if heads and name is not None and name in heads[0].modules_to_save else None
    if not isinstance(head, PrototypeHead):
        raise RecastTargetError(f"task {name!r} has no prototypes: make it with RecastConfig(..., head_type='prototypes')")
    if heads[0].disable_adapters or name not in heads[0].active_adapters:
        raise RecastTargetError(f"task {name!r} is not in force: call model.set_adapter({name!r}) first")
    classes, features = head.prototypes.shape
    found = class_statistics(model, head, classes, features, batches)
    with torch.no_grad():
        head.prototypes.copy_(found.sums / found.counts[:, None])
    return head.prototypes.detach().clone()


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """What is kept of the features of labelled examples, in float64.

    Attributes:
        counts: ``(classes,)`` the examples of each class.
        sums: ``(classes, features)`` of their features.
        products: ``(features, features)`` sum of the outer products of all features, where it was asked for.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add examples ``(examples, features)`` with their labels ``(examples,)``.

        Raises:
            RecastTargetError: if a label is none of the classes.
        """
        if labels.min() < 0 or labels.max() >= len(self.sums):
            raise RecastTargetError(
                f"labels must be numbers of the task's classes\n  labels:  {int(labels.min())} to {int(labels.max())}\n"
                f"  classes: 0 to {len(self.sums) - 1}"
            )
        labels, features = labels.cpu(), features.detach().to("cpu", torch.float64)
        self.sums.index_add_(0, labels, features)
        self.counts.add_(torch.bincount(labels, minlength=len(self.sums)))
        if self.products is not None:
            self.products.addmm_(features.T, features)


def class_statistics(
    model: nn.Module, head: nn.Module, classes: int, features: int, batches: Iterable[Any], products: bool = False
) -> ClassStatistics:
    """Run a model in evaluation mode and collect what reaches its head.

    Args:
        model: as it stands.
        head: the module whose input, ``(examples, features)``, counts.
        classes: of the task.
        features: that reach the head.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (given to the model by name).
        products: whether outer products are kept too.

    Raises:
        RecastTargetError: if a label is none of the classes, a class has no example, or the head sees more than one vector an
            example.
    """
    found = ClassStatistics(
        torch.zeros(classes, dtype=torch.float64),
        torch.zeros(classes, features, dtype=torch.float64),
        torch.zeros(features, features, dtype=torch.float64) if products else None,
    )
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                labels = _run(model, batch)
                given = seen.pop()
                if given.shape != (len(labels), features):
                    raise RecastTargetError(
                        f"the classifier must see one vector for each label\n  its input: {tuple(given.shape)}\n"
                        f"  labels:    {tuple(labels.shape)}"
                    )
                found.add(given, labels)
    finally:
        handle.remove()
    empty = (found.counts == 0).nonzero().flatten().tolist()
    if empty:
        raise RecastTargetError(f"no example of class {empty[:5]} was given; every class needs at least one")
    return found


def _run(model: nn.Module, batch: Any) -> Tensor:
    device = device_of(model)

    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, dict):
        model(**{key: here(value) for key, value in batch.items() if key != "labels"})
        return batch["labels"]
    inputs, labels = batch
    model(here(inputs))
    return labels


def _top_level(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children())
