"""Mimicry methods: each reproduces weights as well as its mathematics says, and is deterministic."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import converted, outputs, randomise, tiny_vit, vit_input
from torch import Tensor, nn

from recast_peft import (
    RecastConfig,
    RecastConfigError,
    StoredBank,
    collapse_coefficient_sets,
    fit_bank,
    get_recast_model,
    mimicry_report,
)
from recast_peft.banks.template_bank import mix_templates
from recast_peft.growth.fitting import input_moments, output_change
from recast_peft.mimicry import METHODS, AutoEncoder, ClosedForm, DataAware, FittedTemplates, Gradient, Recipe, resolve_method
from recast_peft.mimicry.data_aware import best_coefficients, best_templates, total_error
from recast_peft.planning.targets import find_targets
from recast_peft.tasks.plan import plan_recast

QUICK = {
    "closed_form": ClosedForm(),
    "gradient": Gradient(steps=300, decay_every=60, progress=False),
    "autoencoder": AutoEncoder(steps=400, learning_rate=1e-2, progress=False),
    "data_aware": DataAware(distill_steps=3, progress=False),
}


def group(layers: int = 4, seed: int = 0, shape: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    """Weights that have a part in common, as layers of one role have, each of its own size."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return [(0.5 + 0.3 * i) * (0.1 * common + 0.1 * torch.randn(shape, generator=generator)) for i in range(layers)]


def moments_for(weights: list[Tensor], seed: int = 3) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    size = weights[0][0].numel()
    roots = [torch.randn(3 * size, size, generator=generator) * torch.linspace(0.1, 3, size) for _ in weights]
    return [root.T @ root / len(root) for root in roots]


def composed(found: Recipe | FittedTemplates, weights: list[Tensor]) -> Tensor:
    templates = mix_templates(weights, found.mix) if isinstance(found, Recipe) else found.templates
    return torch.tensordot(found.base, templates.double(), dims=1)


def error(found: Recipe | FittedTemplates, weights: list[Tensor]) -> float:
    """Squared Frobenius error over the group."""
    return float((composed(found, weights) - torch.stack(weights).double()).square().sum())


def optimum(weights: list[Tensor], templates: int) -> float:
    """Eckart-Young: the squared singular values that are left out."""
    matrix = torch.stack([w.flatten() for w in weights]).double()
    return float(torch.linalg.svdvals(matrix)[templates:].square().sum())


class TestRegistry:
    @pytest.mark.parametrize("name", METHODS)
    def test_names_every_method(self, name: str) -> None:
        assert METHODS[name].name == name
        assert resolve_method(name) == METHODS[name]()

    @pytest.mark.parametrize("name", METHODS)
    def test_options_survive_json(self, name: str) -> None:
        stored = json.loads(json.dumps(QUICK[name].to_dict()))
        assert resolve_method(stored) == QUICK[name]
        assert RecastConfig(mimicry=QUICK[name]).mimicry == stored

    @pytest.mark.parametrize(
        ("mimicry", "message"),
        [
            ("closedform", "did you mean 'closed_form'"),
            ({"steps": 3}, "'method'"),
            ({"method": "gradient", "step": 3}, "no option 'step'; its options: steps"),
            ({"method": "gradient", "loss": "huber"}, "loss='huber'"),
            ({"method": "gradient", "steps": 0}, "steps=0"),
            ({"method": "gradient", "learning_rate": "fast"}, "wrong type"),
            ({"method": "gradient", "clip_norm": -1.0}, "clip_norm"),
            ({"method": "gradient", "coefficient_noise": -1.0}, "coefficient_noise"),
            ({"method": "autoencoder", "hidden_size": 0}, "hidden_size"),
            ({"method": "autoencoder", "learning_rate": 0}, "learning_rate"),
            ({"method": "data_aware", "sweeps": -1}, "sweeps"),
            ({"method": "data_aware", "ridge": -0.1}, "ridge"),
            (3, "mimicry=3"),
        ],
    )
    def test_refuses_with_what_was_expected(self, mimicry: object, message: str) -> None:
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(mimicry=mimicry)  # type: ignore[arg-type]


class TestEveryMethod:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)])
    def test_is_better_than_nothing_and_no_better_than_the_optimum(self, name: str, shape: tuple[int, ...]) -> None:
        weights = group(shape=shape)
        found = QUICK[name].fit(weights, 2, label="g", moments=moments_for(weights))
        assert composed(found, weights).shape == (4, *shape)
        least, energy = optimum(weights, 2), sum(float(w.square().sum()) for w in weights)
        assert least * (1 - 1e-6) <= error(found, weights) < 0.6 * energy

    @pytest.mark.parametrize("name", METHODS)
    def test_is_deterministic(self, name: str) -> None:
        weights = group()
        first, second = (
            composed(QUICK[name].fit(weights, 2, label="g", moments=moments_for(weights)), weights) for _ in range(2)
        )
        assert torch.equal(first, second)

    @pytest.mark.parametrize("name", ["gradient", "autoencoder"])
    def test_is_drawn_by_its_seed_and_not_by_the_global_one(self, name: str) -> None:
        weights, options = group(), {**QUICK[name].to_dict(), "steps": 3}
        results = []
        for seed, other in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(other)
            results.append(composed(resolve_method({**options, "seed": seed}).fit(weights, 2, label="g"), weights))
        assert torch.equal(results[0], results[1])
        assert not torch.allclose(results[0], results[2])

    @pytest.mark.parametrize("name", METHODS)
    def test_gives_templates_the_mean_norm_of_the_layers(self, name: str) -> None:
        weights = group()
        found = QUICK[name].fit(weights, 2, label="g", moments=moments_for(weights))
        templates = mix_templates(weights, found.mix) if isinstance(found, Recipe) else found.templates
        expected = torch.stack([w.norm() for w in weights]).mean()
        torch.testing.assert_close(templates.flatten(1).norm(dim=1), expected.expand(2), rtol=1e-4, atol=0)


class TestClosedForm:
    @given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 5))
    def test_is_the_eckart_young_optimum(self, layers: int, templates: int, seed: int) -> None:
        templates = min(templates, layers)
        weights = group(layers, seed)
        found = ClosedForm().fit(weights, templates)
        energy = sum(float(w.double().square().sum()) for w in weights)
        assert error(found, weights) == pytest.approx(optimum(weights, templates), rel=1e-3, abs=1e-10 * energy)

    def test_is_the_identity_for_as_many_templates_as_layers(self) -> None:
        weights = group()
        assert torch.equal(composed(ClosedForm().fit(weights, 4), weights), torch.stack(weights).double())

    def test_of_weights_of_zeros_is_finite(self) -> None:
        found = ClosedForm().fit([torch.zeros(3, 3) for _ in range(3)], 1)
        assert all(torch.isfinite(t).all() for t in (found.mix, found.base))


class TestGradient:
    @pytest.mark.parametrize("loss", ["smooth_l1", "mse", "l1"])
    @pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
    def test_nears_the_weights_with_every_loss_and_optimizer(self, loss: str, optimizer: str) -> None:
        weights = group()
        method = Gradient(steps=600, decay_every=120, loss=loss, optimizer=optimizer, progress=False)
        energy = sum(float(w.square().sum()) for w in weights)
        assert error(method.fit(weights, 4, label="g"), weights) < 0.05 * energy

    @pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
    @pytest.mark.parametrize("rate", [1e-4, 0.1])
    def test_from_the_closed_form_never_ends_worse(self, loss: str, rate: float) -> None:
        # the weights are below 1, where smooth L1 is half the square, so both losses are ordered as the squared error
        weights = group()
        method = Gradient(steps=30, start="closed_form", loss=loss, learning_rate=rate, progress=False)
        assert error(method.fit(weights, 2, label="g"), weights) <= optimum(weights, 2) * (1 + 1e-4)

    def test_never_finite_is_refused(self) -> None:
        weights = [torch.full((3, 3), 1e38) for _ in range(2)]
        with pytest.raises(RecastConfigError, match="never had a finite loss"):
            Gradient(steps=2, loss="mse", progress=False).fit(weights, 1, label="g")

    def test_paper_settings(self) -> None:
        assert Gradient.paper() == Gradient()
        resnet = Gradient.paper("resnet", seed=4)
        assert (resnet.steps, resnet.learning_rate, resnet.decay_every, resnet.seed) == (3000, 0.2, 500, 4)
        with pytest.raises(RecastConfigError, match="expected one of vit, resnet"):
            Gradient.paper("bert")

    def test_fits_full_banks_too(self) -> None:
        plain, model = tiny_vit(), converted(target_modules=["qkv"], mimicry=Gradient(steps=5, progress=False))
        assert not mimicry_report(model).is_exact
        assert not torch.allclose(outputs(model, vit_input()), outputs(plain, vit_input()))

    def test_a_failure_leaves_the_model_as_it_was(self) -> None:
        model = tiny_vit()
        with torch.no_grad():
            model.blocks[3].attn.qkv.weight.fill_(1e19)
        before, keys = outputs(model, vit_input()), list(model.state_dict())
        config = RecastConfig(target_modules=["qkv"], num_templates=1, mimicry=Gradient(steps=2, loss="mse", progress=False))
        with pytest.raises(RecastConfigError, match="finite loss"):
            get_recast_model(model, config)
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(outputs(model, vit_input()), before, equal_nan=True, rtol=0, atol=0)


class TestDataAware:
    @given(st.integers(0, 5), st.integers(1, 3))
    def test_half_steps_are_minima(self, seed: int, templates: int) -> None:
        weights = group(4, seed)
        moments = [m for m in moments_for(weights, seed) if m is not None]
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(templates, 6, 5, generator=generator)
        base = best_coefficients(weights, moments, start)
        least = total_error(weights, moments, start, base)
        step = 0.01 * torch.randn(base.shape, generator=generator)
        assert least <= total_error(weights, moments, start, base + step) * (1 + 1e-5)
        better = best_templates(weights, moments, start, base)
        assert total_error(weights, moments, better, base) <= least * (1 + 1e-5)

    def test_changes_the_outputs_less_than_the_closed_form(self) -> None:
        weights = group()
        moments = moments_for(weights)

        def change(found: Recipe | FittedTemplates) -> float:
            differences = torch.stack(weights).double() - composed(found, weights)
            return sum(float(((d @ s.double()) * d).sum()) for d, s in zip(differences, moments, strict=True))

        aware = change(DataAware(progress=False).fit(weights, 2, moments=moments))
        assert aware < 0.9 * change(ClosedForm().fit(weights, 2))

    def test_with_the_same_white_moment_is_the_closed_form(self) -> None:
        weights = group()
        found = DataAware(progress=False, ridge=0.0).fit(weights, 2, moments=[torch.eye(5)] * 4)
        assert error(found, weights) == pytest.approx(optimum(weights, 2), rel=1e-4)

    def test_in_a_config_alone_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="fit_bank"):
            get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="data_aware"))
        with pytest.raises(RecastConfigError, match="needs a few batches"):
            fit_bank(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="data_aware"))
        with pytest.raises(RecastConfigError, match=r"\[batch\]"):
            config = RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="data_aware")
            fit_bank(tiny_vit(), config, vit_input())

    @pytest.mark.parametrize("distill_steps", [0, 40])
    def test_keeps_the_output_of_the_model_better_than_the_closed_form(self, distill_steps: int) -> None:
        plain = tiny_vit()
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        generator = torch.Generator().manual_seed(1)
        scale = torch.linspace(0.2, 3, 8)
        batches = [torch.randn(32, 5, 8, generator=generator) * scale for _ in range(4)]
        fresh = torch.randn(64, 5, 8, generator=generator) * scale
        fields = {"target_modules": ["qkv", "fc1", "fc2"], "num_templates": 1}
        method = DataAware(distill_steps=distill_steps, select_batches=4, progress=False)
        bank = fit_bank(plain, RecastConfig(**fields, mimicry=method), batches)
        assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
        assert all(parameter.grad is None for parameter in plain.parameters())
        wanted = outputs(plain, fresh)

        def change(**config: object) -> float:
            model = get_recast_model(tiny_vit(), RecastConfig(**config)).eval()  # type: ignore[arg-type]
            return float((outputs(model, fresh) - wanted).norm())

        assert change(bank=bank) < (0.9 if distill_steps else 1.0) * change(**fields)

    @pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, padding="same", groups=2)])
    def test_moments_of_convolutions_give_the_energy_of_their_outputs(self, layer: nn.Conv2d) -> None:
        model = nn.Sequential(layer)
        target, _ = find_targets(model, RecastConfig(target_modules=["0"]))
        x = torch.randn(3, 4, 7, 7)
        moment = input_moments(model, target, [x])["0"]
        assert moment is not None
        if layer.groups == 1:
            weight = layer.weight.detach().flatten(1)
            energy = (model(x) - layer.bias.view(1, -1, 1, 1)).square().sum(dim=1).mean()  # type: ignore[union-attr]
            torch.testing.assert_close(((weight @ moment) * weight).sum(), energy.detach(), rtol=1e-4, atol=1e-5)
        assert moment.shape == (36 // layer.groups, 36 // layer.groups)

    def test_a_layer_that_is_never_called_counts_with_its_weight(self) -> None:
        model = tiny_vit()
        model.blocks[0].mlp.forward = lambda x: x  # type: ignore[method-assign]
        config = RecastConfig(target_modules=["fc1"], num_templates=1, mimicry=DataAware(progress=False))
        with pytest.warns(UserWarning, match=r"blocks\.0\.mlp\.fc1"):
            bank = fit_bank(model, config, [vit_input()])
        assert all(torch.isfinite(g.templates).all() for g in bank.groups.values() if g.templates is not None)

    def test_output_change_of_the_model_itself_is_zero(self) -> None:
        model, x = tiny_vit(), vit_input()
        assert output_change(model, dict(model.named_parameters()), [x], [outputs(model, x)]) == 0.0


class TestCollapse:
    @pytest.mark.parametrize("fields", [{}, {"num_templates": 1}, {"coefficient_sharing": "all"}])
    def test_gives_the_same_model_with_one_set(self, fields: dict) -> None:
        model = converted(target_modules=["qkv", "fc1"], num_coefficient_sets=3, **fields)
        randomise(model)
        sets = [p for p in model.parameters() if p.requires_grad]
        assert all(not torch.equal(p[0], p[1]) for p in sets)
        before, numbers = outputs(model, vit_input()), sum(p.numel() for p in sets)
        collapse_coefficient_sets(model)
        assert torch.equal(outputs(model, vit_input()), before)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) * 3 == numbers
        assert model.peft_config["default"].num_coefficient_sets == 1

    def test_of_an_unknown_task_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="no task 'cars'; its tasks: default"):
            collapse_coefficient_sets(converted(), "cars")


class TestLargeModels:
    def test_no_more_than_one_group_is_held_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from recast_peft.banks import template_bank as bank_module

        held: list[int] = []
        model = tiny_vit()
        names = [f"blocks.{i}.attn.qkv" for i in range(4)]

        def count(weights: list[Tensor], mix: Tensor) -> Tensor:
            layers = [model.get_submodule(name) for name in names]
            held.append(sum(layer.base_layer.weight is not None for layer in layers))
            return mix_templates(weights, mix)

        monkeypatch.setattr(bank_module, "mix_templates", count)
        get_recast_model(model, RecastConfig(target_modules=["qkv"], num_templates=1))
        assert held == [4, 2]  # when the second bank is built, the first group's weights are gone

    @pytest.mark.parametrize("name", METHODS)
    def test_works_in_bfloat16(self, name: str) -> None:
        plain = tiny_vit().to(torch.bfloat16)
        x = vit_input().to(torch.bfloat16)
        config = RecastConfig(target_modules=["fc1"], num_templates=1, mimicry=QUICK[name])
        bank = fit_bank(plain, config, [x])
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(bank=bank))
        assert outputs(model, x).dtype == torch.bfloat16
        assert torch.isfinite(outputs(model, x)).all()
        assert {g.dtype for g in plan_recast(plain, config).groups} == {torch.bfloat16}


class TestTrainedWeights:
    """The demo's backbone, on data that nothing was fitted to; docs/mimicry.md has the figures with distillation."""

    def test_data_aware_beats_the_closed_form(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("timm")
        pytest.importorskip("matplotlib")
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        from glyph_backbone import load_backbone
        from glyphs import load_task, pretraining_batches

        plain = load_backbone()
        task = load_task("hebrew", train_per_class=8, test_per_class=4)
        train, test = outputs(plain, task.train_images), outputs(plain, task.test_images)
        centres = torch.stack([train[task.train_labels == label].mean(dim=0) for label in range(task.num_classes)])

        def measure(bank: StoredBank) -> tuple[float, float]:
            model = get_recast_model(load_backbone(), RecastConfig(bank=bank)).eval()
            features = outputs(model, task.test_images)
            right = torch.cdist(features, centres).argmin(dim=1) == task.test_labels
            return float((features - test).norm() / test.norm()), float(right.float().mean())

        fit = [images for images, _ in pretraining_batches(4, 64, seed=7)]
        fields = {"target_modules": ["qkv"], "num_templates": 1}
        closed = measure(fit_bank(plain, RecastConfig(**fields)))
        aware = measure(fit_bank(plain, RecastConfig(**fields, mimicry=DataAware(distill_steps=0, progress=False)), fit))
        assert aware[0] < 0.9 * closed[0]
        assert aware[1] > closed[1] + 0.05
