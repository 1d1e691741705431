"""random_bank: templates of random numbers, of the size and kind that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import outputs, randomise, tiny_vit, vit_input

from recast_peft import RecastConfig, RecastConfigError, StoredBank, get_recast_model, random_bank

CONFIG = RecastConfig(target_modules=["qkv", "fc1"], group_size=1)


def bank(**fields: Any) -> StoredBank:
    return random_bank(tiny_vit(), CONFIG, **{"num_templates": 2, "seed": 3, **fields})


@pytest.mark.parametrize("rank", [None, 2])
def test_templates_have_a_tenth_of_the_weights_size(rank: int | None) -> None:
    weights = tiny_vit().state_dict()
    for name, group in bank(num_templates=40, rank=rank).groups.items():
        assert group.grown is not None
        size = torch.stack(group.grown.dense()).square().mean().sqrt()
        assert size / weights[f"{name}.weight"].square().mean().sqrt() == pytest.approx(0.1, rel=0.1)
        assert len(group.grown.tensors) == (1 if rank is None else 2)


def test_they_follow_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    assert bank().fingerprint == bank().fingerprint != bank(seed=4).fingerprint
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("plain", [True, False])
def test_a_task_has_a_coefficient_for_each(plain: bool) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(bank=bank(plain_templates=plain)), "task").eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (2 + plain) * 2 * 4
    before = outputs(model, vit_input())
    assert torch.equal(before, outputs(tiny_vit().eval(), vit_input()))
    randomise(model, "task", 1)
    assert not torch.allclose(before, outputs(model, vit_input()), atol=1e-3)


@pytest.mark.parametrize("fields", [{"num_templates": 0}, {"num_templates": None}, {"rank": True}])
def test_refuses_sizes_that_are_no_counts(fields: dict[str, Any]) -> None:
    with pytest.raises(RecastConfigError, match="at least 1"):
        bank(**fields)


def test_refuses_a_seed_that_is_no_number() -> None:
    with pytest.raises(RecastConfigError, match="plain_templates='no': expected True or False"):
        bank(plain_templates="no")
    with pytest.raises(RecastConfigError, match="seed='a': expected a whole number"):
        bank(seed="a")


def test_a_config_says_which_modules_share_templates_and_none_lets_no_two() -> None:
    assert {len(group.members) for group in random_bank(tiny_vit(), num_templates=1).groups.values()} == {1}
    together = random_bank(tiny_vit(), RecastConfig(target_modules=["qkv"], group_size=2), num_templates=1)
    assert {len(group.members) for group in together.groups.values()} == {2}


def test_refuses_a_converted_model() -> None:
    with pytest.raises(RecastConfigError, match="random_bank needs the plain pretrained model"):
        random_bank(get_recast_model(tiny_vit(), CONFIG), CONFIG)
