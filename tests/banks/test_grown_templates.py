"""Grown templates: principal components of what moved the weights, dense or as low-rank pairs."""

from __future__ import annotations

import pytest
import torch
from grown_weights import grown, lora

from recast_peft import growth_report
from recast_peft.banks.grown_templates import factorise


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
