"""Arithmetic on tasks: a new task as a weighted combination of others (task arithmetic, Ilharco et al., ICLR 2023).

A composed weight is linear in its coefficients, so ``"linear"`` is exact here: the offsets of the sum describe the sum of what
the tasks add to every weight, and LoRA parts are put side by side. Negative weights forget, weights that sum to one interpolate
or average.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge
from torch import Tensor, nn

from ..banks.template_bank import TemplateBank
from ..composition.compose import average_sets
from ..composition.strength import warn_of_strength
from ..config import RecastConfig, layout_of, tasks_among
from ..errors import RecastBankError, RecastConfigError
from ..holders import held_entries, holders
from ..names import check_adapter_name
from ..parts import PARTS
from ..parts.head import task_head, task_heads
from ..parts.head_building import PreparedHead
from ..parts.lora import A_PART
from ..parts.lora_sum import summed_config, write_sum
from ..parts.readout import Readout
from ..validation import check_arguments, check_is_task, checked_names, listed, one_of
from .undo import undone_on_failure

SUMS = ("linear", "svd")  # of what tasks add
COMBINATION_TYPES = (*SUMS, "ties", "magnitude_prune")
# combination types of PEFT's LoRA that have no meaning for coefficients, and why
REFUSED_TYPES = {
    "cat": "coefficients have no rank that could grow; 'linear' is exact here",
    "svd": "coefficients have no rank to reduce; 'linear' is exact here",
    "dare": "it drops numbers at random, which only averages out over many thousands of them",
}


def check_combination(
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    heads: str | None,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Check the arguments of a combination before anything is done (``RecastConfigError``)."""
    if not isinstance(adapters, Sequence) or isinstance(adapters, (str, bytes)) or not adapters:
        raise RecastConfigError(f"adapters={adapters!r}: expected a list of at least one task")
    checked_names("adapters", adapters, once=True)
    if not isinstance(weights, Sequence):
        raise RecastConfigError(f"weights={weights!r}: expected a list of numbers, one for each task")
    if len(adapters) != len(weights):
        raise RecastConfigError(f"one weight for each task is needed\n  adapters: {len(adapters)}\n  weights:  {len(weights)}")
    if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise RecastConfigError(f"weights={list(weights)!r}: expected finite numbers")
    if combination_type not in COMBINATION_TYPES:
        why = next((f" ({why})" for part, why in REFUSED_TYPES.items() if part in str(combination_type)), "")
        raise RecastConfigError(f"combination_type={combination_type!r}{why}: expected one of {', '.join(COMBINATION_TYPES)}")
    needs_density = combination_type not in SUMS
    if needs_density and not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise RecastConfigError(f"density={density!r}: {combination_type!r} needs the share of numbers to keep, in (0, 1]")
    if not needs_density and density is not None:
        raise RecastConfigError(f"density={density!r}: {combination_type!r} keeps all numbers; expected None")
    check_arguments(one_of("total", "frequency"), majority_sign_method=majority_sign_method)
    check_arguments(one_of(None, "none", "first", "linear"), heads=heads)


def check_svd(combination_type: str, has_part: bool) -> None:
    """Refuse ``"svd"`` for tasks that have no LoRA part, as far as the model or pool says (``RecastConfigError``)."""
    if combination_type == "svd" and not has_part:
        raise RecastConfigError(f"combination_type='svd': none of the tasks has a LoRA part, and {REFUSED_TYPES['svd']}")


def combine_rows(
    rows: Sequence[Tensor],
    weights: Sequence[float],
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Tensor:
    """Combine the numbers of tasks.

    Args:
        rows: ``(numbers,)`` of each task.
        weights: one for each task, of any sign.
        combination_type: ``"linear"`` and ``"svd"``: the weighted sum; ``"magnitude_prune"``: of each task only the share
            ``density`` of its largest numbers; ``"ties"``: of those, only the ones whose sign the majority has (Yadav et al.,
            NeurIPS 2023). A task's numbers are ranked all together, not module by module.
        density: the share of each task's numbers that is kept, in (0, 1].
        majority_sign_method: for ``"ties"``: ``"total"`` by the sum of the numbers, ``"frequency"`` by their count.

    Returns:
        ``(numbers,)`` in the dtype of the rows; formed in float64 and rounded once.
    """
    table = torch.stack(list(rows)).to(torch.float64)  # (tasks, numbers)
    factors = torch.tensor(list(weights), dtype=torch.float64, device=table.device)[:, None]
    if combination_type not in SUMS:
        assert density is not None
        table = _keep_largest(table, density)
    if combination_type == "ties":
        signs = calculate_majority_sign_mask(table, majority_sign_method)  # type: ignore[arg-type]
        combined = disjoint_merge(table * factors, signs)
    else:
        combined = (table * factors).sum(dim=0)
    return combined.to(rows[0].dtype)


def _keep_largest(table: Tensor, density: float) -> Tensor:
    """The largest numbers of each row, at least one; the others are zero."""
    kept = max(1, round(density * table.shape[1]))
    places = table.abs().topk(kept, dim=1).indices
    return torch.zeros_like(table).scatter(1, places, table.gather(1, places))


def combine_heads(heads: dict[str, PreparedHead | None], weights: Sequence[float], choice: str | None) -> PreparedHead | None:
    """The classifier of a combined task.

    Args:
        heads: heads of the tasks by name, copies that may be kept; None for a task without one.
        weights: one for each task.
        choice: ``"none"``: the model's own; ``"first"``: the first task's; ``"linear"``: the weighted sum of the heads, for
            tasks that name the same classes (seeds of one task); None if no task has a head.

    Raises:
        RecastConfigError: if there are heads and no choice, or the heads cannot be added.
    """
    present = {name: head for name, head in heads.items() if head is not None}
    if choice is None and present:
        raise RecastConfigError(
            f"the tasks {', '.join(present)} have classifiers of their own: say what the combined task gets with heads='first' "
            "(that of the first task), heads='linear' (their weighted sum) or heads='none' (the model's own)"
        )
    if choice in (None, "none"):
        return None
    first = next(iter(heads))
    if choice == "first":
        if first not in present:
            raise RecastConfigError(f"heads='first': the first task {first!r} has no classifier of its own")
        return present[first]
    for name in heads:
        if name not in present:
            raise RecastConfigError(f"heads='linear': the task {name!r} has no classifier of its own")
    return _summed_head(present, weights)


def _classes(head: PreparedHead) -> str:
    names = listed([*(head.labels.id2label or {}).values()])
    return f"{head.labels.num_classes} classes{f' ({names})' if names else ''}"


def _summed_head(heads: dict[str, PreparedHead], weights: Sequence[float]) -> PreparedHead:
    first_name, first = next(iter(heads.items()))
    for name, head in heads.items():
        if head.shapes() != first.shapes() or head.labels.id2label != first.labels.id2label:
            raise RecastConfigError(
                f"heads='linear': the classifiers have other classes and cannot be added\n"
                f"  {first_name}: {_classes(first)}\n  {name}: {_classes(head)}\n"
                "Use heads='first' or heads='none'."
            )
    summed = dataclasses.replace(first, module=copy.deepcopy(first.module))
    for key, value in summed.module.state_dict().items():
        states = [head.module.state_dict()[key].flatten() for head in heads.values()]
        value.copy_(combine_rows(states, weights).view_as(value))
    return summed


# ---------------------------------------------------------------- tasks of a model


def check_combinable(model: nn.Module, configs: dict[str, RecastConfig], combination_type: str) -> None:
    """Refuse tasks whose coefficients do not mean the same, or that own more than can be combined in this way.

    Raises:
        RecastBankError: if they are on different banks.
        RecastConfigError: if a task owns parts that cannot be added, or numbers that are not finite.
    """
    first = next(iter(configs))
    for name, config in configs.items():
        refusals = refusals_to_combine(model, name, config)
        if combination_type in SUMS:
            refusals = [refusal for refusal in refusals if refusal != A_PART]
        if refusals:
            raise RecastConfigError(
                f"task {name!r} cannot be combined with others: it owns more than coefficients and a classifier "
                f"({listed(refusals)}), which cannot be {'added' if combination_type in SUMS else 'pruned'}. Combine tasks "
                "without such parts."
            )
        _check_finite(model, name)
        for holder in holders(model):
            mine, other = holder.bank_of(name), holder.bank_of(first)
            if mine is not other:
                raise RecastBankError(
                    f"tasks on different banks cannot be combined: their coefficients belong to other templates; they differ "
                    f"at {holder.module_name}\n  {first}: {_members(other)}\n  {name}: {_members(mine)}\n"
                    "Train them with one config, or make both active: model.base_model.set_adapter([...]) adds what they do."
                )
        if list(task_coefficients(model, name)) != list(task_coefficients(model, first)):
            raise RecastBankError(
                f"the tasks {first!r} and {name!r} cannot be combined: their coefficients are of other modules or biases"
            )


def _check_finite(model: nn.Module, adapter: str) -> None:
    broken = next(
        (e for e in held_entries(model, adapter) if not e.tensor.is_meta and not torch.isfinite(e.tensor).all()), None
    )
    if broken is not None:
        raise RecastConfigError(
            f"task {adapter!r} holds numbers that are not finite (NaN or infinity) in {broken.name}: it diverged in training. "
            "Leave it out."
        )


def refusals_to_combine(model: nn.Module, adapter: str, config: RecastConfig) -> list[str]:
    """What a task owns that no row of numbers can hold; empty if coefficients and a classifier are all it has."""
    of_parts = [part.refusal_to_combine(config) for part in PARTS]
    of_holders = [holder.refusal_to_pool(adapter) for holder in holders(model, adapter)]
    return [text for text in (*of_parts, *of_holders) if text is not None]


def _members(bank: Any) -> str:
    if bank is None:
        return "no bank"
    if isinstance(bank, TemplateBank):
        return f"{bank.num_templates} templates of {', '.join(bank.members)}"
    return f"the readout {bank.bank.fingerprint}" if isinstance(bank, Readout) else "templates of biases"


def task_coefficients(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """A task's coefficients by the name of what they mix: ``(sets, templates)`` of a module, ``(templates,)`` of biases."""
    return {name: own for holder in holders(model, adapter) for name, own in holder.coefficients_of(adapter).items()}


def task_row(model: nn.Module, adapter: str) -> Tensor:
    """A task's coefficients side by side, the coefficient sets averaged: ``(numbers,)``."""
    values = [value.detach().float() for value in task_coefficients(model, adapter).values()]
    return torch.cat([average_sets(value) if value.ndim == 2 else value for value in values])


def write_row(model: nn.Module, adapter: str, row: Tensor) -> None:
    """Write coefficients, as ``task_row`` gives them, into a task with one coefficient set."""
    start = 0
    with torch.no_grad():
        for values in task_coefficients(model, adapter).values():
            values.copy_(row[start : start + values.numel()].view_as(values))
            start += values.numel()


def head_of_adapter(model: nn.Module, adapter: str) -> PreparedHead | None:
    """A copy of the classifier of a model's task, or None if it has none."""
    heads = task_heads(model, adapter)
    return heads[0].prepared(heads[0].module_name, adapter) if heads else None


def add_combined(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    heads: str | None,
    **options: Any,
) -> None:
    """Put a combined task on a model; see ``RecastModel.add_weighted_adapter`` for the arguments and what is raised."""
    check_combination(adapters, weights, combination_type, heads, **options)
    check_adapter_name(adapter_name)
    known = tasks_among(tuner.peft_config)
    for name in adapters:
        check_is_task(name, known)
    if adapter_name in tuner.peft_config:
        raise RecastConfigError(f"the model has a task {adapter_name!r} already; its tasks: {', '.join(tuner.peft_config)}")
    model = tuner.model
    configs = {name: known[name] for name in adapters}
    check_combinable(model, configs, combination_type)
    part = summed_config(model, adapters, combination_type)
    check_svd(combination_type, part is not None)
    own = {name: head_of_adapter(model, name) for name in adapters}
    head = combine_heads(own, weights, heads)
    for name in adapters:
        warn_of_strength(model, name, "add_weighted_adapter", stacklevel=5)
    row = combine_rows([task_row(model, name) for name in adapters], weights, combination_type, **options)
    reads_as_model = head is None and any(each is not None for each in own.values())  # by the model's own classifier
    tuner.peft_config[adapter_name] = _combined_config(list(configs.values()), part, head, reads_as_model)
    try:
        with undone_on_failure(model):
            tuner.inject_adapter(model, adapter_name)
            write_row(model, adapter_name, row)
            if part is not None:
                write_sum(model, adapters, weights, adapter_name)
            if head is not None:
                task_head(model, head.place).modules_to_save[adapter_name].load_state_dict(head.module.state_dict())
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise


def _combined_config(
    configs: Sequence[RecastConfig], part: LoraConfig | None, head: PreparedHead | None, reads_as_model: bool
) -> RecastConfig:
    """The config of a task that is combined of others: the layout of the first, with what the combined LoRA and head are."""
    first, sharing = configs[0], {config.coefficient_sharing for config in configs}
    fields: dict[str, Any] = {} if head is None else dataclasses.asdict(head.labels)
    if reads_as_model:
        fields["partners"] = [partner for partner in first.partners or () if partner.acts_on == "bias"]  # type: ignore[union-attr]
    return layout_of(
        first,
        coefficient_sharing=sharing.pop() if len(sharing) == 1 else None,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        lora_config=part,
        head_type="linear" if head is None else first.head_type,
        head_dtype=None if head is None else first.head_dtype,
        **fields,
    )
