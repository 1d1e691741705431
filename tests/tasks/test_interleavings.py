"""Random sequences of verbs against a reference that composes plainly: whatever was done, the model is what it should be.

Names of tasks are drawn from the model's own paths and parameters. ``RECAST_SEQUENCES`` says how many sequences are tried.
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from models import outputs, tiny_vit, vit_input
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from recast_peft import RecastConfigError, get_recast_model
from recast_peft.config import RecastConfig

_NAMES = "0 1 blocks mlp fc1 head weight bias model norm training keys default v1.2"
NAMES = [*_NAMES.split(), "a b"]
SEQUENCES = int(os.environ.get("RECAST_SEQUENCES", "40"))
STEPS = 12
PER_TEST = 20


@dataclass
class Reference:
    """What a model should be: its tasks' numbers, which is active, which are merged."""

    offsets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    groups: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    active: str = ""
    frozen: bool = False
    merged: str | None = None

    def model(self, task: str | None) -> torch.nn.Module:
        plain = tiny_vit(depth=3)
        weights = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
        with torch.no_grad():
            for members in self.groups[task].values() if task is not None else ():
                for member in members:
                    own = self.offsets[task][member].mean(0)  # type: ignore[index]
                    templates = (weights[f"{other}.weight"] for other in members)
                    change = sum(number * template for number, template in zip(own, templates, strict=True))
                    plain.get_submodule(member).weight.add_(change)
            if task in self.heads:
                head = torch.nn.Linear(*reversed(self.heads[task]["weight"].shape))
                head.load_state_dict(self.heads[task])
                plain.head = head
        return plain.eval()


class Run:
    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder, self.log = random.Random(seed), folder, []
        self.generator = torch.Generator().manual_seed(seed)
        self.reference = Reference()
        self.x = vit_input()
        first = self.random.choice(NAMES)
        self.model = get_recast_model(tiny_vit(depth=3), self.config(), first)
        self.note(first)
        self.reference.active = first
        self.log.append(f"convert {first!r}")

    def config(self) -> RecastConfig:
        targets = self.random.choice([["qkv"], ["fc1", "fc2"], ["qkv", "fc1"]])
        classes = self.random.choice([None, 2, 5])
        return RecastConfig(target_modules=targets, num_classes=classes, num_coefficient_sets=self.random.choice([1, 2]))

    def note(self, name: str) -> None:
        """Give a new task random numbers, and note them."""
        layers = [m for m in self.model.modules() if hasattr(m, "recast_coefficients") and name in m.recast_coefficients]
        own = self.reference.offsets[name] = {}
        for layer in layers:
            values = layer.recast_coefficients[name]
            values.data = torch.randn(values.shape, generator=self.generator) * 0.2
            own[layer.module_name] = values.detach().clone()
        self.reference.groups[name] = copy.deepcopy(self.model.peft_config[name].groups)
        head = self.model.get_base_model().head
        if hasattr(head, "has_task") and head.has_task(name):
            for value in head.modules_to_save[name].state_dict().values():
                value.copy_(torch.randn(value.shape, generator=self.generator))
            self.reference.heads[name] = copy.deepcopy(head.modules_to_save[name].state_dict())

    # ------------------------------------------------------------ the verbs

    def add(self) -> None:
        name = self.free()
        if name is not None:
            self.model.add_adapter(name, self.config())
            self.note(name)

    def free(self) -> str | None:
        free = [name for name in NAMES if name not in self.reference.offsets]
        return self.random.choice(free) if free else None

    def delete(self) -> None:
        name = self.random.choice(list(self.reference.offsets))
        if len(self.reference.offsets) == 1:
            return
        if name == self.reference.merged:
            with pytest.raises(RecastConfigError, match="merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        for held in (self.reference.offsets, self.reference.groups, self.reference.heads):
            held.pop(name, None)
        if name == self.reference.active:
            self.reference.active = next(iter(self.model.peft_config))
            self.reference.merged = None  # as with any activation

    def activate(self) -> None:
        name = self.random.choice(list(self.reference.offsets))
        self.reference.frozen = self.random.random() < 0.3
        self.model.set_adapter(name, inference_mode=self.reference.frozen)
        self.reference.active, self.reference.merged = name, None

    def merge(self) -> None:
        if self.reference.merged is not None:
            return
        name = self.random.choice(list(self.reference.offsets))
        self.model.merge_adapter([name])
        self.reference.merged = name

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.reference.merged = None

    def disable(self) -> None:
        with self.model.disable_adapter():
            assert torch.equal(outputs(self.model, self.x), outputs(tiny_vit(depth=3), self.x))
        self.reference.merged = None

    def save_and_load(self) -> None:
        name, new = self.random.choice(list(self.reference.offsets)), self.free()
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        folder = self.folder if name == "default" else self.folder / name
        stored = load_file(folder / "adapter_model.safetensors")
        for member, values in self.reference.offsets[name].items():
            assert torch.equal(stored[f"base_model.model.{member}.recast_coefficients"], values)
        if new is not None:
            self.model.load_adapter(str(folder), new)
            for held in (self.reference.offsets, self.reference.groups, self.reference.heads):
                if name in held:
                    held[new] = copy.deepcopy(held[name])  # type: ignore[index]

    def modes(self) -> None:
        self.model.train(self.random.random() < 0.5)

    def to(self) -> None:
        self.model.double().float()

    def deepcopy(self) -> None:
        self.model = copy.deepcopy(self.model)

    # ------------------------------------------------------------ what holds after each of them

    def check(self) -> None:
        reference = self.reference
        shown = reference.merged or reference.active
        torch.testing.assert_close(
            outputs(self.model.eval(), self.x), outputs(reference.model(shown), self.x), rtol=1e-4, atol=1e-5
        )
        assert list(self.model.peft_config) == list(reference.offsets)
        assert self.model.active_adapters == [reference.active]
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        own = [m.recast_coefficients for m in self.model.modules() if hasattr(m, "recast_coefficients")]
        expected = {id(c[reference.active]) for c in own if reference.active in c}
        if reference.active in reference.heads:
            expected |= {id(p) for p in self.model.get_base_model().head.modules_to_save[reference.active].parameters()}
        assert trained == (set() if reference.frozen else expected)

    def go(self) -> PeftModel:
        verbs = [self.add, self.delete, self.activate, self.merge, self.unmerge, self.disable, self.save_and_load]
        verbs += [self.modes, self.to, self.deepcopy]
        for _ in range(STEPS):
            verb = self.random.choice(verbs)
            self.log.append(verb.__name__)
            verb()
            self.check()
        return self.model


@pytest.mark.parametrize("start", range(0, SEQUENCES, PER_TEST))
def test_every_sequence_of_verbs_ends_at_the_pretrained_model(start: int, tmp_path: Path) -> None:
    plain = tiny_vit(depth=3).state_dict()
    for seed in range(start, min(start + PER_TEST, SEQUENCES)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Run(seed, tmp_path / str(seed))
            try:
                model = run.go()
            except BaseException as error:
                raise AssertionError(f"sequence {seed}: {' > '.join(run.log)}") from error
            left = model.unload().state_dict()
        assert left.keys() == plain.keys(), run.log
        assert all(torch.equal(left[key], plain[key]) for key in plain), run.log
