"""Tasks of the two worlds that lie in a folder as arrays instead of being made from packages.

``text.npz`` has ``TASK.train.ids``, ``.mask``, ``.labels`` and the same for ``test``; a task of pictures is a file
``TASK.npz`` of ``x_train``, ``y_train``, ``x_test``, ``y_test`` with pictures ``(n, height, width, 3)`` of bytes. The weights
lie beside them (``minilm.safetensors``, ``effnet.safetensors``): the token numbers may belong to a smaller vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .base import Split, Task, World
from .pictures import PICTURES
from .text import TEXT
from .weights import SentenceEncoder


def _named(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _numbers(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _text_task(folder: Path, name: str) -> Task:
    data = np.load(folder / "text.npz")
    train, test = (
        Split(tuple(_numbers(data[f"{name}.{part}.{key}"]) for key in ("ids", "mask")), _numbers(data[f"{name}.{part}.labels"]))
        for part in ("train", "test")
    )
    return Task(name, _named(int(train.labels.max()) + 1), train, test)


def _picture_task(folder: Path, name: str) -> Task:
    data = np.load(folder / f"{name}.npz")
    train, test = (
        Split(((torch.from_numpy(data[f"x_{part}"]).permute(0, 3, 1, 2).float() - 127) / 128,), _numbers(data[f"y_{part}"]))
        for part in ("train", "test")
    )
    return Task(name, _named(int(train.labels.max()) + 1), train, test)


def _encoder(file: Path) -> nn.Module:
    from transformers import BertConfig, BertModel

    state = {name: values.float() for name, values in load_file(file).items()}
    words, width = state["embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=6, num_attention_heads=12, intermediate_size=4 * width
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state, strict=False)
    return SentenceEncoder(model).eval()


def _network(file: Path) -> nn.Module:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    state = load_file(file)
    model.load_state_dict({name: state[name].to(value.dtype) for name, value in model.state_dict().items()})
    return model.to(memory_format=torch.channels_last).eval()


def folder_worlds(folder: str | Path) -> dict[str, World]:
    """The worlds with the tasks, and the weights, of a folder."""
    folder = Path(folder)
    texts = sorted({key.split(".")[0] for key in np.load(folder / "text.npz").files})
    pictures = sorted(file.stem for file in folder.glob("*.npz") if file.stem != "text")
    return {
        TEXT.name: replace(
            TEXT,
            backbone=partial(_encoder, folder / "minilm.safetensors"),
            tasks={name: partial(_text_task, folder, name) for name in texts},
            special_tokens=(1, 0, 2, 3),  # [UNK]: a smaller vocabulary may lack [MASK]
        ),
        PICTURES.name: replace(
            PICTURES,
            backbone=partial(_network, folder / "effnet.safetensors"),
            tasks={name: partial(_picture_task, folder, name) for name in pictures},
        ),
    }
