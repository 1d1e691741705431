"""learn_bank: templates learned together with the coefficients of several tasks.

The weight of module l in task t is ``W_l + sum_i d[t, l, i] * T_i``. ``grow_bank`` takes the T_i from what adapters did to the
weights; here T and d are trained together, by the tasks' own losses. Afterwards the templates are frozen like any others, and a
new task trains its coefficients alone. Pretrained weights are never trained, whether they are templates or not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from ..auto import get_recast_model
from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_bank import GrownBank
from ..banks.grown_templates import GrownTemplates, energy_kept
from ..composition.fingerprint import weight_fingerprint
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError
from ..layer import RecastLayer, recast_layers
from ..names import COEFFICIENTS, MODEL_PREFIX, check_adapter_name
from ..parts.head import find_head
from ..planning.groups import PlannedGroup
from ..pool.task_pool import TaskPool
from ..tasks.conversion import recast_banks
from ..tasks.plan import plan_recast
from .learning_run import LearningRates, LearningRun

LAYOUT = "layout"  # the adapter whose banks are trained; its own coefficients stay zero
RANDOM_SIZE = 0.1  # of a random template, in units of the pretrained weights' root mean square
HEAD_FIELDS = ("num_classes", "id2label", "head_module", "head_init", "head_dtype", "seed")

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LearnedBank:
    """What ``learn_bank`` found.

    Attributes:
        bank: the templates, to be given as ``RecastConfig(bank=...)``, saved and pushed.
        states: coefficients and head of every task, as a task file holds them.
        configs: of the tasks' heads.
        losses: the loss of every step.
    """

    bank: StoredBank
    states: Mapping[str, Mapping[str, Tensor]]
    configs: Mapping[str, RecastConfig]
    losses: tuple[float, ...]

    def apply_to(self, model: nn.Module, bank: StoredBank | None = None) -> PeftModel:
        """Put the tasks on a model, each as an adapter.

        Args:
            model: plain, with the pretrained weights that the bank was learned on, which is converted; or a model with tasks.
            bank: the learned bank under the name where it was stored, for tasks that will be saved; None is ``self.bank``.

        Returns:
            the model with the tasks, the last of them active.

        Raises:
            RecastBankError: if the bank is another one.
            RecastConfigError: if the model has a task of one of the names.
        """
        bank = bank or self.bank
        if bank.fingerprint != self.bank.fingerprint:
            raise RecastBankError(
                f"the tasks were learned with another bank\n  bank of the tasks: {self.bank.fingerprint}\n"
                f"  bank given:        {bank.fingerprint} ({bank.name or 'in memory'})"
            )
        taken = [name for name in self.states if isinstance(model, PeftModel) and name in model.peft_config]
        if taken:
            raise RecastConfigError(f"the model has a task {taken[0]!r} already: delete_adapter first")
        for name, state in self.states.items():
            config = copy.deepcopy(self.configs[name])
            config.bank = bank  # type: ignore[assignment]
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_recast_model(model, config, name)
            set_peft_model_state_dict(model, dict(state), adapter_name=name)
            model.set_adapter(name)
        assert isinstance(model, PeftModel)
        return model


def random_bank(
    model: nn.Module,
    config: RecastConfig | None = None,
    *,
    num_templates: int = 4,
    rank: int | None = None,
    plain_templates: bool = True,
    seed: int = 0,
) -> StoredBank:
    """Make a bank of random templates, for ``learn_bank`` to start from where there are no adapters to grow one from.

    Args:
        model: plain, with its pretrained weights; it is not changed.
        config: its targets and groups are used; None takes a group for each module.
        num_templates: random templates of each group.
        rank: stores each template as a low-rank pair; None stores them dense.
        plain_templates: keep the members' pretrained weights as templates beside the random ones.
        seed: of the random numbers.

    Raises:
        RecastConfigError: if a number is below 1, or the model is converted already.
    """
    _check_plain(model, "random_bank")
    for name, value in (("num_templates", num_templates), ("rank", rank)):
        if name == "rank" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecastConfigError(f"{name}={value!r}: expected a whole number of at least 1")
    plan = plan_recast(model, config or RecastConfig(group_size=1))
    targets = {target.name: target for target in plan.candidates}
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for planned in plan.groups:
        weights = [targets[member].weight.detach().float() for member in planned.members]
        size = RANDOM_SIZE * float(torch.stack([weight.square().mean() for weight in weights]).mean().sqrt())
        tensors = _random_tensors(planned, num_templates, rank, size, generator)
        groups[planned.name] = StoredGroup(
            planned.members, grown=GrownTemplates(tensors, tuple(planned.shape), plain_templates)
        )
    fingerprints = {name: weight_fingerprint(target.weight) for name, target in targets.items()}
    return StoredBank(groups, fingerprints, {"method": "random", "num_templates": num_templates, "rank": rank, "seed": seed})


def _random_tensors(
    planned: PlannedGroup, count: int, rank: int | None, size: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    rows, columns = planned.shape[0], torch.Size(planned.shape[1:]).numel()
    if rank is None:
        shapes: tuple[tuple[int, ...], ...] = ((count, *planned.shape),)
        scale = size
    else:
        rank = min(rank, rows, columns)
        shapes = ((count, rows, rank), (count, rank, columns))
        scale = (size / math.sqrt(rank)) ** 0.5  # an entry of the product is a sum of ``rank`` products
    return tuple((torch.randn(shape, generator=generator) * scale).to(planned.dtype) for shape in shapes)


def learn_bank(
    model: nn.Module,
    tasks: Sequence[str] | Mapping[str, int | RecastConfig | None],
    batches: Iterable[tuple[Any, Tensor, Any]],
    bank: StoredBank,
    *,
    steps: int | None = None,
    lr: float = LearningRates.head,
    coefficient_lr: float = LearningRates.coefficient,
    template_lr: float = LearningRates.template,
    loss: Loss | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> LearnedBank:
    """Train a bank's grown templates together with the coefficients (and classifiers) of several tasks.

    Args:
        model: plain, with its pretrained weights in float32 or float64; it is not changed.
        tasks: their names; as a mapping, with the number of classes of the task's own classifier, or a config that describes
            it (``num_classes``, ``id2label``, ``head_module``, ``head_init``, ``head_dtype``); None leaves it the model's.
        batches: of ``(inputs, labels, task)``, gone through again when they end: a list, a ``DataLoader``, or anything else
            that can be iterated over. ``inputs`` is a tensor, or a mapping of keyword arguments; ``task`` is a name, a name for
            each sample, or numbers ``(samples,)`` of tasks in the order of ``tasks``.
        bank: where to start: of ``grow_bank``, ``random_bank``, or this function; it is not changed.
        steps: optimisation steps, one batch each; None goes through the batches once.
        lr: of the classifiers.
        coefficient_lr: of the coefficients, which start at zero.
        template_lr: of the templates, in units of their own root mean square.
        loss: of the model's output and the labels; None takes the cross-entropy of the logits. Logits of a batch with
            several classifiers are padded with -inf to the widest.
        seed: of fresh classifiers, and of whatever the model draws while it is trained (dropout).
        checkpoint: a file that is written every ``checkpoint_every`` steps and at the end; if it is there already, the run
            goes on from it. On a CPU a run that was broken off and goes on gives the numbers of one that ran through, if the
            batches come in the same order again. That includes a ``DataLoader`` that shuffles, by torch's global
            generator or by its own.
        checkpoint_every: steps.
        progress: show a progress bar.

    Returns:
        the bank with its templates trained, version 1 of a new one, and the tasks on it. Templates are scaled by powers
        of two such that the tasks' coefficients are about 1 in their root mean square.

    Raises:
        RecastConfigError: if an argument cannot be used, or the batches do not fit the tasks.
        RecastBankError: if the bank has no grown templates.
        RecastBaseMismatchError: if the bank was made for other pretrained weights.
        RecastLoadError: if the checkpoint is damaged, or belongs to another run.
    """
    _check_plain(model, "learn_bank")
    _check_trainable(model, bank)
    configs = _configs_of(tasks, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = get_recast_model(copy.deepcopy(model), RecastConfig(bank=bank), LAYOUT)
        pool = TaskPool(twin)
        for name, config in configs.items():
            pool.add(name, config)
        banks = {b.name: b for b in recast_banks(twin.get_base_model()).values() if isinstance(b, GrownBank)}
        identity = {"bank": bank.fingerprint, "classes": {n: c.num_classes for n, c in configs.items()}, "seed": seed}
        rates = LearningRates(lr, coefficient_lr, template_lr)
        templates = [tensor for b in banks.values() for tensor in b.make_trainable()]
        run = LearningRun(twin, pool, templates, batches, rates, loss or _cross_entropy, identity)
        losses = run.train(steps, checkpoint, checkpoint_every, progress)
    _scale_templates(pool, banks)
    states = {name: _state_of(pool, name, config) for name, config in configs.items()}
    return LearnedBank(_stored(bank, banks, pool, len(losses)), states, configs, tuple(losses))


def _check_plain(model: nn.Module, what: str) -> None:
    if any(isinstance(module, RecastLayer) for module in model.modules()):
        raise RecastConfigError(f"{what} needs the plain pretrained model; this one is converted already (see model.unload())")


def _check_trainable(model: nn.Module, bank: StoredBank) -> None:
    if not isinstance(bank, StoredBank) or not any(g.grown is not None and len(g.grown) for g in bank.groups.values()):
        raise RecastBankError("learn_bank trains grown templates, and the bank has none: start from grow_bank or random_bank")
    if bank.is_of_biases:
        raise RecastBankError("learn_bank trains templates of weights, and the bank is of biases: give it to BiasConfig")
    half = [name for name, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise RecastConfigError(
            f"learn_bank trains in the model's own dtype, and {half[0]} is in half precision, which is too coarse for small "
            "steps: call model.float() first. The bank fits the model in half precision afterwards."
        )


def _configs_of(tasks: Sequence[str] | Mapping[str, int | RecastConfig | None], seed: int) -> dict[str, RecastConfig]:
    if isinstance(tasks, str) or not len(tasks) or len(set(tasks)) < len(tasks):
        raise RecastConfigError(f"tasks={tasks!r}: expected names that differ, at least one")
    configs = {}
    for name in tasks:
        check_adapter_name(name)
        given = tasks[name] if isinstance(tasks, Mapping) else None
        if not isinstance(given, RecastConfig):
            configs[name] = RecastConfig(num_classes=given, seed=seed)
            continue
        further = {"train_norms": False, "modules_to_save": None, "bias": "none", "head_type": "linear", "lora_config": None}
        given_too = [field for field, default in further.items() if getattr(given, field) != default]
        if given_too:
            raise RecastConfigError(
                f"the task {name!r} has {given_too[0]}={getattr(given, given_too[0])!r}: tasks that learn a bank together have "
                "coefficients and trained classifiers of their own, nothing else"
            )
        configs[name] = RecastConfig(**{field: getattr(given, field) for field in HEAD_FIELDS})
    return configs


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits, labels)


# ---------------------------------------------------------------- what is made of the trained numbers


@torch.no_grad()
def _scale_templates(pool: TaskPool, banks: Mapping[str, GrownBank]) -> None:
    """Bring the tasks' coefficients near 1; a power of two changes no bit of what a template and a coefficient give."""
    rows = [pool.row(name) for name in pool]
    for bank in banks.values():
        parts = [pool.part_of(member) for member in bank.members]
        columns = [range(part.stop - len(bank.grown), part.stop) for part in parts if part is not None]
        for place in range(len(bank.grown)):
            own = [column[place] for column in columns]
            size = float(pool.table[rows][:, own].square().mean().sqrt())
            if size == 0:
                continue
            factor = 2.0 ** round(math.log2(size))
            bank.grown.tensors[0][place] *= factor
            pool.table[:, own] /= factor


@torch.no_grad()
def _stored(start: StoredBank, banks: Mapping[str, GrownBank], pool: TaskPool, steps: int) -> StoredBank:
    """The trained templates as a bank, which says what it was learned from."""
    layers = recast_layers(pool.model.get_base_model())
    groups: dict[str, StoredGroup] = {}
    for name, group in start.groups.items():
        if name not in banks:
            groups[name] = group
            continue
        bank = banks[name]
        tensors = tuple(t.detach().cpu().clone() for t in bank.grown.tensors)
        grown = replace(bank.grown, tensors=tensors, energy=())
        moves = []
        for member in bank.members:
            templates = bank.get_templates(layers[member].weight_device)
            for task in pool:
                offsets = pool.coefficients(task)[member]
                moves.append(sum(offset * template for offset, template in zip(offsets, templates, strict=True)))
        groups[name] = StoredGroup(group.members, grown=replace(grown, energy=energy_kept(moves, grown)))
    made = {"method": "learned", "tasks": list(pool), "steps": steps, "start": start.mimicry}
    return StoredBank(groups, start.base_fingerprint, made)


def _state_of(pool: TaskPool, name: str, config: RecastConfig) -> dict[str, Tensor]:
    """A task as its file holds it."""
    state = {
        f"{MODEL_PREFIX}{module}.{COEFFICIENTS}": values.cpu().unsqueeze(0)
        for module, values in pool.coefficients(name).items()
    }
    head = pool.head(pool.row(name))
    if head is not None:
        prefix = f"{MODEL_PREFIX}{find_head(pool.model.get_base_model(), config.head_module)}."
        state.update({f"{prefix}{key}": value.detach().cpu().clone() for key, value in head.state_dict().items()})
    return state
