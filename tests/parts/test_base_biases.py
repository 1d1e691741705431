"""The model's own biases, trained and stored with a task."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from models import move, seeded
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastConfigError, get_recast_model


class ThreeLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).relu())


def three_layers() -> ThreeLayers:
    return seeded(ThreeLayers)


def trained(model: PeftModel) -> set[str]:
    names = (n for n, p in model.get_base_model().named_parameters() if p.requires_grad and n.endswith(".bias"))
    return {name.replace(".base_layer", "") for name in names}


def config(bias: str, **fields: object) -> RecastConfig:
    return RecastConfig(target_modules=["first"], lora_config={"target_modules": ["second"]}, bias=bias, **fields)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("recast_only", {"first.bias", "second.bias"}),
        ("all", {"first.bias", "second.bias", "third.bias"}),
    ],
)
def test_those_of_both_parts_are_trained_and_stored(bias: str, expected: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of them are parameters
        model = get_recast_model(three_layers(), config(bias))
    assert trained(model) == expected
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad):
            parameter.add_(0.5)
    state = get_peft_model_state_dict(model)
    stored = {k.removeprefix("base_model.model.").replace(".base_layer", "") for k in state if k.endswith(".bias")}
    assert stored == expected
    other = get_recast_model(three_layers(), config(bias))
    set_peft_model_state_dict(other, state)
    x = torch.ones(2, 8)
    assert torch.equal(other(x), model(x))


def test_biases_that_are_no_parameters_are_told_of() -> None:
    model = three_layers()
    bias = model.third.bias.detach()
    del model.third.bias
    model.third.register_buffer("bias", bias)  # as gptqmodel's layers hold theirs
    with pytest.warns(UserWarning, match="does not train the biases of third: they are no parameters"):
        converted = get_recast_model(model, config("all"))
    assert trained(converted) == {"first.bias", "second.bias"}


def test_those_of_a_later_task_learn_too() -> None:
    model = get_recast_model(three_layers(), config("none"), "plain")
    model.add_adapter("with_biases", config("recast_only"))
    model.set_adapter("with_biases")
    assert trained(model) == {"first.bias", "second.bias"}


def test_they_learn_only_while_their_task_is_active() -> None:
    model = get_recast_model(three_layers(), config("none"), "plain")
    model.add_adapter("with_biases", config("recast_only"))
    assert trained(model) == set()  # "plain" is active, and its file would not hold them
    model.set_adapter("with_biases")
    with pytest.warns(UserWarning, match="stay as task 'with_biases' .*, and plain computes with them"):
        model.set_adapter("plain")
    assert trained(model) == set()
    model.set_adapter("with_biases")
    assert trained(model) == {"first.bias", "second.bias"}
    with pytest.warns(UserWarning, match="has trained them, and plain computes with them"):
        model.delete_adapter("with_biases")
    assert trained(model) == set()


def test_a_task_that_is_merged_is_not_deleted_and_learns_on(recwarn: pytest.WarningsRecorder) -> None:
    model = get_recast_model(three_layers(), config("recast_only"), "with_biases")
    model.add_adapter("plain", config("none"))
    model.merge_adapter()
    with pytest.raises(RecastConfigError, match="merged"):
        model.delete_adapter("with_biases")
    model.unmerge_adapter()
    assert trained(model) == {"first.bias", "second.bias"}
    assert not [warning for warning in recwarn if "deleted" in str(warning.message)]  # nothing was


def test_those_of_a_frozen_task_do_not_learn() -> None:
    assert trained(get_recast_model(three_layers(), config("all", inference_mode=True))) == set()


@pytest.mark.parametrize("saved", [{"modules_to_save": ["second"]}, {"num_classes": 6, "head_module": "third"}])
def test_of_a_module_that_the_task_owns_whole_are_trained_in_its_copy_alone(saved: dict) -> None:
    model = get_recast_model(three_layers(), RecastConfig(target_modules=["first"], bias="all", **saved))
    owned = next(iter(saved.get("modules_to_save", ["third"])))
    assert trained(model) == {
        f"{owned}.modules_to_save.default.bias",
        *(f"{n}.bias" for n in ("first", "second", "third") if n != owned),
    }
    model(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("order", [("adds", "part"), ("adds",), ("part",)])
def test_saved_while_the_task_is_merged_they_are_without_what_is_merged_into_them(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    """A file with the merged biases would add the same once more when it is loaded."""
    lora = LoraConfig(r=2, target_modules=["second"], lora_bias="part" in order)
    fields = {"partners": ["bias"]} if "adds" in order else {}
    model = get_recast_model(three_layers(), RecastConfig(target_modules=["first"], lora_config=lora, bias="all", **fields))
    move(model.eval())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    live, own = model(x), {name: p.clone() for name, p in model.named_parameters() if name.endswith("third.bias")}
    model.merge_adapter()
    torch.testing.assert_close(model(x), live)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(three_layers(), tmp_path).eval()
    torch.testing.assert_close(loaded(x), live)
    model.unmerge_adapter()
    assert torch.equal(model(x), live)
    assert all(torch.equal(dict(loaded.named_parameters())[name], value) for name, value in own.items())
