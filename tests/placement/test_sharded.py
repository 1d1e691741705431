"""What one process can say of tensors that are spread over several; tests/integrations/test_sharded.py runs two processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from recast_peft import RecastConfigError
from recast_peft.placement.sharded import (
    SHARD,
    check_may_be_added_to,
    is_partitioned,
    is_plain,
    is_sharded,
    is_spread_in_calls,
    whole,
    whole_shape,
    whole_trained,
    write,
)


@pytest.fixture
def shard() -> Iterator[nn.Parameter]:
    """The rows ``[0, 1], [2, 3], [4, 5]`` as a parameter of which this process, the only one, holds its shard."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield nn.Parameter(distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [Shard(0)]))
    finally:
        distributed.destroy_process_group()


def partitioned() -> nn.Parameter:
    """A parameter as ZeRO-3 leaves it: without numbers, and with what DeepSpeed notes."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 7, torch.Size([3, 2])  # type: ignore[attr-defined]
    return parameter


class TestOrdinaryTensors:
    def test_are_whole_and_are_written_to_as_they_are(self) -> None:
        parameter = nn.Parameter(torch.zeros(3, 2))
        assert (is_plain(parameter), is_sharded(parameter), is_spread_in_calls(parameter)) == (True, False, False)
        assert whole(parameter) is whole_trained(parameter) is parameter
        assert whole_shape(parameter) == (3, 2)
        write(parameter, torch.ones(3, 2))
        assert parameter.sum() == 6

    def test_with_a_mark_of_somebody_else_are_plain(self) -> None:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.somebody_s = 1  # type: ignore[attr-defined]
        assert is_plain(parameter)
        parameter._fsdp_flattened = True  # type: ignore[attr-defined]
        assert not is_plain(parameter)
        assert not is_plain(torch.zeros(2))  # a view may stand for a parameter


class TestPartitionedTensors:
    def test_are_known_by_their_mark_and_have_the_shape_that_is_noted(self) -> None:
        parameter = partitioned()
        assert (is_plain(parameter), is_partitioned(parameter)) == (False, True)
        assert (is_sharded(parameter), is_spread_in_calls(parameter)) == (True, True)
        assert whole_shape(parameter) == (3, 2)
        assert whole_trained(parameter) is parameter  # DeepSpeed gathers it for the call


class TestDTensors:
    def test_are_gathered_and_say_what_from(self, shard: nn.Parameter) -> None:
        assert (is_plain(shard), is_sharded(shard), is_spread_in_calls(shard)) == (False, True, True)
        gathered = whole(shard)
        assert gathered.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        assert getattr(gathered, SHARD) is shard
        assert whole_shape(shard) == (3, 2)

    def test_take_the_values_of_the_whole_in_their_dtype(self, shard: nn.Parameter) -> None:
        write(shard, torch.full((3, 2), 9.0, dtype=torch.float64))
        assert shard.to_local().tolist() == [[9.0, 9.0]] * 3
        assert shard.dtype == torch.float32

    def test_get_the_gradient_of_the_whole(self, shard: nn.Parameter) -> None:
        factors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        (whole_trained(shard) * factors).sum().backward()
        assert isinstance(shard.grad, Tensor)
        assert shard.grad.full_tensor().tolist() == factors.tolist()  # type: ignore[attr-defined]


class TestWhatFSDP2HasGathered:
    """``fully_shard`` of a whole model leaves its parameters whole after a call; the next one reads the shards."""

    @pytest.fixture
    def around(self, shard: nn.Parameter) -> nn.Module:
        model = fully_shard(nn.Sequential(nn.Linear(2, 2)), mesh=shard.device_mesh)  # type: ignore[attr-defined]
        with torch.no_grad():
            model(torch.ones(1, 2))
        return model

    def test_is_known_as_sharded_and_written_to_the_shard_too(self, around: nn.Module) -> None:
        weight = around[0].weight  # type: ignore[index]
        assert not hasattr(weight, "full_tensor")
        assert is_sharded(weight)
        assert not is_sharded(nn.Linear(2, 2).weight)
        write(weight, torch.full((2, 2), 3.0))
        assert weight.tolist() == [[3.0, 3.0]] * 2
        around.reshard()  # type: ignore[operator]
        assert around[0].weight.full_tensor().tolist() == [[3.0, 3.0]] * 2  # type: ignore[index]

    def test_is_not_added_to_whichever_model_was_sharded(self, around: nn.Module) -> None:
        for _ in range(2):
            with pytest.raises(RecastConfigError, match="by FSDP2"):
                check_may_be_added_to(around[0], False)  # type: ignore[index]
            check_may_be_added_to(around[0], True)  # type: ignore[index]
            around.reshard()  # type: ignore[operator]


class FSDPModule:
    """By its name torch's own, which ``fully_shard`` puts among a module's classes."""


class Sharded(FSDPModule, nn.Linear):
    pass


def flattened() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight._fsdp_flattened = True
    return module


@pytest.mark.parametrize(
    ("model", "for_inference", "message"),
    [
        (nn.Linear(2, 2), False, None),
        (nn.Sequential(Sharded(2, 2)), True, None),
        (nn.Sequential(Sharded(2, 2)), False, r"by FSDP2.*shard it; .*is_trainable=False"),
        (nn.Sequential(flattened()), False, "by FSDP1.*shard it$"),
        (nn.Sequential(flattened()), True, "by FSDP1.*shard it$"),
    ],
)
def test_a_sharded_model_takes_no_trainable_parameter(model: nn.Module, for_inference: bool, message: str | None) -> None:
    if message is None:
        check_may_be_added_to(model, for_inference)
        return
    with pytest.raises(RecastConfigError, match=message):
        check_may_be_added_to(model, for_inference)
