"""A layer's further calls: whatever changes between two calls is seen, and nothing is found out twice."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import converted, layers_of, randomise, vit_input
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recast_peft import PiggybackConfig, RecastConfig, RecastLayer

QKV, OTHER = "blocks.0.attn.qkv", "blocks.1.attn.qkv"  # of one group


def model_of(group_size: int) -> Any:
    """Two random tasks, of which the first is active."""
    model = converted(target_modules=["qkv", "fc1"], group_size=group_size, depth=2).eval()
    config = RecastConfig(target_modules=["qkv", "fc1"], group_size=group_size)
    model.add_adapter("second", config)
    for seed, name in enumerate(("default", "second")):
        randomise(model, name, seed=seed, size=0.2)
    return model


def output(model: Any, without: Callable[[], Any] = torch.no_grad) -> Tensor:
    with without():
        return model(vit_input(2))


def coefficients(model: Any, module: str = QKV) -> nn.Parameter:
    return layers_of(model)[module].recast_coefficients["default"]


def pretrained(model: Any, module: str) -> nn.Linear:
    return layers_of(model)[module].base_layer


@torch.no_grad()
def written(model: Any) -> None:
    coefficients(model).mul_(3)


def exchanged_data(model: Any) -> None:
    coefficients(model).data = coefficients(model).data * 3


def exchanged_parameter(model: Any) -> None:
    layers_of(model)[QKV].recast_coefficients["default"] = nn.Parameter(coefficients(model).detach() * 3)


def another_weight(model: Any) -> None:
    pretrained(model, QKV).weight = nn.Parameter(pretrained(model, QKV).weight.detach() * 2)


def another_weight_of_the_neighbour(model: Any) -> None:
    pretrained(model, OTHER).weight = nn.Parameter(pretrained(model, OTHER).weight.detach() * 2)


@torch.no_grad()
def written_weight_of_the_neighbour(model: Any) -> None:
    pretrained(model, OTHER).weight.mul_(2)


def merged_neighbour(model: Any) -> None:
    layers_of(model)[OTHER].merge()


def another_bias(model: Any) -> None:
    pretrained(model, QKV).bias = nn.Parameter(pretrained(model, QKV).bias.detach() + 1)


def hooked(model: Any) -> None:
    pretrained(model, QKV).register_forward_hook(lambda module, args, y: y * 2)


def masked(model: Any) -> None:
    config = RecastConfig(target_modules=["qkv", "fc1"], partners=[PiggybackConfig()])
    model.add_adapter("masked", config)
    randomise(model, "masked", size=0.2)
    model.set_adapter("masked")
    (masks,) = (layer.recast_masks["masked"] for name, layer in layers_of(model).items() if name == QKV)
    with torch.no_grad():
        masks.scores[:3] = -1  # leaves out what it is for


def deleted(model: Any) -> None:
    model.set_adapter("second")
    model.delete_adapter("default")


def scaled(model: Any) -> None:
    layers_of(model)[QKV].set_scale("default", 0.5)


def several(model: Any) -> None:
    model.base_model.set_adapter(["default", "second"])


CHANGES: list[Callable[[Any], None]] = [
    written,
    exchanged_data,
    exchanged_parameter,
    another_weight,
    another_bias,
    hooked,
    masked,
    deleted,
    scaled,
    several,
    lambda model: model.set_adapter("second"),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.merge_adapter(),
    lambda model: layers_of(model)[QKV].merge(),
    lambda model: model.to(torch.float64).float(),
]
OF_NEIGHBOURS = [another_weight_of_the_neighbour, written_weight_of_the_neighbour]


# inference mode notes nothing for checkpoints, and neither does a call whose gradients are recorded outside of them
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_seen(change: Callable[[Any], None], group_size: int, without: Callable[[], Any]) -> None:
    called, fresh = model_of(group_size), model_of(group_size)
    before = output(called, without)
    assert torch.equal(output(called, without), before)  # the second call
    change(called)
    change(fresh)
    expected = output(fresh, without)
    assert torch.equal(output(called, without), expected)
    assert torch.equal(output(called, without), expected)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change", [*CHANGES, lambda model: model.unmerge_adapter(), lambda model: model.merge_adapter(["second"])]
)
def test_a_change_between_two_merged_calls_is_seen(change: Callable[[Any], None], without: Callable[[], Any]) -> None:
    called, fresh = model_of(2), model_of(2)
    for model in (called, fresh):
        model.merge_adapter()
    output(called, without), output(called, without)
    change(called)
    change(fresh)
    expected = output(fresh, without)
    assert torch.equal(output(called, without), expected)
    assert torch.equal(output(called, without), expected)


def test_a_second_merged_call_notes_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(2)
    model.merge_adapter()
    expected = output(model)
    monkeypatch.setattr(
        RecastLayer, "tasks_in_force", lambda *args: pytest.fail("a call like the last one asked what is merged")
    )
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("change", OF_NEIGHBOURS)
def test_a_change_of_a_neighbour_is_seen(change: Callable[[Any], None]) -> None:
    called, fresh = model_of(2), model_of(2)
    before = [output(called), output(called)]
    change(called)
    change(fresh)
    after = output(called)
    assert torch.equal(after, output(fresh))
    assert not torch.equal(after, before[1])
    with torch.no_grad():
        layer = layers_of(called)[QKV]  # alone: the neighbour's own output has changed as well
        x = torch.randn(2, 3, layer.in_features)
        assert torch.equal(layer(x), layers_of(fresh)[QKV](x))


def test_a_merged_neighbour_changes_nothing() -> None:
    model = model_of(2)
    layer = layers_of(model)[QKV]
    x = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        before = [layer(x), layer(x)]
        merged_neighbour(model)
        assert torch.equal(layer(x), before[1])
        assert torch.equal(layer(x), before[1])


@pytest.mark.parametrize("without", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("group_size", [1, 2])
def test_a_second_call_finds_nothing_out(group_size: int, without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(group_size)
    expected = output(model, without)

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a call that is like the last one asked for its templates")

    monkeypatch.setattr(RecastLayer, "terms", asked)
    assert torch.equal(output(model, without), expected)
    with torch.no_grad(), pytest.raises(AssertionError, match="asked for its templates"):
        coefficients(model).mul_(1)
        output(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_what_it_holds_itself(copied: Callable[[Any], Any]) -> None:
    model = model_of(2)
    before = output(model)
    twin = copied(model)
    assert all(layer.known is None for layer in layers_of(twin).values())
    written(twin)
    assert torch.equal(output(model), before)
    assert not torch.equal(output(twin), before)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_each_sample_its_own_task_after_calls_with_one(without: Callable[[], Any]) -> None:
    model = model_of(2)
    first = output(model)
    model.set_adapter("second")
    second = [output(model, without), output(model, without)][1]
    with without():
        mixed = model(vit_input(2), adapter_names=["default", "second"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
    assert torch.equal(output(model), second)


@pytest.mark.parametrize("without", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_computed_again_with_the_task_of_its_forward_pass(use_reentrant: bool, without: Any) -> None:
    def gradients(switch: bool) -> list[Tensor]:
        model = model_of(2).train()
        with without():  # known by now
            model(vit_input(2)), model(vit_input(2))
        layer = layers_of(model)[QKV]
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        if switch:
            model.set_adapter("second")
            output(model)
        y.square().sum().backward()
        assert x.grad is not None
        return [x.grad, y]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("then", [written, lambda model: model.unmerge_adapter(), lambda model: model.set_adapter("second")])
def test_a_checkpoint_of_a_merged_layer_is_computed_again_as_it_was(then: Callable[[Any], None]) -> None:
    def gradient(changed: bool) -> Tensor:
        model = model_of(2).train()
        model.merge_adapter()
        layer = layers_of(model)[QKV]
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.no_grad():
            layer(x), layer(x)
        if then is not written:
            model.unmerge_adapter()
            with torch.no_grad():
                layer(x), layer(x)
            model.merge_adapter()
        y = checkpoint(layer, x, use_reentrant=True).square()
        if changed:
            then(model)
            with torch.no_grad():
                layer(x), layer(x)
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_nested_checkpoints_are_computed_again_with_the_task_of_their_forward_pass() -> None:
    def gradient(switch: bool) -> Tensor:
        model = model_of(2).train()
        layer = layers_of(model)[QKV]
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = checkpoint(lambda x: checkpoint(layer, x, use_reentrant=True).square(), x, use_reentrant=True)
        if switch:
            model.set_adapter("second")
            output(model), output(model)
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_threads_beside_each_other() -> None:
    model = model_of(2)
    expected = output(model)
    got: list[Tensor] = []
    threads = [threading.Thread(target=lambda: got.extend(output(model) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    assert all(torch.equal(one, expected) for one in got)


def test_transforms_after_calls() -> None:
    model = model_of(1)
    layer = layers_of(model)[QKV]
    x = torch.randn(4, 3, layer.in_features)
    with torch.no_grad():
        expected = [layer(x), layer(x)][1]
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        weights = {name: value * 2 for name, value in layer.named_parameters() if name.endswith("offsets")}
        changed = torch.func.functional_call(layer, weights, (x,))
    assert not torch.allclose(changed, expected)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            if name in weights:
                value.copy_(weights[name])
        assert torch.equal(twin(x), changed)
