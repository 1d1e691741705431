"""Sizes: the paper's settings and counts, budgets that are kept, shared coefficients, the table of alternatives."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import converted, layers_of, outputs, randomise, tiny_vit, vit_input
from peft import PeftModel
from torch import nn

from recast_peft import (
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    get_recast_model,
    mimicry_report,
    plan_recast,
    scaling_table,
)
from recast_peft.config import PAPER_SETTINGS
from recast_peft.names import block_of
from recast_peft.options.checks import SHARING

X = vit_input()


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class TestPaper:
    """Counts of the paper: 12 blocks x 2 sets x 2 templates = 48, and so on (section 4)."""

    @pytest.mark.parametrize(
        ("name", "backbone", "count"),
        [
            ("vit-att", "vit_small_patch16_224", 48),
            ("vit-mlp", "vit_small_patch16_224", 96),
            ("vit-att+mlp", "vit_small_patch16_224", 144),
            ("resnet", "resnet34", 168),
        ],
    )
    def test_counts(self, name: str, backbone: str, count: int) -> None:
        timm = pytest.importorskip("timm")
        with torch.device("meta"):
            shapes = timm.create_model(backbone)
        model = shapes.to_empty(device="cpu")
        plan = plan_recast(model, RecastConfig.paper(name))
        assert plan.num_coefficients == count
        assert all(group.is_exact for group in plan.groups)

    def test_of_resnet_leaves_the_first_block_of_each_stage_out(self) -> None:
        timm = pytest.importorskip("timm")
        groups = plan_recast(timm.create_model("resnet34"), RecastConfig.paper("resnet")).groups
        assert [len(g.members) for g in groups if g.name.endswith("conv1")] == [2, 3, 5, 2]
        assert not any(block_of(member).endswith(".0") for group in groups for member in group.members)

    def test_can_be_overridden_and_lists_its_names(self) -> None:
        assert RecastConfig.paper("vit-att", num_coefficient_sets=1).num_coefficient_sets == 1
        with pytest.raises(RecastConfigError, match="expected one of " + ", ".join(PAPER_SETTINGS).replace("+", r"\+")):
            RecastConfig.paper("vit")


class TestBudget:
    @given(st.integers(1, 80), st.integers(1, 3), st.sampled_from([None, *SHARING]))
    def test_is_kept_or_refused(self, budget: int, sets: int, sharing: str | None) -> None:
        config = RecastConfig(
            target_modules=["qkv", "fc1"], max_coefficients=budget, num_coefficient_sets=sets, coefficient_sharing=sharing
        )
        model = tiny_vit()
        try:
            plan = plan_recast(model, config)
        except RecastConfigError:
            # 4 blocks: one number for each is the least with shared roles, and no more can be saved in exact banks
            assert budget < (8 if sharing == "blocks" else 4)
            return
        assert f"max_coefficients={budget}" in str(plan)
        assert trainable(get_recast_model(model, config)) == plan.num_coefficients + plan.num_lora_numbers <= budget

    @pytest.mark.parametrize(
        ("budget", "size", "sets", "sharing"),
        # 8 layers in 2 roles: exact banks of size s need 8 s K numbers
        [(64, 4, 2, None), (63, 3, 2, None), (32, 2, 2, None), (16, 1, 2, None), (15, 1, 1, None), (7, 1, 1, "roles")],
    )
    def test_takes_the_largest_choice_with_the_least_sharing(
        self, budget: int, size: int, sets: int, sharing: str | None
    ) -> None:
        config = RecastConfig(target_modules=["qkv", "fc1"], max_coefficients=budget, num_coefficient_sets=2)
        plan = plan_recast(tiny_vit(), config)
        assert max(len(group.members) for group in plan.groups) == size
        assert (plan.num_coefficient_sets, plan.coefficient_sharing) == (sets, sharing)

    def test_keeps_what_was_given(self) -> None:
        config = RecastConfig(target_modules=["qkv"], group_size=2, num_templates=1, max_coefficients=4)
        plan = plan_recast(tiny_vit(), config)
        assert {(len(g.members), g.num_templates) for g in plan.groups} == {(2, 1)}
        with pytest.raises(RecastConfigError, match="smallest choice: 2"):
            plan_recast(tiny_vit(), RecastConfig(target_modules=["qkv"], group_size=2, num_templates=1, max_coefficients=1))

    def test_is_stored_with_the_task(self, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=["qkv", "fc1"], max_coefficients=7, num_coefficient_sets=2)
        model = get_recast_model(tiny_vit(), config).eval()
        assert (config.num_coefficient_sets, config.coefficient_sharing) == (2, None)  # the user's object is as it was
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        stored = loaded.peft_config["default"]
        assert (stored.num_coefficient_sets, stored.coefficient_sharing) == (1, "roles")


class TestSharing:
    # 4 blocks, groups of 2 (2 templates), qkv and fc1: 8 layers x 2 numbers alone
    @pytest.mark.parametrize(("sharing", "count"), [(None, 16), ("roles", 8), ("blocks", 8), ("all", 4)])
    def test_counts_and_trains_as_planned(self, sharing: str | None, count: int) -> None:
        model = converted(target_modules=["qkv", "fc1"], coefficient_sharing=sharing)
        assert trainable(model) == count
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(X).square().sum().backward()
        optimizer.step()
        values = {name: layer.recast_coefficients["default"].detach() for name, layer in layers_of(model).items()}
        for first, second in itertools.combinations(values, 2):
            same_block = block_of(first) == block_of(second)
            same_bank = layers_of(model)[first].recast_bank["default"] is layers_of(model)[second].recast_bank["default"]
            pair = (int(block_of(first)[-1]) // 2) == (int(block_of(second)[-1]) // 2)
            shared = {None: False, "roles": same_block, "blocks": same_bank, "all": pair}[sharing]
            assert torch.equal(values[first], values[second]) == shared

    def test_a_new_task_under_a_deleted_ones_name_shares_nothing(self) -> None:
        model = converted("shared", target_modules=["qkv", "fc1"], coefficient_sharing="all")
        model.add_adapter("other", RecastConfig(target_modules=["qkv", "fc1"]))
        model.set_adapter("other")
        model.delete_adapter("shared")
        model.add_adapter("shared", RecastConfig(target_modules=["qkv", "fc1"]))
        model.set_adapter("shared")
        randomise(model, "shared")
        before = outputs(model, X)
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # renews what is shared
        assert torch.equal(outputs(model, X), before)
        assert trainable(model) == 16

    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_survives_saving_and_moving(self, sharing: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        model = converted(target_modules=["qkv", "fc1"], coefficient_sharing=sharing)
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert trainable(copy.deepcopy(loaded).to(torch.bfloat16)) == trainable(loaded) == trainable(model)
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        assert loaded.peft_config["default"].coefficient_sharing == sharing


class TestTable:
    def test_is_what_conversions_give(self) -> None:
        table = scaling_table(tiny_vit(), ["all-attention", ["fc1", "fc2"]], group_sizes=(2, 3), coefficient_sets=(1, 2))
        assert {row.targets for row in table.rows} == {"all-attention", "fc1, fc2"}
        for row in table.rows:
            targets = ["fc1", "fc2"] if row.targets == "fc1, fc2" else row.targets
            config = RecastConfig(
                target_modules=targets,
                group_size=row.group_size,
                num_templates=row.num_templates,
                num_coefficient_sets=row.num_coefficient_sets,
            )
            model = get_recast_model(tiny_vit(), config)
            assert trainable(model) == row.num_coefficients
            plan = plan_recast(tiny_vit(), config)
            assert (len(plan.groups), plan.model_bytes_after) == (row.num_groups, row.model_bytes)
            plain = tiny_vit()
            energies = {
                m.module: float(plain.get_submodule(m.module).weight.detach().square().sum())
                for m in mimicry_report(model).modules
            }
            lost = sum((m.relative_error or 0) ** 2 * energies[m.module] for m in mimicry_report(model).modules)
            assert row.relative_error == pytest.approx((lost / sum(energies.values())) ** 0.5, abs=1e-5)

    def test_shows_itself(self, tmp_path: Path) -> None:
        table = scaling_table(tiny_vit(), group_sizes=(1, 2, 4), fidelity=False)
        assert len(str(table).splitlines()) == len(table.rows) + 2
        assert len(json.loads(json.dumps(table.to_dict()))) == len(table.rows)
        counts = [row.num_coefficients for row in table.rows]
        assert counts == sorted(counts)
        assert [row.num_coefficients for row in table.within(16).rows] == [count for count in counts if count <= 16]
        pytest.importorskip("matplotlib")
        table.plot().savefig(tmp_path / "scaling.png")

    def test_leaves_the_model_alone_and_refuses_a_converted_one(self) -> None:
        model = tiny_vit()
        keys = list(model.state_dict())
        scaling_table(model)
        assert list(model.state_dict()) == keys
        with pytest.raises(RecastConfigError, match="converted already"):
            scaling_table(converted())
        with pytest.raises(ValueError, match="smaller group_sizes") as caught:
            scaling_table(model, group_sizes=(50,))
        assert isinstance(caught.value, RecastConfigError)

    def test_has_no_error_for_weights_that_are_not_finite(self) -> None:
        model = tiny_vit()
        model.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
        with pytest.raises(RecastBankError, match="not finite"):
            scaling_table(model, "all-mlp", group_sizes=(2,))

    @pytest.mark.parametrize(
        "sizes", [{"group_sizes": 2}, {"group_sizes": (0,)}, {"templates": [1.5]}, {"coefficient_sets": []}]
    )
    def test_refuses_sizes_that_are_none(self, sizes: dict[str, Any]) -> None:
        with pytest.raises(RecastConfigError, match=f"{next(iter(sizes))}=.*expected a list of whole numbers"):
            scaling_table(tiny_vit(), **sizes)
        assert len(scaling_table(tiny_vit(), "all-mlp", group_sizes=iter([1, 2]), fidelity=False).rows) > 2
