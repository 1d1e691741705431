"""What each task puts in the place of one module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recast_peft import RecastConfigError
from recast_peft.composition.mixed_batch import MixedBatch, mixed_batch
from recast_peft.parts.head import split_logits
from recast_peft.parts.wrapper import TaskModule, check_one_owner, joined


class TestMixedBatches:
    def test_joining_and_splitting_by_hand(self):
        together = joined([([1], torch.tensor([[1.0, 2.0]])), ([0, 2], torch.tensor([[3.0], [4.0]]))], 3)
        inf = float("inf")
        assert torch.equal(together, torch.tensor([[3.0, -inf], [1.0, 2.0], [4.0, -inf]]))
        assert [row.tolist() for row in split_logits(together)] == [[3.0], [1.0, 2.0], [4.0]]
        overflowed = torch.tensor([[inf, 1.0, -inf], [-inf, 2.0, -inf], [float("nan"), 0.0, 3.0]])
        assert [len(row) for row in split_logits(overflowed)] == [2, 2, 3]


class Constant(nn.Module):
    """Gives one number for each sample, which is trained."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x), 1)


@pytest.fixture
def place() -> TaskModule:
    """The model's own module gives 0, that of task a, which is active, 1, that of task b 2."""
    made = TaskModule(Constant(0.0), "head")
    made.add("a", Constant(1.0), active=True, inference_mode=False)
    made.add("b", Constant(2.0), active=False, inference_mode=False)
    return made


def shown(place: TaskModule) -> float:
    """What is called now."""
    return place(torch.zeros(1, 1)).item()


def trained(place: TaskModule) -> list[str]:
    return [name for name, module in place.modules_to_save.items() if module.value.requires_grad]


class Sum(Constant):
    """Adds its number to what it is called with."""

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return sum(given) + self.value


def test_arguments_that_go_by_sample_are_told_from_numbers() -> None:
    place = TaskModule(Sum(0.0), "head")
    for value, name in ((1.0, "a"), (2.0, "b")):
        place.add(name, Sum(value), active=True, inference_mode=False)
    x, y = torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([[100.0], [200.0], [300.0]])
    with mixed_batch(MixedBatch(("b", "a", "__base__"))):
        assert place(x, torch.tensor(0.5)).tolist() == [[12.5], [21.5], [30.5]]
        assert place(torch.tensor(0.5), x).tolist() == [[12.5], [21.5], [30.5]]
        assert place(x, y).tolist() == [[112.0], [221.0], [330.0]]


class TestTheModuleThatIsCalled:
    def test_is_the_active_tasks_or_the_models_own(self, place):
        assert (shown(place), trained(place)) == (1.0, ["a"])
        place.set_adapter(["elsewhere", "b"])
        assert (shown(place), trained(place), place.active_adapters) == (2.0, ["b"], ["b"])
        place.set_adapter("elsewhere")
        assert (shown(place), trained(place), place.shown_task) == (0.0, [], None)
        assert not place.original_module.value.requires_grad

    def test_is_the_merged_tasks_while_one_is_merged(self, place):
        place.merge(["b", "elsewhere"])
        assert (shown(place), place.merged_adapters) == (2.0, ["b"])
        place.unmerge()
        assert shown(place) == 1.0
        place.merge(["elsewhere"])  # which has nothing here
        assert shown(place) == 0.0
        place.set_adapter("b")
        assert (shown(place), place.merged_adapters) == (2.0, [])

    def test_is_the_models_own_while_tasks_are_off_and_what_was_frozen_stays_so(self, place):
        for inference_mode, expected in ((False, ["a"]), (True, [])):
            place.set_adapter("a", inference_mode=inference_mode)
            place.enable_adapters(False)
            place.enable_adapters(False)
            assert (shown(place), trained(place)) == (0.0, [])
            place.enable_adapters(True)
            assert (shown(place), trained(place)) == (1.0, expected)

    def test_is_gone_with_its_task(self, place):
        place.delete_adapter("a")
        assert (shown(place), [*place.modules_to_save], place.has_task("a")) == (0.0, ["b"], False)
        place.set_adapter("b")
        assert shown(place) == 2.0

    def test_stays_where_a_merged_model_is_unloaded(self, place):
        assert place.unload_and_optionally_merge_module(True, False, None) is place.modules_to_save["a"]
        assert place.unload_and_optionally_merge_module(True, False, ["elsewhere", "b"]) is place.modules_to_save["b"]
        assert place.unload_and_optionally_merge_module(True, False, ["elsewhere"]) is place.original_module
        assert place.unload_and_optionally_merge_module(False, False, ["b"]) is place.original_module


class TestTwoOwners:
    def test_are_refused_by_name_and_nothing_changes(self, place):
        with pytest.raises(RecastConfigError, match="modules_to_save at head, got a, b"):
            place.set_adapter(["a", "b"])
        assert (shown(place), trained(place)) == (1.0, ["a"])

    def test_are_found_in_a_model(self, place):
        model = nn.Sequential(place)
        check_one_owner(model, ["a", "elsewhere"])
        for merging in (False, True):
            with pytest.raises(RecastConfigError, match="'head', got b, a"):
                check_one_owner(model, ["b", "a"], merging=merging)
        place.adds_when_merged = True
        check_one_owner(model, ["b", "a"], merging=True)
        with pytest.raises(RecastConfigError, match="'head', got b, a"):
            check_one_owner(model, ["b", "a"])
