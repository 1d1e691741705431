"""The classifier of all classes so far is that of all examples at once, whatever the order of the tasks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from recast_peft import RecastConfigError, RecastSequenceError
from recast_peft.analysis.class_incremental import IncrementalClassifier

FEATURES = 6


def examples(seed: int, classes: tuple[int, ...], count: int = 90) -> tuple[Tensor, Tensor]:
    """Classes on a curve: no linear classifier of the features tells them all apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.arange(count) % len(classes)]
    centres = torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(7)) * torch.tensor([2.0, 2, 0.1, 0.1, 0.1, 0.1])
    return centres[labels] + 0.3 * torch.randn(count, FEATURES, generator=generator), labels


def learned(*tasks: tuple[Tensor, Tensor], **fields: Any) -> IncrementalClassifier:
    found = IncrementalClassifier(FEATURES, **{"projections": 50, **fields})
    for x, y in tasks:
        found.learn(x, y)
    return found


def test_learning_in_turn_is_learning_at_once() -> None:
    first, second = examples(0, (0, 1, 2)), examples(1, (3, 4))
    both = (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    x = examples(2, (0, 1, 2, 3, 4))[0]
    in_turn, at_once = learned(first, second, ridge=1e-3), learned(both, ridge=1e-3)
    assert in_turn.classes == at_once.classes == [0, 1, 2, 3, 4]
    torch.testing.assert_close(in_turn.logits(x), at_once.logits(x), rtol=1e-6, atol=1e-8)
    backwards = learned(second, first, ridge=1e-3)
    assert backwards.predict(x) == at_once.predict(x)


def test_it_is_ridge_regression_as_scikit_learn_does_it() -> None:
    x, y = examples(0, (0, 1, 2))
    found = learned((x, y), projections=None, ridge=0.01)
    alpha = 0.01 * float((x.double().T @ x.double()).diagonal().mean())
    peer = Ridge(alpha=alpha, fit_intercept=False).fit(x.double().numpy(), np.eye(3)[y.numpy()])
    torch.testing.assert_close(found.weight.T, torch.from_numpy(peer.coef_), rtol=1e-8, atol=1e-10)


def test_nothing_is_forgotten_and_random_features_tell_more_apart() -> None:
    tasks = [examples(0, (0, 1, 2)), examples(1, (3, 4, 5)), examples(2, (6, 7, 8))]
    x, y = examples(3, tuple(range(9)), 270)

    def right(found: IncrementalClassifier) -> float:
        return float((torch.tensor(found.predict(x)) == y).double().mean())

    random, plain = right(learned(*tasks, projections=300)), right(learned(*tasks, projections=None))
    assert random > 0.7
    assert random > plain + 0.1


def test_a_class_that_comes_again_and_names() -> None:
    x, y = examples(0, (0, 1))
    found = IncrementalClassifier(FEATURES, projections=50)
    found.learn(x, y, ["cat", "dog"])
    more, labels = examples(1, (1, 2))
    found.learn(more, labels - 1, ["dog", "cow"])
    assert found.classes == ["cat", "dog", "cow"]
    assert set(found.predict(torch.cat([x, more]))) == {"cat", "dog", "cow"}


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    x, y = examples(0, (0, 1))
    found = IncrementalClassifier(FEATURES, projections=20)
    for arguments, message in (
        ((x[:, :3], y), r"expected \(samples, 6\)"),
        ((x, y[:5]), "one label for each example"),
        ((x, y.double() / 2), "float64 of shape"),
        ((x, y.tolist()), r"a whole number\n  labels:   \[0, "),
        ((x, y, ["cat"]), "names 1"),
        ((x.numpy(), y), "features are ndarray: expected a tensor"),
        ((x.to(torch.complex64), y), "features are torch.complex64: expected a tensor"),
        ((x, y, [["cat"], ["dog"]]), r"classes=\[\['cat'\], .*expected a list of whole numbers or strings"),
        ((x, y, [None, None]), "expected a list of whole numbers or strings"),
        ((x, y, {0: "cat", 1: "dog"}), "expected a list of whole numbers or strings"),
    ):
        with pytest.raises(RecastSequenceError, match=message):
            found.learn(*arguments)
    assert found.classes == []
    for broken in (x * math.nan, x * math.inf):
        with pytest.raises(RecastSequenceError, match="no finite number"):
            found.learn(broken, y)
    with pytest.raises(RecastSequenceError, match=r"with ridge 1e-06: their features are all zero"):
        found.learn(x * 0, y)
    found.learn(x, y)
    before = found.predict(x), found.weight.clone()
    with pytest.raises(RecastSequenceError, match="too large"):
        found.learn(x.double() * 1e200, y + 2)
    with pytest.raises(RecastSequenceError, match="no finite number"):
        found.predict(x * math.nan)
    assert found.classes == [0, 1]
    assert torch.equal(found.weight, before[1])
    found.learn(x, y)
    assert found.predict(x) == before[0]
    assert found.classes == [0, 1]
    found = IncrementalClassifier(FEATURES, projections=None, ridge=1e-20)
    with pytest.raises(RecastSequenceError, match="depend on each other"):
        found.learn(x[:, :1].repeat(1, FEATURES), y)
    with pytest.raises(RecastSequenceError, match="nothing was learned"):
        found.predict(x[:1])
    for fields in ({"features": None}, {"projections": 0}, {"ridge": 0.0}, {"ridge": math.inf}, {"seed": 1.5}):
        with pytest.raises(RecastConfigError, match=next(iter(fields))):
            IncrementalClassifier(**{"features": FEATURES, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names", [torch.arange(3), np.arange(3), list(torch.arange(3))], ids=["tensor", "array", "list of tensors"]
)
def test_numbers_of_any_kind_are_the_same_names(names: Any) -> None:
    """Two tensors are two keys, though they hold one number: a class that came again would be another one."""
    x, y = examples(0, (0, 1, 2))
    found = IncrementalClassifier(FEATURES, projections=50)
    for _ in range(2):
        found.learn(x, y, names)
    assert found.classes == [0, 1, 2]
    assert {type(name) for name in found.predict(x)} == {int}


def test_the_default_dtype_does_not_matter() -> None:
    task = examples(0, (0, 1, 2))
    wanted = learned(task).weight
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(learned(task).weight, wanted)
    finally:
        torch.set_default_dtype(torch.float32)
