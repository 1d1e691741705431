"""Compressed banks that keep the layers' OUTPUTS instead of their weights.

The output of layer l for inputs x changes by (W_l - V_l) x when its weight W_l is replaced by V_l = sum_i c[l,i] T_i. Its mean
square over a few batches is tr((W_l - V_l) S_l (W_l - V_l)^T) with the second moment S_l = mean of x x^T, so the data enter by
these matrices alone. If all S_l were one matrix S, the optimum would be the closed form on W_l S^(1/2): its recipe follows
from the inner products tr(W_l S W_m^T). That is where the fit starts, with the mean of the S_l; from there alternating least
squares lowers the error with each layer's own S_l: coefficients for given templates (n x n systems), then one template after
the other for given coefficients (fan_in x fan_in systems). Every half step is an exact minimum, so the error never rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..composition.compose import without_autocast
from ..errors import RecastConfigError
from ..validation import number_above, whole_number
from .base import FittedTemplates, MimicryMethod, scale_templates
from .closed_form import recipe_from_gram


@dataclass(frozen=True)
class DataAware(MimicryMethod):
    """Least change of every layer's output on given batches; run by ``fit_bank(model, config, batches)``.

    Args:
        sweeps: number of sweeps of alternating least squares at most.
        tolerance: stop when a sweep lowers the error by less than this share.
        ridge: share of the mean diagonal of S_l that is added to it, so that directions without data keep their weight.
        normalize: count the error of every layer in units of its own output's size.
        select_batches: on so many of the batches every group is also tried with the closed form, and keeps it where that
            changes the whole model's output less (errors of neighbouring layers can cancel or add up); 0 for none.
        distill_steps: steps of layer-wise distillation afterwards, which tune templates and base coefficients until the
            features of every block are those of the pretrained model. They take most of the time and, for Adam, memory of
            several times the templates in float32; 0 leaves the fit at its algebra, which a large model needs.
        distill_learning_rate: learning rate of Adam in the distillation, in units of the templates' root mean square.
        max_moment_bytes: second moments held at once; with more, the batches are read several times.
        progress: show a progress bar for what takes over two seconds.
    """

    name: ClassVar[str] = "data_aware"
    needs_data: ClassVar[bool] = True

    sweeps: int = 30
    tolerance: float = 1e-4
    ridge: float = 1e-3
    normalize: bool = False
    select_batches: int = 2
    distill_steps: int = 100
    distill_learning_rate: float = 0.01
    max_moment_bytes: int = 1 << 31
    progress: bool = True

    def __post_init__(self) -> None:
        self.check(whole_number(0), "sweeps", "distill_steps", "select_batches")
        self.check(number_above(0), "max_moment_bytes", "distill_learning_rate")
        self.check(number_above(0, itself=True), "tolerance", "ridge")

    @without_autocast()
    def fit(
        self, weights: Sequence[Tensor], num_templates: int, *, label: str = "", moments: Sequence[Tensor | None] | None = None
    ) -> FittedTemplates:
        """Fit one bank; a layer without a moment (None) counts with the change of its weight.

        Raises:
            RecastConfigError: if there are no moments.
        """
        if moments is None:
            raise RecastConfigError(
                "mimicry='data_aware' needs a few batches:\n"
                "  bank = fit_bank(model, config, batches)\n  model = get_recast_model(model, RecastConfig(bank=bank))"
            )
        matrices = [w.detach().to(weights[0].device, torch.float32).flatten(1) for w in weights]  # (out, fan_in)
        metrics = [self._metric(w, s) for w, s in zip(matrices, moments, strict=True)]
        with torch.no_grad():
            templates, base = whitened_start(matrices, metrics, num_templates)
            templates, base = self._alternate(matrices, metrics, templates, base, label)
            flat, base = scale_templates(templates.flatten(1), base, torch.stack([m.flatten() for m in matrices]))
        shaped = flat.reshape(num_templates, *weights[0].shape).to(weights[0].dtype)
        return FittedTemplates(shaped, base.double().cpu())

    def _metric(self, weight: Tensor, moment: Tensor | None) -> Tensor:
        """S_l with the ridge, in float32; scaled so that the error counts relative to the layer's output."""
        one = torch.eye(weight.shape[1], dtype=torch.float32, device=weight.device)
        moment = one if moment is None else moment.to(one)
        moment = moment + (self.ridge * moment.diagonal().mean()).clamp_min(1e-12) * one
        return moment / output_error(weight, moment).clamp_min(1e-30) if self.normalize else moment

    def _alternate(
        self, weights: list[Tensor], metrics: list[Tensor], templates: Tensor, base: Tensor, label: str
    ) -> tuple[Tensor, Tensor]:
        error = total_error(weights, metrics, templates, base)
        for _ in tqdm(range(self.sweeps), desc=f"data-aware {label}", delay=2, leave=False, disable=not self.progress):
            new_base = best_coefficients(weights, metrics, templates)
            new_templates = best_templates(weights, metrics, templates, new_base)
            new = total_error(weights, metrics, new_templates, new_base)
            if not new < error:  # rounding has the last word, or nothing is left to gain
                break
            gain, error = 1 - new / error, new
            templates, base = new_templates, new_base
            if gain < self.tolerance:
                break
        return templates, base


def output_error(change: Tensor, metric: Tensor) -> Tensor:
    """Mean square of the output that a weight ``(out, fan_in)`` gives for inputs of second moment ``metric``."""
    return ((change @ metric) * change).sum()


def total_error(weights: Sequence[Tensor], metrics: Sequence[Tensor], templates: Tensor, base: Tensor) -> float:
    """Mean square change of the outputs, summed over the layers; templates ``(n, out, fan_in)``, base ``(layers, n)``."""
    composed = torch.tensordot(base, templates, dims=1)
    return sum(float(output_error(w - v, s)) for w, v, s in zip(weights, composed, metrics, strict=True))


def whitened_start(weights: Sequence[Tensor], metrics: Sequence[Tensor], num_templates: int) -> tuple[Tensor, Tensor]:
    """The optimum if all layers had the mean of the second moments: the closed form in that inner product."""
    mean = torch.stack(list(metrics)).mean(dim=0)
    images = torch.stack([(w @ mean).flatten() for w in weights]).double()
    flat = torch.stack([w.flatten() for w in weights])
    recipe = recipe_from_gram((images @ flat.double().T).cpu(), num_templates)
    templates = (recipe.mix.to(flat) @ flat).reshape(num_templates, *weights[0].shape)
    return templates, recipe.base.to(flat)


def best_coefficients(weights: Sequence[Tensor], metrics: Sequence[Tensor], templates: Tensor) -> Tensor:
    """For given templates the coefficients ``(layers, n)`` with the least error: one small system for each layer."""
    rows = []
    for weight, metric in zip(weights, metrics, strict=True):
        seen = (templates @ metric).flatten(1).double()  # (n, out * fan_in)
        inner = seen @ templates.flatten(1).double().T
        rows.append(torch.linalg.lstsq(inner.cpu(), (seen @ weight.flatten().double()).cpu(), driver="gelsd").solution)
    return torch.stack(rows).to(weights[0])


def best_templates(weights: Sequence[Tensor], metrics: Sequence[Tensor], templates: Tensor, base: Tensor) -> Tensor:
    """For given coefficients each template in turn with the least error, the others held.

    Template i solves T_i sum_l c[l,i]^2 S_l = sum_l c[l,i] (W_l - sum over j != i of c[l,j] T_j) S_l.
    """
    templates = templates.clone()
    for i in range(len(templates)):
        matrix = sum(c**2 * s for c, s in zip(base[:, i], metrics, strict=True))
        right = torch.zeros_like(templates[i])
        for weight, metric, row in zip(weights, metrics, base, strict=True):
            rest = torch.tensordot(row, templates, dims=1) - row[i] * templates[i]
            right += row[i] * (weight - rest) @ metric
        factor, failed = torch.linalg.cholesky_ex(matrix.double())
        if failed == 0:  # a template that no layer uses stays as it is
            templates[i] = torch.cholesky_solve(right.double().T, factor).T.to(templates)
    return templates
