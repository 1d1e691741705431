"""An optimiser with learning rates of their own for the parts of a task, and rates that fit a model.

An optimiser like Adam moves every coefficient by the learning rate in its first steps. What that does to the features depends
on the model (measured on pretrained ones, one step of random signs at a rate of 0.01):

    EfficientNet-Lite0, 48 numbers    10 %    a rate of 0.01 trained well, 0.05 broke 5 of 11 runs
    MiniLM-L6, 24 numbers              3 %    0.05 trained well
    MiniLM-L6 (q, k, v), 36 numbers    1 %    0.05 to 0.15 trained well

So rates that train well move the features by an eighth or so. ``find_coefficient_lr`` measures that on a batch. Without one,
``default_coefficient_lr`` estimates it from what the coefficients move: the changes of N independent numbers add up like
sqrt(N), and a number that several layers share counts as often as they are.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .banks.template_bank import TemplateBank
from .composition.kinds import CONVOLUTION, family_of
from .errors import RecastConfigError
from .holders import trained_kinds
from .layer import RecastLayer
from .mimicry.features import call_arguments, captured_outputs, device_of, evaluating
from .model import RecastModel
from .names import block_of, modules_of, unwrapped
from .planning.heads import modules_by
from .tasks.state import keep_trained, task_entries, trained_outside_tasks
from .validation import check_arguments, check_is_module, number_above, optional, shown

COEFFICIENT_LR = 0.05  # at most, in units of a template as large as the pretrained weight
FEATURE_CHANGE = 0.13  # of the features in one step, in units of their norm
# By how much a layer's weight moves the features, in units of its own relative change. A convolution's output goes through
# norms with fixed statistics; a linear layer stands in a branch beside others whose sum is normalised.
SENSITIVITY, SENSITIVITY_OF_CONVOLUTIONS = 0.5, 1.5
# A number of a core between r main directions. Linear layers: by a factor r^0.4 less for each of r * r numbers, since further
# directions carry less (measured on MiniLM-L6 and a ViT-S, where the rates that moved the features alike fell with r^0.6, and
# on the first rates that trained best). Convolutions of EfficientNet-Lite0 trained best where rates fell with r.
SENSITIVITY_OF_CORES, SENSITIVITY_OF_CORES_OF_CONVOLUTIONS = 0.32, 0.2
COEFFICIENT_LR_OF_CORES = 0.2  # at most
_PROBES, _PROBE_RATE = 3, 0.01


def default_coefficient_lr(model: nn.Module) -> float:
    """A learning rate for the coefficients that a model trains, from their number and from what they move.

    Args:
        model: model with an active RECAST task.

    Returns:
        ``COEFFICIENT_LR``, or less for a task whose coefficients would move the features by more than ``FEATURE_CHANGE``.
    """
    trained = list(_trained(model))
    moved: dict[nn.Parameter, float] = {}  # how much a number of it moves, in all layers that share it
    for layer, bank, parameter in trained:
        moved[parameter] = moved.get(parameter, 0.0) + _sensitivity(layer, bank)
    total = math.sqrt(sum(parameter.shape[-1] * change**2 for parameter, change in moved.items()))
    if total == 0:
        return COEFFICIENT_LR
    are_cores = all(bank.is_factored for _, bank, _ in trained)
    return min(COEFFICIENT_LR_OF_CORES if are_cores else COEFFICIENT_LR, FEATURE_CHANGE / total)


def _sensitivity(layer: RecastLayer, bank: TemplateBank) -> float:
    is_convolution = family_of(layer.get_base_layer()) is CONVOLUTION
    if not bank.is_factored:
        return SENSITIVITY_OF_CONVOLUTIONS if is_convolution else SENSITIVITY
    if is_convolution:
        return SENSITIVITY_OF_CORES_OF_CONVOLUTIONS
    return SENSITIVITY_OF_CORES * bank.num_templates**-0.2


def find_coefficient_lr(model: nn.Module, batch: Any, change: float = FEATURE_CHANGE) -> float:
    """Measure the learning rate at which one step moves the features of a batch by a certain share of their norm.

    Args:
        model: model with an active RECAST task that is not merged; it is left as it is.
        batch: a tensor, a mapping of keyword arguments, or a tuple ``(inputs, labels, ...)`` as a ``DataLoader`` yields it.
        change: the share.

    Returns:
        the rate, for ``create_recast_optimizer(coefficient_lr=...)``.

    Raises:
        RecastConfigError: if the model trains no coefficients, a task is merged, or they do not move its features.
    """
    check_is_module(model)
    check_arguments(number_above(0), change=change)
    layers = modules_of(model, RecastLayer)
    if any(layer.merged for layer in layers):
        raise RecastConfigError("a task is merged, so its coefficients move nothing: call unmerge_adapter() first")
    parameters = list(dict.fromkeys(parameter for _, _, parameter in _trained(model)))
    if not parameters:
        raise RecastConfigError(f"{type(model).__name__} trains no RECAST coefficients: there is no rate to find")
    names = {id(module): name for name, module in model.named_modules()}
    blocks = dict.fromkeys(block_of(names[id(layer)]) for layer in layers)
    args, kwargs = call_arguments(batch, device_of(model))
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        model(*args, **kwargs)
        if not outputs:
            raise RecastConfigError(f"{type(model).__name__} calls none of its RECAST layers on this batch: give another one")
        return next(iter(outputs.values())).double()  # the head behind the last block may be zero

    changes = []
    with (
        evaluating(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),  # a compiled graph would call no hook
        captured_outputs(model, blocks, last=True) as outputs,
        _put_back(parameters) as before,
    ):
        wanted = features()
        for _ in range(_PROBES):
            for parameter, value in zip(parameters, before, strict=True):
                signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                parameter.copy_(value + _PROBE_RATE * signs.to(value))
            changes.append(float((features() - wanted).norm() / wanted.norm()))
    mean = sum(changes) / len(changes)
    if not mean > 0 or not math.isfinite(mean):
        raise RecastConfigError(f"the coefficients move the features of this batch by {mean}: no rate can be found by it")
    return change * _PROBE_RATE / mean


@contextmanager
def _put_back(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """What parameters hold, which is in them again when the block ends."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _trained(model: nn.Module) -> Iterator[tuple[RecastLayer, TemplateBank, nn.Parameter]]:
    """The layers of a model with the coefficients that are trained there; what layers share comes with each of them."""
    for layer in modules_of(model, RecastLayer):
        for name, parameter in layer.recast_coefficients.items():
            if parameter.requires_grad:
                yield layer, layer.recast_bank[name], parameter


def create_recast_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    coefficient_lr: float | None = None,
    lora_lr: float | None = None,
    partner_lr: float | None = None,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser for the trainable parameters of a model, in the manner of PEFT's ``create_loraplus_optimizer``.

    Coefficients have a learning rate of their own, which depends on the model's depth, and no weight decay: zero is the
    pretrained weight, and tens of numbers need no pull towards it. A task's partners may have one of their own too; they are
    not decayed either, since a decayed mask would be one that loses its entries.

    Args:
        model: model with a RECAST task that is trained.
        optimizer_cls: optimiser class, of torch or made like one.
        lr: learning rate of everything else that is trained: classifier, norms, biases.
        coefficient_lr: learning rate of the coefficients, those of biases (``BiasConfig``) among them. None is
            ``default_coefficient_lr(model)``; ``find_coefficient_lr`` measures it on a batch.
        lora_lr: learning rate of the LoRA part; None is ``lr``.
        partner_lr: learning rate of the task's partners; None is ``lr``, and for coefficients of biases ``coefficient_lr``.
        kwargs: further arguments of the optimiser (``weight_decay``, ``betas``, ...).

    Returns:
        the optimiser, with a parameter group for each kind of part that is trained.

    Raises:
        RecastConfigError: if the model trains nothing that a RECAST task has, or a rate is no number from 0.

    Warns:
        UserWarning: if nothing gives class scores, or parameters of the pretrained model are trainable; and at a step, if a
            task that was activated since is trained by none, or a merged one has no gradient.
    """
    check_is_module(model)
    check_arguments(_rate, lr=lr)
    check_arguments(optional(_rate), coefficient_lr=coefficient_lr, lora_lr=lora_lr, partner_lr=partner_lr)
    if not callable(optimizer_cls):
        raise RecastConfigError(f"optimizer_cls={shown(optimizer_cls)}: expected a class, such as torch.optim.AdamW")
    for tuner in modules_of(model, RecastModel):
        keep_trained(tuner.model)
    kinds = trained_kinds(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(id(parameter) in kinds for parameter in trained) and not _owned(model, trained):
        raise RecastConfigError(
            f"{type(model).__name__} trains no RECAST coefficients and nothing else of a task ({len(trained)} trainable "
            "parameters): convert it with get_recast_model, and activate a task that is not in inference mode"
        )
    parts: dict[str, list[nn.Parameter]] = {"coefficients": [], "biases": [], "lora": [], "partners": [], "others": []}
    for parameter in trained:
        parts.get(kinds.get(id(parameter), "others"), parts["others"]).append(parameter)
    if coefficient_lr is None and (parts["coefficients"] or parts["biases"]):
        coefficient_lr = default_coefficient_lr(model)
    if not parts["others"]:
        _warn_of_features(model)
    _warn_of_pretrained(model)
    options: dict[str, dict[str, Any]] = {
        "coefficients": {"lr": coefficient_lr, "weight_decay": 0.0},
        "biases": {"lr": coefficient_lr if partner_lr is None else partner_lr, "weight_decay": 0.0},
        "lora": {"lr": lr if lora_lr is None else lora_lr},
        "partners": {"lr": lr if partner_lr is None else partner_lr, "weight_decay": 0.0},
        "others": {"lr": lr},
    }
    groups = [{"params": parameters, **options[name]} for name, parameters in parts.items() if parameters]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    if isinstance(optimizer, Optimizer):
        optimizer.register_step_pre_hook(_StepCheck(model))
    return optimizer


def _rate(value: Any) -> None:
    """A number from 0, also numpy's; a tensor of one is what schedules change without compiling a step again."""
    is_one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, np.number)
    number_above(0, itself=True)(value.item() if is_one else value)


def _owned(model: nn.Module, trained: Sequence[nn.Parameter]) -> bool:
    """Whether an active task owns anything that is trained: norms, whole modules and biases have no group of their own."""
    own: set[int] = set()
    for tuner in modules_of(model, RecastModel):
        for name in tuner.active_adapters:
            own.update(entry.identity for entry in task_entries(tuner.model, name, tuner.peft_config[name]).values())
    return any(id(parameter) in own for parameter in trained)


def _warn_of_pretrained(model: nn.Module) -> None:
    """Say so where the pretrained model's own parameters would be trained, which no task has."""
    tuners = modules_of(model, RecastModel)  # what is around them may be trained
    names = [name for tuner in tuners for name in trained_outside_tasks(tuner.model)]
    if names:
        warnings.warn(
            f"{len(names)} parameters of the pretrained model are trainable, such as {names[0]}: they would change for all "
            "tasks, and are saved with none. Freeze them (requires_grad_(False)), or give the task copies (modules_to_save, "
            "train_norms, bias).",
            stacklevel=3,
        )


def _warn_of_features(model: nn.Module) -> None:
    """Say so where a backbone without a classifier is trained, and the task brings none."""
    backbone = unwrapped(model.get_base_model() if isinstance(model, PeftModel) else model)
    heads = modules_by(backbone, "get_classifier")
    if heads and all(isinstance(head, nn.Identity) for head in heads):
        warnings.warn(
            f"{type(backbone).__name__} has no classifier and the task brings none: what the model gives are features. Give "
            "the task one with RecastConfig(num_classes=...), unless a module of your own takes the features.",
            stacklevel=3,
        )


class _StepCheck:
    """Before each step: what is trained now is what the optimiser holds, and has a gradient. It speaks once."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = weakref.ref(model), [weakref.ref(layer) for layer in modules_of(model, RecastLayer)]
        self.seen: Any = None  # which tasks were active or merged at the last look
        self.has_spoken = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        model, layers = self.model(), [layer for ref in self.layers if (layer := ref()) is not None]
        if model is None or self.has_spoken:
            return
        now = [(list(layer.active_adapters), layer.merged) for layer in layers]
        if now == self.seen:
            return
        self.seen = now
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        strangers = [p for _, _, p in _trained(model) if id(p) not in held]
        merged = [layer for layer in modules_of(model, RecastLayer) if layer.merged]
        if strangers:
            message = (
                f"{len(set(strangers))} trainable parameters of coefficients are not in this optimiser: a task was "
                "activated after it was made. Make the optimiser after set_adapter."
            )
        elif merged:
            message = (
                f"a task is merged into {len(merged)} layers, so its coefficients get no gradient: unmerge_adapter() first"
            )
        else:
            return
        self.has_spoken = True
        warnings.warn(message, stacklevel=4)
