"""What the pretrained model makes of samples, for routing."""

from __future__ import annotations

import pytest
import torch
from pools import model_with_pool

from recast_peft import RecastConfigError


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
