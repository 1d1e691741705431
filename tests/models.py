"""Small models for tests, one for each kind of module that can be a target, and a reference that needs no tuner.

A kind of module is one row in ``KINDS``; every test that is parametrised over ``KINDS`` runs on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft import RecastConfig, RecastLayer, get_recast_model

WIDTH = 8
CLASSES = 3


class Around(nn.Module):
    """What a user may put around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Mlp(nn.Module):
    """fc1 and fc2 of a transformer block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention with a fused projection, as timm writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class TinyVit(nn.Module):
    """Blocks of attention and MLP on tokens, and a head. Input: ``(batch, tokens, width)``."""

    def __init__(self, depth: int = 4, width: int = WIDTH, classes: int = CLASSES) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class Chain(nn.Module):
    """Layers of one kind, one after the other, with a bounded step between them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Repeated(nn.Module):
    """One linear layer under two names, and one block at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.first
        block = nn.Sequential(nn.Linear(4, 4))
        self.blocks, self.tail = nn.ModuleList([block, nn.Sequential(nn.Linear(4, 4))]), block

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.own, self.again, *self.blocks, self.tail):
            x = torch.tanh(layer(x))
        return x


class WeightReader(nn.Module):
    """Never calls its projection: it reads the weight, and asks the projection for other attributes."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.proj.bias is None
        assert x.shape[-1] == self.proj.in_features
        return F.linear(x, self.proj.weight)


class ScaledLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2.0 * self.weight, self.bias).clamp(-1.5, 1.5)


class StandardisedConv2d(nn.Conv2d):
    """A convolution that standardises its weight in each call."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = self.weight.std(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-3), self.bias, self.stride, self.padding)


class AttentionNet(nn.Module):
    """Multi-head attention modules, called for self-attention."""

    def __init__(self, batch_first: bool, depth: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        self.attns = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=batch_first) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for attn in self.attns:
            x = x + attn(x, x, x, need_weights=False)[0]
        return x


class EncoderNet(nn.Module):
    """torch's own transformer encoder, whose eval mode takes a fast path that reads weights."""

    def __init__(self, depth: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        for parameter in self.parameters():  # the copies start equal, which would hide a mix-up of layers
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class EmbeddingNet(nn.Module):
    """Two embedding tables of one shape. Input: token ids."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(11, width) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.tables[0](ids) * self.tables[1](ids))


@dataclass(frozen=True)
class Kind:
    """A kind of target module: how to build a model of it, its input, and what to target."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: list[str] = field(default_factory=lambda: ["0", "1", "2"])
    config: dict[str, Any] = field(default_factory=dict)
    mixed_batch: bool = True


def _chain(layer: Callable[[], nn.Module], depth: int = 3) -> Callable[[], nn.Module]:
    return lambda: Chain([layer() for _ in range(depth)])


def _tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*(shape or (2, 5, WIDTH)), generator=torch.Generator().manual_seed(11))


def _transposed_linear() -> nn.Module:
    layer = Conv1D(WIDTH, WIDTH)
    nn.init.normal_(layer.weight, std=0.3)  # GPT-2's 0.02 would hide what a task does
    return layer


def _conv(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return _chain(partial(kind, 4, 4, kernel_size=3, **options))


KINDS: dict[str, Kind] = {
    "linear": Kind(_chain(lambda: nn.Linear(WIDTH, WIDTH)), _tokens()),
    "linear without bias": Kind(_chain(lambda: nn.Linear(WIDTH, WIDTH, bias=False)), _tokens()),
    "conv1d": Kind(_conv(nn.Conv1d, padding=1), _tokens(2, 4, 9)),
    "conv2d": Kind(_conv(nn.Conv2d, padding=1), _tokens(2, 4, 6, 5)),
    "conv2d with stride": Kind(_conv(nn.Conv2d, padding=1, stride=2), _tokens(2, 4, 9, 9)),
    "conv2d padded by reflection": Kind(_conv(nn.Conv2d, padding=1, padding_mode="reflect"), _tokens(2, 4, 6, 5)),
    "conv2d padded in a circle": Kind(_conv(nn.Conv2d, padding=(1, 2), padding_mode="circular"), _tokens(2, 4, 6, 5)),
    "conv2d padded to the same size": Kind(_conv(nn.Conv2d, padding="same", dilation=2), _tokens(2, 4, 6, 5)),
    "conv2d with dilation and groups": Kind(_conv(nn.Conv2d, padding=2, dilation=2, groups=2), _tokens(2, 4, 6, 5)),
    "conv2d depth-wise": Kind(_conv(nn.Conv2d, padding=1, groups=4), _tokens(2, 4, 6, 5)),
    "conv3d": Kind(_conv(nn.Conv3d, padding=1), _tokens(2, 4, 3, 4, 5)),
    "transposed conv2d": Kind(_conv(nn.ConvTranspose2d, padding=1), _tokens(2, 4, 6, 5)),
    "transformers Conv1D": Kind(_chain(_transposed_linear), _tokens()),
    "linear subclass": Kind(_chain(lambda: ScaledLinear(WIDTH, WIDTH)), _tokens()),
    "weight-standardised conv2d": Kind(_chain(lambda: StandardisedConv2d(4, 4, 3, padding=1)), _tokens(2, 4, 6, 5)),
    "bilinear weight reader": Kind(_chain(WeightReader), _tokens(), ["proj"], mixed_batch=False),
    "embedding": Kind(
        EmbeddingNet, lambda: torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(11)), ["0", "1"]
    ),
    "multi-head attention": Kind(lambda: AttentionNet(False), _tokens(), ["0", "1"], mixed_batch=False),
    "multi-head attention, batch first": Kind(lambda: AttentionNet(True), _tokens(), ["0", "1"], mixed_batch=False),
    "torch's transformer encoder": Kind(EncoderNet, _tokens(), ["self_attn", "linear1", "linear2"], mixed_batch=False),
    "vision transformer": Kind(TinyVit, _tokens(), ["qkv", "proj", "fc1", "fc2"]),
}


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model from a seed, in eval mode, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        seed_cpu(seed)
        return build().eval()


def seed_cpu(seed: int) -> None:
    """As ``torch.manual_seed``, which also writes its caller's stack down for each kind of accelerator that is not there."""
    torch.default_generator.manual_seed(seed)


def tiny_vit(seed: int = 0, **kwargs: Any) -> TinyVit:
    return seeded(lambda: TinyVit(**kwargs), seed)  # type: ignore[return-value]


def small_transformer(kind: str, seed: int = 0, *, scale: int = 1, **fields: Any) -> nn.Module:
    """A model of transformers with two layers: ``"bert"``, ``"gpt2"``, ``"llama"``, ``"t5"`` or ``"vit"``.

    Args:
        kind: its name.
        seed: random seed for its weights.
        scale: how many times 16 it is wide.
        fields: fields of its config that are to be others.
    """
    import transformers

    width, hidden, heads, words = 16 * scale, 24 * scale, 2 * scale, {"vocab_size": 20 * scale}
    layers = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": 2, "num_attention_heads": heads}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    name, own = {
        "bert": ("BertForSequenceClassification", {**layers, **words, **still, "max_position_embeddings": 8, "num_labels": 2}),
        "gpt2": ("GPT2LMHeadModel", {**words, "n_embd": width, "n_layer": 2, "n_head": heads, "n_positions": width}),
        "llama": ("LlamaForCausalLM", {**layers, **words, "num_key_value_heads": scale}),
        "t5": ("T5ForConditionalGeneration", {**words, "d_model": width, "d_kv": 8, "d_ff": hidden, "num_layers": 2}),
        "vit": ("ViTForImageClassification", {**layers, "image_size": 8, "patch_size": 4, "num_labels": 3}),
    }[kind]
    if kind == "t5":
        own |= {"num_heads": heads, "decoder_start_token_id": 0}
    else:
        own |= {"initializer_range": 0.3}  # the library's 0.02 would hide what a task does
    if kind == "gpt2":
        own |= {"bos_token_id": 1, "eos_token_id": 1}
    build = getattr(transformers, name)
    return seeded(lambda: build(build.config_class(**{**own, **fields})), seed)


def captured(model: nn.Module, static: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a model's call with a tensor, and the tensor that it writes the output to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)
    return graph, out


def small_vit(num_classes: int = 7, depth: int = 2, seed: int = 0) -> nn.Module:
    """timm's vision transformer for grey pictures of 16 x 16 pixels; the global generator is seeded."""
    from timm.models.vision_transformer import VisionTransformer

    seed_cpu(seed)
    sizes = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "num_heads": 2}
    return VisionTransformer(**sizes, depth=depth, num_classes=num_classes).eval()


def run_at_once(functions: Sequence[Callable[[], Any]]) -> None:
    """Run functions in threads of their own; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(functions)) as executor:
        for future in [executor.submit(function) for function in functions]:
            future.result(timeout=120)


def vit_input(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(11))


def converted(adapter_name: str = "default", depth: int = 4, **config: Any) -> PeftModel:
    """A tiny vision transformer with one task on its fused projections (unless the config says otherwise)."""
    config.setdefault("target_modules", ["qkv"])
    return get_recast_model(tiny_vit(depth=depth), RecastConfig(**config), adapter_name).eval()


def layers_of(model: nn.Module) -> dict[str, RecastLayer]:
    return {m.module_name: m for m in model.modules() if isinstance(m, RecastLayer)}


def move(model: nn.Module, part: str | None = None, seed: int = 1, size: float = 0.1) -> None:
    """Move whatever is trained in a model, or has ``part`` in its name: what stands for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad if part is None else part in name:
                moved = torch.randn(parameter.shape, generator=generator) * (0.02 if name.endswith("scores") else size)
                # where PEFT has drawn numbers, they would be others the next time
                parameter.copy_(moved if "lora_" in name else parameter + moved.to(parameter))


def randomise(model: nn.Module, adapter: str = "default", seed: int = 1, size: float = 0.3) -> None:
    """Give a task coefficients that a test would see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model).values():
            if adapter in layer.recast_coefficients:
                values = layer.recast_coefficients[adapter]
                values.copy_(torch.randn(values.shape, generator=generator).to(values) * size)


def offsets_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The mean of a task's coefficient sets, by module."""
    return {
        name: layer.recast_coefficients[adapter].mean(dim=0)
        for name, layer in layers_of(model).items()
        if adapter in layer.recast_coefficients
    }


def weight_names(plain: nn.Module, modules: Sequence[str]) -> dict[str, str]:
    """The name of the parameter that is composed, by module."""
    return {
        name: f"{name}.in_proj_weight" if isinstance(plain.get_submodule(name), nn.MultiheadAttention) else f"{name}.weight"
        for name in modules
    }


def composed_weights(plain: nn.Module, model: PeftModel, adapters: Sequence[str] = ("default",)) -> dict[str, Tensor]:
    """The weights of exact banks by plain arithmetic: W_l + sum_i d[l, i] * W_i over the members i of l's group."""
    weights: dict[str, Tensor] = {}
    for adapter in adapters:
        groups = model.peft_config[adapter].groups
        names = weight_names(plain, [member for members in groups.values() for member in members])
        offsets = offsets_of(model, adapter)
        for members in groups.values():
            pretrained = [plain.get_parameter(names[member]) for member in members]
            for member in members:
                weight = weights.get(names[member], plain.get_parameter(names[member]))
                for i, template in enumerate(pretrained):
                    weight = weight + offsets[member][i] * template
                weights[names[member]] = weight
    return weights


def reference_model(plain: nn.Module, model: PeftModel, adapters: Sequence[str] = ("default",)) -> nn.Module:
    """A plain copy whose target weights were composed by plain arithmetic."""
    result = copy.deepcopy(plain)
    with torch.no_grad():
        for name, weight in composed_weights(plain, model, adapters).items():
            result.get_parameter(name).copy_(weight)
    return result


def outputs(model: nn.Module, inputs: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs, **kwargs)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a failed verb must leave as it was."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "attributes": sorted(model.__dict__),
        "tasks": {n: sorted(layer.recast_coefficients) + sorted(layer.recast_bank) for n, layer in layers_of(model).items()},
        "active": {n: list(layer.active_adapters) for n, layer in layers_of(model).items()},
        "training": [m.training for m in model.modules()],
    }
