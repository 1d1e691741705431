"""fit_bank: templates that are fitted before a conversion, with data where the method needs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..banks.files import StoredBank, StoredGroup
from ..banks.template_bank import mix_templates
from ..composition.compose import made_to_stay
from ..composition.kinds import family_of, rows_of
from ..config import RecastConfig, checked_config
from ..errors import RecastConfigError
from ..mimicry import ClosedForm, DataAware, FittedTemplates, MimicryMethod, Recipe
from ..mimicry.features import captured_outputs, evaluating, main_tensor, run_on
from ..names import block_of
from ..planning.candidates import Candidate
from ..planning.groups import PlannedGroup, as_matrix
from ..tasks.plan import plan_recast
from ..validation import listed
from .sources import check_pretrained


@made_to_stay()
def fit_bank(model: nn.Module, config: RecastConfig, batches: Iterable[Any] | None = None) -> StoredBank:
    """Fit the template banks of a config without converting the model.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        config: its targets, groups, templates and ``mimicry`` are used.
        batches: a few inputs, for a method that needs data; read more than once, so a list or a ``DataLoader``. For what a
            batch may be see :func:`recast_peft.mimicry.features.call_arguments`.

    Returns:
        the bank, to be given as ``RecastConfig(bank=...)``, saved and pushed.

    Raises:
        RecastConfigError: if the model is converted already, or data are needed and missing.
        RecastBankError: if every bank is exact, so that there is nothing to fit.
    """
    check_pretrained(model, "fit_bank")
    method = checked_config(config).method
    plan = plan_recast(model, config)
    targets = {target.name: target for target in plan.candidates}
    groups = [group for group in plan.groups if not group.is_exact and not group.is_grown]
    data = _as_list(batches)
    if method.needs_data and groups and not data:
        raise RecastConfigError(f"mimicry {method.name!r} needs a few batches: fit_bank(model, config, batches)")
    members = {group.name: [targets[name] for name in group.members] for group in groups}
    fitted: dict[str, FittedTemplates] = {}
    for chunk in _chunks(groups, method.max_moment_bytes if isinstance(method, DataAware) else None):
        all_members = [member for group in chunk for member in members[group.name]]
        measured = input_moments(model, all_members, data) if method.needs_data else None
        for group in chunk:
            moments = None if measured is None else [measured[name] for name in group.members]
            fitted[group.name] = _fit(method, members[group.name], group.num_templates, label=group.name, moments=moments)
    if isinstance(method, DataAware) and groups:
        fitted = select(model, members, fitted, list(islice(data, method.select_batches)))
        fitted = distill(model, members, fitted, data, method)
    stored = {group.name: StoredGroup.of(group.members, fitted.get(group.name)) for group in plan.groups}
    fingerprints = {name: target.fingerprint for name, target in targets.items()}
    return StoredBank(stored, fingerprints, method.to_dict())


def _as_list(batches: Iterable[Any] | None) -> Sequence[Any]:
    """Batches that can be read again; a single tensor would be taken for its rows."""
    if batches is None:
        return []
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise RecastConfigError(f"batches is one {type(batches).__name__}; give a list of batches: [batch]")
    try:
        len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader of a data set without a length
        return list(batches)
    return list(batches) if isinstance(batches, (set, frozenset)) else batches  # type: ignore[return-value]


def _chunks(groups: Sequence[PlannedGroup], limit: int | None) -> list[list[PlannedGroup]]:
    """Groups whose second moments together stay below a limit in bytes, or one group alone."""
    if limit is None:
        return [[group] for group in groups]
    chunks: list[list[PlannedGroup]] = []
    held = 0
    for group in groups:
        need = 4 * len(group.members) * as_matrix(group.shape)[1] ** 2
        if not chunks or held + need > limit:
            chunks.append([])
            held = 0
        chunks[-1].append(group)
        held += need
    return chunks


def _fit(method: MimicryMethod, targets: Sequence[Candidate], num_templates: int, **options: Any) -> FittedTemplates:
    """What a method finds for targets, whose weights it sees with outputs first; templates have the weights' shape."""
    kinds, weights = [family_of(target.module) for target in targets], [target.weight.detach() for target in targets]
    weights = [w if kind is None else kind.as_matrix(w).contiguous() for kind, w in zip(kinds, weights, strict=True)]
    found = method.fit(weights, num_templates, **options)
    if isinstance(found, Recipe):
        found = FittedTemplates(mix_templates(weights, found.mix), found.base)
    if kinds[0] is not None and kinds[0].is_transposed:
        found = FittedTemplates(found.templates.transpose(1, 2).contiguous(), found.base)
    return found


# ---------------------------------------------------------------- second moments of the inputs


def input_moments(model: nn.Module, targets: Sequence[Candidate], batches: Iterable[Any]) -> dict[str, Tensor | None]:
    """The second moment of every target's input: mean of x x^T over all samples and places of the batches, in evaluation mode.

    Targets are linear layers and convolutions. Of a convolution x is the patch under the kernel; groups are averaged.

    Returns:
        ``(fan_in, fan_in)`` in float32 by name; None, with a warning, for a module that is never called or of another kind.

    Raises:
        RecastConfigError: if a module is given no numbers, or some that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, columns: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            rows = columns(module, args[0].detach()).float()  # (places, fan_in)
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + rows.shape[0]

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for target in targets:
            columns = rows_of(target.module)
            if columns is not None:
                hooks.enter_context(target.module.register_forward_pre_hook(partial(note, target.name, columns)))
        for batch in batches:
            run_on(model, batch)
    silent = [target.name for target in targets if target.name not in sums]
    if silent:
        warnings.warn(
            f"{len(silent)} targets show no input that could be measured ({listed(silent)}): they are fitted by "
            "the change of their weight instead of their output",
            stacklevel=4,
        )
    unusable = next((name for name, moment in sums.items() if not counts[name] or not moment.isfinite().all()), None)
    if unusable is not None:
        raise RecastConfigError(f"the batches give {unusable} no numbers, or some that are not finite: give other examples")
    return {target.name: sums[target.name] / counts[target.name] if target.name in sums else None for target in targets}


# ---------------------------------------------------------------- the output of the whole model


def output_change(model: nn.Module, weights: dict[str, Tensor], batches: Iterable[Any], wanted: Sequence[Tensor]) -> float:
    """Squared change of the model's output with other weights, in units of the pretrained output's square."""
    change = size = 0.0
    with evaluating(model), torch.no_grad():
        for batch, output in zip(batches, wanted, strict=True):
            new = main_tensor(run_on(model, batch, weights))
            assert new is not None
            change += float((new - output).double().square().sum())
            size += float(output.double().square().sum())
    return change / max(size, 1e-300)


def select(
    model: nn.Module, members: Mapping[str, Sequence[Candidate]], first: dict[str, FittedTemplates], batches: Sequence[Any]
) -> dict[str, FittedTemplates]:
    """Of a fit of every group and the closed form take the one that changes the whole model's output less.

    The better of the two as a whole is where it starts; then every group in turn is tried with the other, so that the result
    is never worse than either on these batches. It takes one pass for each group.
    """
    if not batches:
        return first
    with evaluating(model), torch.no_grad():
        outputs = [main_tensor(run_on(model, batch)) for batch in batches]
    wanted = [output for output in outputs if output is not None]
    if len(wanted) < len(batches):
        return first  # an output without numbers to compare

    def change_of(fits: dict[str, FittedTemplates]) -> float:
        return output_change(model, _composed(members, _in_float32(fits)), batches, wanted)

    second = {name: _fit(ClosedForm(), own, len(first[name].templates)) for name, own in members.items()}
    changes = change_of(first), change_of(second)
    best, other = (first, second) if changes[0] <= changes[1] else (second, first)
    best, least = dict(best), min(changes)
    for name in members:
        tried = {**best, name: other[name]}
        change = change_of(tried)
        if change < least:
            best, least = tried, change
    return best


# ---------------------------------------------------------------- layer-wise distillation


def distill(
    model: nn.Module,
    members: Mapping[str, Sequence[Candidate]],
    fitted: dict[str, FittedTemplates],
    batches: Sequence[Any],
    method: DataAware,
) -> dict[str, FittedTemplates]:
    """Tune templates and base coefficients until every block gives the pretrained model's features.

    Batches are taken one after the other, from the start again when they end.

    Returns:
        the tuned templates, in the dtype they had. The loss is the sum over the blocks of the squared difference of the
        features in units of the pretrained features' mean square.
    """
    if not method.distill_steps:
        return fitted
    leaves = {
        name: (templates.clone().requires_grad_(), base.clone().requires_grad_())
        for name, (templates, base) in _in_float32(fitted).items()
    }
    flat = [leaf for pair in leaves.values() for leaf in pair]
    rate = method.distill_learning_rate
    optimizer = torch.optim.Adam(
        [{"params": [t], "lr": rate * float(t.detach().square().mean().sqrt())} for t, _ in leaves.values()]
        + [{"params": [base for _, base in leaves.values()], "lr": rate}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.distill_steps)
    blocks = sorted({block_of(member.name) for own in members.values() for member in own})
    steps = islice(cycle(batches), method.distill_steps)
    bar = tqdm(steps, "distillation", method.distill_steps, delay=2, leave=False, disable=not method.progress)
    with evaluating(model), captured_outputs(model, blocks) as outputs:
        for batch in bar:
            with torch.no_grad():
                run_on(model, batch)
            wanted = dict(outputs)
            with torch.enable_grad():
                run_on(model, batch, _composed(members, leaves))
                loss = sum((outputs[b] - wanted[b]).square().mean() / wanted[b].square().mean() for b in wanted)
                gradients = torch.autograd.grad(loss, flat)  # type: ignore[arg-type]
            for leaf, gradient in zip(flat, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
    return {
        name: FittedTemplates(templates.detach().to(fitted[name].templates.dtype), base.detach().double().cpu())
        for name, (templates, base) in leaves.items()
    }


def _in_float32(fits: Mapping[str, FittedTemplates]) -> dict[str, tuple[Tensor, Tensor]]:
    """Templates and base coefficients of every group, on the templates' device."""
    return {name: (fit.templates.float(), fit.base.to(fit.templates.device, torch.float32)) for name, fit in fits.items()}


def _composed(members: Mapping[str, Sequence[Candidate]], leaves: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The composed weights by the names of the parameters whose place they take."""
    weights = {}
    for name, own in members.items():
        templates, base = leaves[name]
        for member, weight in zip(own, torch.tensordot(base, templates, dims=1), strict=True):
            weights[f"{member.name}.{member.weight_name}"] = weight.to(member.weight.dtype)
    return weights
