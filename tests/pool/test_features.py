"""What the pretrained model makes of samples, for routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pools import model_with_pool
from torch import nn

from recast_peft import RecastConfig, RecastConfigError, TaskPool, get_recast_model
from recast_peft.pool.features import base_features


class TestFindingTheTask:
    def test_bad_samples(self, images):
        _, pool = model_with_pool(1)
        with pytest.raises(RecastConfigError, match=r"labels: +\(2,\)"):
            pool.remember("task0", images, torch.tensor([0, 1]))
        for inputs in ({}, {"x": None}, torch.empty(0, 1, 16, 16), [1.0]):
            with pytest.raises(RecastConfigError, match="at least one sample"):
                pool.remember("task0", inputs)
        with pytest.raises(RecastConfigError, match="at least one sample"):
            pool.route({})


class TestFeatures:
    def pool(self, *layers: nn.Module, head: str | None = None) -> TaskPool:
        model = get_recast_model(nn.Sequential(*layers), RecastConfig(target_modules=["0", "1"]), "first").eval()
        made = TaskPool(model)
        made.add("busy", RecastConfig(num_classes=2, head_module=head) if head else None)
        made.table.fill_(0.5)
        made.activate("busy")
        return made

    def found(self, pool: TaskPool, inputs: Any, head: str | None = None) -> torch.Tensor:
        backbone = pool.model.base_model
        return base_features(backbone, head, inputs, lambda samples: pool.batch([None] * samples))

    @pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4)])
    def test_are_what_the_pretrained_head_is_given_averaged_over_tokens(self, shape):
        first, second, head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        x = torch.randn(shape)
        expected = second(first(x))
        if len(shape) > 2:
            expected = expected.reshape(3, -1, 4).sum(dim=1) / expected[0, ..., 0].numel()
        pool = self.pool(first, second, head, head="2")
        assert not torch.allclose(pool.model(x), head(second(first(x))))  # another task is active
        torch.testing.assert_close(self.found(pool, x, "2"), expected)

    def test_of_a_model_without_a_head_are_its_output_in_float32(self):
        first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        x = torch.randn(3, 4, dtype=torch.float64)
        found = self.found(self.pool(first, second), x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, second(first(x)).float())

    def test_leave_no_hook_behind(self):
        pool = self.pool(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), head="2")
        hooks = [len(module._forward_pre_hooks) for module in pool.model.modules()]
        with pytest.raises(RuntimeError):
            self.found(pool, torch.randn(3, 5), "2")  # not as wide as the model expects
        self.found(pool, torch.randn(3, 4), "2")
        assert [len(module._forward_pre_hooks) for module in pool.model.modules()] == hooks
