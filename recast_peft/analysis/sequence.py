"""Tasks learned one after the other, the accuracy matrix, and a bank that grows with them.

RECAST's tasks own their numbers, so that backward transfer and forgetting are zero by construction; ``learn_in_sequence``
checks it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..auto import with_task
from ..banks.files import StoredBank
from ..config import RecastConfig, checked_config
from ..errors import RecastConfigError, RecastSequenceError
from ..growth.biases import grow_bias_bank
from ..growth.sources import Source, check_bank
from ..growth.weights import extend_bank, grow_bank
from ..holders import plain_modules, unwrapped_module
from ..hub.transfer import task_names
from ..layer import RecastLayer
from ..mimicry.features import evaluating, modes_kept
from ..names import check_adapter_name, modules_of
from ..options.partner import partners_of
from ..parts import BiasConfig
from ..placement.sharded import is_plain
from ..planning.plan import SAID_BY_BANK
from ..validation import COUNT, check_arguments, check_is_module, flag, function, listed, of_type, optional, shown
from .matrix import AccuracyMatrix

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


@dataclass
class Growth:
    """How the bank of a sequence grows: from what the tasks learned so far do to the pretrained weights.

    A task that is learned with coefficients alone moves the weights within the span of the bank, so there is nothing in it to
    grow from. So a source is a task with a LoRA part (``RecastConfig(lora_config=...)``), or ``source`` learns the task a
    second time by freer means.

    An object is for one sequence, also for one that goes on in a later call: sources since the bank grew last are for its next
    growth. For another sequence, or for the same one from its start again after an error, make a new one.

    Attributes:
        source: is called with a plain copy of the backbone and the task, and returns what moved the weights (an adapter such
            as a LoRA, a fine-tuned copy: a source of ``grow_bank``), or None if the task is to add nothing. Without it the
            tasks of the sequence that have a LoRA part are the sources, coefficients and LoRA together.
        of: ``"weights"``, or ``"biases"`` for a bank of biases (``grow_bias_bank``): tasks are then learned with coefficients
            for its templates beside those that their configs ask for. Then ``source`` is needed, since what trains biases whole
            is no task of the sequence.
        config: targets and groups of a bank of weights, as for ``grow_bank``.
        num_templates: templates of a group that are added each time, at most; None adds all principal components.
        rank: stores each template of weights as a low-rank pair.
        plain_templates: keep the pretrained weights as templates beside the grown ones.
        bank: where to start, and afterwards the bank as it stands; None before anything was grown.
    """

    source: Callable[[nn.Module, Any], Source | None] | None = None
    config: RecastConfig | None = None
    num_templates: int | None = None
    rank: int | None = None
    plain_templates: bool = True
    bank: StoredBank | None = None
    of: str = "weights"
    _sources: list[Source] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.of not in ("weights", "biases"):
            raise RecastConfigError(f"Growth(of={self.of!r}): expected 'weights' or 'biases'")
        checked_config(self.config)
        check_arguments(optional(COUNT), num_templates=self.num_templates, rank=self.rank)
        check_arguments(flag, plain_templates=self.plain_templates)
        check_arguments(optional(function), source=self.source)
        if self.bank is not None:
            check_bank(self.bank)
            kind = "biases" if self.bank.is_of_biases else "weights"
            if kind != self.of:
                raise RecastConfigError(f"Growth(of={self.of!r}) starts from a bank that is of {kind}")
        if self.of == "biases" and (self.source is None or self.config is not None or self.rank is not None):
            raise RecastConfigError(
                "Growth(of='biases') needs source=, a function that learns a task by training biases, and takes neither config="
                " nor rank=, which are of weights"
            )

    def learn(self, plain: nn.Module, task: Any, model: PeftModel, name: str) -> None:
        """Get the source of a task that the model has learned under a name."""
        if self.source is not None:
            found = self.source(copy.deepcopy(plain), task)
        else:
            found = (model, name) if getattr(model.peft_config[name], "lora_config", None) is not None else None
        if found is not None:
            self._sources.append(found)

    def grow(self, plain: nn.Module) -> None:
        """Grow the bank from the sources since it grew last, or extend it by them; without any it stays."""
        sources, count = self._sources, self.num_templates
        if not sources:
            return
        if self.bank is not None:
            self.bank = extend_bank(self.bank, plain, sources, num_templates=count)
        elif self.of == "biases":
            self.bank = grow_bias_bank(plain, sources, num_templates=count)
        else:
            self.bank = grow_bank(
                plain, sources, self.config, num_templates=count, rank=self.rank, plain_templates=self.plain_templates
            )
        self._sources = []  # after an error they are for the next call


def learn_in_sequence(
    model: nn.Module,
    tasks: Mapping[str, Any],
    train: Callable[[PeftModel, Any], Any],
    evaluate: Callable[[nn.Module, Any], float],
    *,
    config: RecastConfig | Mapping[str, RecastConfig] | None = None,
    evaluate_unseen: bool = False,
    grow: Growth | None = None,
    grow_every: int = 1,
    progress: bool = True,
) -> tuple[PeftModel, AccuracyMatrix]:
    """Learn tasks one after the other, and measure after each of them.

    Each task becomes an adapter of its own. Nothing of the earlier ones may change; that is checked. What is raised while tasks
    are learned has the model, with the tasks that were put in so far, as its attribute ``model``; of a backbone that was given,
    ``error.model.unload()`` is the plain model again.

    Args:
        model: a backbone, which is converted, or a model that has tasks already.
        tasks: what ``train`` and ``evaluate`` are given, by the task's name, in the order of learning.
        train: is called with the model in training mode, whose new task is active and alone trainable, and with the task; any
            training loop.
        evaluate: is called with the model and the task, and returns an accuracy. The task's adapter is active, the model in
            evaluation mode, gradients are off.
        config: config of every task, or by name; None is ``RecastConfig()``.
        evaluate_unseen: also evaluate tasks before they are learned, for forward transfer: with the adapter learned last, and
            before the first one with the backbone as it is. It makes sense where tasks share a head.
        grow: grows a bank from the tasks; each task is learned on the bank as it stands then, and stays on that version. The
            tasks before the bank has grown are learned on the banks of their configs.
        grow_every: after how many tasks the bank grows.
        progress: show a progress bar.

    Returns:
        the model with all tasks, the last of them active and every module in the mode that it was given in, and the accuracy
        matrix.

    Raises:
        RecastSequenceError: if a task's name is taken, an accuracy is not a finite number, or training changed the pretrained
            model or an earlier task, or deleted one.
        RecastConfigError: if ``grow_every`` is below 1, or a config names a bank of its own beside ``grow``.
        RecastError: if a task cannot be made.
    """
    check_is_module(model)
    check_arguments(function, train=train, evaluate=evaluate)
    check_arguments(optional(of_type(Growth)), grow=grow)
    if not isinstance(tasks, Mapping):
        raise RecastSequenceError(f"tasks={shown(tasks)}: expected a dictionary of what train and evaluate are given, by name")
    matrix = AccuracyMatrix(list(tasks))
    _check_names(model, tasks, config)
    configs = {name: checked_config(config[name] if isinstance(config, Mapping) else config) for name in tasks}
    plain = None if grow is None else _checked_plain(model, configs, grow, grow_every)
    if evaluate_unseen:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            for name, task in tasks.items():
                matrix.record(None, name, _measure(model, evaluate, task))
    known = {name: _numbers(model, name) for name in task_names(model)} if isinstance(model, PeftModel) else {}
    bar = tqdm(tasks.items(), desc="tasks", disable=not progress)
    mode = model.training
    try:
        with modes_kept(model):
            for place, (name, task) in enumerate(bar, start=1):
                bar.set_postfix_str(name)
                model = _add_task(model, name, configs[name], None if grow is None else grow.bank)
                model.train()
                with _nothing_else_changes(model, name, known):
                    train(model, task)
                known[name] = _numbers(model, name)
                for other in tasks if evaluate_unseen else [other for other in tasks if other in known]:
                    model.set_adapter(other if other in known else name)
                    matrix.record(name, other, _measure(model, evaluate, tasks[other]))
                model.set_adapter(name)
                if grow is not None and plain is not None:
                    grow.learn(plain, task, model, name)
                    if place % grow_every == 0:
                        grow.grow(plain)
    except (Exception, KeyboardInterrupt) as error:  # whoever interrupts wants what was learned so far
        error.model = model  # type: ignore[attr-defined, union-attr]
        raise
    assert isinstance(model, PeftModel)
    model.training = model.base_model.training = mode
    return model, matrix


def _checked_plain(model: nn.Module, configs: Mapping[str, RecastConfig], grow: Growth, grow_every: int) -> nn.Module:
    """A plain copy of the backbone, to grow a bank for."""
    check_arguments(COUNT, grow_every=grow_every)
    if grow.source is None and not any(own.lora_config is not None for own in configs.values()):
        raise RecastConfigError(
            "there is nothing that a bank could grow from: none of the tasks has a LoRA part. Give Growth(source=...), or some "
            "of the tasks RecastConfig(lora_config=...)"
        )
    for name, own in configs.items():
        named = own.partner_bank("bias") if grow.of == "biases" else own.bank
        if named is not None:
            raise RecastConfigError(
                f"the config of task {name!r} names the bank {named}, and grow= is given too: start from it with "
                "Growth(bank=...), or leave grow out"
            )
    plain = copy.deepcopy(model)
    converted = isinstance(plain, PeftModel) and bool(modules_of(plain, RecastLayer))
    return plain.unload() if converted else plain  # type: ignore[operator]


def _check_names(model: nn.Module, tasks: Mapping[str, Any], config: Any) -> None:
    for name in tasks:
        check_adapter_name(name)
    taken = [name for name in tasks if isinstance(model, PeftModel) and name in model.peft_config]
    if taken:
        raise RecastSequenceError(f"the model has a task {taken[0]!r} already: choose other names, or delete_adapter first")
    without = [name for name in tasks if isinstance(config, Mapping) and name not in config]
    if without:
        raise RecastSequenceError(f"config names no configuration for task {without[0]!r}")


def _add_task(model: nn.Module, name: str, config: RecastConfig, bank: StoredBank | None) -> PeftModel:
    own = copy.deepcopy(config)
    if bank is not None and bank.is_of_biases:
        own.partners = [*(partner for partner in partners_of(own) if partner.method != "bias"), BiasConfig(bank=bank)]
    elif bank is not None:
        own = own.as_chosen(bank=bank, **dict.fromkeys(SAID_BY_BANK))
    return with_task(model, own, name)


def _measure(model: nn.Module, evaluate: Callable[[nn.Module, Any], float], task: Any) -> float:
    with evaluating(model), torch.no_grad():
        return evaluate(model, task)


def _numbers(model: PeftModel, name: str) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Task .* not stored yet")  # nothing is saved here
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def _base_weights(model: PeftModel) -> dict[str, tuple[torch.dtype, int]]:
    """The parameters of the pretrained model that no task may train: of each its dtype, and a sum over its bits.

    No count of writes: torch counts none that goes by way of ``.data``, and a parameter may be exchanged for another one.
    """
    modules = {name: unwrapped_module(module) for name, module in plain_modules(model.get_base_model()).items()}
    found = {f"{name}.{key}": p for name, module in modules.items() for key, p in module._parameters.items()}
    own = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())  # biases of a task
    kept = {name: p for name, p in found.items() if p is not None and is_plain(p) and not (own and name.endswith(".bias"))}
    return {name: (p.dtype, _sum_of_bits(p.detach())) for name, p in kept.items() if not (p.is_meta or p.is_complex())}


def _sum_of_bits(weight: Tensor) -> int:
    """A whole number that is another one for almost any other numbers, on every device the same; no copy is made of them."""
    bits = weight.view(_BITS[weight.element_size()])
    rows = bits.reshape(-1) if bits.ndim < 2 else bits.flatten(1).sum(dim=1, dtype=torch.int64)
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())  # and for other places of them


@contextmanager
def _nothing_else_changes(model: PeftModel, new: str, known: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """A block that trains a new task; it may change neither the pretrained model nor tasks whose numbers are known.

    Raises:
        RecastSequenceError: if it did, or deleted a task.
    """
    base = _base_weights(model)
    yield
    now = _base_weights(model)
    # in another dtype they are other numbers, and nothing says whether somebody wrote into them too
    changed = [name for name, (dtype, bits) in base.items() if name in now and now[name][0] is dtype and now[name][1] != bits]
    if changed:
        raise RecastSequenceError(
            f"training changed the pretrained model, which all tasks share: {listed(changed)}\nLeave it frozen, or give the "
            "tasks copies (modules_to_save, train_norms)."
        )
    lost = [name for name in (*known, new) if name not in model.peft_config]
    if lost:
        raise RecastSequenceError(f"training deleted the task {lost[0]!r}: delete tasks when all are learned")
    for name, before in known.items():
        after = _numbers(model, name)
        changed = [k for k, value in before.items() if k not in after or not torch.equal(after[k].to(value.device), value)]
        if changed:
            raise RecastSequenceError(
                f"training changed the earlier task {name!r}: {listed(changed)}\n"
                "Give the optimiser only the parameters that require gradients, and do not activate other tasks while training."
            )
