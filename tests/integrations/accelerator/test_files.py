"""Tasks move by file between an accelerator and the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerator import CASES, CLOSE, DEVICE, FLOATS, needs_device, plain_of, relative, run, small, vit_x
from models import layers_of, outputs, randomise, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import RecastBaseMismatchError, RecastConfig, get_recast_model

pytestmark = needs_device


class TestFiles:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_model_on_the_cpu_has_its_task_there(self, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        # PEFT reads files to the accelerator of the machine, whether the model is there or not
        config = RecastConfig(
            target_modules=["qkv"],
            coefficient_sharing="all",
            num_classes=3,
            train_norms=True,
            partners=["bias", "adaptformer", "piggyback"],
        )
        model = get_recast_model(tiny_vit(), config, "cars").eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(
            tiny_vit(), tmp_path / "cars", "cars", low_cpu_mem_usage=low_cpu_mem_usage, torch_device=DEVICE.type
        ).eval()
        assert {p.device.type for p in again.parameters()} == {"cpu"}
        assert not any(p.requires_grad for p in again.parameters())
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
        assert torch.equal(outputs(again, vit_input()), outputs(model, vit_input()))

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("there", [False, True], ids=["to the CPU", "from the CPU"])
    def test_tasks_move_by_file(self, case: str, there: bool, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=CASES[case].targets)
        plain = CASES[case].build()
        model = get_recast_model(plain if there else plain.to(DEVICE), config).eval()
        randomise(model, size=0.1)
        model.save_pretrained(tmp_path)
        target = torch.device("cpu") if not there else DEVICE
        loaded = PeftModel.from_pretrained(CASES[case].build().to(target), tmp_path).eval()
        for own, other in zip(layers_of(model).values(), layers_of(loaded).values(), strict=True):
            values = other.recast_coefficients["default"]
            assert values.device.type == target.type
            assert torch.equal(values.detach().cpu(), own.recast_coefficients["default"].detach().cpu())
        here = run(model.to(DEVICE), case)
        assert torch.equal(run(loaded.to(DEVICE), case), here)
        # sums in another order alone, in units of the largest number
        assert relative(cpu_run(loaded, case), here) < 1e-4

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_fingerprint_knows_the_weights_everywhere(self, dtype: torch.dtype, tmp_path: Path) -> None:
        for case in ("vision transformer", "convolutions"):
            folder = tmp_path / case
            model = get_recast_model(CASES[case].build(), RecastConfig(target_modules=CASES[case].targets))
            randomise(model)
            model.save_pretrained(folder)
            PeftModel.from_pretrained(plain_of(case, dtype), folder)
            other = plain_of(case, dtype)
            name = next(iter(layers_of(model)))
            other.get_parameter(f"{name}.weight").data.mul_(1.1)
            with pytest.raises(RecastBaseMismatchError, match=name):
                PeftModel.from_pretrained(other, folder)

    def test_a_fingerprint_made_here_is_known_on_the_cpu(self, tmp_path: Path) -> None:
        model = small(dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        for own, other in zip(layers_of(model).values(), layers_of(loaded).values(), strict=True):
            assert torch.equal(other.recast_coefficients["default"], own.recast_coefficients["default"].cpu())

    def test_a_compressed_task_is_rebuilt_from_its_recipe(self, tmp_path: Path) -> None:
        model = small(num_templates=1)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        torch.testing.assert_close(outputs(loaded, vit_input(6)), outputs(model, vit_x()).cpu(), **CLOSE[torch.float32])


def cpu_run(model: nn.Module, case: str) -> Tensor:
    x = CASES[case].inputs()
    model = model.cpu()
    with torch.no_grad():
        if x.is_floating_point():
            return model(x)
        extra = {"decoder_input_ids": x.flip(0)} if case == "T5" else {}
        return model(input_ids=x, **extra).logits
