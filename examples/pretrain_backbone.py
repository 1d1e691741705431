"""Pretrain the small vision transformer of the examples on printed glyphs and write its weights.

The model learns to tell apart the characters of :func:`glyphs.pretraining_characters`, none of which belongs to a task.
One CPU thread needs about half an hour::

    python examples/pretrain_backbone.py
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from glyph_backbone import BACKBONE_PATH, build_backbone, save_backbone
from glyphs import pretraining_batches, pretraining_characters
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from tqdm import tqdm


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step: a linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters for the optimiser: matrices decay, vectors (biases, norms) and embeddings do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_free = parameter.ndim < 2 or name in {"cls_token", "pos_embed"}
        (free if is_free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def accuracy(model: nn.Module, held_out: bool, batches: int = 16, batch_size: int = 256, seed: int = 1) -> float:
    """Return the share of right answers on pretraining characters.

    Args:
        model: classifier of (batch, 1, 28, 28) images.
        held_out: whether to draw from the faces that pretraining never shows.
        batches: number of batches.
        batch_size: images in a batch.
        seed: of the draws; never that of the training.
    """
    model.eval()
    right = sum(
        int((model(images).argmax(dim=1) == labels).sum())
        for images, labels in pretraining_batches(batches, batch_size, seed=1_000_000 + seed, held_out=held_out)
    )
    model.train()
    return right / (batches * batch_size)


def pretrain(arguments: argparse.Namespace) -> VisionTransformer:
    """Train a classifier of the pretraining characters as the command line asks, writing the weights on the way."""
    torch.manual_seed(arguments.seed)
    classes = len(pretraining_characters())
    model = build_backbone(num_classes=classes)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, arguments.weight_decay), lr=arguments.learning_rate, betas=(0.9, 0.98)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, arguments.warmup, arguments.steps)
    )
    batches = pretraining_batches(arguments.steps, arguments.batch_size, seed=arguments.seed)
    progress = tqdm(batches, total=arguments.steps, desc=f"pretraining, {classes} characters", mininterval=5)
    for step, (images, labels) in enumerate(progress, start=1):
        loss = F.cross_entropy(model(images), labels, label_smoothing=arguments.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % arguments.evaluate_every == 0 or step == arguments.steps:
            scores = {"seen_faces": accuracy(model, held_out=False), "held_out_faces": accuracy(model, held_out=True)}
            notes = {f"accuracy_{name}": f"{score:.4f}" for name, score in scores.items()}
            save_backbone(model, arguments.output, {"steps": str(step), "characters": str(classes), **notes})
            report = ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
            progress.write(f"step {step}: loss {loss.item():.3f}, {report}")
    return model


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BACKBONE_PATH, help="file to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5600, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest rate (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=400, help="steps of warm-up (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices (default: %(default)s)")
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="of the loss (default: %(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=700, help="steps between scores (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Pretrain, write the weights and say how large they are."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    pretrain(arguments)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size:,} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
