"""A pool beside a model: batches of many tasks, threads, the model's own files, routing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import layers_of, outputs, run_at_once
from peft import PeftModel, get_peft_model
from pools import TARGETS, TEXT_MODELS, TOKENS, by_adapter, model_with_pool, random_state, small_vit, text_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, TaskPool, get_recast_model
from recast_peft.composition import mixed_batch, mixing
from recast_peft.composition.mixed_batch import FOLLOWS_CONTEXT, MixedBatch
from recast_peft.parts.head import split_logits


def text_pool(task_type: str) -> tuple[PeftModel, TaskPool]:
    """A model of texts, and a pool with two tasks that say other things."""
    model = get_recast_model(text_model(task_type), RecastConfig(task_type=task_type)).eval()
    pool = TaskPool(model)
    for name, seed in (("up", 1), ("down", 2)):
        pool.add(name, {key: 8 * value for key, value in random_state(pool, seed).items()})
    return model, pool


def _no_memory(*args: object, **options: object) -> None:
    raise torch.OutOfMemoryError


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

    def test_one_weight_s_memory_serves_all_tasks_of_a_call(self, images, monkeypatch):
        monkeypatch.setattr(mixing, "PRODUCT_LIMIT", 0)
        model, pool = model_with_pool(3)
        compose, made = mixing.compose_into, []

        def noted(out, *args):
            made.append(out)  # kept, so that no address is used twice
            return compose(out, *args)

        monkeypatch.setattr(mixing, "compose_into", noted)
        with torch.no_grad():
            model(images, task_ids=pool.ids(["task1", "task0", "task2"] * 2))
        assert len(made) == 3 * len(layers_of(model))
        assert len({out.data_ptr() for out in made}) == len(layers_of(model))

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

    @pytest.mark.parametrize("beams", [1, 2])
    @pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
    def test_text_generation(self, task_type, beams):
        model, pool = text_pool(task_type)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
        mixed = model.generate(input_ids=TOKENS, task_ids=pool.ids(["up", "down"]), **options)
        alone = []
        for i, name in enumerate(("up", "down")):
            pool.activate(name)
            alone.append(model.generate(input_ids=TOKENS, **options))
            length = min(mixed.shape[1], alone[i].shape[1])
            assert torch.equal(mixed[i, :length], alone[i][i, :length])
        assert not torch.equal(alone[0], alone[1])

    @pytest.mark.parametrize("task_type", sorted(TEXT_MODELS))
    def test_in_the_class_of_a_task_type(self, task_type):
        model, pool = text_pool(task_type)
        assert type(model).__name__.startswith("PeftModelFor")
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

    def test_a_task_with_a_classifier_is_saved_as_a_task_of_its_own(self, tmp_path, images):
        model, pool = model_with_pool()
        pool.add("pets", RecastConfig(num_classes=2, id2label={0: "cat", 1: "dog"}))
        pool.activate("pets")
        with pytest.raises(RecastTargetError, match="'task_pool' holds the classifier of a pool's task.*make a task of it"):
            model.save_pretrained(tmp_path / "slot", selected_adapters=["task_pool"])
        assert not list((tmp_path / "slot").glob("*"))
        model.base_model.add_weighted_adapter(["task_pool"], [1.0], "pets", heads="first")
        model.save_pretrained(tmp_path, selected_adapters=["pets"])
        task = PeftModel.from_pretrained(small_vit(), tmp_path / "pets").eval()
        assert torch.equal(task(images), model(images))
        assert task(images).shape[1] == 2
        pool.deactivate()
        model.save_pretrained(tmp_path, selected_adapters=["task_pool"])
        task = PeftModel.from_pretrained(small_vit(), tmp_path / "task_pool").eval()
        assert torch.equal(task(images), small_vit()(images))

    def test_of_a_model_that_peft_made_as_well(self, tmp_path):
        model = get_peft_model(small_vit(), RecastConfig(target_modules=TARGETS))
        TaskPool(model, slot="mine")
        model.save_pretrained(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
        assert (tmp_path / "adapter_model.safetensors").is_file()

    def test_a_slot_is_never_a_task(self, images):
        model = get_recast_model(small_vit(), RecastConfig(init_weights=False), "trained").eval()
        before = outputs(model, images)
        with pytest.raises(RecastConfigError, match="slot='trained'.*write its tasks over it"):
            TaskPool(model, slot="trained")
        assert torch.equal(outputs(model, images), before)

    def test_a_pool_that_cannot_be_made_leaves_no_slot(self, images, monkeypatch):
        model = get_recast_model(small_vit(), RecastConfig(init_weights=False), "trained").eval()
        before = outputs(model, images)
        with pytest.raises(RecastConfigError, match="head_dtype='int8'"):
            TaskPool(model, head_dtype="int8")
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr("recast_peft.pool.table.nn.Parameter", _no_memory)
            TaskPool(model)
        assert list(model.peft_config) == model.active_adapters == ["trained"]
        assert not model.base_model.task_pool
        assert torch.equal(outputs(model, images), before)
        assert TaskPool(model).slot == "task_pool"

    def test_pools_of_two_layouts_need_two_slots(self, tmp_path, images):
        model, pool = model_with_pool(1)
        model.add_adapter("other", RecastConfig(target_modules=["fc2"]))
        with pytest.raises(RecastConfigError, match="slot='task_pool'.*another name"):
            TaskPool(model, like="other")
        with pytest.raises(RecastConfigError, match="like='': the model has the tasks"):
            TaskPool(model, like="")
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

    def test_a_replaced_task_is_still_found(self):
        _, pool = model_with_pool(2)
        for number in range(2):
            pool.remember(f"task{number}", self.clouds(number))
        pool.replace("task1", random_state(pool, 9))
        assert torch.equal(pool.route(self.clouds(1)), pool.ids(["task1"] * 20))

    def test_a_removed_task_is_forgotten_and_nothing_to_choose_from_is_an_error(self, images):
        _, pool = model_with_pool(1)
        pool.remember("task0", images)
        pool.remove("task0")
        with pytest.raises(RecastConfigError, match="pool.remember"):
            pool.route(images)


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
