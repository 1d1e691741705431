"""mimicry_report: how near a converted model is to the pretrained one, module by module and block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..composition.blocks import with_attribute
from ..composition.compose import compose_weight
from ..composition.fingerprint import same_weight, weight_fingerprint
from ..errors import RecastBankError, RecastConfigError
from ..growth.sources import check_plain
from ..layer import RecastLayer, recast_layers
from ..mimicry.features import captured_outputs, evaluating, main_tensor, run_on
from ..mimicry.fidelity import EXACT, Fidelity, measure_fidelity
from ..names import block_of, unwrapped
from ..planning.table import text_table
from ..tasks.banks import task_banks
from ..tasks.state import backbone_of
from ..validation import check_is_module

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ModuleFidelity:
    """How well the bank reproduces one pretrained weight.

    Attributes:
        module: name of the target module.
        bank: name of its bank.
        exact: whether the pretrained weight itself is in the bank, so that nothing is approximated.
        cosine: cosine of the angle between composed and pretrained weight; None if the pretrained weight is not known any more.
        relative_error: Frobenius norm of the difference in units of the pretrained weight's.
        energy_kept: 1 - relative_error squared.
    """

    module: str
    bank: str
    exact: bool
    cosine: float | None
    relative_error: float | None
    energy_kept: float | None


@dataclass(frozen=True)
class FeatureFidelity:
    """How near one output is to the pretrained model's on a batch.

    Attributes:
        name: name of the block; ``"output"`` for the model's own output.
        cosine: mean over the samples of the cosine of the flattened features.
        relative_error: norm of the difference in units of the pretrained features' norm.
    """

    name: str
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class MimicryReport:
    """What ``mimicry_report`` found; ``print(report)`` shows it as a table, ``report.plot()`` as a picture.

    Attributes:
        modules: one row for each target module.
        features: one row for each block and one for the output; empty without a batch.
    """

    modules: tuple[ModuleFidelity, ...]
    features: tuple[FeatureFidelity, ...] = field(default=())

    @property
    def is_exact(self) -> bool:
        """Whether every bank is exact."""
        return all(module.exact for module in self.modules)

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine of the modules' weights, as far as it is known."""
        return _mean([m.cosine for m in self.modules])

    @property
    def mean_relative_error(self) -> float | None:
        """Mean relative error of the modules' weights, as far as it is known."""
        return _mean([m.relative_error for m in self.modules])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return {"exact": self.is_exact, **asdict(self)}

    def plot(self) -> Figure:
        """Relative error of every weight, and of every block's features where the report has them.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        panels = 2 if self.features else 1
        height = 1.5 + 0.22 * max(len(self.modules), len(self.features))
        figure = Figure(figsize=(6.0 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        known = [m for m in self.modules if m.relative_error is not None]
        axes[0].barh([m.module for m in known], [m.relative_error for m in known], color="tab:blue")
        axes[0].set(xlabel="relative error of the weight", title="exact banks" if self.is_exact else "weights")
        axes[0].invert_yaxis()
        if self.features:
            axes[1].barh([f.name for f in self.features], [f.relative_error for f in self.features], color="tab:orange")
            axes[1].set(xlabel="relative error of the features", title="features on the batch")
            axes[1].invert_yaxis()
        return figure

    def __str__(self) -> str:
        rows = [
            (m.module, m.bank, "exact" if m.exact else "", *map(_shown, (m.cosine, m.relative_error, m.energy_kept)))
            for m in self.modules
        ]
        text = text_table(("module", "bank", "", "cosine", "relative error", "energy kept"), rows)
        if self.is_exact:
            text += "\nevery bank is exact: the pretrained weights themselves are the templates, nothing is approximated"
        else:
            text += f"\nmean cosine {_shown(self.mean_cosine)}, mean relative error {_shown(self.mean_relative_error)}"
        if self.features:
            rows = [(f.name, _shown(f.cosine), _shown(f.relative_error)) for f in self.features]
            text += "\n\n" + text_table(("features of", "cosine", "relative error"), rows)
        return text


def mimicry_report(
    model: nn.Module, batch: Any = None, reference: nn.Module | None = None, adapter_name: str | None = None
) -> MimicryReport:
    """Compare what the banks compose without any task with the pretrained model.

    Args:
        model: a converted model, as ``get_recast_model`` returns it.
        batch: input of the model, a tensor, a dictionary or a pair: with it, what every block and the whole model give is
            compared too.
        reference: the plain pretrained model. It is needed for the features where the pretrained weights were released;
            the figures of the weights were taken when the bank was built.
        adapter_name: whose banks; None means the active task.

    Returns:
        the report.

    Raises:
        RecastConfigError: if the model is not converted, stands in another module, or ``reference`` is not the plain model
            that it was made from.
        RecastBankError: if a task is merged, or the features of released weights are asked for without ``reference``.
    """
    check_is_module(model)
    layers = recast_layers(model)
    if not layers:
        raise RecastConfigError("the model has no RECAST layers: convert it with get_recast_model first")
    if adapter_name is None:
        active = [name for layer in layers.values() for name in layer.active_adapters]
        # a pool that shows the base of kept weights leaves no task active
        adapter_name = next(iter(active or [name for layer in layers.values() for name in layer.recast_bank]), None)
    banks = task_banks(model, adapter_name) if adapter_name else {}
    if not banks:
        raise RecastConfigError(f"the model has no task {adapter_name!r}; give the adapter_name of one")
    if reference is not None:
        _check_reference(reference, layers)
    modules = []
    for bank in banks.values():
        if bank.is_anchored:
            found: dict[str, Fidelity] = dict.fromkeys(bank.members, EXACT)
        elif reference is not None and bank.templates is not None and bank.base_coefficients is not None:
            weights = [getattr(reference.get_submodule(name), layers[name].weight_name) for name in bank.members]
            found = dict(zip(bank.members, measure_fidelity(weights, bank.templates, bank.base_coefficients), strict=True))
        else:
            found = bank.fidelity
        for member in bank.members:
            one = found.get(member)
            figures = (None, None, None) if one is None else (one.cosine, one.relative_error, one.energy_kept)
            modules.append(ModuleFidelity(member, bank.name, bank.is_anchored, *figures))
    features = () if batch is None else _compare_features(model, layers, batch, reference)
    return MimicryReport(tuple(modules), features)


def _check_reference(reference: nn.Module, layers: dict[str, RecastLayer]) -> None:
    check_plain(reference, "reference=")
    known = dict(reference.named_modules())
    for name, layer in layers.items():
        weight = getattr(known.get(name), layer.weight_name, None)
        if weight is None or (layer.is_released and weight.shape != layer.weight_shape):
            raise RecastConfigError(
                f"reference= is another model: its weight of {name} is not that of the model before it was converted\n"
                f"  given:    {'none' if weight is None else tuple(weight.shape)}\n  expected: {tuple(layer.weight_shape)}"
            )
        if layer.is_released and weight.is_floating_point() and not same_weight(weight_fingerprint(weight), layer.fingerprint):
            raise RecastConfigError(
                f"reference= has other weights than the model had before it was converted: {name} differs\n"
                f"  given:    {weight_fingerprint(weight)}\n  expected: {layer.fingerprint}"
            )


def _compare_features(
    model: nn.Module, layers: dict[str, RecastLayer], batch: Any, reference: nn.Module | None
) -> tuple[FeatureFidelity, ...]:
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RecastBankError(
            f"a task is merged into {merged[0]}: call model.unmerge_adapter() before the features are compared"
        )
    released = [name for name, layer in layers.items() if layer.is_released]
    if released and reference is None:
        raise RecastBankError(
            f"the pretrained weight of {released[0]} was released: give the plain pretrained model as reference=, or convert "
            "with keep_base_weights=True"
        )
    model = unwrapped(model)
    base = backbone_of(model)
    blocks = [b for b in dict.fromkeys(map(block_of, layers)) if b not in layers]
    try:
        for block in blocks:
            base.get_submodule(block)
    except AttributeError as error:
        raise RecastConfigError(
            f"a {type(model).__name__} around the converted model has no {block}: give mimicry_report the converted model "
            "itself, and a batch of its own inputs"
        ) from error
    with _without_task(model):
        with with_attribute(layers.values(), "instead", _mimicked):
            mine = _run(base, blocks, batch)
        if reference is None:
            with with_attribute(layers.values(), "instead", lambda layer: layer.pretrained_weight):
                wanted = _run(base, blocks, batch)
        else:
            wanted = _run(reference, blocks, batch)
    return tuple(_compare(name, mine[name], wanted[name]) for name in wanted if name in mine)


def _run(model: nn.Module, blocks: list[str], batch: Any) -> dict[str, Tensor]:
    with evaluating(model), torch.no_grad(), captured_outputs(model, blocks) as outputs:
        result = main_tensor(run_on(model, batch))
    found = {name: outputs[name] for name in blocks if name in outputs}
    return found if result is None else {**found, "output": result}


def _without_task(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which no task is active anywhere, its heads and other modules included."""
    if isinstance(model, PeftModel):
        return model.disable_adapter()
    held = [module for module in model.modules() if "_disable_adapters" in vars(module)]
    return with_attribute(held, "_disable_adapters", True)


def _mimicked(layer: RecastLayer) -> Tensor:
    """What a layer's bank composes without any task."""
    if not layer.compressed_bank:
        return layer.pretrained_weight
    bank, device = layer.compressed_bank[0], layer.weight_device
    return compose_weight(None, bank.get_templates(device), bank.base_of(layer.module_name).to(device))


def _compare(name: str, mine: Tensor, wanted: Tensor) -> FeatureFidelity:
    if mine.shape != wanted.shape:
        raise RecastConfigError(
            f"reference= gives another shape for {name}\n  given:    {tuple(wanted.shape)}\n  expected: {tuple(mine.shape)}"
        )
    a, b = mine.flatten(1).double(), wanted.to(mine.device).flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).mean()
    return FeatureFidelity(name, float(cosine), float((a - b).norm() / b.norm().clamp_min(1e-300)))


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
