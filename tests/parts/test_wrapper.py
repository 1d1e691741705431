"""What each task puts in the place of one module."""

from __future__ import annotations

import torch

from recast_peft.parts.head import split_logits
from recast_peft.parts.wrapper import joined


class TestMixedBatches:
    def test_joining_and_splitting_by_hand(self):
        together = joined([([1], torch.tensor([[1.0, 2.0]])), ([0, 2], torch.tensor([[3.0], [4.0]]))], 3)
        inf = float("inf")
        assert torch.equal(together, torch.tensor([[3.0, -inf], [1.0, 2.0], [4.0, -inf]]))
        assert [row.tolist() for row in split_logits(together)] == [[3.0], [1.0, 2.0], [4.0]]
