"""practice_bank: a bank for whoever has data, but neither labels nor earlier tasks.

Practice tasks are made of what has no labels: which word was taken out of a text, which picture is it that was shifted and
recoloured (``families.py``). What training does to the model on many of them has directions in common, and these are the
templates.

Related: prompts and adapters pretrained on self-supervised tasks (PVP, Song et al., arXiv 2211.06871; SUPMER, Pan et al.,
arXiv 2303.12314) start a new task at a learned point, where a practice bank gives it the directions to move in; aTLAS (Zhang et
al., arXiv 2407.02880) scales blocks of task vectors that labelled tasks gave, and Uni-LoRA (Li et al., arXiv 2506.00799) and
VB-LoRA (Li et al., arXiv 2405.15179) do without any: their directions are random, or learned with the task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..banks.files import StoredBank
from ..composition.compose import made_to_stay
from ..config import RecastConfig
from ..errors import RecastConfigError, RecastTargetError
from ..mimicry.features import call_arguments, device_of, evaluating, main_tensor
from ..parts.lora_plan import takes_lora, these_modules
from ..parts.precision import HALF
from ..planning.candidates import find_candidates
from ..tasks.plan import plan_recast
from ..validation import COUNT, SEED, check_arguments, flag, function, number_above, one_of, optional, shown, whole_number
from .biases import bias_places, grow_bias_bank, is_affine_norm
from .families import Inputs, PracticeFamily, PracticeTask, check_data, each_tensor, rows_of_inputs
from .sources import check_pretrained
from .weights import grow_bank


@made_to_stay()
def practice_bank(
    model: nn.Module,
    data: Inputs,
    family: PracticeFamily | Sequence[PracticeFamily],
    *,
    tasks: int = 12,
    of: str = "biases",
    config: RecastConfig | None = None,
    num_templates: int | None = None,
    group_size: int = 1,
    scales: bool = False,
    epochs: int = 4,
    batch_size: int = 32,
    lr: float = 3e-3,
    features: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> StoredBank:
    """Grow a bank from practice tasks, which are made of unlabelled data and trained one after the other.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        data: unlabelled: a tensor ``(examples, ...)``, or such tensors by the names of the model's arguments. A model in half
            precision is trained in float32, for which floating numbers are taken to float32.
        family: how practice tasks are made of them, or several that take turns: :class:`MissingWords`, :class:`KnownPictures`,
            or a class of your own with a method ``make``.
        tasks: how many are trained.
        of: ``"biases"``: biases of layers and norms are trained, and the bank is one for ``BiasConfig(bank=...)``;
            ``"weights"``: LoRAs of rank 4 on the config's targets are (but grouped convolutions), and it is one for
            ``RecastConfig(bank=...)``.
        config: for ``"weights"``: targets and groups, as for ``grow_bank``.
        num_templates: templates of a group at most; None takes all principal components, as many as tasks.
        group_size: for ``"biases"``: blocks that share templates and coefficients.
        scales: for ``"biases"``: the scales of norms are trained too, and take part in the templates.
        epochs: passes over the examples of each task.
        batch_size: examples of a step.
        lr: learning rate at its height; it rises over a tenth of the steps and falls to zero.
        features: from the model and a batch of inputs to ``(batch, features)``, which a linear classifier sees. None takes the
            model's output (its logits or last hidden state), averaged over positions that the ``attention_mask`` names.
        seed: random seed for the tasks, the classifiers and the order of examples.
        progress: show a progress bar over the tasks.

    Returns:
        the bank, version 1; ``growth_report`` says how much of the tasks' moves its templates keep.

    Raises:
        RecastConfigError: if an argument cannot be used, the data do not suit a family, or the model is converted already.
        RecastTargetError: if nothing of the model can be trained in this way.
    """
    check_pretrained(model, "practice_bank")
    check_arguments(COUNT, tasks=tasks, group_size=group_size, epochs=epochs)
    check_arguments(whole_number(2), batch_size=batch_size)
    check_arguments(optional(COUNT), num_templates=num_templates)
    check_arguments(flag, scales=scales)
    check_arguments(one_of("biases", "weights"), of=of)
    check_arguments(optional(function), features=features)
    check_arguments(number_above(0), lr=lr)
    check_arguments(SEED, seed=seed)
    families = _families(family)
    check_data(data)
    _check_fits(of, config, group_size, scales)
    targets = _lora_targets(model, config) if of == "weights" else None
    if targets is None and not bias_places(model):
        raise RecastTargetError(
            "practice_bank(of='biases'): no layer or norm in the model's numbered blocks has a bias; take of='weights'"
        )
    generator = torch.Generator().manual_seed(seed)
    train = partial(
        _train, epochs=epochs, batch_size=batch_size, lr=lr, features=features or mean_features, generator=generator
    )
    in_half = any(parameter.dtype in HALF for parameter in model.parameters())
    if in_half:
        data = each_tensor(data, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    moved, names = [], []
    for index in tqdm(range(tasks), desc="practice", disable=not progress):
        task = _made(families[index % len(families)], data, generator)
        names.append(task.name)
        copied = copy.deepcopy(model).requires_grad_(False)
        if in_half:
            copied = copied.float()  # small steps would be rounded away
        if targets is None:
            moved.append(_moved_biases(copied, scales, partial(train, task)))
        else:
            moved.append(_moved_weights(copied, targets, seed, partial(train, task)))
    if targets is None:
        bank = grow_bias_bank(model, moved, num_templates=num_templates, group_size=group_size, scales=scales)
    else:
        bank = grow_bank(model, moved, config, num_templates=num_templates)
    return replace(bank, mimicry={**bank.mimicry, "sources": names})  # type: ignore[dict-item]


def _families(family: Any) -> list[PracticeFamily]:
    families = list(family) if isinstance(family, Sequence) else [family]
    if not families or any(isinstance(one, type) or not callable(getattr(one, "make", None)) for one in families):
        raise RecastConfigError(f"family={shown(family)}: expected an object with a method make, such as KnownPictures()")
    return families


def _check_fits(of: str, config: RecastConfig | None, group_size: int, scales: bool) -> None:
    if of == "biases" and config is not None:
        raise RecastConfigError("practice_bank(of='biases') trains all biases and takes no config")
    if of == "weights" and (group_size != 1 or scales):
        raise RecastConfigError(
            "practice_bank(of='weights') takes no group_size and no scales: give config=RecastConfig(group_size=...)"
        )


def _made(family: PracticeFamily, data: Inputs, generator: torch.Generator) -> PracticeTask:
    task = family.make(data, generator)
    if not isinstance(task, PracticeTask):
        raise RecastConfigError(f"{type(family).__name__}.make gave a {type(task).__name__}: expected a PracticeTask")
    return task


def _lora_targets(model: nn.Module, config: RecastConfig | None) -> list[str]:
    """The target modules that a LoRA can be trained on."""
    candidates = plan_recast(model, RecastConfig(group_size=1) if config is None else config).candidates
    targets = [target.name for target in candidates if takes_lora(target)]
    if not targets:
        raise RecastTargetError(
            "practice_bank(of='weights') trains LoRAs, and PEFT has none for the targets: give the config target_modules"
        )
    return targets


def mean_features(model: nn.Module, inputs: Any) -> Tensor:
    """What a model says of each input ``(batch, features)``: its output, averaged over the positions that are attended to."""
    args, kwargs = call_arguments(inputs, device_of(model))
    found = main_tensor(model(*args, **kwargs))
    if found is None:
        raise RecastConfigError("the model's output holds no tensor of features: give practice_bank features=")
    if found.ndim == 2:
        return found
    mask = kwargs.get("attention_mask")
    if found.ndim == 3 and mask is not None and mask.shape == found.shape[:2]:
        weights = mask[..., None].to(found.dtype)
        return (found * weights).sum(1) / weights.sum(1).clamp_min(1)
    return found.mean(1) if found.ndim == 3 else found.flatten(2).mean(2)


def _moved_biases(model: nn.Module, scales: bool, train: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """The biases, and perhaps the scales of norms, of a frozen model after training, by their names."""
    for place in bias_places(model):
        place.module.bias.requires_grad_(True)  # type: ignore[union-attr]
        if scales and is_affine_norm(place.module):
            place.module.weight.requires_grad_(True)  # type: ignore[union-attr]
    train(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _moved_weights(model: nn.Module, targets: list[str], seed: int, train: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """The weights that LoRAs on targets give after training, by their names; the model is changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted = these_modules(targets, find_candidates(model))
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=wanted))
    train(adapted)
    state = adapted.merge_and_unload().state_dict()  # type: ignore[operator]
    return {f"{name}.weight": state[f"{name}.weight"] for name in targets if f"{name}.weight" in state}


def _train(
    task: PracticeTask,
    model: nn.Module,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    features: Callable[[nn.Module, Any], Tensor],
    generator: torch.Generator,
) -> None:
    """Train the free parameters of a model on a task, with a classifier of its features that is then forgotten."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = epochs * math.ceil(len(task.labels) / batch_size)
    with evaluating(model), torch.enable_grad():
        classifier = _fresh_classifier(task, model, features)
        if steps < 2:
            raise RecastConfigError(
                f"practice task {task.name!r} has {len(task.labels)} examples, one step of batch_size={batch_size}: the first "
                "step moves the classifier alone. Expected more: give more examples, a smaller batch_size, or more epochs."
            )
        of_classifier = {"params": classifier.parameters(), "lr": 1e-2, "weight_decay": 0.01}
        optimizer = torch.optim.AdamW([of_classifier, {"params": free, "lr": lr, "weight_decay": 0.0}])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, lr], total_steps=steps, pct_start=0.1)
        for rows in _batches(len(task.labels), batch_size, epochs, generator):
            logits = classifier(features(model, rows_of_inputs(task.inputs, rows)).float())
            loss = F.cross_entropy(logits, task.labels[rows].to(logits.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(free, 1.0)
            optimizer.step()
            schedule.step()
    if not all(parameter.isfinite().all() for parameter in free):
        raise RecastConfigError(f"practice task {task.name!r} diverged at lr={lr:g}: give a smaller lr")


def _fresh_classifier(task: PracticeTask, model: nn.Module, features: Callable[[nn.Module, Any], Tensor]) -> nn.Module:
    """A classifier of zeros for what is seen of a task's inputs; it draws no random numbers."""
    with torch.no_grad():
        first = features(model, rows_of_inputs(task.inputs, torch.arange(min(2, len(task.labels)))))
    if not isinstance(first, Tensor) or first.ndim != 2 or not first.is_floating_point():
        given = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise RecastConfigError(f"features gave {given}: expected floating numbers (batch, features)")
    head = nn.utils.skip_init(nn.Linear, first.shape[1], task.num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    # the scale of features differs from model to model: of standardised ones, all learn at one rate
    return nn.Sequential(nn.BatchNorm1d(first.shape[1], affine=False), head).to(device_of(model))


def _batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step; one row alone has no spread, so it goes with the batch before it."""
    for _ in range(epochs):
        order = list(torch.randperm(count, generator=generator).split(size))
        if len(order) > 1 and len(order[-1]) == 1:
            order[-2:] = [torch.cat(order[-2:])]
        yield from order
