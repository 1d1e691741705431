"""Models to export, tasks on them, and how an exported graph is run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from models import layers_of, randomise, seeded, small_transformer
from peft import PeftModel
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from recast_peft import RecastConfig, export_onnx, export_program, get_recast_model

TOLERANCE = 1e-6  # of the norm of the outputs, in float32
IDS = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def onnx_tools() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    read_operators_once()
    return pytest.importorskip("onnxruntime")


@cache
def read_operators_once() -> None:
    """torch reads the source of all its operators again for each graph, which takes as long as a small graph does."""
    tables = pytest.importorskip("torch.onnx._internal.exporter._registration").ONNXRegistry
    tables.from_torchlib = staticmethod(cache(tables.from_torchlib))


def backbone(name: str, seed: int = 0, **options: Any) -> nn.Module:
    return seeded(lambda: timm.create_model(name, **{"num_classes": 0, **options}), seed)


bert = partial(
    small_transformer,
    "bert",
    scale=2,
    vocab_size=20,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    initializer_range=0.2,
)
llama = partial(small_transformer, "llama", scale=2, vocab_size=20, initializer_range=0.2, use_cache=False)


class Inverted(nn.Module):
    """Two blocks of an EfficientNet: convolutions, norms with an activation inside, squeezes; and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4)
        self.blocks = nn.Sequential(*(InvertedResidual(8, 8, exp_ratio=2, se_layer=SqueezeExcite) for _ in range(2)))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def images(samples: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(samples, 3, 160, 160, generator=torch.Generator().manual_seed(seed))


def texts(samples: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids, mask = IDS.repeat(2, 2)[:samples, :length], MASK.repeat(2, 1)[:samples].repeat(1, 2)[:, :length]
    return {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous()}


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[Any]]] = {
    "vit": (lambda: backbone("test_vit", depth=2), {"num_classes": 4}, [images(), images(1), images(3)]),
    "cnn": (lambda: seeded(Inverted), {"num_classes": 4}, [images(), images(1), images(3)]),
    "bert": (bert, {"num_classes": 4}, [texts(), texts(1, 5), texts(4, 9)]),
    "llama": (llama, {}, [{"input_ids": IDS}, {"input_ids": IDS[:1, :3]}, {"input_ids": IDS.repeat(2, 2)}]),
}


def two_tasks(build: Callable[[], nn.Module], config: dict[str, Any], **more: Any) -> PeftModel:
    """A model with the tasks ``first`` and ``second``, which differ in everything, also in the number of classes."""
    model = get_recast_model(build(), RecastConfig(**config, **more), "first")
    other = {**config, **({"num_classes": 6} if "num_classes" in config else {})}
    model.add_adapter("second", RecastConfig(**other, **more))
    model.add_adapter("fresh", RecastConfig(**config, **more))
    randomise(model, "first", 1, 0.1)
    randomise(model, "second", 2, 0.1)
    model.set_adapter("first")
    return model.eval()


def called(model: nn.Module, inputs: Any) -> np.ndarray:
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return (output if isinstance(output, Tensor) else output.logits).numpy()


def called_exactly(model: nn.Module, inputs: Any) -> np.ndarray:
    """What a float32 model stands for: it and its graph round differently, each by what the processor's kernels do."""
    given = inputs if isinstance(inputs, dict) else {"x": inputs}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    return called(copy.deepcopy(model).double(), wide if isinstance(inputs, dict) else wide["x"])


def session(path: Path) -> Any:
    tools = onnx_tools()
    options = tools.SessionOptions()
    options.intra_op_num_threads = 1
    return tools.InferenceSession(str(path), options)


def run(graph: Any, task: dict[str, Any], inputs: Any) -> np.ndarray:
    given = inputs if isinstance(inputs, dict) else {"x": inputs}
    wanted = {value.name for value in graph.get_inputs()}
    feed = {name: np.asarray(value) for name, value in {**task, **given}.items() if name in wanted}
    return graph.run(None, feed)[0]


def traced(model: Any, inputs: Any, folder: Path, in_onnx: bool, **options: Any) -> Callable[[Any, Any], np.ndarray]:
    """A graph, ONNX's or torch's, as a function of a task, or of rows, and the inputs."""
    if in_onnx:
        graph = session(export_onnx(model, folder / "graph.onnx", inputs, **options))
        return lambda task, given: run(graph, task if isinstance(task, dict) else {"rows": task}, given)
    module = export_program(model, inputs, **options).module()

    def call(task: Any, given: Any) -> np.ndarray:
        tensors = {name: torch.as_tensor(value) for name, value in task.items()} if isinstance(task, dict) else task
        outputs = module(tensors, **given) if isinstance(given, dict) else module(tensors, given)
        return next(iter(outputs.values())).detach().numpy()

    return call


def distance(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def recast(model: nn.Module) -> list[Any]:
    return list(layers_of(model).values())


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
