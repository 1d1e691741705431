"""The slot of a pool: one task active, live or merged, and the pretrained model again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import captured, layers_of, offsets_of, randomise
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pooled_parts import answer, pool_of, with_tasks
from pools import TARGETS, by_adapter, model_with_pool, random_state, small_vit
from torch._dynamo.testing import CompileCounter

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, TaskPool, get_recast_model, mimicry_report


def _interrupt() -> None:
    raise KeyboardInterrupt


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

    @pytest.mark.parametrize("fails", [KeyboardInterrupt, torch.OutOfMemoryError])
    @pytest.mark.parametrize("where", ["set_adapter", "_unmerge", "_write", "_merge", "_show"])
    def test_what_fails_half_way_leaves_the_pretrained_model(self, images, monkeypatch, where, fails):
        model, pool = model_with_pool(2)
        pool.add("headed", RecastConfig(num_classes=5))
        pool.activate("task0", merge=where == "_unmerge")
        if where == "set_adapter":
            model.set_adapter("first")
        calls, slot = [], pool._slot
        owner = slot if where != "set_adapter" else model.base_model
        verb = getattr(owner, where)

        def half_done(*args, **options):
            result = verb(*args, **options)
            if not calls:
                calls.append(where)
                raise fails
            return result

        with monkeypatch.context() as patch, pytest.raises(fails):
            patch.setattr(owner, where, half_done)
            pool.activate("headed", merge=where == "_merge")
        assert calls
        assert pool.active is None
        assert model.active_adapter == pool.slot
        assert model.active_adapters == [pool.slot]
        assert torch.equal(model(images), small_vit()(images))
        pool.activate("task1")
        assert torch.equal(model(images), by_adapter(random_state(pool, 1), images))

    def test_deactivating_is_done_once_it_was_begun(self, images, monkeypatch):
        model, pool = model_with_pool(1)
        pool.activate("task0")
        show = pool._slot._show
        monkeypatch.setattr(pool._slot, "_show", lambda head: (show(head), monkeypatch.undo(), _interrupt()))
        with pytest.raises(KeyboardInterrupt):
            pool.deactivate()
        assert pool.active is None
        assert torch.equal(model(images), small_vit()(images))

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

    @pytest.mark.parametrize("merge", [False, True])
    def test_the_block_puts_a_merged_task_back_that_is_not_the_active_one(self, images, merge):
        model, pool = self.tasks()
        model.add_adapter("second", RecastConfig(target_modules=TARGETS, num_classes=3, init_weights=False))
        active = model(images)
        model.merge_adapter(["second"])
        before = model(images)
        assert before.shape != active.shape
        with pool.use("task0", merge=merge):
            assert model(images).shape == active.shape
        assert torch.equal(model(images), before)
        model.unmerge_adapter()
        assert torch.equal(model(images), active)

    @pytest.mark.parametrize("merged", [False, True])
    def test_the_block_ends_at_the_pretrained_model_if_the_task_before_was_deleted_in_it(self, images, merged):
        model, pool = self.tasks()
        if merged:
            model.merge_adapter()
        with pool.use("task0"):
            model.delete_adapter("first")
        assert pool.active is None
        assert torch.equal(model(images), small_vit()(images))

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
        torch.testing.assert_close(model(images, task_ids=pool.ids([None] * 6)), expected)
        with pool.batch([None] * 6):
            torch.testing.assert_close(model(images), expected)

    def test_a_slot_that_was_deleted(self, images, tmp_path):
        model, pool = self.tasks()
        model.save_pretrained(tmp_path)
        model.delete_adapter(pool.slot)
        name = next(iter(model.peft_config))
        reading = (lambda: pool.add("more", name), lambda: pool.replace("task0", name), lambda: pool.load_folder(tmp_path))
        computing = (lambda: pool.activate("task0"), lambda: model(images, task_ids=pool.ids(["task0"] * 6)))
        for use in (pool.deactivate, *computing, *reading):
            with pytest.raises(RecastConfigError, match="make a new TaskPool"):
                use()

    def test_a_task_under_the_name_of_a_deleted_slot_is_an_ordinary_one(self, images, tmp_path):
        model, pool = self.tasks()
        model.delete_adapter(pool.slot)
        model.add_adapter(pool.slot, RecastConfig(target_modules=["qkv"], group_size=1))
        randomise(model, pool.slot)
        for use in (lambda: pool.activate("task0"), lambda: pool.mixed_batch_of(["task0"])):
            with pytest.raises(RecastConfigError, match="was deleted"):
                use()
        with pytest.raises(RecastConfigError, match="the pool would write its tasks over it"):
            TaskPool(model)
        model.save_pretrained(tmp_path)
        assert (tmp_path / pool.slot).is_dir()
        other = copy.deepcopy(model)
        randomise(other, pool.slot, seed=7)
        model.load_state_dict(other.state_dict())
        for name, numbers in offsets_of(other, pool.slot).items():
            assert torch.equal(offsets_of(model, pool.slot)[name], numbers)


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


class TestAMergedLayerOfAnotherMethod:
    """What lies in its weight is the task that was active when it was merged; another one cannot come below it."""

    @pytest.fixture
    def parts(self):
        model, pool = model_with_pool(2)
        pool.activate("task0")
        lora = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
        other = get_peft_model(model.base_model.model, lora, adapter_name="other").eval()
        pool.activate("task0")  # PEFT made its own adapter the active one
        other.merge_adapter(["other"])
        return model, pool, other

    @pytest.mark.parametrize(
        "verb",
        [
            lambda pool: pool.activate("task1"),
            lambda pool: pool.activate("task1", merge=True),
            lambda pool: pool.deactivate(),
            lambda pool: pool.remove("task0"),
        ],
        ids=["activate", "merge", "deactivate", "remove"],
    )
    def test_is_left_as_it_is_by_what_is_refused(self, parts, images, verb):
        model, pool, _ = parts
        before = model(images)
        numbers = [layer.recast_coefficients[pool.slot].clone() for layer in layers_of(model).values()]
        with pytest.raises(RecastBankError, match="Unmerge them first"):
            verb(pool)
        assert (pool.active, "task0" in pool.names) == ("task0", True)
        now = [layer.recast_coefficients[pool.slot] for layer in layers_of(model).values()]
        assert all(torch.equal(a, b) for a, b in zip(numbers, now, strict=True))
        assert torch.equal(model(images), before)

    def test_lets_another_task_be_active_once_it_is_unmerged(self, parts, images):
        model, pool, other = parts
        other.unmerge_adapter()
        pool.activate("task1", merge=True)
        merged = model(images)
        pool.activate("task1")
        torch.testing.assert_close(model(images), merged)
        assert not torch.equal(merged, by_adapter(random_state(pool, 1), images))  # the other method acts too


def test_a_merge_that_no_weight_can_hold_is_refused_before_anything_is_written(images):
    model, pool = model_with_pool(2)
    pool.activate("task0")
    before = model(images)
    layer = layers_of(model)["blocks.3.mlp.fc1"]
    layer._switched_off = True  # as inside of disable_part
    try:
        with pytest.raises(RecastConfigError, match="leave the block of disable_part"):
            pool.activate("task1", merge=True)
    finally:
        layer._switched_off = False
    assert pool.active == "task0"
    assert torch.equal(model(images), before)
    assert not layers_of(model)["blocks.0.attn.qkv"].merged


class TestAHeadThatWasActiveBefore:
    """The slot keeps its module for the next head like it; no verb takes it for that of a task without one."""

    @pytest.mark.parametrize("then", ["the base", "task0"])
    @pytest.mark.parametrize(
        "verb",
        [
            lambda model, x: model(x),
            lambda model, x: model.merge_adapter() or model(x),
            lambda model, x: model.set_adapter("first") or model.set_adapter("task_pool") or model(x),
            lambda model, x: model(x, adapter_names=["task_pool"] * len(x)),
            lambda model, x: copy.deepcopy(model).merge_and_unload()(x),
        ],
        ids=["call", "merge", "set_adapter", "adapter_names", "merge_and_unload"],
    )
    def test_is_not_that_of_what_is_active_now(self, images, verb, then):
        model, pool = model_with_pool(1)
        pool.add("classes", RecastConfig(num_classes=3, seed=1))
        pool.activate("classes")
        assert model(images).shape[-1] == 3
        if then == "task0":
            pool.activate("task0")
            expected = by_adapter(random_state(pool, 0), images)
        else:
            pool.deactivate()
            expected = small_vit()(images)
        torch.testing.assert_close(verb(model, images), expected)

    def test_comes_back_in_the_same_storage_and_goes_with_the_slot(self, images):
        model, pool = model_with_pool()
        pool.add("classes", RecastConfig(num_classes=3, seed=1))
        pool.activate("classes")
        head = model.get_base_model().head
        expected, module = model(images), head.modules_to_save[pool.slot]
        pool.deactivate()
        pool.activate("classes")
        assert head.modules_to_save[pool.slot] is module
        assert torch.equal(model(images), expected)
        pool.deactivate()
        model.delete_adapter(pool.slot)
        assert pool.slot not in head.modules_to_save


def empty_slot(**more: Any) -> tuple[PeftModel, TaskPool, torch.Tensor]:
    """A pool whose tasks have coefficients of weights and biases and a LoRA part; none is active."""
    model, x = with_tasks(partners=["bias"], **more)
    pool = pool_of(model)
    pool.deactivate()
    return model, pool, x


class TestTheSlotWithoutATask:
    """It costs what the model costs without tasks, and whoever writes a task into it is seen."""

    def test_computes_what_the_model_without_tasks_does(self):
        model, _, x = empty_slot()

        def operations() -> tuple[torch.Tensor, dict[str, int]]:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                out = answer(model, x)
            return out, {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")}

        out, found = operations()
        with model.disable_adapter():
            plain, expected = operations()
        assert torch.equal(out, plain)
        assert found == expected

    def test_where_gradients_are_recorded_it_learns(self):
        model, _, x = empty_slot()
        model.set_requires_grad("task_pool")
        with torch.enable_grad():
            answer(model, x).square().sum().backward()
        learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        for kind in ("recast_coefficients", "bias.modules_to_save"):
            assert any(kind in name for name in learned)

    @pytest.mark.parametrize("way", ["compile", "export", "trace"])
    def test_in_a_graph_it_is_no_other_than_with_a_task(self, way):
        model, pool, x = empty_slot()
        backbone, compiled = model.get_base_model(), CompileCounter()
        if way == "compile":
            graph = torch.compile(backbone, backend=compiled, fullgraph=True)
        elif way == "export":
            graph = torch.export.export(backbone, (x,)).module()
        else:
            graph = torch.jit.trace(backbone, x, check_trace=False)
        base = graph(x)
        for name in ("t0", None, "t1"):
            pool.deactivate() if name is None else pool.activate(name)
            torch.testing.assert_close(graph(x), answer(model, x), rtol=1e-4, atol=1e-5)
            assert torch.allclose(graph(x), base, atol=1e-3) == (name is None)
        assert compiled.frame_count == (way == "compile")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
    def test_in_a_captured_graph_it_is_no_other_than_with_a_task(self):
        model, pool, x = empty_slot()
        model.to("cuda")
        static = x.to("cuda")
        graph, out = captured(model, static)
        for name in ("t0", None, "t1"):
            pool.deactivate() if name is None else pool.activate(name)
            graph.replay()
            torch.testing.assert_close(out, answer(model, static))

    def test_that_another_one_writes_into_is_no_longer_without(self):
        model, pool, x = empty_slot()
        base = answer(model, x)
        state = {name: value + 0.2 for name, value in get_peft_model_state_dict(model, adapter_name=pool.slot).items()}
        set_peft_model_state_dict(model, state, adapter_name=pool.slot)
        changed = answer(model, x)
        assert not torch.allclose(changed, base, atol=1e-3)
        with torch.enable_grad():  # computes with whatever numbers there are
            torch.testing.assert_close(answer(model, x), changed)

    @pytest.mark.parametrize("assign", [False, True])
    def test_stays_as_the_pool_says_when_a_state_dict_is_loaded(self, assign):
        model, pool, x = empty_slot()
        base = answer(model, x)
        pool.activate("t0")
        state = copy.deepcopy(model.state_dict())
        for name in ("t1", None):
            pool.deactivate() if name is None else pool.activate(name)
            before = answer(model, x)
            model.load_state_dict(state, assign=assign)
            assert pool.active == name
            assert torch.equal(answer(model, x), before)
            assert torch.equal(before, base) == (name is None)

    def test_a_state_dict_with_another_classifier_in_it_is_loaded(self):
        model, pool, x = empty_slot()
        for classes in (3, 4):
            pool.add(f"of {classes}", RecastConfig(num_classes=classes))
        states = {}
        for name in ("t0", "of 3", "of 4", None):
            pool.deactivate() if name is None else pool.activate(name)
            states[name] = copy.deepcopy(model.state_dict())
        for name in states:
            pool.deactivate() if name is None else pool.activate(name)
            before = answer(model, x)
            for state in states.values():
                model.load_state_dict(state)
                assert torch.equal(answer(model, x), before)

    def test_is_left_by_its_copy_without_the_one_it_was_copied_from(self):
        model, pool, x = empty_slot()
        other_model, other = copy.deepcopy((model, pool))
        base = answer(model, x)
        other.activate("t0")
        pool.deactivate()
        changed = answer(other_model, x)
        assert not torch.allclose(changed, base, atol=1e-3)
        assert torch.equal(answer(model, x), base)
        other.deactivate()
        assert torch.equal(answer(other_model, x), base)
