"""The paper's auto-encoder: coefficients are what a network says of the weights."""

from __future__ import annotations

import pytest
import torch
from weight_groups import composed, error, group, optimum

from recast_peft.mimicry import AutoEncoder

OPTIONS = {"steps": 400, "learning_rate": 1e-2, "progress": False}


def test_equal_weights_get_equal_coefficients() -> None:
    """The start alone would already tell them apart, were the coefficients trained themselves."""
    first, second = group(2)
    found = AutoEncoder(**OPTIONS).fit([first, second, first], 2)
    assert torch.equal(found.base[0], found.base[2])
    assert not torch.allclose(found.base[0], found.base[1], atol=1e-2)


def test_a_weight_that_looks_the_same_to_the_network_is_taken_for_the_same() -> None:
    """Of two numbers of a weight that are averaged to one feature, the network knows the mean alone."""
    weights = [torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 1.0]])]
    seen_alike = AutoEncoder(**OPTIONS, features=1).fit(weights, 1)
    assert torch.equal(seen_alike.base[0], seen_alike.base[1])
    assert not torch.equal(*AutoEncoder(**OPTIONS, features=2).fit(weights, 1).base)


@pytest.mark.parametrize("templates", [1, 2])
def test_comes_to_the_optimum(templates: int) -> None:
    """Eckart and Young: a network of eight hidden numbers can say any coefficients of four layers."""
    weights = group(4)
    found = AutoEncoder(**{**OPTIONS, "steps": 2000}).fit(weights, templates)
    least = optimum(weights, templates)
    assert least * (1 - 1e-6) <= error(found, weights) < 1.001 * least


def test_the_label_is_part_of_the_seed() -> None:
    weights, method = group(3), AutoEncoder(steps=3, progress=False)
    first, again, other = (composed(method.fit(weights, 2, label=label), weights) for label in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
