"""What must hold of every architecture, as one function over a ``Case``.

For ``RecastConfig()`` exactly as it is:

    same output     converted model == plain model, to the last bit
    gradients       every coefficient of every target gets a gradient that is finite and not zero; where one does not, the
                    plain model's output must not depend on it either: it stays the same to the last bit when the weight is
                    replaced, or within rounding when the weight is moved along its templates (the scale of a weight that
                    the model standardises)
    merged          merged == live with coefficients that are not zero, within float32 rounding; unmerging gives the live
                    output back and disabling the plain model's, to the last bit
    reload          saved and loaded into a fresh model == live, to the last bit
    targets         no shorthand picks a classifier head, a tied weight or a shared module

A model is built several times from one seed, so ``Case.build`` has to be deterministic.

torch chooses among matrix products by whether a weight requires a gradient, even where none is recorded, and a conversion
freezes all but the targets. So "the plain model" is the one as it was built, or the one with the same weights frozen.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastLayer, RecastTargetError, get_recast_model, plan_recast

SHORTHANDS = (None, "all-attention", "all-mlp", "all-conv", "all-linear")
MERGE_TOLERANCE = 1e-5  # of the largest output: float32 rounding (6e-8) through some hundred layers
SEED = 0


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: of the model.
        build: makes the model; the same one each time.
        run: calls the model and gives back its outputs.
        heads: names of the modules that turn features into predictions, found without the library's help.
        gradients_in_training: for a model that has gradients in training mode alone.
    """

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]
    heads: Callable[[nn.Module], set[str]]
    gradients_in_training: bool = False


@dataclass
class Result:
    """What was found for one architecture.

    Attributes:
        name: of the model.
        targets: modules that were converted.
        coefficients: numbers that a task trains.
        parameters: of the plain model.
        leaves: last parts of the targets' names, each with its number.
        unused: targets with a coefficient that has no gradient, since the model's output does not depend on it.
        merge_difference: largest difference between merged and live in units of the largest output.
        failures: what does not hold; empty if all is well.
        seconds: that the checks took.
    """

    name: str
    targets: int = 0
    coefficients: int = 0
    parameters: int = 0
    leaves: str = ""
    unused: list[str] = field(default_factory=list)
    merge_difference: float = 0.0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


class CheckFailedError(AssertionError):
    """One of the things that must hold does not."""


def check_case(case: Case) -> Result:
    """Run all checks on one architecture; whatever goes wrong stands in the result's ``failures``."""
    result = Result(case.name)
    start = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum, and with it its last bit, may depend on the number of threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(case, result)
    except CheckFailedError as error:
        result.failures.append(str(error))
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        torch.set_num_threads(threads)
    result.seconds = time.perf_counter() - start
    return result


def _check(case: Case, result: Result) -> None:
    model = fresh_model(case)
    result.parameters = sum(p.numel() for p in model.parameters())
    plain = outputs_of(case, model)
    _require(all(torch.isfinite(t).all() for t in plain), "the plain model's own output is not finite")
    _require(same(plain, outputs_of(case, model)), "the plain model's own output differs from call to call")
    result.failures += target_failures(model, case.heads(model))

    converted = get_recast_model(model, RecastConfig())
    layers = {layer.module_name: layer for layer in converted.modules() if isinstance(layer, RecastLayer)}
    result.targets = len(layers)
    result.coefficients = sum(layer.recast_coefficients["default"].numel() for layer in layers.values())
    leaves = Counter(name.rpartition(".")[2] for name in layers)
    result.leaves = " ".join(f"{leaf}:{count}" for leaf, count in leaves.items())
    after = outputs_of(case, converted)
    _require(
        same(plain, after) or same(frozen_outputs(case, but=set(layers)), after),
        "the output after the conversion differs from the one before",
    )

    silent = without_gradient(case, converted, layers)
    used = changes_output(case, plain, silent, layers)
    result.unused = [name for name in silent if name not in used]
    if used:
        result.failures.append(f"no gradient, though the output depends on the weight: {shorten(used)}")

    set_coefficients(layers)
    live = outputs_of(case, converted)
    _require(not same(plain, live), "the output is the same with coefficients that are not zero")
    converted.merge_adapter()
    merged = outputs_of(case, converted)
    result.merge_difference = difference(merged, live)
    if not result.merge_difference <= MERGE_TOLERANCE:
        result.failures.append(f"merged and live differ by {result.merge_difference:.1e} of the largest output")
    converted.unmerge_adapter()
    _require(same(live, outputs_of(case, converted)), "merging and unmerging left another output")
    with converted.disable_adapter():
        disabled = outputs_of(case, converted)
    _require(
        same(plain, disabled) or same(frozen_outputs(case), disabled),
        "the output with the task disabled is not the plain model's",
    )
    with tempfile.TemporaryDirectory() as folder:
        converted.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(fresh_model(case), folder).eval()
    _require(same(live, outputs_of(case, reloaded)), "the output after saving and loading differs")
    _require(same(merged, outputs_of(case, reloaded.merge_and_unload())), "the unloaded model's output is not the merged one's")


# ---------------------------------------------------------------- models and outputs


def fresh_model(case: Case) -> nn.Module:
    """The case's model in eval mode, always with the same weights, none of them constant.

    Norms, biases and layer scales start at ones, zeros or something close to zero. Trained ones do not stand there, and
    zeros would hide whether a gradient gets through.
    """
    torch.manual_seed(SEED)
    model = case.build().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter == parameter.flatten()[:1]).all():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    measure_batch_norms(case, model)
    return model


def measure_batch_norms(case: Case, model: nn.Module) -> None:
    """Give batch norms the statistics of the case's inputs; with those that they start at, signals vanish or explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average
        norm.train()
    if norms:
        outputs_of(case, model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def frozen_outputs(case: Case, but: set[str] = frozenset()) -> list[Tensor]:  # type: ignore[assignment]
    """The plain model's outputs with its parameters frozen as a conversion leaves them."""
    model = fresh_model(case).requires_grad_(False)
    for name in but:
        target_weight(model, name).requires_grad_(True)
    return outputs_of(case, model)


def target_weight(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a plain model that a target of this name composes."""
    module = model.get_submodule(name)
    return module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight  # type: ignore


def outputs_of(case: Case, model: nn.Module) -> list[Tensor]:
    """All floating outputs of a model, without gradients."""
    with torch.no_grad():
        return list(_outputs(case, model))


def _outputs(case: Case, model: nn.Module) -> Iterator[Tensor]:
    torch.manual_seed(SEED)  # some models draw a random mask even in eval mode
    yield from tensors_in(case.run(model))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of outputs are equal to the last bit."""
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest difference between two lists of outputs, in units of the largest value of each."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if b.numel() else 0.0
        for a, b in zip(first, second, strict=True)
    )


# ---------------------------------------------------------------- gradients


def without_gradient(case: Case, model: nn.Module, layers: dict[str, RecastLayer]) -> dict[str, list[int]]:
    """The layers with coefficients whose gradient is missing, zero or not finite, by name, and which of them."""
    model.train(case.gradients_in_training)
    generator = torch.Generator().manual_seed(SEED)
    # a weighted sum: a plain one is constant behind a softmax or a norm
    total = sum(
        (output * torch.randn(output.shape, generator=generator)).sum()
        for output in _outputs(case, model)
        if output.requires_grad
    )
    _require(isinstance(total, Tensor), "no output depends on a coefficient")
    total.backward()  # type: ignore[union-attr]
    model.eval()
    silent = {}
    for name, layer in layers.items():
        coefficients = layer.recast_coefficients["default"]
        gradient = torch.zeros_like(coefficients) if coefficients.grad is None else coefficients.grad
        templates = [i for i, value in enumerate(gradient[0].tolist()) if value == 0 or not math.isfinite(value)]
        if templates:
            silent[name] = templates
    return silent


def changes_output(case: Case, plain: list[Tensor], silent: dict[str, list[int]], layers: dict[str, RecastLayer]) -> list[str]:
    """Those of the silent modules on which the plain model's output depends, as far as the silent templates move them."""
    if not silent:
        return []
    model = fresh_model(case)
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for name, indices in silent.items():
        weight = target_weight(model, name)
        kept = weight.detach().clone()
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * kept.std())
        is_read = not same(plain, outputs_of(case, model))
        members = layers[name].recast_bank["default"].members
        templates = [target_weight(model, members[i]).detach().clone() for i in indices]
        templates = [kept if members[i] == name else template for i, template in zip(indices, templates, strict=True)]
        weight.data.copy_(kept + sum((0.1 + 0.1 * i) * template for i, template in enumerate(templates)))
        has_gradient = layers[name].recast_coefficients["default"].grad is not None
        moves = difference(outputs_of(case, model), plain) > MERGE_TOLERANCE
        if is_read and (moves or not has_gradient):
            found.append(name)
        weight.data.copy_(kept)
    return found


def set_coefficients(layers: dict[str, RecastLayer]) -> None:
    """Give every coefficient a value of size 0.05 to 0.2."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for layer in layers.values():
            coefficients = layer.recast_coefficients["default"]
            sign = torch.randint(0, 2, coefficients.shape, generator=generator) * 2.0 - 1.0
            coefficients.copy_(sign * (0.05 + 0.15 * torch.rand(coefficients.shape, generator=generator)))


# ---------------------------------------------------------------- targets


def target_failures(model: nn.Module, heads: set[str]) -> list[str]:
    """What is wrong with the modules that the shorthands and None pick."""
    failures = []
    chosen = {shorthand: chosen_by(model, shorthand) for shorthand in SHORTHANDS}
    if not chosen[None]:
        failures.append("RecastConfig() picks nothing")
    # each module once: what lies below a shared module has several names, yet one place
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    slots = Counter(id(m) for parent in model.modules() for m in parent._modules.values())
    for shorthand, names in chosen.items():
        picked = [name for name in names if is_under(name, heads)]
        if picked:
            failures.append(f"{shorthand} picks a head: {shorten(picked)}")
        for name in names:
            if owners[id(target_weight(model, name))] != 1 or slots[id(model.get_submodule(name))] != 1:
                failures.append(f"{shorthand} picks {name}, which is tied or shared")
    if chosen["all-attention"] and chosen[None] != (chosen["all-mlp"] or chosen["all-attention"]):
        failures.append("None does not pick the feed-forward layers of a transformer, or its attention where it has none")
    return failures


def chosen_by(model: nn.Module, shorthand: str | None) -> tuple[str, ...]:
    """Names of the modules that a shorthand picks, none if it finds nothing."""
    try:
        return plan_recast(model, RecastConfig(target_modules=shorthand)).targets
    except RecastTargetError:
        return ()


def is_under(name: str, prefixes: set[str]) -> bool:
    """Whether a module is one of ``prefixes`` or inside of one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def names_of(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    """Names of given modules in a model."""
    wanted = {id(module) for module in modules}
    return {name for name, module in model.named_modules() if id(module) in wanted and name}


def shorten(names: list[str]) -> str:
    """A few names and how many there are."""
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailedError(message)
