"""Models that read a bias by themselves: which modules a partner of biases leaves alone, or warns of."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from models import outputs, seeded
from partner_cases import learn
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from recast_peft import BiasConfig, CLRConfig, RecastConfig, RecastTargetError, get_recast_model, plan_recast


class Readers(nn.Module):
    """One block, whose modules are used in all the ways that models have for them. Input: ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("read", "deeper", "called", "asked", "passed", "both"):
            self.add_module(name, nn.Linear(4, 4))
        self.inner = nn.ModuleDict({"linear": nn.Linear(4, 4)})
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.asked.bias is not None:
            x = self.asked(x.to(self.asked.bias.dtype))
        x = self.once_more(F.linear(x, self.read.weight, self.read.bias.float()))
        x = torch.utils.checkpoint.checkpoint(self.passed, self.called(x), use_reentrant=False)
        x = F.conv2d(x[:, None, :, None], self.conv.weight, self.conv.bias, padding=1)[:, 0, :, 0]
        return F.linear(self.both(x), self.both.weight, self.both.bias)

    def once_more(self, x: Tensor) -> Tensor:
        return sum(F.linear(x, w, self.deeper.bias) for w in [self.deeper.weight]) + self.inner.linear.bias

    def fuse(self) -> Tensor:  # no part of a call
        return self.called.bias


class Net(nn.Module):
    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(checkpoint_wrapper(Readers()) if wrap else Readers() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("wrap", [False, True])
def test_a_bias_that_the_model_reads_and_never_calls_gets_no_coefficient(wrap: bool) -> None:
    config = RecastConfig(target_modules=["called"], partners=["bias"])
    places = {name.rpartition(".")[2] for name in plan_recast(Net(wrap), config).parts["bias"]}
    assert places == {"called", "asked", "passed", "both"}


class ByOtherNames(nn.Module):
    """The same by local variables, and in lists."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("read", "called", "both"):
            self.add_module(name, nn.Linear(4, 4))
        for name in ("looped", "picked", "run", "given"):
            self.add_module(name, nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        read = self.read
        called = self.called
        both = self.both
        dtype = called.bias.dtype
        x = F.linear(called(x.to(called.bias.dtype).to(dtype)), read.weight, read.bias) + both(x) + both.bias
        for layer in self.looped:
            x = F.linear(x, layer.weight, layer.bias)
        for run in self.run:
            x = run(x)
        x = self.picked[1](F.linear(x, self.picked[0].weight, self.picked[0].bias))
        return self.through(x, self.given)

    def through(self, x: Tensor, layers: nn.ModuleList) -> Tensor:
        return layers[1](layers[0](x))


def on_bias_of(*names: str) -> RecastConfig:
    return RecastConfig(target_modules=["called"], partners=[BiasConfig(target_modules=list(names))])


@pytest.mark.parametrize("name", ["read", "looped.0", "looped.1", "picked.0"])
def test_a_bias_that_is_read_by_another_name_is_found(name: str) -> None:
    with pytest.raises(RecastTargetError, match="ByOtherNames reads its bias and never calls it"):
        get_recast_model(ByOtherNames(), on_bias_of(name))


def test_what_is_called_by_another_name_is_found() -> None:
    with pytest.warns(UserWarning, match=r"the model calls both and also computes"):
        get_recast_model(ByOtherNames(), on_bias_of("both"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_recast_model(ByOtherNames(), on_bias_of("called", "picked.1", "run.0", "run.1", "given.0", "given.1"))


def test_naming_one_is_an_error_that_says_who_reads_it() -> None:
    for name in ("read", "deeper", "linear", "conv"):
        config = RecastConfig(target_modules=["called"], partners=[BiasConfig(target_modules=[name])])
        with pytest.raises(RecastTargetError, match="Readers reads its bias and never calls it"):
            get_recast_model(Net(), config)
    config = RecastConfig(target_modules=["called"], partners=[CLRConfig(target_modules=["conv"])])
    with pytest.raises(RecastTargetError, match="Readers reads its weight and never calls it"):
        get_recast_model(Net(), config)


def test_one_that_is_called_and_read_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"calls blocks\.0\.both, blocks\.1\.both and also computes with the bias by itself"):
        get_recast_model(Net(), RecastConfig(target_modules=["called"], partners=["bias"]))


def test_what_is_left_acts_alike_live_and_merged() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    partner = BiasConfig(target_modules=["called", "asked", "passed"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_recast_model(seeded(Net), RecastConfig(target_modules=["called"], partners=[partner])).eval()
    before = outputs(model, x)
    learn(model)
    live = outputs(model, x)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), live)
    assert not torch.allclose(live, before)
