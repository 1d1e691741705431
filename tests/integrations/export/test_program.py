"""torch's own exports: a task goes in beside the inputs, and the program gives what the model gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import (
    IDS,
    MASK,
    MODELS,
    TOLERANCE,
    backbone,
    called,
    distance,
    header,
    images,
    llama,
    onnx_tools,
    recast,
    traced,
    two_tasks,
)
from grown_biases import grown, learn_offsets
from lora_parts import fill
from models import converted, move, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig
from safetensors.torch import load_file as load_tensors

from recast_peft import (
    BiasConfig,
    RecastBankError,
    RecastConfig,
    export_aoti,
    export_program,
    export_task,
    export_tasks,
    get_recast_model,
    grow_bank,
)


class TestProgram:
    def test_a_task_goes_in_as_its_file_is_read(self, tmp_path):
        build, config, samples = MODELS["bert"]
        model = two_tasks(build, config)
        program = export_program(model, samples[0])
        path = tmp_path / "program.pt2"
        torch.export.save(program, path)
        module = torch.export.load(path).module()
        for task in ("first", "second"):
            model.set_adapter(task)
            export_task(model, tmp_path / task)
            for inputs in samples:
                found = module(load_tensors(tmp_path / task), **inputs)["logits"]
                assert distance(found.numpy(), called(model, inputs)) < TOLERANCE

    @pytest.mark.parametrize("in_onnx", [False, True], ids=["torch", "onnx"])
    def test_autocast_around_the_export_does_not_round_the_graph(self, in_onnx, tmp_path):
        if in_onnx:
            onnx_tools()
        build, config, samples = MODELS["bert"]
        model = two_tasks(build, config)
        model.set_adapter("first")
        with torch.autocast("cpu", torch.bfloat16):
            task = export_task(model, tmp_path / "first")
            graph = traced(model, samples[0], tmp_path, in_onnx)
        found = graph({name: value.numpy() for name, value in task.items()}, samples[0])
        assert distance(found, called(model, samples[0])) < TOLERANCE

    def test_a_fresh_task_changes_nothing_to_the_last_bit(self):
        model = get_recast_model(backbone("test_vit", depth=2), RecastConfig()).eval()
        module = export_program(model, images()).module()
        assert torch.equal(module({"coefficients": torch.zeros(8)}, images())["output"], torch.tensor(called(model, images())))

    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("plain", [True, False])
    def test_tasks_on_a_grown_bank(self, rank, plain):
        moved = seeded(lambda: tiny_vit(seed=0))
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if "qkv.weight" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
        bank = grow_bank(tiny_vit(), [moved], RecastConfig(target_modules=["qkv"]), rank=rank, plain_templates=plain)
        model = get_recast_model(tiny_vit(), RecastConfig(bank=bank)).eval()
        randomise(model)
        task = {"coefficients": torch.cat([layer.recast_coefficients["default"][0] for layer in recast(model)]).detach()}
        found = export_program(model, vit_input()).module()(task, vit_input())["output"]
        assert distance(found.numpy(), called(model, vit_input())) < TOLERANCE
        assert distance(found.numpy(), called(tiny_vit(), vit_input())) > 1e-3

    @pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
    def test_aotinductor_compiles_it(self, tmp_path):
        part = LoraConfig(r=2, target_modules=["fc1"])
        model = converted("task", num_classes=3, depth=1, num_directions=2, lora_config=part)
        path = export_aoti(model, tmp_path / "model.pt2", vit_input())
        compiled = torch._inductor.aoti_load_package(str(path))
        for seed in (1, 2):
            fill(model, "task", seed)
            found = compiled(export_task(model, tmp_path / "task"), vit_input(3))["output"]
            assert distance(found.detach().numpy(), called(model, vit_input(3))) < TOLERANCE


@pytest.fixture(scope="module")
def program_of_two():
    return export_program(two_tasks(*MODELS["vit"][:2]), images(), tasks=["first", "second"]).module()


class TestTable:
    def test_without_a_classifier_of_its_own_the_pretrained_model_has_no_logits(self):
        model = two_tasks(*MODELS["vit"][:2])
        program = export_program(model, images(), tasks=["second", "first"])
        logits = program.module()(torch.tensor([1, 0, -1]), images(3))["output"]
        assert logits[:2].isnan().sum() == 0
        assert logits[2].isnan().all()
        model.set_adapter("second")
        assert distance(logits[1:2, :6].numpy(), called(model, images(3))[1:2]) < TOLERANCE

    @pytest.mark.parametrize("row", [2, 3, -2, -3, 2**63 - 1])
    def test_a_number_of_no_task_is_refused(self, row, program_of_two):
        with pytest.raises(IndexError, match="out of bounds"):
            program_of_two(torch.tensor([0, row]), images())


class TestHalf:
    @pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])  # bfloat16 has 8 bits
    def test_a_classifier_in_float32_behind_a_model_in_half_precision(self, dtype, near, tmp_path):
        model = get_recast_model(backbone("test_vit", depth=1).to(dtype), RecastConfig(num_classes=4), "task").eval()
        randomise(model, "task", 1, 0.1)
        x = images().to(dtype)
        expected = model(x)
        assert model.get_parameter("base_model.model.head.modules_to_save.task.weight").dtype == torch.float32
        for found in (
            export_program(model, x).module()(export_task(model, tmp_path / "task"), x),
            export_program(model, x, ["task"]).module()(torch.tensor([0, 0]), x),
        ):
            torch.testing.assert_close(found["output"], expected, rtol=near, atol=near)

    def test_norms_in_float32_in_a_model_in_bfloat16(self, tmp_path: Path) -> None:
        """They are rounded to the model's dtype, in the graph as in the model: the results are equal."""
        config = RecastConfig(train_norms=True, train_coefficients=False)
        model = get_recast_model(llama().bfloat16(), config, "task").eval()
        move(model, ".modules_to_save.task.")
        program = export_program(model, {"input_ids": IDS, "attention_mask": MASK})
        found = program.module()(export_task(model, tmp_path / "task"), input_ids=IDS, attention_mask=MASK)["logits"]
        assert torch.equal(found, model(input_ids=IDS, attention_mask=MASK).logits)


class TestBiases:
    def test_tasks_on_a_bank_of_biases_and_others(self, tmp_path):
        first, second = BiasConfig(bank=grown()), BiasConfig(bank=grown((3, 4, 5)))
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["fc1"], partners=[first]), "task").eval()
        learn_offsets(model, "task")
        for name, config in (("other bank", RecastConfig(partners=[second])), ("without", RecastConfig())):
            model.add_adapter(name, replace(config, target_modules=["fc1"]))
            with pytest.raises(RecastBankError, match=f"'{name}' has other target modules, biases or banks"):
                export_program(model, vit_input(), ["task", name])
        module = export_program(model, vit_input()).module()
        task = export_task(model, tmp_path / "task")
        assert distance(module(task, vit_input(3))["output"].numpy(), called(model, vit_input(3))) < TOLERANCE
        assert export_tasks(model, tmp_path / "tasks") == ["task"]
        layouts = {header(tmp_path / name)["__metadata__"]["recast_layout"] for name in ("task", "tasks")}
        export_task(model, tmp_path / "other", "other bank")
        assert (
            len(layouts | {header(tmp_path / "other")["__metadata__"]["recast_layout"]}) == 2
        )  # of one size, yet not the same
        table = export_program(model, vit_input(2), tasks="table").module()(torch.tensor([0, -1]), vit_input(2))["output"]
        assert distance(table[:1].numpy(), called(model, vit_input(2))[:1]) < TOLERANCE
        assert distance(table[1:].numpy(), called(tiny_vit(), vit_input(2))[1:]) < TOLERANCE
