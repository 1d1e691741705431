"""All mimicry methods side by side: time, error and cosine of the weights, error of the features, accuracy.

    python examples/benchmarks/mimicry.py random     # MLP of ViT-Small's shape, random weights, groups of 2, n = 2 and n = 1
    python examples/benchmarks/mimicry.py trained    # the glyph backbone: n = L/2, on data that nothing was fitted to

On random weights the features are those of a random batch. On the glyph backbone ``data_aware`` is fitted to pretraining
images; features and accuracy (of a linear probe that was fitted to the pretrained model's features) are measured on the test
images of tasks whose characters pretraining never showed.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Tables, arguments, finish, start
from torch import Tensor, nn

from recast_peft import RecastConfig, fit_bank, get_recast_model, mimicry_report
from recast_peft.mimicry import AutoEncoder, DataAware, Gradient, MimicryMethod, resolve_method

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


METHOD_NAMES = [
    "closed_form",
    "gradient",
    "gradient from closed form",
    "autoencoder",
    "data_aware",
    "data_aware, no distillation",
]


class MlpBlocks(nn.Module):
    """The MLPs of a vision transformer, each with its norm and residual, on ``(batch, tokens, width)``."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
            for _ in range(depth)
        )
        for block in self.blocks:
            for name in ("fc1", "fc2"):
                nn.init.xavier_uniform_(block[name].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features after the last block."""
        for block in self.blocks:
            x = x + block["fc2"](F.gelu(block["fc1"](block["norm"](x))))
        return x


def measure(
    model: nn.Module,
    config: RecastConfig,
    fit_batches: list[Tensor],
    test_batch: Tensor,
    accuracy: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """Convert a copy of the model and say how near it is."""
    copied = copy.deepcopy(model)
    start = time.perf_counter()
    if config.method.needs_data:
        config.bank = fit_bank(copied, config, fit_batches)
    converted = get_recast_model(copied, config).eval()
    seconds = time.perf_counter() - start
    report = mimicry_report(converted, test_batch, reference=model)
    output = report.features[-1]
    return {
        "seconds": seconds,
        "exact": report.is_exact,
        "relative_error": report.mean_relative_error,
        "cosine": report.mean_cosine,
        "worst_cosine": min(m.cosine for m in report.modules if m.cosine is not None),
        "output_error": output.relative_error,
        "output_cosine": output.cosine,
        "accuracy": accuracy(converted),
    }


def linear_probe(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """A ridge classifier of standardised features; returns the function from features to labels."""
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)

    def rows(values: Tensor) -> Tensor:
        return F.pad((values - mean) / deviation, (0, 1), value=1.0).double()

    x, y = rows(features), F.one_hot(labels, classes).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    return lambda values: (rows(values) @ weights).argmax(dim=1)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs of a model, a few hundred images at a time."""
    return torch.cat([model(part) for part in images.split(256)])


def random_setting(depth: int, seed: int) -> tuple[nn.Module, list[Tensor], Tensor, Callable[[nn.Module], float]]:
    """MLP weights of ViT-Small's shape, and random batches."""
    torch.manual_seed(seed)
    model = MlpBlocks(depth, 384).eval()
    batches = [torch.randn(8, 64, 384) for _ in range(3)]
    return model, batches[:2], batches[2], lambda converted: float("nan")


def trained_setting(tasks: tuple[str, ...], seed: int) -> tuple[nn.Module, list[Tensor], Tensor, Callable[[nn.Module], float]]:
    """The glyph backbone, pretraining images to fit to, and the accuracy over test images of several tasks."""
    from glyph_backbone import load_backbone
    from glyphs import load_task, pretraining_batches

    model = load_backbone()
    fit = [images for images, _ in pretraining_batches(16, 64, seed=1000 + seed)]
    loaded = [load_task(name, seed=seed, test_per_class=20) for name in tasks]
    probes = [linear_probe(features_of(model, t.train_images), t.train_labels, t.num_classes) for t in loaded]

    def accuracy(converted: nn.Module) -> float:
        right = [p(features_of(converted, t.test_images)) == t.test_labels for p, t in zip(probes, loaded, strict=True)]
        return float(torch.cat(right).float().mean())

    return model, fit, torch.cat([t.test_images for t in loaded])[::3], accuracy


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("weights", nargs="?", choices=["random", "trained"], default="random")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the random model (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES)
    parser.add_argument("--steps", type=int, help="steps of gradient and autoencoder instead of the paper's")
    parser.add_argument("--distill-steps", type=int, default=100, help="of data_aware (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", help="target modules (default: fc1 fc2)")
    parser.add_argument("--templates", type=int, nargs="+", help="n (default: 2 and 1 for random, 1 for trained)")
    parser.add_argument("--tasks", nargs="+", default=["greek", "cyrillic", "hebrew"])
    parser.add_argument("--seed", type=int, default=0)
    options = start(parser, given)
    if options.quick:
        options.weights, options.depth, options.steps = "random", 2, 2
        options.methods = ["closed_form", "gradient", "autoencoder"]
    steps = {} if options.steps is None else {"steps": options.steps}
    methods: dict[str, MimicryMethod] = {
        "closed_form": resolve_method("closed_form"),
        "gradient": Gradient(seed=options.seed, **steps),
        "gradient from closed form": Gradient(seed=options.seed, start="closed_form", learning_rate=1e-3, **steps),
        "autoencoder": AutoEncoder(seed=options.seed, **steps),
        "data_aware": DataAware(distill_steps=options.distill_steps),
        "data_aware, no distillation": DataAware(distill_steps=0),
    }
    if options.weights == "random":
        setting = random_setting(options.depth, options.seed)
    else:
        setting = trained_setting(tuple(options.tasks), options.seed)
    model, fit, test, accuracy = setting
    if options.weights == "trained":
        print(f"accuracy of the pretrained model: {accuracy(model):.3f}")
    # what the first conversion of a process loads is not the method's time
    get_recast_model(MlpBlocks(2, 16), RecastConfig(target_modules=["fc1"], num_templates=1))
    found = []
    for templates in options.templates or ([2, 1] if options.weights == "random" else [1]):
        for name in options.methods:
            targets = options.targets or ["fc1", "fc2"]
            config = RecastConfig(target_modules=targets, group_size=2, num_templates=templates, mimicry=methods[name])
            if config.method.needs_data and templates == 2:
                continue  # exact already
            found.append({"method": name, "templates": templates, **measure(model, config, fit, test, accuracy)})
            print(f"  {name}, n = {templates}: {found[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return finish("mimicry", options, {f"methods of mimicry, {options.weights} weights": found}, "seconds")


if __name__ == "__main__":
    main()
