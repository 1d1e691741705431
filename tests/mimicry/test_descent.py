"""The loop of gradient descent: the best step is kept, and judged as it will be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from recast_peft import RecastConfigError
from recast_peft.mimicry import FittedTemplates
from recast_peft.mimicry.descent import LOSSES, DescentMethod, Start, random_templates

WEIGHTS = [torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])]  # twice the first one


@dataclass(frozen=True)
class Plain(DescentMethod):
    """Plain gradient descent on one template and a coefficient for each of the two weights."""

    templates: tuple[float, ...] = (3.0, 4.0)
    base: tuple[float, ...] = (1.0, 2.0)
    noise: Callable[[], Tensor] | None = None
    steps: int = 20
    learning_rate: float = 1e-9
    loss: str = "mse"
    loss_scale: float = 1.0
    clip_norm: float | None = None
    seed: int = 0
    progress: bool = False

    def begin(self, weights: Sequence[Tensor], target: Tensor, num_templates: int, generator: torch.Generator) -> Start:
        templates, coefficients = torch.tensor([self.templates]), torch.tensor(self.base)[:, None]
        optimizer = torch.optim.SGD([templates.requires_grad_(), coefficients.requires_grad_()], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return Start(templates, lambda: coefficients, optimizer, schedule, self.noise)


def composed(found: FittedTemplates) -> Tensor:
    return found.base @ found.templates.double().flatten(1)


def test_the_start_is_kept_where_every_step_is_worse() -> None:
    found = Plain(base=(1.0, 1.9), learning_rate=10.0).fit(WEIGHTS, 1)  # each step goes far too wide
    torch.testing.assert_close(composed(found), torch.tensor([[3.0, 4.0], [5.7, 7.6]], dtype=torch.float64))


def test_steps_that_help_are_taken() -> None:
    found = Plain(base=(0.5, 1.0), learning_rate=0.01, steps=500).fit(WEIGHTS, 1)
    torch.testing.assert_close(composed(found), torch.cat(WEIGHTS).double(), rtol=1e-3, atol=1e-3)
    assert found.templates.shape == (1, 1, 2)


def test_noise_is_trained_with_but_does_not_count() -> None:
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.full((2, 1), 100.0)

    found = Plain(learning_rate=1e-3, noise=noise, steps=3).fit(WEIGHTS, 1)
    assert len(drawn) == 3
    # without the noise the start is exact, and every step that trained with it is worse
    torch.testing.assert_close(composed(found), torch.cat(WEIGHTS).double())


@pytest.mark.parametrize(("clip_norm", "length"), [(None, 2.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_the_norm_that_was_asked_for(clip_norm: float | None, length: float) -> None:
    seen: list[float] = []

    class Watched(Plain):
        def begin(self, *given: Any) -> Start:
            templates = torch.tensor([[2.0]], requires_grad=True)
            optimizer = torch.optim.SGD([templates], lr=1.0)

            def coefficients() -> Tensor:
                seen.append(templates.item())
                return torch.tensor([[1.0]])

            return Start(templates, coefficients, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))

    Watched(steps=1, loss="l1", loss_scale=2.0, clip_norm=clip_norm).fit([torch.tensor([[4.0]])], 1)
    assert seen == pytest.approx([2.0, 2.0 + length])  # the gradient of 2 |t - 4| at t = 2 is -2


def test_no_finite_loss_is_refused() -> None:
    with pytest.raises(RecastConfigError, match=r"mimicry of blocks never had a finite loss; give a smaller learning_rate"):
        Plain((float("nan"), 1.0)).fit(WEIGHTS, 1, label="blocks")


@pytest.mark.parametrize(("loss", "value"), [("mse", 3.125), ("l1", 1.25), ("smooth_l1", 1.0)])
def test_losses_are_means_over_all_numbers(loss: str, value: float) -> None:
    # differences 2.5, 0, 0 and 0... of 2.5 and 0: squares 6.25 / 2, sizes 2.5 / 2, and (2.5 - 0.5) / 2 where they are large
    assert LOSSES[loss](torch.tensor([2.5, 0.0]), torch.zeros(2)).item() == value


def test_random_templates_have_the_size_that_keeps_a_layers_outputs() -> None:
    weight = torch.empty(200, 50)
    templates = random_templates(weight, 3, torch.Generator().manual_seed(0))
    assert templates.shape == (3, 200 * 50)
    # Kaiming: a standard deviation of sqrt(2 / inputs); of 10,000 numbers it is known to about 1 %
    assert templates.std(dim=1).tolist() == pytest.approx([(2 / 50) ** 0.5] * 3, rel=0.05)
