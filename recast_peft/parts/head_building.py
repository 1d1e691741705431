"""Finding a model's classifier, and building one of a task's own size in its place; the model is not touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..config import RecastConfig
from ..errors import RecastTargetError
from ..holders import plain_modules, plain_place, put_child, unwrapped_module
from ..names import lies_in, unwrapped
from ..placement.offloaded import computing_device, like_weights
from ..planning.heads import head_names, modules_by, named_head, top_level
from .base import Piece
from .copies import plain_copy

TRANSFORMERS_HEADS = ("classifier", "score", "classification_head", "head", "fc")
# by the ending of a model's class, or by the head's name: what the head gives, which is no matter of the task
FIXED_OUTPUTS = {
    "ForMultipleChoice": (1, "every choice is scored by itself, and their number comes with the input"),
    "ForNextSentencePrediction": (2, "the model says whether a sentence follows or not"),
    "qa_outputs": (2, "the model marks where an answer begins and ends"),
}
HEAD_STD = 0.001  # of a fresh head's weights: larger ones drive the coefficients into random directions at first


def head_type(head: nn.Module) -> str:
    """What ``RecastConfig.head_type`` calls a classifier: ``"linear"`` or ``"prototypes"``."""
    return "prototypes" if isinstance(head, PrototypeHead) else "linear"


class PrototypeHead(nn.Module):
    """Nearest class mean: logits are negative squared distances to one prototype a class; nothing is trained.

    Shapes:
        input ``(..., features)``, output ``(..., classes)``; prototypes ``(classes, features)``.
    """

    prototypes: Tensor

    def __init__(self, num_features: int, num_classes: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        # no frozen parameter: whoever saves what was trained leaves those out
        self.register_buffer("prototypes", torch.zeros(num_classes, num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        prototypes = self.prototypes.to(x.dtype)
        return 2 * x @ prototypes.T - prototypes.square().sum(-1) - x.square().sum(-1, keepdim=True)

    def as_linear(self) -> nn.Linear:
        """The linear layer with the same differences between logits, and so the same probabilities."""
        classes, features = self.prototypes.shape
        linear = skip_init(nn.Linear, features, classes, device=self.prototypes.device, dtype=self.prototypes.dtype)
        with torch.no_grad():
            linear.weight.copy_(2 * self.prototypes)
            linear.bias.copy_(-self.prototypes.square().sum(-1))
        return linear


@dataclass(frozen=True)
class Labels:
    """What a model says of its classes: their number, their names if there are any, and the kind of loss (transformers')."""

    num_classes: int | None
    id2label: dict[int, str] | None = None
    problem_type: str | None = None


@dataclass
class PreparedHead(Piece):
    """A task's head, ready to be put in."""

    place: str  # the module of the plain model whose place it takes
    module: nn.Module
    labels: Labels
    stored_dtype: torch.dtype | None  # in which the head is saved; None is the dtype it is trained in

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)


def find_head(model: nn.Module, name: str | None = None) -> str:
    """The name of the module that turns features into class scores.

    Args:
        model: a timm model (``get_classifier``), a transformers model (``classifier``, ``score``, ...) or another one whose
            last head-like module is taken.
        name: given, it only has to exist.

    Raises:
        RecastTargetError: if there is none, or several.
    """
    modules = {key: unwrapped_module(module) for key, module in plain_modules(model).items()}
    named = named_head(model, name)
    if named is not None:
        return named
    heads = head_names(model)
    linear = {key: module for key, module in modules.items() if lies_in(key, heads) and isinstance(module, nn.Linear)}
    known = _known_heads(model, modules)
    found = known or [key for key in linear if key in heads]
    alike = _alike(linear, found[0]) if len(found) == 1 else []
    if len(found) == 1 and len(alike) < 2:
        return found[0]
    if alike or known or len({_sizes(linear[key]) for key in found}) == 1:
        several = alike or found
        raise RecastTargetError(
            f"the model has {len(several)} classifiers ({', '.join(several)}): where it mixes their scores, build it with the "
            f"task's number of classes, and give modules_to_save={several} instead of num_classes; else name the one that the "
            "task replaces with head_module="
        )
    last = [key for key, module in modules.items() if isinstance(module, nn.Linear)][-3:]
    raise RecastTargetError(
        f"the model's classifier is not known ({len(found)} modules look like one: {found}): "
        f"name it with head_module=; last linear layers: {', '.join(last) or 'none'}; top level: {top_level(model)}"
    )


def _known_heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """The classifiers that timm's and transformers' conventions tell."""
    # transformers has timm's models inside a model of its own
    told = modules_by(unwrapped(model), "get_classifier") or modules_by(modules.get("timm_model"), "get_classifier")
    parts = [part for module in told for part in (module if isinstance(module, nn.ModuleList) else [module])]
    if places := [place for part in parts if (place := plain_place(model, part)) is not None]:
        return places
    return [key for key in TRANSFORMERS_HEADS if isinstance(modules.get(key), nn.Module)][:1]


def _alike(linear: dict[str, nn.Linear], head: str) -> list[str]:
    """The last layer of a head and others of its size, but for those beside it in one module: a pooling, or an MLP."""
    last = next((key for key in reversed(linear) if lies_in(key, [head])), None)
    if last is None:
        return []
    beside = last.rpartition(".")[0] if last != head else None
    same = [key for key, module in linear.items() if _sizes(module) == _sizes(linear[last])]
    return [key for key in same if key == last or key.rpartition(".")[0] != beside]


def _sizes(linear: nn.Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The model that says how many classes its head ``name`` has: the outermost, or one inside a wrapper or a user's module."""
    modules = plain_modules(model)
    around = [model, *(modules[name[:i]] for i, letter in enumerate(name) if letter == ".")]
    inner = [unwrapped_module(module) for module in around]
    told = [m for m in inner if label_config(m) is not None]
    told += [m for m in inner if isinstance(getattr(m, "num_classes", None), int)]
    return next(iter(told), inner[0])


def check_outputs(model: nn.Module, name: str, num_classes: int) -> None:
    """Refuse a number of classes (``RecastTargetError``) where outputs are no classes, and the model's class says how many."""
    kind = type(unwrapped(model)).__name__
    added = getattr(unwrapped(model), "final_logits_bias", None)  # BART and its kin
    if isinstance(added, Tensor) and added.shape[-1] != num_classes:
        raise RecastTargetError(
            f"num_classes={num_classes}: {kind} adds final_logits_bias to {name}, which has {added.shape[-1]} outputs, its "
            "words\nTo classify, take the model's class for that, such as ...ForSequenceClassification."
        )
    for ending, (outputs, meaning) in FIXED_OUTPUTS.items():
        if (kind.endswith(ending) or name == ending) and num_classes != outputs:
            raise RecastTargetError(
                f"num_classes={num_classes}: {meaning}, so that {name} of {kind} has {outputs} "
                f"output{'s' if outputs > 1 else ''}\nTo train it, leave num_classes and id2label out and give "
                f"modules_to_save=[{name!r}]."
            )


def prepare_head(model: nn.Module, config: RecastConfig, counting: bool = False) -> PreparedHead | None:
    """Build the head that a config asks for, if any; the model is not touched. If it is only counted, it holds no numbers.

    Raises:
        RecastTargetError: if the model's classifier cannot be found or replaced.
    """
    if config.num_classes is None:
        return None
    name = find_head(model, config.head_module)
    owner = owner_of(model, name)
    check_outputs(owner, name, config.num_classes)
    original = plain_copy(plain_modules(model)[name], with_numbers=not counting)
    device = torch.device("meta") if counting else None
    with device or nullcontext():
        module = build_head(owner, original, name, config, device)
    module.train(original.training)
    stored = None if config.head_dtype is None else getattr(torch, config.head_dtype)
    return PreparedHead(name, module, Labels(config.num_classes, config.id2label, config.problem_type), stored)


def build_head(
    model: nn.Module, original: nn.Module, name: str, config: RecastConfig, device: torch.device | None
) -> nn.Module:
    """A head for ``config.num_classes`` classes in place of ``original``.

    A linear layer or a 1x1 convolution is replaced; of a larger head the last such layer in it; an identity (a backbone
    without classifier) by a linear layer on the backbone's features.
    """
    assert config.num_classes is not None
    near, dtype = like_weights(model)
    if isinstance(original, nn.Identity):
        features = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
        if not isinstance(features, int):
            raise RecastTargetError(f"head {name!r} is an identity and the model does not say its num_features")
        return _fresh(nn.Linear(features, config.num_classes, device=device or near, dtype=dtype), config)
    layers = _layers(original)
    if not layers:
        raise RecastTargetError(
            f"head {name!r} is a {type(original).__name__} without a linear layer or convolution to replace; "
            "name another module with head_module="
        )
    last_name, last = layers[-1]
    new = _resized(last, name, config, device or computing_device(last, last.weight))
    if last is original:
        return new
    if config.head_type == "prototypes":
        raise RecastTargetError(
            f"head {name!r} is a {type(original).__name__}; prototypes need a single linear layer there: "
            f"head_module={f'{name}.{last_name}'!r}"
        )
    parent, _, child = last_name.rpartition(".")
    put_child(original.get_submodule(parent), child, new)
    return original


def _layers(head: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers of a head by name, the one that gives the scores last."""
    return [(key, module) for key, module in head.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def classes_of(head: nn.Module) -> int | None:
    """How many scores a head gives, as its last layer says; None if it has none."""
    return next((len(layer.weight) for _, layer in reversed(_layers(head))), None)


def _resized(layer: nn.Linear | nn.Conv2d, name: str, config: RecastConfig, device: torch.device) -> nn.Module:
    assert config.num_classes is not None
    like: Any = {"bias": layer.bias is not None, "device": device, "dtype": layer.weight.dtype}
    if config.head_init == "copy":
        if layer.weight.shape[0] != config.num_classes:
            raise RecastTargetError(
                f"head_init='copy': the head has other classes than the task\n  head {name}: {layer.weight.shape[0]}\n"
                f"  num_classes: {config.num_classes}\nUse head_init='fresh'."
            )
        return copy.deepcopy(layer)
    if isinstance(layer, nn.Conv2d):
        kept = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        like.update({key: getattr(layer, key) for key in kept})
        return _fresh(nn.Conv2d(layer.in_channels, config.num_classes, **like), config)
    return _fresh(nn.Linear(layer.in_features, config.num_classes, **like), config)


def _fresh(layer: nn.Linear | nn.Conv2d, config: RecastConfig) -> nn.Module:
    if config.head_type == "prototypes":
        return PrototypeHead(layer.weight.shape[1], len(layer.weight), layer.weight.device, layer.weight.dtype)
    if layer.weight.is_meta:
        return layer
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * HEAD_STD)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def label_config(model: nn.Module) -> Any:
    """The config in which a model of transformers names its classes; None for any other model."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "id2label") else None


def read_labels(model: nn.Module) -> Labels:
    """What a model says of its classes now."""
    config = label_config(model)
    if config is None:
        return Labels(getattr(model, "num_classes", None))
    return Labels(config.num_labels, dict(config.id2label or {}), getattr(config, "problem_type", None))


def class_names(labels: Labels) -> dict[int, str]:
    """The names of classes by number, those of transformers where a task has none of its own."""
    return dict(labels.id2label or {i: f"LABEL_{i}" for i in range(labels.num_classes or 0)})


def names_every_class(labels: Labels) -> bool:
    """Whether names that a user has set are such as a task may have: a text for each class."""
    names = labels.id2label or {}
    return set(names) == set(range(labels.num_classes or 0)) and all(isinstance(name, str) for name in names.values())


def guessed_problem_type(labels: Labels, targets: Tensor) -> str:
    """The kind of loss that transformers guesses from what a model is trained on, where its config says none."""
    if labels.num_classes == 1:
        return "regression"
    return "multi_label_classification" if targets.is_floating_point() else "single_label_classification"


def write_labels(model: nn.Module, labels: Labels) -> None:
    """Make a model say of its classes what ``labels`` says: transformers' config and ``num_labels``, timm's ``num_classes``."""
    if labels.num_classes is None:
        return
    if "num_classes" in vars(model):
        model.num_classes = labels.num_classes  # type: ignore[assignment]
    config = label_config(model)
    if config is None:
        return
    names = class_names(labels)
    config.id2label = names
    config.label2id = {name: i for i, name in names.items()}
    # transformers guesses the kind of loss at the first batch and keeps the guess in the config: each task has its own
    config.problem_type = labels.problem_type
    if "num_labels" in vars(model):
        model.num_labels = labels.num_classes  # type: ignore[assignment]


def write_timm_labels(model: nn.Module, labels: Labels) -> None:
    """Put class names where timm saves them from (``save_for_hf``); while a model has tasks its own stay there."""
    pretrained = getattr(model, "pretrained_cfg", None)
    if not isinstance(pretrained, dict) or labels.num_classes is None:
        return
    kept = {key: value for key, value in pretrained.items() if key not in ("label_names", "label_descriptions")}
    names = {} if labels.id2label is None else {"label_names": [labels.id2label[i] for i in range(labels.num_classes)]}
    model.pretrained_cfg = {**kept, "num_classes": labels.num_classes, **names}  # type: ignore[assignment]
