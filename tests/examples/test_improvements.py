"""The study of variants: its own mathematics against derivations by hand, and that it runs."""

from __future__ import annotations

import improvements
import pytest
import torch
import torch.nn.functional as F
from glyph_backbone import load_backbone
from glyphs import load_task
from training import Schedule, features_of


def named(name: str) -> improvements.Method:
    return next(m for methods in improvements.VARIANTS.values() for m in methods if m.name == name)


class TestPieces:
    weight = torch.arange(48.0).reshape(12, 4)

    def test_blocks_of_rows_add_up_to_the_weight(self):
        blocks = improvements.rows_of(self.weight, 3)
        assert torch.equal(blocks.sum(0), self.weight)
        assert torch.equal(blocks[1][4:8], self.weight[4:8])
        assert not blocks[1][:4].any()
        assert not blocks[1][8:].any()

    def test_heads_of_the_value_are_in_the_last_third(self):
        first, second = improvements.heads_of_value(self.weight, 2)
        assert torch.equal(first[8:10], self.weight[8:10])
        assert torch.equal((first + second)[8:], self.weight[8:])
        assert not (first + second)[:8].any()

    def test_singular_components_are_stationary_directions_of_the_weight(self):
        torch.manual_seed(0)
        weight = torch.randn(6, 4)
        values = torch.linalg.svdvals(weight)
        for component, value in zip(improvements.singular(weight, 2), values, strict=False):
            assert torch.allclose(component.norm(), weight.norm())
            assert torch.linalg.matrix_rank(component) == 1
            assert torch.allclose((component * weight).sum() / component.norm(), value)

    def test_random_ones_are_the_same_every_time_and_of_low_rank(self):
        torch.manual_seed(0)
        weight = torch.randn(12, 10)
        drawn = improvements.random_low_rank(weight, 2, rank=3)
        assert torch.equal(drawn, improvements.random_low_rank(weight, 2, rank=3))
        assert not torch.equal(drawn, improvements.random_low_rank(weight * 1.01, 2, rank=3))
        assert [int(torch.linalg.matrix_rank(each)) for each in drawn] == [3, 3]
        assert torch.allclose(drawn.flatten(1).norm(dim=1), weight.norm())

    def test_own_blocks_as_templates_scale_parts_of_a_layer(self):
        task = load_task("damage", train_per_class=1, test_per_class=1)
        model = improvements.APART.build(load_backbone(), task, 0)
        layer = model.get_base_model().blocks[3].attn.qkv
        with torch.no_grad():
            layer.recast_coefficients["default"].copy_(torch.tensor([[0.0, 1.0, -0.5]]))
        plain = load_backbone().blocks[3].attn.qkv.weight
        expected = torch.cat([plain[:96], 2 * plain[96:192], 0.5 * plain[192:]])
        assert torch.allclose(layer.weight, expected, atol=1e-6)

    @pytest.mark.parametrize("methods", list(improvements.VARIANTS.values())[1:3], ids=["targets", "pieces"])
    def test_no_variant_trains_more_than_48_numbers(self, methods):
        task = load_task("damage", train_per_class=1, test_per_class=1)
        for method in methods:
            model = method.build(load_backbone(), task, 0)
            assert 8 <= sum(p.numel() for n, p in model.named_parameters() if "recast_coefficients" in n) <= 48


class TestLeavingOneOut:
    def test_it_is_what_fitting_without_the_example_gives(self):
        torch.manual_seed(0)
        labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 3)
        x = torch.randn(15, 4, dtype=torch.float64) + labels[:, None]
        found = improvements.leave_one_out_logits(x, labels, 3, 0.3)
        means = torch.stack([x[labels == k].mean(0) for k in range(3)])
        sphere = (x - means[labels]).square().sum() / 15 / 4 * torch.eye(4, dtype=torch.float64)
        for i in range(15):
            kept = torch.arange(15) != i
            y, own = x[kept], labels[kept]
            means = torch.stack([y[own == k].mean(0) for k in range(3)])
            within = (y - means[own]).T @ (y - means[own]) / 15
            inverse = torch.linalg.inv(0.7 * within + 0.3 * sphere)
            for k in range(3):
                away = x[i] - means[k]
                expected = -away @ inverse @ away / 2 + torch.log((labels == k).double().mean())
                assert torch.allclose(found[i, k], expected, atol=1e-9)

    def test_it_can_be_differentiated(self):
        torch.manual_seed(0)
        labels = torch.tensor([0, 0, 0, 1, 1, 1])
        x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda each: improvements.leave_one_out_logits(each, labels, 2), x)

    def test_training_lowers_its_loss_and_leaves_a_classifier_in_place(self, monkeypatch):
        monkeypatch.setattr(improvements, "ITERATIONS", 2)
        task = load_task("damage", train_per_class=6, test_per_class=2)
        method = named("MLP, groups of 2, L-BFGS")
        model = method.build(load_backbone(), task, 0)

        def loss() -> float:
            features = features_of(model, task.train_images).double()
            return float(F.cross_entropy(improvements.leave_one_out_logits(features, task.train_labels, 10), task.train_labels))

        before = loss()
        method.train(model, [], task, Schedule())
        assert loss() < before - 0.01
        with torch.no_grad():
            right = (model(task.train_images).argmax(1) == task.train_labels).float().mean()
        assert right > 0.5  # a tenth by chance


def test_it_runs(tmp_path):
    rows = improvements.main(["--quick", "--output", str(tmp_path), "--variants", "fc1, own weight"])
    assert [(row.name, row.numbers) for row in rows] == [("linear probe", 0), ("fc1, own weight", 8)]
    assert "| fc1, own weight | 8 |" in (tmp_path / "table.md").read_text()
