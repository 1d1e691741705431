"""Grown templates: principal components of what moved the weights, dense or as low-rank pairs."""

from __future__ import annotations

import pytest
import torch
from grown_weights import grown, lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from recast_peft import growth_report
from recast_peft.banks.grown_templates import GrownTemplates, energy_kept, factorise, low_rank_sum, principal_mix


class TestComponents:
    def test_the_components_are_those_of_the_singular_values(self) -> None:
        bank = grown(num_templates=1)
        name, group = next(iter(bank.groups.items()))
        moves = torch.stack([lora(seed).base_model.model.get_submodule(name).get_delta_weight("default") for seed in range(3)])
        values = torch.linalg.svdvals(moves.detach().flatten(1).double())
        assert group.grown is not None
        assert group.grown.energy == pytest.approx((float(values[0] ** 2 / values.square().sum()),), rel=1e-4)
        size = moves.detach().flatten(1).norm(dim=1).square().mean().sqrt()
        assert float(group.grown.dense()[0].norm()) == pytest.approx(float(size), rel=1e-4)

    def test_a_rank_keeps_what_it_can(self) -> None:
        dense, pairs, all_of_it = grown(num_templates=2), grown(num_templates=2, rank=1), grown(num_templates=2, rank=6)
        lost = growth_report(dense).groups[0].energy[-1] - growth_report(pairs).groups[0].energy[-1]
        assert 0.01 < lost < 0.9
        assert growth_report(all_of_it).groups[0].energy[-1] == pytest.approx(
            growth_report(dense).groups[0].energy[-1], abs=1e-5
        )
        assert pairs.nbytes < dense.nbytes / 4
        left, right = factorise(torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0)), 99)
        assert left.shape == (2, 6, 6)
        assert right.shape == (2, 6, 12)


def test_components_of_moves_at_right_angles_are_the_moves_by_size() -> None:
    # squared norms 1 and 4: the second is the larger one, and both get the root mean square norm sqrt(5 / 2)
    mix = principal_mix(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64), None)
    size = 2.5**0.5
    torch.testing.assert_close(mix, torch.tensor([[0.0, size], [size / 2, 0.0]], dtype=torch.float64))
    assert principal_mix(torch.diag(torch.tensor([1.0, 4.0, 1e-12], dtype=torch.float64)), None).shape == (3, 2)  # rounding
    assert principal_mix(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), 1).shape == (2, 1)


def test_energy_is_the_share_of_the_squared_norm_in_the_span() -> None:
    first, second, third = torch.eye(3).unbind()
    grown = GrownTemplates((torch.stack([first, first + second]),), (3,))
    moves = [2 * first, second, 2 * third]  # squared norms 4, 1 and 4; no template reaches the last one
    assert energy_kept(moves, grown) == pytest.approx((4 / 9, 5 / 9))
    assert energy_kept([], grown) == ()


def test_low_rank_pairs_are_products_in_the_shape_of_the_weight() -> None:
    left, right = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 0.0, -1.0, 5.0]]])
    grown = GrownTemplates((left, right), (2, 2, 2), plain=False)
    assert [t.tolist() for t in grown.dense()] == [[[[3.0, 0.0], [-1.0, 5.0]], [[6.0, 0.0], [-2.0, 10.0]]]]
    assert list(grown.named("g")) == ["g.only_left", "g.only_right"]
    assert grown.first(1).tensors[0].data_ptr() == left.data_ptr()
    assert len(grown.first(0)) == 0
    assert grown.nbytes == 4 * (2 + 4)


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_a_sum_of_pairs_is_the_product_with_the_sum_of_their_weights(kind: str) -> None:
    module = nn.Linear(3, 2) if kind == "linear" else Conv1D(2, 3)  # 3 inputs, 2 outputs
    rows, columns = (2, 3) if kind == "linear" else (3, 2)
    left, right, coefficients = torch.randn(4, rows, 2), torch.randn(4, 2, columns), torch.randn(5, 4)
    x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 2)
    wanted = y.clone()
    for sample in range(5):
        weight = sum(c * a @ b for c, a, b in zip(coefficients[sample], left, right, strict=True))
        wanted[sample] += x[sample] @ (weight.T if kind == "linear" else weight)
    found = low_rank_sum(module, (left, right), coefficients).add_to(y.clone(), x)
    torch.testing.assert_close(found, wanted)
    half = low_rank_sum(module, (left, right), coefficients).add_to(y.bfloat16(), x.bfloat16())  # as under autocast
    torch.testing.assert_close(half, wanted.bfloat16(), rtol=0.05, atol=0.2)
