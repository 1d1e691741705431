"""What a module is for, as its name and its surroundings say: the shorthands of ``target_modules``, and what None stands for.

A shorthand is one row in ``SHORTHANDS``: a name and a predicate over a ``Candidate``. Adding one touches nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from ..composition.kinds import CONVOLUTION, LINEAR, TRANSPOSED_LINEAR, family_of
from ..names import held_name
from .candidates import Candidate

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
# An MLP that makes a bias of relative positions (Swin V2, relative-position ViTs, MaxxViT) reads no samples.
_POSITION_MLP = re.compile(r"(^|_)(cpb_mlp|meta_mlp|rel_?pos|position_bias_mlp)$")
_MLP_LEAF = re.compile(
    r"^(ffn(_output)?|fc_?[12]|w[io](_\d)?|w[123]|lin[12]|linear[12]|pwconv[12]|(gate|up|down|gate_up)_proj|c_fc|dense_h_to_4h|dense_4h_to_h)$"
)
_EMBEDDING = re.compile(r"(^|\.)(patch_embed\w*|embeddings?|embed_tokens|stem|conv_stem)(\.|$)")
_POSITION = re.compile(r"(^|_)(pos|rel|relative|bias|cpb|rope|rotary|norm|gate)(_|$)|^norm|^(r|pos)_(net|proj)$|cpb")


def is_minor_convolution(candidate: Candidate) -> bool:
    """Whether it is there beside layers that do the work: it makes patches or joins them, or is a short filter in time."""
    module = candidate.module
    is_depthwise_filter = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    return is_depthwise_filter or bool(_EMBEDDING.search(candidate.name)) or ".downsample." in candidate.name


def is_linear(candidate: Candidate) -> bool:
    # by name as well: some models bring a linear layer of their own, such as I-BERT's QuantLinear
    return family_of(candidate.module) in (LINEAR, TRANSPOSED_LINEAR) or type(candidate.module).__name__.endswith("Linear")


def is_convolution(candidate: Candidate) -> bool:
    return family_of(candidate.module) is CONVOLUTION


def _block_kind(candidate: Candidate) -> str | None:
    """``"attention"``, ``"mlp"`` or None: what the nearest module above that says anything is."""
    words = _words_above(candidate)
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


def _words_above(candidate: Candidate) -> list[tuple[str, str]]:
    """Names and class names of the modules around one, the nearest first; what a wrapper holds has the wrapper's name."""
    words: list[tuple[str, str]] = []
    outer: str | None = None
    for slot, module in candidate.path:
        name = slot if outer is None else outer
        outer = name if held_name(module) is not None else None
        if outer is None:
            words.append((name, type(module).__name__))
    return words[:0:-1]  # without the model itself


def _is_attention(candidate: Candidate) -> bool:
    if isinstance(candidate.module, nn.MultiheadAttention):
        return True
    if not (is_linear(candidate) or is_convolution(candidate)) or _block_kind(candidate) != "attention":
        return False
    return not any(_POSITION.search(part) for part in candidate.name.split(".")[-2:])


def _is_mlp(candidate: Candidate) -> bool:
    if not (is_linear(candidate) or is_convolution(candidate)):
        return False
    if any(_POSITION_MLP.search(name) for name, _ in _words_above(candidate)):
        return False
    kind = _block_kind(candidate)
    leaf = candidate.name.rpartition(".")[2]
    return kind == "mlp" or (kind is None and bool(_MLP_LEAF.match(leaf)))


SHORTHANDS: dict[str, Callable[[Candidate], bool]] = {
    "all-linear": is_linear,
    "all-attention": _is_attention,
    "all-mlp": _is_mlp,
    "all-conv": is_convolution,
}


def default_shorthands(candidates: list[Candidate]) -> tuple[str, ...]:
    """What None stands for, the first that a model has: of a transformer its feed-forward layers."""
    if any(in_shape(c) and _is_attention(c) for c in candidates):
        return "all-mlp", "all-attention", "all-linear"
    return "all-conv", "all-linear"


def in_shape(candidate: Candidate) -> bool:
    return candidate.weight_name is not None and not isinstance(candidate.module, nn.Embedding)
