"""A small vision transformer pretrained on printed glyphs, for tests and for the benchmark of mimicry.

``examples/backbone/glyph_vit.safetensors`` was made by ``examples/pretrain_backbone.py`` of commit 54955ae. It holds
half-precision weights and, as metadata, the arguments of :class:`timm.models.vision_transformer.VisionTransformer`.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

BACKBONE_PATH = Path(__file__).parent / "backbone" / "glyph_vit.safetensors"


def load_backbone(path: Path = BACKBONE_PATH) -> VisionTransformer:
    """The pretrained backbone: 8 blocks of width 96, float32, in evaluation mode, features ``(batch, 96)`` without a head."""
    with safe_open(path, framework="pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = VisionTransformer(**architecture, num_classes=0)
    model.load_state_dict(weights)
    return model.eval()
