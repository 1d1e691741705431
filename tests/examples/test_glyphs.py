"""The glyphs and their backbone: the same images for the same seed, and weights that know something."""

from __future__ import annotations

import glyphs
import pytest
import torch
from glyph_backbone import BACKBONE_PATH, load_backbone


class TestGlyphs:
    def test_the_same_seed_draws_the_same_images_and_another_seed_others(self):
        first, same, other = (glyphs.load_task("greek", seed=s, train_per_class=3, test_per_class=2) for s in (1, 1, 2))
        assert torch.equal(first.train_images, same.train_images)
        assert not torch.equal(first.train_images, other.train_images)

    @pytest.mark.parametrize("name", glyphs.TASKS)
    def test_every_task_has_images_of_all_its_classes(self, name):
        task = glyphs.load_task(name, train_per_class=2, test_per_class=1)
        assert task.train_images.shape == (2 * task.num_classes, 1, 28, 28)
        assert task.test_labels.tolist() == list(range(task.num_classes))
        assert task.train_images.flatten(1).std(dim=1).min() > 0.1

    def test_pretraining_shows_no_character_of_a_task(self):
        reserved = {character for characters in glyphs._RESERVED.values() for character in characters}
        assert not reserved & set(glyphs.pretraining_characters())

    @pytest.mark.parametrize(("name", "count"), [("nothing", 4), ("greek", 0)])
    def test_bad_requests(self, name, count):
        with pytest.raises(ValueError):
            glyphs.load_task(name, train_per_class=count)


def test_the_backbone_is_small_and_knows_more_than_chance():
    assert BACKBONE_PATH.stat().st_size < 2_000_000
    task = glyphs.load_task("hebrew", train_per_class=15, test_per_class=10)

    def found(model):
        with torch.no_grad():
            train, test = model(task.train_images), model(task.test_images)
        centres = torch.stack([train[task.train_labels == label].mean(0) for label in range(task.num_classes)])
        return float((torch.cdist(test, centres).argmin(1) == task.test_labels).float().mean())

    trained, random = load_backbone(), load_backbone()
    for parameter in random.parameters():
        if parameter.ndim > 1:
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    assert found(trained) > found(random) + 0.1
