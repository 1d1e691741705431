"""The pretrained weight stays its own object, whatever is merged, in any thread and any dtype."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from models import converted, layers_of, outputs, randomise, vit_input
from torch import nn


def test_the_very_parameter_comes_back() -> None:
    model = converted()
    randomise(model)
    before = {name: layer.base_layer.weight for name, layer in layers_of(model).items()}
    for _ in range(3):
        model.merge_adapter()
        for name, layer in layers_of(model).items():
            assert layer.base_layer.weight is not before[name]
            assert layer.pretrained_weight is before[name]
        model.unmerge_adapter()
    assert all(layer.base_layer.weight is before[name] for name, layer in layers_of(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False])
def test_a_merged_model_that_was_rounded_is_composed_again(dtype: torch.dtype, whole: bool) -> None:
    model = converted()
    randomise(model)
    reference = copy.deepcopy(model)
    model.merge_adapter()
    for each in (model, reference):
        part = each if whole else each.get_base_model()
        part.to(dtype).to(torch.float32)
    reference.merge_adapter()
    assert torch.equal(outputs(model, vit_input()), outputs(reference, vit_input()))
    for own, other in zip(layers_of(model).values(), layers_of(reference).values(), strict=True):
        assert torch.equal(own.base_layer.weight, other.base_layer.weight)
    model.unmerge_adapter()
    reference.unmerge_adapter()
    assert torch.equal(outputs(model, vit_input()), outputs(reference, vit_input()))


def test_readers_in_other_threads_find_the_pretrained_weight() -> None:
    model = converted()
    randomise(model)
    layers = list(layers_of(model).values())
    wanted = [layer.pretrained_weight for layer in layers]
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            wrong.extend(layer for layer, weight in zip(layers, wanted, strict=True) if layer.pretrained_weight is not weight)

    threads = [threading.Thread(target=read) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(200):
            for layer in layers:
                layer.merge()
                layer.unmerge()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_what_was_merged_inside_inference_mode_can_be_trained_with() -> None:
    model = converted()
    randomise(model)
    with torch.inference_mode():
        model.merge_adapter()
    x = vit_input().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_training_a_merged_task_warns() -> None:
    model = converted().train()
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"'default' is merged.*unmerge_adapter"):
        model(vit_input())
    model.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: pytest.fail(str(args)))
        model(vit_input())
        model.unmerge_adapter()
        model.train()(vit_input())


def test_an_unloaded_model_holds_one_weight_each() -> None:
    model = converted()
    randomise(model)
    merged = model.merge_and_unload()
    assert all(not vars(p) for p in merged.parameters())
    assert all(type(p) is nn.Parameter for p in merged.parameters())
