"""A bank that moves the scales of norms with the biases computes what the moved norms compute, in every way of using it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import BiasConfig, RecastConfig, StoredBank, TaskPool, extend_bank, get_recast_model, grow_bias_bank
from recast_peft.parts.bias_part import bias_coefficients

X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(9))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=64).double().eval()


def cnn() -> nn.Module:
    """Norms with an activation inside, and running statistics that are not those of a fresh model."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "bn" in name and value.is_floating_point():
            value.data += 0.2 * torch.rand(value.shape, generator=generator).double()
    return model


KINDS = {"vit": vit, "cnn": cnn}


def moved(make: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    norms = ("norm", "bn")
    state = make().state_dict()
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator).double()
        for name, value in state.items()
        if name.endswith(("weight", "bias")) and value.ndim == 1 and any(norm in name for norm in norms)
    }


def bank(make: Any, **fields: Any) -> StoredBank:
    return grow_bias_bank(make(), [moved(make, 0), moved(make, 1)], scales=True, **fields)


def adapted(make: Any, stored: StoredBank, name: str = "task", seed: int = 3) -> PeftModel:
    model = get_recast_model(make(), RecastConfig(group_size=1, partners=[BiasConfig(bank=stored)]), name).eval()
    randomise(model, name, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, task: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("offset") and f".{task}." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def by_hand(make: Any, model: nn.Module, task: str, stored: StoredBank) -> Tensor:
    """The plain model with its norms moved by the task's coefficients."""
    plain, owned = make(), bias_coefficients(model, task)
    for group in stored.groups.values():
        offset = owned[f"{group.members[0]}.bias"]
        for member, templates in group.biases().items():
            parameter = plain.get_parameter(member if member.endswith(".weight") else f"{member}.bias")
            parameter += offset.double() @ templates.double()
    return plain(X.double())


@pytest.mark.parametrize("kind", KINDS)
class TestScales:
    def test_live_and_merged_are_the_moved_norms(self, kind: str) -> None:
        make = KINDS[kind]
        stored = bank(make)
        assert any(member.endswith(".weight") for group in stored.groups.values() for member in group.members)
        model = adapted(make, stored)
        with torch.no_grad():
            wanted = by_hand(make, model, "task", stored)
            assert not torch.allclose(wanted, make()(X.double()), rtol=1e-2)
            torch.testing.assert_close(model(X.double()), wanted, rtol=1e-6, atol=1e-6)
            model.merge_adapter()
            torch.testing.assert_close(model(X.double()), wanted, rtol=1e-6, atol=1e-6)
            model.unmerge_adapter()
            with model.disable_adapter():
                assert torch.equal(model(X.double()), make()(X.double()))
        torch.testing.assert_close(model.merge_and_unload()(X.double()), wanted, rtol=1e-6, atol=1e-6)

    def test_a_fresh_task_changes_nothing(self, kind: str) -> None:
        make = KINDS[kind]
        fresh = get_recast_model(make(), RecastConfig(group_size=1, partners=[BiasConfig(bank=bank(make))])).eval()
        with torch.no_grad():
            assert torch.equal(fresh(X.double()), make()(X.double()))

    def test_a_pool_whatever_is_merged(self, kind: str) -> None:
        make = KINDS[kind]
        stored = bank(make)
        model = adapted(make, stored)
        model.add_adapter("other", RecastConfig(group_size=1, partners=[BiasConfig(bank=stored)]))
        randomise(model, "other", 7)
        pool = TaskPool(model)
        for name in ("task", "other"):
            pool.add(name, name)
        wanted = {name: by_hand(make, model, name, stored) for name in ("task", "other")}
        with torch.no_grad():
            for merge in (False, True):
                pool.activate("other", merge=merge)
                found = model(X.double(), task_ids=pool.ids(["task", "other", "task"]))
                for row, name in enumerate(("task", "other", "task")):
                    torch.testing.assert_close(found[row], wanted[name][row], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(model(X.double()), wanted["other"], rtol=1e-4, atol=1e-4)
            pool.activate("task", merge=True)
            torch.testing.assert_close(model(X.double()), wanted["task"], rtol=1e-4, atol=1e-4)

    def test_saved_loaded_and_trained(self, kind: str, tmp_path: Path) -> None:
        make = KINDS[kind]
        model = adapted(make, bank(make).save(tmp_path / "bank"))
        model(X.double()).square().mean().backward()
        offsets = [p for n, p in model.named_parameters() if n.endswith("offset") and p.requires_grad]
        assert offsets
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in offsets)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path / "task", "task").eval()
        with torch.no_grad():
            assert torch.equal(again(X.double()), model(X.double()))

    def test_extended(self, kind: str) -> None:
        make = KINDS[kind]
        more = extend_bank(bank(make, num_templates=1), make(), [moved(make, 5)])
        assert more.version == 2
        model = adapted(make, more)
        with torch.no_grad():
            torch.testing.assert_close(model(X.double()), by_hand(make, model, "task", more), rtol=1e-6, atol=1e-6)


def test_a_scale_of_zero_stays() -> None:
    def dead() -> nn.Module:
        model = cnn()
        with torch.no_grad():
            model.get_submodule("blocks.0.0.bn1").weight[0] = 0.0
        return model

    stored = bank(dead)
    model = adapted(dead, stored)
    with torch.no_grad():
        assert torch.isfinite(model(X.double())).all()
        torch.testing.assert_close(model(X.double()), by_hand(dead, model, "task", stored), rtol=1e-6, atol=1e-6)
