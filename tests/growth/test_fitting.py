"""fit_bank: what needs data is measured on them, and the output is kept better than without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import outputs, tiny_vit, vit_input
from torch import nn

from recast_peft import (
    RecastConfig,
    RecastConfigError,
    StoredBank,
    fit_bank,
    get_recast_model,
)
from recast_peft.growth.fitting import distill, input_moments, output_change
from recast_peft.mimicry import DataAware, FittedTemplates
from recast_peft.planning.targets import find_targets


def test_in_a_config_alone_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="fit_bank"):
        get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="data_aware"))
    with pytest.raises(RecastConfigError, match="needs a few batches"):
        fit_bank(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="data_aware"))
    with pytest.raises(RecastConfigError, match=r"\[batch\]"):
        config = RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="data_aware")
        fit_bank(tiny_vit(), config, vit_input())


@pytest.mark.parametrize("distill_steps", [0, 40])
def test_keeps_the_output_of_the_model_better_than_the_closed_form(distill_steps: int) -> None:
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
def test_moments_of_convolutions_give_the_energy_of_their_outputs(layer: nn.Conv2d) -> None:
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


class Side(nn.Module):
    """Two blocks side by side, of which one gives features a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 1, bias=False)) for _ in range(2))
        for block, weight in zip(self.blocks, WEIGHTS, strict=True):
            block[0].weight.data = torch.tensor([weight])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block(x) for block in self.blocks])


WEIGHTS = ([1.0, 0.0], [0.0, 100.0])


def test_distillation_takes_every_block_for_as_much() -> None:
    model = Side()
    members = {"both": find_targets(model, RecastConfig(target_modules=["0"]))[0]}
    start = FittedTemplates(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0], [100.0]], dtype=torch.float64))
    method = DataAware(distill_steps=50, distill_learning_rate=0.03, progress=False)
    fit = distill(model, members, {"both": start}, [torch.eye(2)], method)["both"]
    found, wanted = fit.base @ fit.templates[0].double(), torch.tensor(WEIGHTS, dtype=torch.float64)
    errors = (found - wanted).square().sum(1) / wanted.square().sum(1)
    # 2 and 0 at the start; the larger block alone would leave the template where it is, at errors of 1 and 0 at best
    assert errors.max() < 0.9


def test_a_layer_that_is_never_called_counts_with_its_weight() -> None:
    model = tiny_vit()
    model.blocks[0].mlp.forward = lambda x: x  # type: ignore[method-assign]
    config = RecastConfig(target_modules=["fc1"], num_templates=1, mimicry=DataAware(progress=False))
    with pytest.warns(UserWarning, match=r"blocks\.0\.mlp\.fc1"):
        bank = fit_bank(model, config, [vit_input()])
    assert all(torch.isfinite(g.templates).all() for g in bank.groups.values() if g.templates is not None)


@pytest.mark.parametrize("batch", [vit_input()[:0], vit_input() * float("nan")], ids=["no examples", "no numbers"])
def test_batches_that_say_nothing_are_refused(batch: torch.Tensor) -> None:
    config = RecastConfig(target_modules=["fc1"], num_templates=1, mimicry=DataAware(progress=False))
    with pytest.raises(RecastConfigError, match=r"the batches give blocks\.0\.mlp\.fc1 no numbers, or some"):
        fit_bank(tiny_vit(), config, [batch])


class Endless(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(vit_input())


def test_batches_of_any_form() -> None:
    config = RecastConfig(target_modules=["fc1"], num_templates=1, mimicry=DataAware(distill_steps=1, progress=False))
    x = vit_input()
    forms = ([x], [(x, 1)], (b for b in [x]), torch.utils.data.DataLoader(Endless(), batch_size=len(x)))
    assert len({fit_bank(tiny_vit(), config, form).fingerprint for form in forms}) == 1
    for wrong in (x, {"x": x}, "x", 3):
        with pytest.raises(RecastConfigError, match=f"batches is one {type(wrong).__name__}; give a list"):
            fit_bank(tiny_vit(), config, wrong)  # type: ignore[arg-type]


def test_output_change_of_the_model_itself_is_zero() -> None:
    model, x = tiny_vit(), vit_input()
    assert output_change(model, dict(model.named_parameters()), [x], [outputs(model, x)]) == 0.0


def test_data_aware_beats_the_closed_form_on_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
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
