"""The report says what plain arithmetic says of the weights and of the features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import converted, layers_of, outputs, randomise, tiny_vit, vit_input
from torch import nn

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, get_recast_model, mimicry_report
from recast_peft.mimicry import Gradient

X = vit_input()


def reproduced(model: nn.Module) -> nn.Module:
    """The plain model with the weights that the banks reproduce, by plain arithmetic."""
    changed = tiny_vit()
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            bank = layer.compressed_bank[0]
            changed.get_submodule(name).weight.copy_(torch.tensordot(bank.base_of(name), bank.templates, dims=1))
    return changed


def scaled(factor: float) -> nn.Module:
    """The plain model with another first target."""
    model = tiny_vit()
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").weight.mul_(factor)  # type: ignore[operator, union-attr]
    return model


class TestWeights:
    @pytest.mark.parametrize("fields", [{}, {"mimicry": Gradient(steps=5, progress=False)}, {"keep_base_weights": True}])
    def test_of_compressed_banks(self, fields: dict) -> None:
        plain = tiny_vit()
        model = converted(num_templates=1, **fields)
        for row in mimicry_report(model).modules:
            layer = layers_of(model)[row.module]
            bank = layer.compressed_bank[0]
            w = plain.get_submodule(row.module).weight.detach().double()
            v = torch.tensordot(bank.base_of(row.module).double(), bank.templates.detach().double(), dims=1)
            assert row.cosine == pytest.approx(float((w * v).sum() / (w.norm() * v.norm())), abs=1e-9)
            assert row.relative_error == pytest.approx(float((w - v).norm() / w.norm()), abs=1e-9)
            assert row.energy_kept == pytest.approx(1 - float((w - v).square().sum() / w.square().sum()), abs=1e-9)
            assert not row.exact
        assert mimicry_report(model, reference=plain) == mimicry_report(model)

    def test_of_exact_banks_says_so(self) -> None:
        report = mimicry_report(converted(), X)
        assert report.is_exact
        assert "nothing is approximated" in str(report)
        assert all(row.relative_error == 0 for row in (*report.modules, *report.features))


class TestFeatures:
    @pytest.mark.parametrize("keep", [True, False])
    def test_are_those_of_the_model_without_any_task(self, keep: bool) -> None:
        plain = tiny_vit()
        model = converted(num_templates=1, keep_base_weights=keep)
        randomise(model)
        before = outputs(model, X)
        report = mimicry_report(model, X, reference=None if keep else plain)
        assert [f.name for f in report.features] == [f"blocks.{i}" for i in range(4)] + ["output"]
        changed = reproduced(model)
        error = (outputs(changed, X) - outputs(plain, X)).norm() / outputs(plain, X).norm()
        assert report.features[-1].relative_error == pytest.approx(float(error), rel=1e-4)
        assert error > 0.01
        assert torch.equal(outputs(model, X), before)  # the task is back

    def test_are_means_over_the_samples(self) -> None:
        plain = tiny_vit()
        model = converted(num_templates=1, keep_base_weights=True)
        changed = reproduced(model)
        cosines = torch.cosine_similarity(outputs(changed, X).double(), outputs(plain, X).double(), dim=1)
        assert cosines.max() - cosines.min() > 1e-4
        assert mimicry_report(model, X).features[-1].cosine == pytest.approx(float(cosines.mean()), abs=1e-6)

    def test_need_a_reference_where_weights_were_released(self) -> None:
        with pytest.raises(RecastBankError, match="reference="):
            mimicry_report(converted(num_templates=1), X)

    def test_are_refused_while_merged(self) -> None:
        model = converted(num_templates=1, keep_base_weights=True)
        randomise(model)
        model.merge_adapter()
        with pytest.raises(RecastBankError, match="unmerge_adapter"):
            mimicry_report(model, X)

    @pytest.mark.parametrize(
        "form",
        [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m.base_model, lambda m: m.get_base_model()],
        ids=["wrapped", "compiled", "the tuner", "the backbone"],
    )
    def test_are_without_the_tasks_classifier_in_every_form_of_the_model(self, form: Callable[..., nn.Module]) -> None:
        model = converted(num_templates=1, keep_base_weights=True, num_classes=7)
        wanted = mimicry_report(model, X).features
        assert mimicry_report(form(model), X).features == wanted
        assert model(X).shape[1] == 7

    @pytest.mark.parametrize(
        ("reference", "said"),
        [
            (lambda: tiny_vit(width=32), r"given:    \(96, 32\)"),
            (lambda: nn.Linear(2, 2), "given:    none"),
            (lambda: scaled(1.05), "(?s)other weights.*blocks.0.attn.qkv.*given:.*expected:"),
            (lambda: converted(num_templates=1), "converted already"),
            (lambda: tiny_vit(classes=7), "another shape for output"),
        ],
        ids=["wider", "of another class", "with other weights", "converted", "with another head"],
    )
    def test_refuse_another_model_as_reference(self, reference: Callable[[], nn.Module], said: str) -> None:
        with pytest.raises(RecastConfigError, match=said):
            mimicry_report(converted(num_templates=1), X, reference=reference())

    def test_of_a_batch_in_every_form(self) -> None:
        model = converted(num_templates=1, keep_base_weights=True)
        wanted = mimicry_report(model, X).features
        assert mimicry_report(model, (X, torch.zeros(2))).features == wanted
        assert mimicry_report(model, {"x": X}).features == wanted
        with pytest.raises(RecastConfigError, match="a batch is a int"):
            mimicry_report(model, 3)


class TestShowing:
    def test_as_table_and_dictionary(self) -> None:
        report = mimicry_report(converted(num_templates=1, keep_base_weights=True), X)
        assert json.loads(json.dumps(report.to_dict()))["modules"][0]["module"] == "blocks.0.attn.qkv"
        assert len(str(report).splitlines()) == 2 + 4 + 1 + 1 + 2 + 5

    @pytest.mark.parametrize("batch", [None, X])
    def test_as_picture(self, batch: torch.Tensor | None, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        figure = mimicry_report(converted(num_templates=1, keep_base_weights=True), batch).plot()
        figure.savefig(tmp_path / "report.png")
        assert len(figure.axes) == (1 if batch is None else 2)
        assert len(figure.axes[0].patches) == 4

    def test_of_a_plain_model_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="no RECAST layers"):
            mimicry_report(nn.Linear(2, 2))
        with pytest.raises(RecastConfigError, match="no task 'cars'"):
            mimicry_report(get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"])), adapter_name="cars")


def test_a_module_around_converted_models_is_refused() -> None:
    model = converted()
    with pytest.raises(
        RecastConfigError, match="Sequential around the converted model has no blocks.0.*the converted model itself"
    ):
        mimicry_report(nn.Sequential(model), X)
    with pytest.raises(RecastConfigError, match="several converted models: 8 RECAST layers have 4 names, and"):
        mimicry_report(nn.Sequential(model, converted()))
    other = get_recast_model(nn.Sequential(nn.Linear(4, 4)), RecastConfig(target_modules=["0"]))  # no name is the same
    with pytest.raises(RecastConfigError, match="several converted models"):
        mimicry_report(nn.ModuleDict({"picture": model, "text": other}))
