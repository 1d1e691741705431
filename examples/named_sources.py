"""Backbones and data by name, for those who have a network: timm, transformers, torchvision, datasets.

The same functions read local folders: a transformers folder (``config.json`` in it) as a backbone, and a folder with
``train`` and ``test`` in it, each with a folder of images for every class, as a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from glyphs import Task
from torch import Tensor, nn


def load_named_backbone(name: str, pretrained: bool = True) -> nn.Module:
    """A timm model by its name, else a transformers image classifier by its name or folder.

    Without pretrained weights they are random, and the same at every call.

    Raises:
        ValueError: if neither library knows the name.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _load(name, pretrained)


def _load(name: str, pretrained: bool) -> nn.Module:
    import timm

    if timm.is_model(name):
        return timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        if pretrained:
            return AutoModelForImageClassification.from_pretrained(name).eval()
        return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name)).eval()
    except (OSError, ValueError) as error:
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0][:8]}*")[:4])
        raise ValueError(
            f"backbone {name!r} is known neither to timm (near: {near or 'none'}) nor to transformers: {error}"
        ) from error


def preprocessing_of(backbone: nn.Module) -> Callable[[Any], Tensor]:
    """How an image becomes what the backbone expects, ``(channels, height, width)``."""
    from torchvision.transforms import v2

    config = getattr(backbone, "config", None)
    if config is not None and hasattr(config, "image_size"):
        size = config.image_size
        channels, mean, std = getattr(config, "num_channels", 3), (0.5,) * 3, (0.5,) * 3
    else:
        from timm.data import resolve_model_data_config

        data = resolve_model_data_config(backbone)
        (channels, size, _), mean, std = data["input_size"], data["mean"], data["std"]
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Grayscale(1) if channels == 1 else v2.RGB(),
            v2.Resize((size, size) if isinstance(size, int) else tuple(size), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean[:channels], std[:channels]),
        ]
    )


def load_named_task(name: str, backbone: nn.Module, limit: int = 2000, seed: int = 0) -> Task:
    """A torchvision data set by its class, a folder of images, or a data set of the Hub, as a task.

    Args:
        name: such as ``Flowers102``, ``path/to/folder``, or ``beans``.
        backbone: decides size and normalisation of the images.
        limit: most images of each of training and test, drawn at random.
        seed: of that draw.
    """
    prepare = preprocessing_of(backbone)
    train, test, classes = _open(name)
    parts = [_tensors(part, prepare, limit, seed) for part in (train, test)]
    (train_images, train_labels), (test_images, test_labels) = parts
    task_name = Path(name).name.replace(".", "-")  # names of tasks hold no dot
    return Task(task_name, tuple(classes), train_images, train_labels, test_images, test_labels)


def _open(name: str) -> tuple[Any, Any, list[str]]:
    """Training pairs, test pairs and class names."""
    from torchvision import datasets as vision

    folder = Path(name)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (vision.ImageFolder(str(folder / part)) for part in ("train", "test"))
        return train, test, train.classes
    if hasattr(vision, name):
        return _torchvision(getattr(vision, name))
    return _hub(name)


def _torchvision(kind: Any) -> tuple[Any, Any, list[str]]:
    import inspect

    root = str(Path.home() / ".cache" / "recast_peft" / "data")
    parameters = inspect.signature(kind).parameters
    options = {"root": root, "download": True} if "download" in parameters else {}
    if "train" in parameters:
        parts = [kind(train=train, **options) for train in (True, False)]
    elif "split" in parameters:
        parts = [kind(split=split, **options) for split in ("train", "test")]
    else:
        parts = [kind(**options, random_offset=offset) for offset in (0, 1)] if "random_offset" in parameters else []
    if not parts:
        raise ValueError(f"torchvision's {kind.__name__} has no split for training and test")
    labels = sorted({int(label) for _, label in _sample(parts[0], 5000, 0)})
    return parts[0], parts[1], [str(c) for c in getattr(parts[0], "classes", None) or range(max(labels) + 1)]


def _hub(name: str) -> tuple[Any, Any, list[str]]:
    from datasets import load_dataset

    data = load_dataset(name)
    parts = [data["train"], data["test" if "test" in data else "validation"]]
    label = next(key for key in ("label", "labels", "fine_label") if key in parts[0].features)
    image = next(key for key in ("image", "img") if key in parts[0].features)
    pairs = [[(row[image], row[label]) for row in part] for part in parts]
    return pairs[0], pairs[1], parts[0].features[label].names


def _sample(pairs: Any, limit: int, seed: int) -> Iterable[tuple[Any, Any]]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:limit]
    return (pairs[i] for i in order.tolist())


def _tensors(pairs: Any, prepare: Callable[[Any], Tensor], limit: int, seed: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*((prepare(image), int(label)) for image, label in _sample(pairs, limit, seed)), strict=True)
    return torch.stack(images), torch.tensor(labels)
