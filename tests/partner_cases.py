"""Partners of tasks for tests: what each trains, the models that they stand in, and what they compute by plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from models import randomise, reference_model, seeded, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import AdaptFormerConfig, BiasConfig, CLRConfig, PartnerConfig, PiggybackConfig, RecastConfig, get_recast_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class TinyCnn(nn.Module):
    """Convolutions of all sizes and strides, two of one shape, and a head. Input: ``(batch, 3, height, width)``."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.norm(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(torch.tanh(self.point(x)).mean(dim=(2, 3)))


def tiny_cnn() -> TinyCnn:
    return seeded(TinyCnn)  # type: ignore[return-value]


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(5))


def with_biases(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model with biases that are not small: those of fresh norms are zero."""

    def built() -> nn.Module:
        model = build()
        generator = torch.Generator().manual_seed(6)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        return model

    return built


@dataclass(frozen=True)
class Case:
    """A partner with options on a model: the options, the numbers that it trains, worked out by hand."""

    partner: PartnerConfig
    numbers: int
    build: Callable[[], nn.Module] = tiny_vit
    inputs: Callable[..., Tensor] = vit_input
    targets: list[str] = field(default_factory=lambda: ["qkv"])

    @property
    def config(self) -> RecastConfig:
        return RecastConfig(target_modules=list(self.targets), partners=[self.partner])


CNN: dict[str, Any] = {"build": tiny_cnn, "inputs": image, "targets": ["conv1", "conv2"]}


CASES: dict[str, Case] = {
    # 4 blocks of (8 + 1) * 5 down and (5 + 1) * 8 up
    "adaptformer": Case(AdaptFormerConfig(bottleneck=5, dropout=0.0), 4 * (45 + 48)),
    "adaptformer with a norm": Case(AdaptFormerConfig(bottleneck=2, dropout=0.0, layer_norm=True), 4 * (18 + 24 + 16)),
    # qkv, proj, fc1 and fc2 of 4 blocks
    "bias": Case(BiasConfig(), 4 * 4, build=with_biases(tiny_vit)),
    "bias of named layers": Case(BiasConfig(target_modules=["fc1", "qkv"]), 4 * 2, build=with_biases(tiny_vit)),
    "bias of convolutions": Case(
        BiasConfig(target_modules=["stem", "point", "norm"]),
        3,
        build=with_biases(tiny_cnn),
        inputs=image,
        targets=["conv1", "conv2"],
    ),
    # 4, 4, 4 and 6 channels of 3x3
    "clr": Case(CLRConfig(), 18 * 9, **CNN),
    "clr with factors after 1x1": Case(CLRConfig(pointwise_kernel_size=1), 12 * 9 + 6, **CNN),
    # 4 blocks of 8 x 24; every bit has a score
    "piggyback": Case(PiggybackConfig(), 4 * 8 * 24),
    "piggyback beside the targets": Case(PiggybackConfig(target_modules=["qkv", "fc1"]), 4 * (8 * 24 + 8 * 16)),
    "piggyback on convolutions": Case(PiggybackConfig(target_modules="all-conv"), 108 + 144 + 144 + 24, **CNN),
}


ON_BIASES = [name for name in CASES if name.startswith("bias")]


ON_OUTPUTS = [name for name in CASES if not name.startswith(("piggyback", "bias"))]


ON_WEIGHTS = [name for name in CASES if name.startswith("piggyback")]


def learn(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Give coefficients and partners of a task numbers that a test would see."""
    randomise(model, adapter, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_partners(name) and f".{adapter}." in name:
                size = 0.02 if name.endswith("scores") else 0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def is_partners(name: str) -> bool:
    return "recast_partners" in name or "recast_masks" in name


def partner_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The numbers of a task's partners by the place and the last part of their names."""
    found = {}
    for name, parameter in model.named_parameters():
        if is_partners(name) and f".{adapter}." in name:
            place = name.split("recast_partners.")[1].split(".")[0].replace("%2E", ".") if "recast_partners" in name else ""
            place = place or name.removeprefix("base_model.model.").partition(".recast_masks")[0]
            found[f"{place}:{name.partition(f'.{adapter}.')[2]}"] = parameter.detach()
    return found


def learned(name: str, adapter: str = "default") -> PeftModel:
    case = CASES[name]
    model = get_recast_model(case.build(), case.config, adapter).eval()
    learn(model, adapter)
    return model


def expected_model(name: str, model: PeftModel) -> nn.Module:
    """A plain model that computes by plain arithmetic what the task's coefficients and partner should."""
    case = CASES[name]
    plain = reference_model(case.build(), model)
    tensors = partner_tensors(model)
    places = list(dict.fromkeys(key.partition(":")[0] for key in tensors))
    for place in places:
        own = {key.partition(":")[2]: value for key, value in tensors.items() if key.startswith(f"{place}:")}
        module = plain.get_submodule(place)
        parent = plain.get_submodule(place.rpartition(".")[0])
        if isinstance(case.partner, AdaptFormerConfig):
            setattr(parent, place.rpartition(".")[2], Beside(module, own))
        elif isinstance(case.partner, CLRConfig):
            channels, size = own["offset"].shape[0], own["offset"].shape[-1]
            follower = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
            identity = torch.zeros(channels, 1, size, size)
            identity[:, 0, size // 2, size // 2] = 1
            follower.weight.data = identity + own["offset"]
            setattr(parent, place.rpartition(".")[2], nn.Sequential(module, follower))
        elif isinstance(case.partner, BiasConfig):
            module.bias.data = module.bias.data * (1 + own["offset"])
        else:
            module.weight.data = module.weight.data * (own["scores"] > 0.005)
    return plain.eval()


class Beside(nn.Module):
    """AdaptFormer's equation, written down once more."""

    def __init__(self, mlp: nn.Module, own: dict[str, Tensor]) -> None:
        super().__init__()
        self.mlp, self.own = mlp, own

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if "normalization.weight" in self.own:
            h = F.layer_norm(x, x.shape[-1:], self.own["normalization.weight"], self.own["normalization.bias"])
        h = (h @ self.own["down_projection.weight"].T + self.own["down_projection.bias"]).clamp_min(0)
        return self.mlp(x) + 0.1 * (h @ self.own["up_projection.weight"].T + self.own["up_projection.bias"])


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
