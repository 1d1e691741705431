"""The small vision transformer that the examples start from, pretrained on printed glyphs.

``examples/backbone/glyph_vit.safetensors`` is made by ``examples/pretrain_backbone.py``; it holds half-precision
weights and, as metadata, the arguments of :class:`timm.models.vision_transformer.VisionTransformer`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

BACKBONE_PATH = Path(__file__).parent / "backbone" / "glyph_vit.safetensors"
"""Where the pretrained weights lie."""

ARCHITECTURE: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 8,
    "num_heads": 3,
    "mlp_ratio": 4.0,
}
"""Arguments of the vision transformer: 17 tokens, 8 blocks, 0.9 million parameters."""


def build_backbone(architecture: dict[str, Any] | None = None, num_classes: int = 0) -> VisionTransformer:
    """Build the vision transformer with random weights (from the global generator of torch).

    Args:
        architecture: arguments of ``VisionTransformer``; :data:`ARCHITECTURE` if not given.
        num_classes: outputs of the head; 0 leaves the features of the class token, (batch, 96).

    Returns:
        The model in training mode.
    """
    return VisionTransformer(**(architecture or ARCHITECTURE), num_classes=num_classes)


def save_backbone(model: VisionTransformer, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write the weights without the head, in half precision, with the architecture and notes as metadata.

    Args:
        model: a model of :func:`build_backbone` with the default architecture.
        path: file to write; its folder is made if missing.
        notes: further metadata, for example how the weights were trained.
    """
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"architecture": json.dumps(ARCHITECTURE), **(notes or {})})


def load_backbone(path: Path = BACKBONE_PATH) -> VisionTransformer:
    """Load the pretrained backbone.

    Args:
        path: file written by :func:`save_backbone`.

    Returns:
        The model with float32 parameters, in evaluation mode and without a head; its output is the class token's
        features, (batch, 96). Attach a head with ``model.reset_classifier(classes)``.

    Raises:
        FileNotFoundError: if the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no backbone at {path}\nmake it with: python examples/pretrain_backbone.py")
    with safe_open(path, framework="pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = build_backbone(architecture)
    model.load_state_dict(weights)
    return model.eval()
