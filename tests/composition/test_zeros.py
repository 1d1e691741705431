"""What a slot's zeros are passed over in, and what always multiplies by them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from recast_peft.composition import zeros as module
from recast_peft.composition.zeros import Zeros


class Holder(nn.Module):
    """Holds the numbers of one adapter, and of another one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(3))
        self.active_adapters = ["slot"]
        self.zeros: Any = Zeros("slot")
        self.zeros.note([self])

    def numbers_of(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        return (self.numbers,) if adapter_name == "slot" else ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 if self.zeros.are_all(self) else x + self.numbers.sum()


@pytest.fixture
def holder() -> Holder:
    return Holder()


def write(holder: Holder) -> None:
    holder.numbers.fill_(1)


def exchange(holder: Holder) -> None:
    holder.numbers = nn.Parameter(torch.ones(3))


def exchange_data(holder: Holder) -> None:
    nn.utils.vector_to_parameters(torch.ones(3), [holder.numbers])


def swap(holder: Holder) -> None:
    torch.utils.swap_tensors(holder.numbers, nn.Parameter(torch.ones(3)))


def load(holder: Holder) -> None:
    holder.load_state_dict({"numbers": torch.ones(3)}, assign=True)


def activate(holder: Holder) -> None:
    holder.active_adapters = ["slot", "other"]


def forget(holder: Holder) -> None:
    holder.zeros.forget()


@torch.no_grad()
def test_are_passed_over_where_they_are_all_that_is_active(holder: Holder) -> None:
    assert holder.zeros.are_all(holder)
    assert not holder.zeros.are_all(Holder())  # of another place nothing was noted


@torch.no_grad()
@pytest.mark.parametrize("change", [write, exchange, exchange_data, swap, load, activate, forget])
def test_count_again_after_any_change(holder: Holder, change: Any) -> None:
    change(holder)
    assert not holder.zeros.are_all(holder)


def test_count_where_gradients_are_recorded(holder: Holder) -> None:
    assert torch.is_grad_enabled()
    assert not holder.zeros.are_all(holder)


@torch.no_grad()
def test_count_in_a_graph_that_is_traced(holder: Holder) -> None:
    x = torch.ones(3)
    traced = torch.jit.trace(holder, x, check_trace=False)
    write(holder)
    assert torch.equal(traced(x), x + 3)


@torch.no_grad()
def test_count_in_a_graph_that_is_captured(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert module._may_be_captured("cuda") == capturing
    assert module._may_be_captured("xpu")  # nobody knows
    monkeypatch.setattr(module, "_may_be_captured", lambda device: True)
    assert not holder.zeros.are_all(holder)


@torch.no_grad()
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_count_in_a_copy_until_they_are_noted_there(holder: Holder, copier: Any) -> None:
    copied, same = copier((holder, holder.zeros))
    assert copied.zeros is same
    assert not copied.zeros.are_all(copied)
    assert holder.zeros.are_all(holder)
    same.note([copied])
    assert copied.zeros.are_all(copied)
