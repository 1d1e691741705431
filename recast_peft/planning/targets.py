"""Which modules of a model can be composed from templates, and which of them a config means.

A target shorthand is one row in ``SHORTHANDS``: a name and a predicate over a ``Candidate``. Adding one touches nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from ..config import RecastConfig
from ..errors import RecastTargetError
from ..names import BANK_CONTAINER, PARTNER_CONTAINER

# A component that decides what the modules below it are. Names and class names are searched from the module upwards, and
# the first component that says anything decides, so that the MLP inside an "attention block" is an MLP.
_CHANNEL_ATTENTION = re.compile(
    r"^(se|eca|cbam|ca)\d*$|SEModule|SELayer|Squeeze(?!Bert)|Cbam|Eca|GatherExcite|GlobalContext$|SplitAttn|SelectiveKernel"
)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|intermediate|dense(?:relu|act|gated)|^ff\d*$|layerff|(?<!Self)(?<!Attention)(?<!Cross)Output$|Mlp|MLP|FFN|FeedForward"
    r"|Intermediate|LayerFF|Dense(?:Relu|Act|Gated)"
)
# A block or stage that is called after its attention holds other things as well; SHSA, SHMA and MLA are kinds of attention.
_ATTENTION = re.compile(r"attn|attention|(Attn|Attention)(?!\w*(Block|Stage)$)|SHSA|SHMA|LiteMLA")
_MLP_LEAF = re.compile(
    r"^(fc_?[12]|w[io](_\d)?|w[123]|lin[12]|linear[12]|pwconv[12]|(gate|up|down|gate_up)_proj|c_fc|dense_h_to_4h|dense_4h_to_h)$"
)
_POSITION = re.compile(r"(^|_)(pos|rel|relative|bias|cpb|rope|rotary|norm|gate)(_|$)|^norm|^(r|pos)_(net|proj)$|cpb")
_HEAD_FIRST = re.compile(
    r"^(head|heads|head_dist|classifier|cls_classifier|distillation_classifier|fc|score|lm_head|qa_outputs|logits|logits_proj"
    r"|pre_classifier|classification_head|cls|seq_relationship|sequence_summary|summary|embed_out|proj_out|aux_head|prediction_head"
    r"|generator_lm_head|decode_head|auxiliary_head|vocab_projector|vocab_transform|vocab_layer_norm|last_linear)$"
)
_HEAD_LAST = re.compile(r"^(lm_head|embed_out|qa_outputs|last_linear|vocab_projector|distillation_classifier)$")


@dataclass(frozen=True)
class Candidate:
    """A module whose weight could be composed.

    Attributes:
        name: its name in the plain model (no ``base_layer`` of a tuner in it).
        module: the plain module, whatever tuner layers are around it.
        visible: the module that stands in the model now (a tuner layer, or the module itself).
        weight_name: the name of the parameter that is composed; None for a module that has none.
        reason: why the module cannot be a target; None if it can.
        path: the modules from the root down to the one above it, with their names: ``((name, module), ...)``.
    """

    name: str
    module: nn.Module
    visible: nn.Module
    weight_name: str | None
    reason: str | None
    path: tuple[tuple[str, nn.Module], ...]

    @property
    def weight(self) -> Tensor:
        """The parameter that is composed (None while a compressed bank stands for it)."""
        assert self.weight_name is not None
        return getattr(self.module, self.weight_name)


def find_candidates(model: nn.Module) -> list[Candidate]:
    """All modules of a model in the order of their definition, each with the reason why it cannot be a target, if any."""
    owners = _parameter_owners(model)
    places = _module_places(model)
    candidates = []
    for name, visible, path in _walk(model):
        module = visible.get_base_layer() if isinstance(visible, BaseTunerLayer) else visible
        weight_name, reason = _weight_of(visible, module)
        if weight_name is not None and reason is None:
            reason = _sharing(module, weight_name, owners, places[id(visible)])
        candidates.append(Candidate(name, module, visible, weight_name, reason, path))
    return candidates


def find_targets(model: nn.Module, config: RecastConfig) -> tuple[list[Candidate], dict[str, str]]:
    """The modules that a config means.

    Args:
        model: a plain model, or one that already has tuner layers.
        config: its ``groups`` are used by name if given, else ``target_modules`` and what restricts it.

    Returns:
        the targets in the order of their definition, and for each module that matched but was left out the reason.

    Raises:
        RecastTargetError: if nothing matches, or a module that was asked for by name cannot be a target.
    """
    candidates = find_candidates(model)
    if config.groups is not None:
        return _by_name(candidates, [m for members in config.groups.values() for m in members]), {}
    heads = head_names(model)
    if config.target_modules is None or (isinstance(config.target_modules, str) and config.target_modules in SHORTHANDS):
        targets, skipped = _by_shorthand(candidates, config, heads)
    else:
        targets, skipped = _by_pattern(candidates, config)
    if not targets:
        raise _nothing_matches(candidates, config, skipped)
    return targets, skipped


def head_names(model: nn.Module) -> set[str]:
    """Names of the modules that turn features into predictions, by timm's and transformers' conventions and by name."""
    found: list[nn.Module] = []
    for method in ("get_classifier", "get_output_embeddings"):
        try:
            result = getattr(model, method)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        found += [m for m in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(m, nn.Module)]
    identities = {id(module) for module in found}
    names = {name for name, module in model.named_modules() if id(module) in identities}
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if isinstance(base, nn.Module):  # transformers: a model for a task is the base model with the task's modules beside it
        names.update(name for name, child in model.named_children() if child is not base)
    convention = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    classifier = convention.get("classifier") if isinstance(convention, dict) else None
    names.update([classifier] if isinstance(classifier, str) else classifier or ())
    for name, _ in model.named_modules():
        parts = name.split(".")
        if _HEAD_FIRST.match(parts[0]) or _HEAD_LAST.match(parts[-1]):
            names.add(name)
    return {name for name in names if name}


def _by_name(candidates: list[Candidate], names: list[str]) -> list[Candidate]:
    known = {c.name: c for c in candidates}
    missing = [name for name in names if name not in known]
    if missing:
        near = {m: difflib.get_close_matches(m, known, n=2) for m in missing[:3]}
        hints = "; ".join(f"{m!r}: near {n}" if n else f"{m!r}: nothing near" for m, n in near.items())
        raise RecastTargetError(
            f"the task names {len(missing)} of {len(names)} target modules that this model does not have ({hints}). "
            "Load the task on the architecture that it was made for."
        )
    refused = {name: known[name].reason or "it has no weight of its own" for name in names if not _usable(known[name])}
    if refused:
        raise _cannot_be_targets(refused)
    wanted = set(names)
    return [c for c in candidates if c.name in wanted]


def _by_pattern(candidates: list[Candidate], config: RecastConfig) -> tuple[list[Candidate], dict[str, str]]:
    matched = [c for c in candidates if _is_meant(config, c.name)]
    # a multi-head attention module stands for both of its projections
    chosen = {c.name for c in matched}
    for attention in [c for c in matched if isinstance(c.module, nn.MultiheadAttention)]:
        name = f"{attention.name}.out_proj"
        chosen.update(c.name for c in candidates if c.name == name and not _left_out(config, name))
    skipped, refused = {}, {}
    for candidate in matched:
        if candidate.weight_name is None and candidate.reason is None:
            skipped[candidate.name] = f"{type(candidate.module).__name__} has no weight of its own"
        elif candidate.reason is not None:
            refused[candidate.name] = candidate.reason
    if refused:
        raise _cannot_be_targets(refused)
    return [c for c in candidates if c.name in chosen and _usable(c)], skipped


def _by_shorthand(candidates: list[Candidate], config: RecastConfig, heads: set[str]) -> tuple[list[Candidate], dict[str, str]]:
    wanted = (config.target_modules,) if config.target_modules else _default_shorthands(candidates)
    skipped: dict[str, str] = {}
    for shorthand in wanted:
        assert isinstance(shorthand, str)
        predicate = SHORTHANDS[shorthand]
        matched = [c for c in candidates if _in_shape(c) and predicate(c)]
        if config.target_modules is None and shorthand == "all-conv" and all(map(_is_minor_convolution, matched)):
            continue  # a patch embedding, or the short filters of a state space model, make no convolutional network
        names = [c.name for c in matched if not _under(c.name, heads)]
        if not names:
            continue
        chosen = set(names)
        targets = [c for c in matched if c.name in chosen and _is_kept(config, c.name)]
        skipped = {c.name: c.reason for c in targets if c.reason is not None}
        targets = [c for c in targets if c.reason is None]
        if targets:
            return targets, skipped
    return [], skipped


def _default_shorthands(candidates: list[Candidate]) -> tuple[str, ...]:
    """What None stands for, the first that a model has: of a transformer its feed-forward layers (see docs/accuracy.md)."""
    if any(_in_shape(c) and _is_attention(c) for c in candidates):
        return "all-mlp", "all-attention", "all-linear"
    return "all-conv", "all-linear"


def _with_targets(config: RecastConfig, names: list[str] | str | None) -> RecastConfig:
    explicit = RecastConfig.__new__(RecastConfig)
    explicit.__dict__.update(config.__dict__)
    explicit.target_modules = names
    return explicit


def _is_meant(config: RecastConfig, name: str) -> bool:
    """PEFT's rule; but it sees no layer index in a list that lies in no other module, such as ``blocks.0.attn.qkv``."""
    first = re.match(r"([^.]+)\.\d+\.", name)
    if first and config.layers_to_transform is not None and not config.layers_pattern:
        config = _with_targets(config, config.target_modules)
        config.layers_pattern = [first.group(1)]
    return bool(check_target_module_exists(config, name))


def _is_kept(config: RecastConfig, name: str) -> bool:
    """Whether a module that was chosen by its kind stays, for all that the config leaves out."""
    if "." not in name:
        return config.layers_to_transform is None and not _left_out(config, name)
    # the last part alone: for a whole name PEFT would not look at the layer's index
    return _is_meant(_with_targets(config, [name.rpartition(".")[2]]), name)


def _left_out(config: RecastConfig, name: str) -> bool:
    return not check_target_module_exists(_with_targets(config, [name]), name)


def _usable(candidate: Candidate) -> bool:
    return candidate.weight_name is not None and candidate.reason is None


def _in_shape(candidate: Candidate) -> bool:
    return candidate.weight_name is not None and not isinstance(candidate.module, nn.Embedding)


def _under(name: str, prefixes: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in prefixes for i in range(1, len(parts) + 1))


def _is_embedding(candidate: Candidate) -> bool:
    return bool(re.search(r"(^|\.)(patch_embed\w*|embeddings?|embed_tokens|stem|conv_stem)(\.|$)", candidate.name))


def _is_minor_convolution(candidate: Candidate) -> bool:
    """Whether it is there beside layers that do the work: it makes patches or joins them, or is a short filter in time."""
    module = candidate.module
    is_depthwise_filter = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    return is_depthwise_filter or _is_embedding(candidate) or ".downsample." in candidate.name


def _is_linear(candidate: Candidate) -> bool:
    # by name as well: some models bring a linear layer of their own, such as I-BERT's QuantLinear
    return isinstance(candidate.module, (nn.Linear, Conv1D)) or type(candidate.module).__name__.endswith("Linear")


def _is_convolution(candidate: Candidate) -> bool:
    return isinstance(candidate.module, nn.modules.conv._ConvNd)


def _block_kind(candidate: Candidate) -> str | None:
    """``"attention"``, ``"mlp"`` or None: what the nearest module above that says anything is."""
    words = [
        (name, type(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).__name__)
        for name, module in reversed(candidate.path[1:])
    ]
    for place, here in enumerate(words):
        if any(map(_CHANNEL_ATTENTION.search, here)):
            return None
        if any(map(_MLP.search, here)):
            return "mlp"
        if any(map(_ATTENTION.search, here)):
            # the "attention" directly inside of a squeeze-and-excitation module is that module's own
            above = words[place + 1] if place + 1 < len(words) else ()
            return None if any(map(_CHANNEL_ATTENTION.search, above)) else "attention"
    return None


def _is_attention(candidate: Candidate) -> bool:
    if isinstance(candidate.module, nn.MultiheadAttention):
        return True
    if not (_is_linear(candidate) or _is_convolution(candidate)) or _block_kind(candidate) != "attention":
        return False
    return not any(_POSITION.search(part) for part in candidate.name.split(".")[-2:])


def _is_mlp(candidate: Candidate) -> bool:
    if not (_is_linear(candidate) or _is_convolution(candidate)):
        return False
    kind = _block_kind(candidate)
    leaf = candidate.name.rpartition(".")[2]
    return kind == "mlp" or (kind is None and bool(_MLP_LEAF.match(leaf)))


SHORTHANDS: dict[str, Callable[[Candidate], bool]] = {
    "all-linear": _is_linear,
    "all-attention": _is_attention,
    "all-mlp": _is_mlp,
    "all-conv": _is_convolution,
}


def _walk(
    module: nn.Module, prefix: str = "", path: tuple[tuple[str, nn.Module], ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, nn.Module], ...]]]:
    """All modules once, by their names in the plain model; what tuners added is passed over."""
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, path: tuple[tuple[str, nn.Module], ...]) -> Iterator:
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        here = (*path, (prefix.rpartition(".")[2], inner))
        for child_name, child in inner.named_children():
            if isinstance(child, AuxiliaryTrainingWrapper) or id(child) in seen:
                continue
            if child_name in (BANK_CONTAINER, PARTNER_CONTAINER):
                continue
            seen.add(id(child))
            name = f"{prefix}.{child_name}" if prefix else child_name
            yield name, child, here
            yield from visit(child, name, here)

    yield from visit(module, prefix, path)


def _weight_of(visible: nn.Module, module: nn.Module) -> tuple[str | None, str | None]:
    """The name of the parameter to compose, and why it cannot be composed."""
    kind = type(module).__name__
    name = "weight"
    if isinstance(module, nn.MultiheadAttention):
        name = "in_proj_weight"
        if module._parameters.get(name) is None and name not in _released(visible):
            return name, "its query, key and value have different sizes; only the fused projection is supported"
    if any(getattr(module, n, None) is not None for n in ("qweight", "W_q", "quant_state")):
        return name, f"{kind} is quantized, which is not supported yet; load the model without quantization"
    weight = module._parameters.get(name)
    if weight is None:
        if name in _released(visible):
            return name, None
        if torch.nn.utils.parametrize.is_parametrized(module, name):
            return name, "its weight is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
        return None, None
    if is_lazy(weight):
        return name, f"{kind} is not initialised yet; run the model once before it is converted"
    is_plain = weight.is_floating_point() and weight.element_size() >= 2 and weight.layout == torch.strided
    if not is_plain or hasattr(weight, "quant_state"):
        return name, (
            f"its weight is of {weight.dtype} ({weight.layout}), a sparse, integer or quantized type, which is not supported "
            "yet; load the model dense and in float32, bfloat16 or float16"
        )
    if weight.ndim < 2:
        return (
            name,
            f"the weight of {kind} is a vector of shape {tuple(weight.shape)}; at least two dimensions are needed",
        )
    return name, None


def _released(visible: nn.Module) -> tuple[str, ...]:
    """The weight that a compressed bank stands for, if there is a layer of ours."""
    layer = composed_layer(visible)
    return (str(layer.weight_name),) if layer is not None and layer.is_compressed else ()


def composed_layer(visible: nn.Module) -> Any:
    """RECAST's layer of a module, also inside layers of other methods; None if there is none."""
    layer: Any = visible
    while isinstance(layer, BaseTunerLayer) and not hasattr(type(layer), "is_compressed"):
        layer = layer.base_layer  # type: ignore[attr-defined]
    return layer if isinstance(layer, BaseTunerLayer) else None


def _sharing(module: nn.Module, weight_name: str, owners: dict[int, list[str]], places: list[str]) -> str | None:
    if len(places) > 1:
        return f"the module is shared by {' and '.join(places)}; a shared module cannot be replaced in one of them alone"
    weight = module._parameters.get(weight_name)
    names = owners.get(id(weight), [])
    if weight is not None and len(names) > 1:
        return f"its weight is tied: one parameter is {' and '.join(names)}; untie it first (clone the weight)"
    return None


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{name}.{parameter_name}" if name else parameter_name)
    return owners


def _module_places(model: nn.Module) -> dict[int, list[str]]:
    """For every module the names of the slots that hold it; the same parent reached by two ways counts once."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            if child is not None:
                places[id(child)].append(f"{name}.{child_name}" if name else child_name)
    return places


def _cannot_be_targets(refused: dict[str, str]) -> RecastTargetError:
    shown = "\n".join(f"  {name}: {reason}" for name, reason in list(refused.items())[:8])
    more = f"\n  ... and {len(refused) - 8} more" if len(refused) > 8 else ""
    return RecastTargetError(
        f"{len(refused)} of the modules that target_modules names cannot be composed from templates:\n{shown}{more}\n"
        "Leave them out with exclude_modules, or name the modules that are meant."
    )


def _nothing_matches(candidates: list[Candidate], config: RecastConfig, skipped: dict[str, str]) -> RecastTargetError:
    supported = [c for c in candidates if _usable(c)]
    leaves = sorted({c.name.rpartition(".")[2] for c in supported})
    wanted = config.target_modules
    names = [wanted] if isinstance(wanted, str) else list(wanted or [])
    near = sorted({hit for n in names for hit in difflib.get_close_matches(n, leaves + [c.name for c in supported], n=3)})
    message = f"Target modules {wanted!r} not found in the base model, or all of them were left out."
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if getattr(config, name):
            message += f" Note: {name}={getattr(config, name)!r}."
    if skipped:
        message += "\nMatched but not usable: " + "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:5])
    if near:
        message += f"\nNear: {', '.join(near)}"
    shown = ", ".join(leaves[:40]) + (", ..." if len(leaves) > 40 else "")
    return RecastTargetError(f"{message}\nThe model has these modules that can be targets: {shown or 'none'}")


def check_materialised(targets: list[Candidate]) -> None:
    """Refuse targets whose weight is on the meta device.

    Raises:
        RecastTargetError: naming the modules.
    """
    empty = [c.name for c in targets if (w := c.module._parameters.get(c.weight_name or "")) is not None and w.is_meta]
    if empty:
        raise RecastTargetError(
            f"{len(empty)} target modules are on the meta device and hold no numbers ({', '.join(empty[:3])}, ...): "
            "load the pretrained weights before the model is converted (low_cpu_mem_usage is for the adapter alone)."
        )


def total_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each counted once."""
    tensors: dict[int, torch.Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
