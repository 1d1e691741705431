"""LoRA parts of a pool's tasks: what each gives active, merged and as one sample of a batch is what it gives alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import quantised_models
import torch
from lora_parts import fill
from models import layers_of, seeded, small_transformer, small_vit
from peft import IA3Config, LoraConfig, get_peft_model
from pooled_parts import CASES, IMAGES, NAMES, PART, WORDS, answer, assert_mixed, each_alone, pool_of, with_tasks
from torch import nn
from torch._dynamo.testing import CompileCounter

from recast_peft import RecastBankError, RecastConfig, TaskPool, get_recast_model
from recast_peft.parts.lora_pool import product_by_sample


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6, bias=False), (3, 4)),
        (nn.Linear(4, 6, bias=False), (3, 2, 5, 4)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), (3, 4, 7, 5)),
        (nn.Conv3d(4, 6, 2, dilation=2, bias=False), (3, 4, 5, 5, 5)),
        (nn.Conv2d(4, 6, 1, bias=False), (3, 4, 7, 5)),
        (nn.Conv2d(4, 6, 1, padding=1, bias=False), (3, 4, 7, 5)),
        (nn.Conv2d(4, 6, 1, stride=2, bias=False), (3, 4, 7, 5)),
    ],
)
def test_a_product_with_a_weight_for_each_sample(layer, shape):
    x, weights = torch.randn(shape), torch.randn(3, *layer.weight.shape)
    one_by_one = [torch.func.functional_call(layer, {"weight": w}, (x[i : i + 1],)) for i, w in enumerate(weights)]
    torch.testing.assert_close(product_by_sample(layer, x, weights), torch.cat(one_by_one), rtol=1e-5, atol=1e-5)


class TestAsAlone:
    @pytest.mark.parametrize("case", CASES)
    def test_activated_merged_and_one_for_each_sample(self, case, tmp_path):
        model, x = with_tasks(case)
        alone, merged = each_alone(model, x), {}
        for name in NAMES:
            model.set_adapter(name)
            model.merge_adapter()
            merged[name] = answer(model, x)
            model.unmerge_adapter()
        model.save_pretrained(tmp_path)
        pool = TaskPool(model)
        assert sorted(pool.load_folder(tmp_path)) == sorted(NAMES)
        for name in NAMES:
            pool.activate(name)
            assert torch.equal(answer(model, x), alone[name])
        assert_mixed(model, pool, x, alone)
        addresses = None
        for name in (*NAMES, *NAMES):
            pool.activate(name, merge=True)
            assert torch.equal(answer(model, x), merged[name])
            now = {key: value.data_ptr() for key, value in model.named_parameters()}
            assert addresses in (None, now)
            addresses = now
        assert_mixed(model, pool, x, alone)  # what is merged is no part of it
        pool.deactivate()
        assert torch.equal(answer(model, x), alone[None])
        assert_mixed(model, pool, x, alone)

    def test_where_another_task_alone_has_coefficients(self):
        model, x = with_tasks()
        model.add_adapter("there", RecastConfig(target_modules=["fc1"]))
        fill(model, "there", 7)
        alone = each_alone(model, x)
        pool = pool_of(model)
        pristine = {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
        for name in ("t0", "t1", "t0"):
            pool.activate(name, merge=True)
            torch.testing.assert_close(answer(model, x), alone[name], rtol=1e-5, atol=1e-5)
            assert_mixed(model, pool, x, alone)
        pool.deactivate()
        state = {key: value for key, value in model.get_base_model().state_dict().items() if "task_pool" not in key}
        assert all(torch.equal(value, pristine[key]) for key, value in state.items())

    def test_beside_ordinary_tasks_whatever_is_active_or_merged(self):
        model, x = with_tasks()
        alone = each_alone(model, x)
        pool = pool_of(model)
        model.set_adapter("t1")
        assert_mixed(model, pool, x, alone)
        model.merge_adapter()
        assert_mixed(model, pool, x, alone)
        before = answer(model, x)
        for merge in (True, False):
            with pool.use("t2", merge=merge):
                torch.testing.assert_close(answer(model, x), alone["t2"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(answer(model, x), before, rtol=1e-5, atol=1e-5)
        pool.activate("t0")
        model.merge_adapter()  # the slot, by the model's own verb
        pool.activate("t2", merge=True)
        torch.testing.assert_close(answer(model, x), alone["t2"], rtol=1e-5, atol=1e-5)
        pool.activate("t0")
        model.merge_adapter(["t1"])  # another task over the slot
        pool.activate("t2", merge=True)
        torch.testing.assert_close(answer(model, x), alone["t2"], rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(answer(model, x), alone[None])
            assert_mixed_off = answer(model, x, task_ids=pool.ids(["t0"] * 5))
        torch.testing.assert_close(assert_mixed_off, alone[None], rtol=1e-5, atol=1e-5)

    def test_a_layer_of_a_later_task_around_the_part(self):
        model, x = with_tasks()
        pool = pool_of(model)
        alone = each_alone(model, x)
        model.add_adapter("later", RecastConfig(target_modules=["fc2"]))
        assert "blocks.0.mlp.fc2" in layers_of(model)
        assert_mixed(model, pool, x, alone)
        pool.activate("t1", merge=True)
        torch.testing.assert_close(answer(model, x), alone["t1"], rtol=1e-5, atol=1e-5)
        with pytest.raises(RecastBankError, match="other layers stand between: unmerge it"):
            answer(model, x, task_ids=pool.ids(["t0"] * 5))

    def test_what_another_method_has_merged_is_not_overwritten(self):
        model, x = with_tasks()
        pool = pool_of(model)
        pool.activate("t0")
        outer = get_peft_model(model.get_base_model(), IA3Config(target_modules=["qkv"], feedforward_modules=[]))
        for name, parameter in outer.named_parameters():
            if "ia3" in name:
                parameter.fill_(1.5)
        pool.activate("t0", merge=True)
        outer.merge_adapter()
        before = outer(x)
        with pytest.raises(RecastBankError, match="Unmerge them first"):
            pool.activate("t1", merge=True)
        assert torch.equal(outer(x), before)

    def test_the_strength_of_the_slot(self):
        model, x = with_tasks()
        pool = pool_of(model)
        pool.activate("t0")
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(pool.slot, 0.5)
        torch.testing.assert_close(answer(model, x, task_ids=["t0"] * 5), answer(model, x), rtol=1e-5, atol=1e-5)
        live = answer(model, x)
        pool.activate("t0", merge=True)
        torch.testing.assert_close(answer(model, x), live, rtol=1e-5, atol=1e-5)

    def test_beams_repeat_a_task(self):
        model, x = with_tasks("llama")
        pool = pool_of(model)
        options = {"num_beams": 2, "min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        mixed = model.generate(input_ids=x[:2], task_ids=pool.ids(["t1", "t2"]), **options)
        for row, name in zip(mixed, ("t1", "t2"), strict=True):
            pool.activate(name)
            assert torch.equal(model.generate(input_ids=x[:2], **options)[["t1", "t2"].index(name)], row)

    def test_a_model_that_reads_the_dtype_of_a_weight(self):
        config = RecastConfig(target_modules=["wo"], lora_config=LoraConfig(r=2))
        model = get_recast_model(small_transformer("t5"), config, "t0").eval()
        model.add_adapter("t1", config)
        tasks, x = ["t1", None, "t0"], WORDS[:3]
        for seed, name in enumerate(("t0", "t1")):
            fill(model, name, seed)
        pool = TaskPool(model)
        for name in ("t0", "t1"):
            pool.add(name, name)
        mixed = model(input_ids=x, decoder_input_ids=x, task_ids=pool.ids(tasks)).logits
        by_name = model(input_ids=x, decoder_input_ids=x, adapter_names=["t1", "__base__", "t0"]).logits
        for row, task in enumerate(tasks):
            pool.deactivate() if task is None else pool.activate(task)
            alone = model(input_ids=x[row : row + 1], decoder_input_ids=x[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(by_name[row], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mixed[0], alone, rtol=1e-2)
        weight = model.get_base_model().encoder.block[0].layer[1].DenseReluDense.wo
        with pool.batch(tasks), pytest.raises(RecastBankError, match="one for all samples"):
            weight.weight.sum()

    def test_a_module_that_is_computed_by_its_weight(self):
        dilated = lambda: nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=2, dilation=2) for _ in range(2))).eval()  # noqa: E731
        model = get_recast_model(seeded(dilated), RecastConfig(target_modules=["0", "1"], lora_config=LoraConfig(r=2)), "t0")
        fill(model, "t0", 1)
        x = torch.randn(2, 4, 6, 6)
        alone = model.eval()(x)
        pool = TaskPool(model)
        pool.add("t0", "t0")
        for merge in (False, True):
            pool.activate("t0", merge=merge)
            torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-5)
        with pytest.raises(RecastBankError, match="computed by its weight"):
            model(x, task_ids=pool.ids(["t0", None]))


class TestPrecision:
    @pytest.mark.parametrize("is_cast", [True, False])
    def test_a_part_computes_in_the_dtype_of_the_layouts(self, is_cast):
        options = CASES["timm's vit"][2]
        config = {**options, "lora_config": PART}
        model = get_recast_model(small_vit().bfloat16(), RecastConfig(**config), "t0", autocast_adapter_dtype=is_cast).eval()
        for name in NAMES[1:]:
            own = {**config, "lora_config": None} if name == "alone" else config
            model.add_adapter(name, RecastConfig(**own), autocast_adapter_dtype=is_cast)
        for seed, name in enumerate(NAMES):
            fill(model, name, seed)
        alone, pool = each_alone(model, IMAGES.bfloat16()), pool_of(model)
        for name in NAMES:
            pool.activate(name)
            assert torch.equal(model(IMAGES.bfloat16()), alone[name])
        mixed = model(IMAGES.bfloat16(), task_ids=["t0", "t1", "t2", None, "alone"])
        wanted = torch.stack([alone[task][i] for i, task in enumerate([*NAMES[:3], None, "alone"])])
        torch.testing.assert_close(mixed, wanted, rtol=0.03, atol=0.03 * float(wanted.abs().max()))

    @quantised_models.kinds
    def test_beside_quantised_weights(self, kind):
        model = get_recast_model(quantised_models.quantised(kind), RecastConfig(lora_config=LoraConfig(r=2)), "t0")
        model.add_adapter("t1", RecastConfig(lora_config=LoraConfig(r=2)))
        for seed, name in enumerate(("t0", "t1")):
            fill(model, name, seed)
        x, alone, pool = quantised_models.X, {}, TaskPool(model.eval())
        with model.disable_adapter():
            alone[None] = model(x)
        for name in ("t0", "t1"):
            model.set_adapter(name)
            alone[name] = model(x)
            pool.add(name, name)
        for name in ("t0", "t1"):
            pool.activate(name)
            assert torch.equal(model(x), alone[name])
        tasks = ["t0", "t1", None, "t1", "t0"]
        wanted = torch.stack([alone[task][i] for i, task in enumerate(tasks)])
        near = quantised_models.near_without_gradients(kind)
        torch.testing.assert_close(model(x, task_ids=pool.ids(tasks)), wanted, **near)
        with pytest.raises(RecastBankError, match=r"task 't0' cannot be merged: it has a LoRA part.*without merge=True"):
            pool.activate("t0", merge=True)
        assert pool.active == "t1"
        assert torch.equal(model(x), alone["t1"])


class TestCompiled:
    @pytest.mark.parametrize("case", ["timm's vit", "efficientnet"])
    def test_other_tasks_are_no_reason_to_compile_again(self, case):
        model, x = with_tasks(case)
        alone, pool = each_alone(model, x), pool_of(model)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        for name in ("t0", "t1"):
            pool.activate(name)
            torch.testing.assert_close(answer(compiled, x), alone[name], rtol=1e-5, atol=1e-5)
        frames = counter.frame_count
        pool.activate("t2")
        answer(compiled, x)
        assert counter.frame_count == frames

    def test_a_mixed_batch(self):
        model, x = with_tasks()
        alone, pool = each_alone(model, x), pool_of(model)
        pool.deactivate()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for tasks in (["t0", "t1", None, "alone", "t2"], ["t2", "t2", "t1", None, "t0"]):
            with pool.batch(tasks):
                mixed = answer(compiled, x)
            wanted = torch.stack([alone[task][i] for i, task in enumerate(tasks)])
            torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-4)
