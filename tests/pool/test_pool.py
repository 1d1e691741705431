"""Thousands of tasks beside one model: rows, swaps, mixed batches, files, threads."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import captured, layers_of, run_at_once
from models import small_vit as timm_vit
from peft import PeftModel, PeftModelForSequenceClassification, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from recast_peft import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastLayer,
    RecastLoadError,
    TaskPool,
    get_recast_model,
    mimicry_report,
)
from recast_peft.composition import mixed_batch, mixing
from recast_peft.composition.mixed_batch import FOLLOWS_CONTEXT, MixedBatch
from recast_peft.parts.head import split_logits
from recast_peft.parts.prototypes import fit_prototypes
from recast_peft.storage.tensors import CHECKSUM

TARGETS = ["qkv", "fc1"]
TOKENS = torch.arange(1, 9).reshape(2, 4)
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT_MODELS = {  # by PEFT's task types
    "SEQ_CLS": (BertForSequenceClassification, BertConfig(**SMALL)),
    "TOKEN_CLS": (BertForTokenClassification, BertConfig(**SMALL)),
    "QUESTION_ANS": (BertForQuestionAnswering, BertConfig(**SMALL)),
    "FEATURE_EXTRACTION": (BertModel, BertConfig(**SMALL)),
    "CAUSAL_LM": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    ),
    "SEQ_2_SEQ_LM": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
}


def text_model(task_type: str) -> nn.Module:
    torch.manual_seed(0)
    build, config = TEXT_MODELS[task_type]
    model = build(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.data.mul_(10)  # the usual 0.02 would hide what a task does
    return model


small_vit = partial(timm_vit, depth=4)


def model_with_pool(tasks: int = 0, **config) -> tuple[PeftModel, TaskPool]:
    model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, **config), "first").eval()
    pool = TaskPool(model)
    for i in range(tasks):
        pool.add(f"task{i}", random_state(pool, i))
    return model, pool


def random_state(pool: TaskPool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = {layer.module_name for layer in pool.model.modules() if isinstance(layer, RecastLayer)}
    parts = {name: part for name in layers if (part := pool.part_of(name)) is not None}
    sizes = {name: part.stop - part.start for name, part in sorted(parts.items(), key=lambda entry: entry[1].start)}
    return {
        f"base_model.model.{name}.recast_coefficients": torch.randn(1, n, generator=generator) * 0.3
        for name, n in sizes.items()
    }


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def by_adapter(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a task gives as an ordinary adapter: the reference for everything that a pool does."""
    model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS)).eval()
    for name, module in model.get_base_model().named_modules():
        key = f"base_model.model.{name}.recast_coefficients"
        if key in state:
            module.recast_coefficients["default"].data.copy_(state[key])
    return model(x)


class TestOneTask:
    def test_an_activated_task_gives_what_its_adapter_gives(self, images):
        model, pool = model_with_pool(3)
        for i in (2, 0, 1):
            pool.activate(f"task{i}")
            assert torch.equal(model(images), by_adapter(random_state(pool, i), images))

    def test_merged_and_live_give_the_same_bits(self, images):
        model, pool = model_with_pool(2)
        pool.activate("task0")
        live = model(images)
        pool.activate("task1", merge=True)
        other = model(images)
        pool.activate("task0", merge=True)
        assert torch.equal(model(images), live)
        assert not torch.equal(other, live)

    def test_merged_tasks_use_one_storage(self):
        model, pool = model_with_pool(3)
        pool.activate("task0", merge=True)
        weight = model.get_base_model().blocks[0].attn.qkv.base_layer.weight
        address = weight.data_ptr()
        for i in (1, 2, 0):
            pool.activate(f"task{i}", merge=True)
            assert model.get_base_model().blocks[0].attn.qkv.base_layer.weight is weight
            assert weight.data_ptr() == address

    @given(steps=st.lists(st.tuples(st.integers(-1, 4), st.booleans()), max_size=12))
    def test_any_number_of_swaps_ends_at_the_base(self, steps):
        model, pool = model_with_pool(5)
        pristine = {k: v.clone() for k, v in small_vit().state_dict().items()}
        for task, merge in steps:
            if task < 0:
                pool.deactivate()
            else:
                pool.activate(f"task{task}", merge=merge)
        pool.deactivate()
        plain = model.unload()
        assert all(torch.equal(value, pristine[name]) for name, value in plain.state_dict().items())

    def test_the_block_puts_the_task_before_back_also_after_an_exception(self, images):
        model, pool = model_with_pool(2)
        pool.activate("task0", merge=True)
        before = model(images)
        with pytest.raises(RuntimeError, match="stop"), pool.use("task1"):
            assert pool.active == "task1"
            assert not torch.equal(model(images), before)
            raise RuntimeError("stop")
        assert pool.active == "task0"
        assert torch.equal(model(images), before)
        assert model.get_base_model().blocks[0].attn.qkv.merged

    def test_activating_trains_nothing_and_makes_no_new_parameter(self):
        model, pool = model_with_pool(2)
        pool.activate("task0")
        parameters = {name: id(p) for name, p in model.named_parameters()}
        pool.activate("task1")
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        assert not [n for n, p in model.named_parameters() if p.requires_grad]

    def test_a_compiled_model_is_compiled_once_for_all_tasks(self, images):
        compiled = CompileCounter()
        model, pool = model_with_pool(4)
        pool.activate("task0")
        fast = torch.compile(model.get_base_model(), backend=compiled, fullgraph=True)
        for i in range(100):
            pool.activate(f"task{i % 4}")
            out = fast(images)
        assert compiled.frame_count == 1
        assert torch.equal(out, model(images))

    def test_live_activation_keeps_every_storage(self, images):
        model, pool = model_with_pool()
        for i in range(3):
            pool.add(f"task{i}", RecastConfig(num_classes=4, seed=i))
            pool.table[i].copy_(torch.randn(pool.numbers_per_task, generator=torch.Generator().manual_seed(i)) * 0.3)
        pool.activate("task0")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        first = model(images)
        for name in ("task1", "task2", "task1"):
            pool.activate(name)
            assert not torch.allclose(model(images), first, atol=1e-3)
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {name: tensor.data_ptr() for name, tensor in now.items()} == addresses
        assert any("head.modules_to_save" in name for name in now)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
    @pytest.mark.parametrize("merge", [False, True])
    def test_a_captured_graph_computes_with_the_task_that_is_in_force(self, images, merge):
        model, pool = model_with_pool(3)
        model.to("cuda")
        static = images.to("cuda")
        pool.activate("task0", merge=merge)
        graph, out = captured(model, static)
        seen = []
        for name in ("task0", "task1", "task2", "task0"):
            pool.activate(name, merge=merge)
            graph.replay()
            seen.append(out.clone())
            torch.testing.assert_close(seen[-1], model(static))
        assert torch.equal(seen[0], seen[3])
        assert not torch.allclose(seen[0], seen[1], atol=1e-3)

    def test_on_a_compressed_bank(self, images):
        model, pool = model_with_pool(2, num_templates=1)
        pool.activate("task0")
        live = model(images)
        pool.activate("task1", merge=True)
        pool.activate("task0", merge=True)
        assert torch.allclose(model(images), live, atol=1e-6)
        pool.deactivate()
        model.set_adapter("first")
        first = model(images)
        assert not torch.allclose(first, live, atol=1e-3)


class TestMixedBatch:
    @pytest.mark.parametrize("limit", [0, 10**9], ids=["composed for each task", "products of the whole batch"])
    def test_every_sample_gets_its_own_task(self, images, monkeypatch, limit):
        monkeypatch.setattr(mixing, "PRODUCT_LIMIT", limit)
        model, pool = model_with_pool(3)
        base = small_vit()(images)
        names = ["task1", "task0", None, "task2", "task1", None]
        mixed = model(images, task_ids=pool.ids(names))
        for i, name in enumerate(names):
            expected = base if name is None else by_adapter(random_state(pool, int(name[-1])), images)
            assert torch.allclose(mixed[i], expected[i], atol=1e-5)

    @pytest.mark.parametrize("limit", [0, 10**9], ids=["composed for each task", "products of the whole batch"])
    def test_convolutions_with_bias_padding_and_groups(self, monkeypatch, limit):
        monkeypatch.setattr(mixing, "PRODUCT_LIMIT", limit)
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect") for _ in range(2)]
        model = get_recast_model(nn.Sequential(*layers, nn.Flatten()), RecastConfig(groups={"convs": ["0", "1"]})).eval()
        pool = TaskPool(model)
        x = torch.randn(3, 4, 5, 5)
        for name, seed in (("red", 1), ("blue", 2)):
            pool.add(name, random_state(pool, seed))
        mixed = model(x, task_ids=pool.ids(["blue", "red", "blue"]))
        for i, name in enumerate(["blue", "red", "blue"]):
            pool.activate(name)
            assert torch.allclose(mixed[i], model(x)[i], atol=1e-5)

    def test_one_composed_weight_is_alive_at_a_time(self, images, monkeypatch):
        monkeypatch.setattr(mixing, "PRODUCT_LIMIT", 0)
        model, pool = model_with_pool(3)
        compose, made, most = mixing.compose_weight, [], []

        def counted(*args):
            weight = compose(*args)
            made.append(weakref.ref(weight))
            most.append(sum(ref() is not None for ref in made))
            return weight

        monkeypatch.setattr(mixing, "compose_weight", counted)
        with torch.no_grad():
            model(images, task_ids=pool.ids(["task1", "task0", "task2"] * 2))
        assert len(most) == 3 * len(layers_of(model))
        assert max(most) <= 2  # one in use while the next is made

    def test_samples_side_by_side_are_viewed_and_others_copied(self):
        batch, x = MixedBatch(names=("a",) * 6), torch.randn(6, 3)
        for samples in ([1, 2, 3], [4], [0, 1, 2, 3, 4, 5], [2, 0, 4], [0, 2], [3, 2]):
            taken = batch.taken(x, samples)
            assert torch.equal(taken, torch.stack([x[i] for i in samples]))
            is_view = taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert is_view == (samples == sorted(samples) and samples[-1] - samples[0] == len(samples) - 1)

    def test_it_works_while_a_task_is_merged(self, images):
        model, pool = model_with_pool(2)
        expected = model(images, task_ids=pool.ids(["task0", "task1", None] * 2))
        pool.activate("task1", merge=True)
        assert torch.allclose(model(images, task_ids=pool.ids(["task0", "task1", None] * 2)), expected, atol=1e-6)

    def test_heads_of_different_sizes(self, images):
        model, pool = model_with_pool()
        pool.add("five", RecastConfig(num_classes=5, seed=1))
        pool.add("two", RecastConfig(num_classes=2, seed=2))
        pool.add("none")
        names = ["two", "five", "none", "five", "two", "two"]
        rows = split_logits(model(images, task_ids=pool.ids(names)))
        assert [len(row) for row in rows] == [2, 5, 7, 5, 2, 2]
        for i, name in enumerate(names):
            pool.activate(name)
            assert torch.allclose(model(images)[i], rows[i], atol=1e-5)

    def test_one_batch_trains_many_tasks_as_if_each_were_alone(self, images):
        names = ["task0", "task2", "task0", "task2", "task0", "task2"]

        def train(which: list[str]) -> torch.Tensor:
            model, pool = model_with_pool(3)
            pool.requires_grad_()
            optimiser = torch.optim.SGD(pool.parameters(), lr=0.05)
            keep = [i for i, name in enumerate(names) if name in which]
            with torch.enable_grad():
                for _ in range(3):
                    out = model(images[keep], task_ids=pool.ids([names[i] for i in keep]))
                    loss = out.square().sum()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            return pool.table.detach()

        _, untouched = model_with_pool(3)
        together = train(["task0", "task2"])
        assert torch.allclose(together[0], train(["task0"])[0], atol=1e-5)
        assert torch.allclose(together[2], train(["task2"])[2], atol=1e-5)
        assert torch.equal(together[1], untouched.table[1])
        assert not torch.allclose(together[0], untouched.table[0], atol=1e-3)

    def test_one_batch_trains_the_heads_of_many_tasks(self, images):
        labels = {"five": torch.tensor([4, 0, 2]), "two": torch.tensor([1, 0, 1])}

        def train(which: list[str]) -> dict[str, list[torch.Tensor]]:
            model, pool = model_with_pool()
            pool.add("five", RecastConfig(num_classes=5, seed=1))
            pool.add("two", RecastConfig(num_classes=2, seed=2))
            pool.requires_grad_()
            optimiser = torch.optim.SGD(pool.parameters(), lr=0.5)
            for _ in range(3 if which else 0):
                ids = pool.ids([name for name in which for _ in range(3)])
                x = torch.cat([images[:3] if name == "five" else images[3:] for name in which])
                targets = torch.cat([labels[name] for name in which])
                with torch.enable_grad():
                    loss = nn.functional.cross_entropy(model(x, task_ids=ids), targets, reduction="sum")
                    optimiser.zero_grad()
                    loss.backward()
                optimiser.step()
            heads = {name: [p.detach() for p in pool.head(pool.row(name)).parameters()] for name in pool}
            return {name: [pool.table.detach()[pool.row(name)], *heads[name]] for name in pool}

        start, together = train([]), train(["five", "two"])
        for name in ("five", "two"):
            alone = train([name])
            for mine, apart, before in zip(together[name], alone[name], start[name], strict=True):
                torch.testing.assert_close(mine, apart, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(mine, before, atol=1e-3)
            other = "two" if name == "five" else "five"
            assert all(torch.equal(a, b) for a, b in zip(alone[other], start[other], strict=True))

    def test_a_compiled_model_is_told_by_the_argument_as_well(self, images):
        compiled = CompileCounter()
        model, _ = model_with_pool(3)
        fast = torch.compile(model, backend=compiled)
        generator = torch.Generator().manual_seed(0)
        counts = []
        for _ in range(6):
            ids = torch.randint(0, 3, (6,), generator=generator)
            torch.testing.assert_close(fast(images, task_ids=ids), model(images, task_ids=ids), rtol=1e-4, atol=1e-5)
            counts.append(compiled.frame_count)
        assert counts[1:] == counts[1:2] * 5

    @pytest.mark.parametrize("follows_context", sorted({FOLLOWS_CONTEXT, False}))
    def test_a_compiled_model_takes_any_mixture(self, follows_context, images, monkeypatch):
        monkeypatch.setattr(mixed_batch, "FOLLOWS_CONTEXT", follows_context)  # False: as with an older torch
        torch._dynamo.reset()
        compiled = CompileCounter()
        model, pool = model_with_pool(3)
        fast = torch.compile(model.get_base_model(), backend=compiled, fullgraph=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            ids = torch.randint(0, 3, (6,), generator=generator)
            with pool.batch(ids):
                mixed = fast(images)
            assert torch.allclose(mixed, model(images, task_ids=ids), atol=1e-5)
        assert compiled.frame_count == 1

    def test_nothing_is_left_of_batches_whose_threads_overlapped(self, images):
        _, pool = model_with_pool(2)
        inside, leave = threading.Event(), threading.Event()

        def first():
            with pool.batch(["task0"] * len(images)):
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(10)
        with pool.batch(["task1"] * len(images)):
            leave.set()
            thread.join(10)  # the other thread's batch is over before this one
        assert mixed_batch._shared is None
        assert mixed_batch.current_batch() is None

    @pytest.mark.parametrize("beams", [1, 2])
    def test_text_generation_with_an_encoder(self, beams):
        model = get_recast_model(text_model("SEQ_2_SEQ_LM"), RecastConfig(task_type="SEQ_2_SEQ_LM")).eval()
        pool = TaskPool(model)
        for name, seed in (("up", 1), ("down", 2)):
            pool.add(name, {key: 8 * value for key, value in random_state(pool, seed).items()})
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
        mixed = model.generate(input_ids=TOKENS, task_ids=pool.ids(["up", "down"]), **options)
        alone = []
        for i, name in enumerate(("up", "down")):
            pool.activate(name)
            alone.append(model.generate(input_ids=TOKENS, **options))
            length = min(mixed.shape[1], alone[i].shape[1])
            assert torch.equal(mixed[i, :length], alone[i][i, :length])
        assert not torch.equal(alone[0], alone[1])

    def test_text_generation(self):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        model = get_recast_model(GPT2LMHeadModel(config).eval(), RecastConfig(task_type="CAUSAL_LM")).eval()
        pool = TaskPool(model)
        for name, seed in (("up", 1), ("down", 2)):
            pool.add(name, {k: 8 * v for k, v in random_state(pool, seed).items()})
        ids = torch.arange(1, 9).reshape(2, 4)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        for beams in (1, 2):
            mixed = model.generate(input_ids=ids, task_ids=pool.ids(["up", "down"]), num_beams=beams, **options)
            for i, name in enumerate(("up", "down")):
                pool.activate(name)
                alone = model.generate(input_ids=ids[i : i + 1], num_beams=beams, **options)
                assert torch.equal(mixed[i, : alone.shape[1]], alone[0])
            pool.deactivate()

    @pytest.mark.parametrize("ids", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([9]), torch.tensor([-2])])
    def test_row_numbers_that_are_none(self, ids, images):
        model, _ = model_with_pool(2)
        with pytest.raises(ValueError, match="task_ids"):
            model(images[:1], task_ids=ids)

    def test_a_batch_of_another_length(self, images):
        model, pool = model_with_pool(2)
        with pytest.raises(ValueError, match="same as the number of inputs"):
            model(images, task_ids=pool.ids(["task0", "task1"]))

    def test_without_a_pool(self, images):
        ids = torch.tensor([0] * 6)
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS)).eval()
        with pytest.raises(RecastConfigError, match="no pool"):
            model(images, task_ids=ids)
        with model.disable_adapter(), pytest.raises(RecastConfigError, match="no pool"):
            model(images, task_ids=ids)
        plain = get_peft_model(small_vit(), RecastConfig(target_modules=TARGETS)).eval()
        with pytest.raises(RecastConfigError, match="no pool"):
            plain(images, task_ids=ids)

    @pytest.mark.parametrize("task_type", sorted(TEXT_MODELS))
    def test_without_a_pool_in_the_class_of_a_task_type(self, task_type):
        model = get_recast_model(text_model(task_type), RecastConfig(task_type=task_type)).eval()
        ids = {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if task_type == "SEQ_2_SEQ_LM" else {})}
        for call in (model, model.generate) if hasattr(model.get_base_model(), "generate") else (model,):
            with pytest.raises(RecastConfigError, match="no pool"):
                call(**ids, task_ids=torch.tensor([0, 0]))

    @pytest.mark.parametrize("task_type", sorted(TEXT_MODELS))
    def test_in_the_class_of_a_task_type(self, task_type):
        model = get_recast_model(text_model(task_type), RecastConfig(task_type=task_type)).eval()
        assert type(model).__name__ != "RecastPeftModel"
        pool = TaskPool(model)
        for name, seed in (("up", 1), ("down", 2)):
            pool.add(name, {key: 8 * value for key, value in random_state(pool, seed).items()})
        ids = {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if task_type == "SEQ_2_SEQ_LM" else {})}
        pool.deactivate()  # PEFT's classes give the first task a classifier of its own
        mixed = model(**ids, task_ids=pool.ids(["up", "down"]))[0]
        with pool.batch(["up", "down"]):
            assert torch.equal(model(**ids)[0], mixed)
        for i, name in enumerate(("up", "down")):
            pool.activate(name)
            alone = model(**ids)[0]
            torch.testing.assert_close(mixed[i], alone[i], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(mixed[1 - i], alone[1 - i], atol=1e-2)

    def test_of_a_class_of_its_own_that_would_swallow_task_ids(self):
        class Own(PeftModelForSequenceClassification):
            pass

        model = Own(text_model("SEQ_CLS"), RecastConfig(task_type="SEQ_CLS"), "first").eval()
        pool = TaskPool(model)
        pool.add("task")
        with pytest.raises(RecastConfigError, match=r"pool\.batch"):
            model(TOKENS, task_ids=pool.ids(["task", None]))


class TestThreads:
    def test_two_threads_never_see_each_others_tasks(self, images):
        model, pool = model_with_pool(3)
        expected = {name: model(images, task_ids=pool.ids([name] * 6)) for name in pool}
        wrong: list[str] = []

        def serve(name: str) -> None:
            with torch.no_grad():
                for _ in range(25):
                    with pool.batch([name] * 6):
                        if not torch.equal(model(images), expected[name]):
                            wrong.append(name)

        run_at_once([partial(serve, name) for name in pool])
        assert not wrong
        assert not torch.equal(expected["task0"], expected["task1"])

    def test_ordinary_tasks_by_name_beside_a_pools_tasks(self, images):
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, num_classes=3), "flowers").eval()
        model.add_adapter("cars", RecastConfig(target_modules=TARGETS, num_classes=5))
        model.add_adapter("whole", RecastConfig(target_modules=TARGETS, modules_to_save=["blocks.1.attn.proj"]))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith((".flowers", ".cars", ".whole")) or ".modules_to_save." in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
        pool = TaskPool(model)
        pool.add("pooled", random_state(pool, 3))
        pool.deactivate()
        calls = {
            "all": lambda: model(images, adapter_names=["flowers", "cars", "whole", "__base__", "whole", "flowers"]),
            "whole": lambda: model(images, adapter_names=["whole"] * 6),
            "pool": lambda: model(images, task_ids=pool.ids(["pooled", None] * 3)),
            "none": lambda: model(images),
        }
        expected = {name: call() for name, call in calls.items()}
        model.set_adapter("whole")
        torch.testing.assert_close(model(images), expected["whole"])
        pool.deactivate()
        assert len({result.sum().item() for result in expected.values()}) == 4
        outcomes: list[bool | Exception] = []

        def serve(name: str) -> None:
            with torch.no_grad():
                for _ in range(15):
                    try:
                        outcomes.append(torch.equal(calls[name](), expected[name]))
                    except Exception as error:
                        outcomes.append(error)

        run_at_once([partial(serve, name) for name in calls])
        assert outcomes == [True] * 60


class TestSavingTheModel:
    def test_leaves_the_pools_slot_out_unless_it_is_named(self, tmp_path, images):
        model, pool = model_with_pool(2)
        pool.activate("task1")
        model.save_pretrained(tmp_path / "all")
        assert sorted(path.name for path in (tmp_path / "all").iterdir() if path.is_dir()) == ["first"]
        model.save_pretrained(tmp_path / "slot", selected_adapters=["task_pool"])
        task = PeftModel.from_pretrained(small_vit(), tmp_path / "slot" / "task_pool").eval()
        assert torch.equal(task(images), model(images))
        assert not torch.allclose(small_vit()(images), model(images), atol=1e-3)

    def test_of_a_model_that_peft_made_as_well(self, tmp_path):
        model = get_peft_model(small_vit(), RecastConfig(target_modules=TARGETS))
        TaskPool(model, slot="mine")
        model.save_pretrained(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
        assert (tmp_path / "adapter_model.safetensors").is_file()

    def test_pools_of_two_layouts_need_two_slots(self, tmp_path, images):
        model, pool = model_with_pool(1)
        model.add_adapter("other", RecastConfig(target_modules=["fc2"]))
        with pytest.raises(RecastConfigError, match="slot='task_pool'.*another name"):
            TaskPool(model, like="other")
        second = TaskPool(model, like="other", slot="second")
        second.add("b", random_state(second, 2))
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["first", "other"]
        expected = {}
        for name, of in (("task0", pool), ("b", second)):
            of.activate(name)
            expected[name] = model(images)
        assert not torch.allclose(expected["task0"], expected["b"], atol=1e-3)
        model.to(torch.float64)
        assert pool.table.dtype == second.table.dtype == torch.float64


class TestRows:
    def test_removed_rows_are_used_again_and_names_keep_their_rows(self):
        _, pool = model_with_pool(4)
        kept = pool.coefficients("task3")
        pool.activate("task1")
        pool.remove("task1")
        assert pool.active is None
        assert "task1" not in pool
        assert pool.add("new") == 1
        assert pool.names == ["task0", "new", "task2", "task3"]
        assert all(torch.equal(a, b) for a, b in zip(kept.values(), pool.coefficients("task3").values(), strict=True))
        assert not any(v.any() for v in pool.coefficients("new").values())

    def test_ten_thousand_tasks_take_a_few_megabytes(self):
        _, pool = model_with_pool()
        for i in range(10_000):
            pool.add(f"t{i}")
        assert len(pool) == 10_000
        assert pool.nbytes() < 4e6
        assert pool.row("t9999") == 9999

    def test_unknown_and_taken_names(self):
        _, pool = model_with_pool(1)
        with pytest.raises(RecastConfigError, match="no task 'x'; it has 1: task0"):
            pool.activate("x")
        with pytest.raises(RecastConfigError, match="already"):
            pool.add("task0")
        for name in ("", "a\nb", 3):
            with pytest.raises(RecastConfigError, match="name="):
                pool.add(name)
        for name in ("a/b", "..", "/tmp/x"):  # it could not be saved as a folder
            with pytest.raises(RecastConfigError, match="plain name"):
                pool.add(name)
            with pytest.raises(RecastConfigError, match="plain name"):
                pool.add_weighted_adapter(["task0"], [1.0], name)
        assert len(pool) == 1

    def test_a_model_without_tasks(self):
        with pytest.raises(RecastConfigError, match="get_recast_model"):
            TaskPool(small_vit())
        model, _ = model_with_pool()
        with pytest.raises(RecastConfigError, match="like="):
            TaskPool(model, like="nobody")


class TestFindingTheTask:
    @staticmethod
    def clouds(task: int, count: int = 20) -> torch.Tensor:
        """Images of one task: stripes across or along, and noise."""
        generator = torch.Generator().manual_seed(task)
        stripes = torch.zeros(16, 16)
        stripes[::2] = 3.0
        image = stripes if task == 0 else stripes.T
        return image + 0.3 * torch.randn(count, 1, 16, 16, generator=generator)

    def test_samples_go_to_the_task_that_they_look_like(self, tmp_path):
        model, pool = model_with_pool(3)
        pool.remember("task2", self.clouds(0), torch.arange(20) % 2)
        pool.remember("task0", self.clouds(1))
        mixed = torch.cat([self.clouds(0)[:5] + 0.1, self.clouds(1)[:5] - 0.1])
        pool.activate("task1", merge=True)  # routing looks at the pretrained model, whatever is active
        assert pool.route(mixed).tolist() == [2] * 5 + [0] * 5
        logits = model(mixed, task_ids=pool.route(mixed))
        assert torch.allclose(logits[:5], model(mixed[:5], task_ids=pool.ids(["task2"] * 5)), atol=1e-5)
        pool.save(tmp_path / "pool.safetensors")
        _, again = model_with_pool()
        again.load(tmp_path / "pool.safetensors")
        assert again.route(mixed).tolist() == pool.route(mixed).tolist()

    def test_a_removed_task_is_forgotten_and_nothing_to_choose_from_is_an_error(self, images):
        _, pool = model_with_pool(1)
        pool.remember("task0", images)
        pool.remove("task0")
        with pytest.raises(RecastConfigError, match="pool.remember"):
            pool.route(images)

    def test_bad_samples(self, images):
        _, pool = model_with_pool(1)
        with pytest.raises(RecastConfigError, match=r"labels: +\(2,\)"):
            pool.remember("task0", images, torch.tensor([0, 1]))
        for inputs in ({}, {"x": None}, torch.empty(0, 1, 16, 16), [1.0]):
            with pytest.raises(RecastConfigError, match="at least one sample"):
                pool.remember("task0", inputs)
        with pytest.raises(RecastConfigError, match="at least one sample"):
            pool.route({})


class TestFiles:
    def test_one_that_is_not_there_is_said_to_be_so(self, tmp_path):
        pool = model_with_pool()[1]
        for place, what in ((tmp_path / "none.safetensors", "is not there"), (tmp_path, "is a folder, not a file")):
            with pytest.raises(RecastLoadError, match=what):
                pool.load(place)
        with pytest.raises(RecastLoadError, match="pool.safetensors is a file: expected the folder of a saved task"):
            pool.save(tmp_path / "new" / "pool.safetensors")  # the folder is made
            pool.add("one", tmp_path / "new" / "pool.safetensors")

    def saved_task(self, folder: Path, name: str, seed: int, **config) -> None:
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, **config), name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(folder)

    def test_saved_tasks_are_read_from_a_folder(self, tmp_path, images):
        self.saved_task(tmp_path, "one", 1)
        self.saved_task(tmp_path, "two", 2, num_classes=3)
        self.saved_task(tmp_path, "three", 3, num_coefficient_sets=3)
        model, pool = model_with_pool()
        assert pool.load_folder(tmp_path) == ["one", "three", "two"]
        for name in pool:
            expected = PeftModel.from_pretrained(small_vit(), tmp_path / name, name).eval()(images)
            pool.activate(name)
            assert torch.allclose(model(images), expected, atol=1e-6)

    def test_a_task_of_the_model(self, images):
        model, pool = model_with_pool()
        model.add_adapter("trained", RecastConfig(target_modules=TARGETS, num_classes=4))
        for name, parameter in model.named_parameters():
            if ".trained" in name:
                parameter.data.normal_()
        model.set_adapter("trained")
        expected = model(images)
        pool.add("copy", "trained")
        model.set_adapter("first")
        pool.activate("copy")
        assert torch.equal(model(images), expected)

    def test_one_packed_file_brings_everything_back(self, tmp_path, images):
        model, pool = model_with_pool(3)
        pool.remove("task1")
        pool.add("häuser", RecastConfig(id2label={0: "alt", 1: "neu"}))
        pool.save(tmp_path / "pool.safetensors")
        again_model, again = model_with_pool()
        assert again.load(tmp_path / "pool.safetensors") == ["task0", "häuser", "task2"]
        for name in pool:
            pool.activate(name)
            again.activate(name)
            assert torch.equal(again_model(images), model(images))
        assert again_model.get_base_model().num_classes == 7

    def test_a_task_takes_fewer_than_200_bytes(self, tmp_path):
        with torch.device("meta"):
            empty = timm.create_model("vit_small_patch16_224")
        model = get_recast_model(empty.to_empty(device="cpu").apply(_zero), RecastConfig(target_modules=["qkv"]), "first")
        pool = TaskPool(model)
        pool.save(tmp_path / "none.safetensors")
        for i in range(1000):
            pool.add(f"customer-{i}")
        pool.save(tmp_path / "many.safetensors")
        sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("none", "many")}
        assert (sizes["many"] - sizes["none"]) / 1000 < 200

    def test_other_targets_and_other_weights_are_refused(self, tmp_path):
        _, pool = model_with_pool()
        other = get_recast_model(small_vit(), RecastConfig(target_modules=["proj"]), "proj")
        other.save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match="other target modules"):
            pool.add("proj", tmp_path / "proj")
        stranger = get_recast_model(small_vit(seed=5), RecastConfig(target_modules=TARGETS), "stranger")
        stranger.save_pretrained(tmp_path)
        with pytest.raises(RecastBaseMismatchError, match="other pretrained weights"):
            pool.add("stranger", tmp_path / "stranger")
        foreign = TaskPool(stranger)
        foreign.add("x")
        foreign.save(tmp_path / "foreign.safetensors")
        with pytest.raises(RecastBaseMismatchError):
            pool.load(tmp_path / "foreign.safetensors")
        assert len(pool) == 0

    def test_damaged_files_put_nothing_in(self, tmp_path):
        self.saved_task(tmp_path, "good", 1)
        self.saved_task(tmp_path, "poor", 2)
        file = tmp_path / "poor" / "adapter_model.safetensors"
        entries = load_file(file)
        key = next(iter(entries))
        _, pool = model_with_pool(1)
        for broken in (
            {k: v for k, v in entries.items() if k != key},
            {**entries, "stranger": torch.zeros(1)},
            {**entries, key: torch.zeros(1, 5)},
            {**entries, key: torch.full_like(entries[key], float("nan"))},
        ):
            save_file(broken, file)
            with pytest.raises(RecastLoadError, match="does not fit"):
                pool.load_folder(tmp_path)
            assert pool.names == ["task0"]
        file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(RecastLoadError, match="is damaged"):
            pool.load_folder(tmp_path)
        file.rename(file.with_name("adapter_model.bin"))
        with pytest.raises(RecastLoadError, match="is damaged"):
            pool.load_folder(tmp_path)
        assert pool.names == ["task0"]
        with pytest.raises(RecastLoadError, match="no saved task"):
            pool.load_folder(tmp_path / "good")

    def test_damaged_packed_files(self, tmp_path):
        _, pool = model_with_pool(2)
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        whole = path.read_bytes()
        _, fresh = model_with_pool()
        for damaged in (whole[:20], whole[:-30], b"", whole.replace(b"recast-task-pool-2", b"recast-task-pool-9")):
            path.write_bytes(damaged)
            with pytest.raises(RecastLoadError):
                fresh.load(path)
        with pytest.raises(RecastLoadError, match="is not there"):
            fresh.load(tmp_path / "nowhere")
        assert len(fresh) == 0
        path.write_bytes(whole)
        fresh.load(path)
        with pytest.raises(RecastConfigError, match="already"):
            fresh.load(path)

    def test_packed_files_with_wrong_contents(self, tmp_path):
        _, pool = model_with_pool(1)
        pool.add("headed", RecastConfig(num_classes=3))
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        with safe_open(path, framework="pt") as file:
            metadata = {key: text for key, text in file.metadata().items() if key != CHECKSUM}
        tensors = load_file(path)
        _, fresh = model_with_pool()
        table = tensors["coefficients"]
        for changed, message in (
            ({"coefficients": table[:, 1:].contiguous()}, "table in .* is damaged"),
            ({"coefficients": table / 0}, "2 of 2 tasks in .* not finite"),
            ({"coefficients": table.int()}, "table in .* is damaged"),
            ({"names": tensors["names"][:5]}, "names for 2 tasks"),
            ({"heads.0.weight": torch.zeros(1, 2, 16)}, "classifiers of kind 0 are damaged"),
            ({"heads.0.places": torch.tensor([2])}, "classifier of place 2 among 2 tasks is damaged"),
            ({"heads.0.labels": torch.tensor([1])}, "does not fit the model"),
        ):
            save_file({**tensors, **changed}, path, metadata)
            with pytest.raises(RecastLoadError, match=message):
                fresh.load(path)
        for heads in ('[{"classes": 3}]', "[3]", "{", "7"):
            save_file(tensors, path, {**metadata, "heads": heads})
            with pytest.raises(RecastLoadError, match="damaged or does not fit|not valid JSON"):
                fresh.load(path)
        assert len(fresh) == 0

    def test_a_changed_file_is_known_by_its_checksum(self, tmp_path):
        _, pool = model_with_pool(2)
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file({**tensors, "coefficients": tensors["coefficients"] * 2}, path, metadata)
        with pytest.raises(RecastLoadError, match="checksum"):
            model_with_pool()[1].load(path)


def _zero(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.fill_(0.01)


class TestBesideOrdinaryTasks:
    def tasks(self) -> tuple[PeftModel, TaskPool]:
        model, pool = model_with_pool(2)
        model.set_adapter("first")
        for layer in layers_of(model).values():
            layer.recast_coefficients["first"].data.fill_(0.2)
        return model, pool

    @pytest.mark.parametrize("merge", [False, True])
    def test_the_block_puts_an_ordinary_task_back_and_what_it_trains(self, images, merge):
        model, pool = self.tasks()
        before = model(images)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        with pool.use("task0", merge=merge):
            assert not torch.allclose(model(images), before)
        assert model.active_adapters == ["first"]
        assert torch.equal(model(images), before)
        assert trained
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained

    def test_deactivating_gives_the_base_whatever_was_active(self, images):
        model, pool = self.tasks()
        pool.activate("task0")
        model.set_adapter("first")
        assert pool.active is None
        pool.deactivate()
        assert torch.equal(model(images), small_vit()(images))

    def test_a_task_that_was_merged_by_the_models_own_verb_gives_way(self, images):
        model, pool = self.tasks()
        pool.activate("task1")
        expected = model(images)
        pool.activate("task0")
        model.merge_adapter()
        pool.activate("task1")
        assert torch.equal(model(images), expected)

    @pytest.mark.parametrize("owned", [{"train_norms": True}, {"modules_to_save": ["norm"]}, {"bias": "recast_only"}])
    def test_a_task_that_owns_more_than_a_pool_holds_is_refused(self, owned):
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS), "first")
        model.add_adapter("more", RecastConfig(target_modules=TARGETS, **owned))
        with pytest.raises(RecastConfigError, match="a pool cannot hold task 'more': it owns"):
            TaskPool(model).add("more", "more")

    def test_the_pools_samples_never_meet_an_ordinary_tasks_norms(self, images):
        model = get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS), "first").eval()
        model.add_adapter("norms", RecastConfig(target_modules=TARGETS, train_norms=True))
        model.set_adapter("norms")
        for name, parameter in model.named_parameters():
            if ".modules_to_save.norms." in name:
                parameter.data += 0.5
        pool = TaskPool(model)
        model.set_adapter("norms")
        expected = small_vit()(images)
        assert not torch.allclose(model(images), expected)
        with pytest.raises(RecastBankError, match=r"call pool\.deactivate"):
            model(images, task_ids=pool.ids([None] * 6))
        with pytest.raises(RecastBankError, match=r"call pool\.deactivate"), pool.batch([None] * 6):
            pass
        pool.deactivate()
        torch.testing.assert_close(model(images, task_ids=pool.ids([None] * 6)), expected)

    def test_a_slot_that_was_deleted(self, images):
        model, pool = self.tasks()
        model.delete_adapter(pool.slot)
        for use in (lambda: pool.activate("task0"), pool.deactivate, lambda: model(images, task_ids=pool.ids(["task0"] * 6))):
            with pytest.raises(RecastConfigError, match="make a new TaskPool"):
                use()


class TestOtherBanks:
    def test_kept_base_weights_are_what_no_task_gives(self, images):
        model, pool = model_with_pool(1, num_templates=1, keep_base_weights=True)
        expected = small_vit()(images)
        pool.activate("task0")
        task = model(images)
        pool.deactivate()
        assert torch.equal(model(images), expected)
        assert not mimicry_report(model).is_exact  # it still finds the banks
        mixed = model(images, task_ids=pool.ids([None, "task0"] * 3))
        torch.testing.assert_close(mixed[::2], expected[::2])
        torch.testing.assert_close(mixed[1::2], task[1::2])
        pool.activate("task0")
        assert torch.equal(model(images), task)

    @pytest.mark.parametrize("head", [{}, {"num_classes": 3, "head_module": "head"}])
    def test_kept_base_weights_stay_in_force_whatever_peft_does_beside_the_pool(self, images, head):
        model, pool = model_with_pool(1, num_templates=1, keep_base_weights=True)
        expected = small_vit()(images)
        pool.activate("task0")
        task = model(images)
        pool.deactivate()
        fresh = RecastConfig(target_modules=TARGETS, num_templates=1, keep_base_weights=True, **head)
        model.add_adapter("second", fresh)
        assert torch.equal(model(images), expected)
        pool.add("third", RecastConfig(**head))
        assert torch.equal(model(images), expected)
        model.merge_adapter()
        assert torch.equal(model(images), expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(images), expected)
        model.set_adapter("second")
        pool.deactivate()
        model.delete_adapter("second")
        model.add_adapter("fourth", fresh)
        assert torch.equal(model(images), expected)
        for merge in (False, True):
            pool.activate("task0", merge=merge)
            torch.testing.assert_close(model(images), task)
            pool.deactivate()
            assert torch.equal(model(images), expected)

    def test_a_fitted_bank_and_no_tasks_of_another_one(self, tmp_path, images):
        def fitted(steps: int) -> PeftModel:
            method = {"method": "gradient", "steps": steps, "progress": False}
            return get_recast_model(small_vit(), RecastConfig(target_modules=TARGETS, num_templates=1, mimicry=method), "first")

        model = fitted(2).eval()
        for layer in layers_of(model).values():
            layer.recast_coefficients["first"].data.fill_(0.2)
        expected = model(images)
        model.save_bank(tmp_path / "bank")
        model.save_pretrained(tmp_path, selected_adapters=["first"])
        pool = TaskPool(model)
        pool.add("own", "first")
        pool.activate("own")
        assert torch.equal(model(images), expected)
        pool.add("same", tmp_path / "first")
        pool.save(tmp_path / "pool")
        other = TaskPool(fitted(3))
        with pytest.raises(RecastBankError, match="another template bank"):
            other.add("task", tmp_path / "first")
        with pytest.raises(RecastBankError, match="another template bank"):
            other.load(tmp_path / "pool")

    def test_prototypes_and_a_head_in_half_precision_come_back(self, tmp_path, images):
        def model() -> PeftModel:
            config = RecastConfig(target_modules=TARGETS, num_classes=2, head_type="prototypes", head_module="head")
            return get_recast_model(small_vit(), config, "first").eval()

        first = model()
        fit_prototypes(first, [(images, torch.tensor([0, 1] * 3))])
        expected = first(images)
        pool = TaskPool(first)
        pool.add("prototypes", "first")
        pool.add("half", RecastConfig(num_classes=3, head_dtype="float16", head_module="head"))
        pool.save(tmp_path / "pool")
        again = TaskPool(model())
        again.load(tmp_path / "pool")
        again.activate("prototypes")
        assert torch.equal(again.model(images), expected)
        again.save(tmp_path / "again")
        assert load_file(tmp_path / "again")["heads.1.weight"].dtype == torch.float16


class TestFollowingTheModel:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_table_and_heads_follow_it_to_another_dtype(self, images, dtype):
        model, pool = model_with_pool(1)
        pool.add("headed", RecastConfig(num_classes=3, head_module="head"))
        table = pool.table
        model.to(dtype)
        mixed = model(images.to(dtype), task_ids=pool.ids(["task0", "headed"] * 3))
        assert mixed.dtype == dtype
        assert pool.table is table
        assert table.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        pool.activate("headed")
        torch.testing.assert_close(model(images.to(dtype))[1], mixed[1, :3])


class TestWhatIsComputedAgain:
    def test_gradient_checkpointing_is_refused_and_does_no_harm_without_gradients(self, images):
        model, pool = model_with_pool(1)
        model.get_base_model().set_grad_checkpointing()
        ids = pool.ids(["task0"] * 6)
        assert model(images, task_ids=ids).shape == (6, 7)
        with torch.enable_grad(), pytest.raises(RecastConfigError, match="gradient checkpointing"):
            model(images, task_ids=ids)

    def test_gradient_checkpointing_of_transformers_is_refused_as_well(self):
        model = get_recast_model(text_model("CAUSAL_LM"), RecastConfig(task_type="CAUSAL_LM"), "first")
        pool = TaskPool(model)
        pool.add("task")
        model.gradient_checkpointing_enable()
        model.train()
        with torch.enable_grad(), pytest.raises(RecastConfigError, match="gradient checkpointing"):
            pool.batch(["task", None])
