"""What a call with a task for each sample is given, and what it refuses."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from models import move
from peft import LoraConfig, PeftModelForSequenceClassification, get_peft_model
from pools import TARGETS, TEXT_MODELS, TOKENS, model_with_pool, small_vit, text_model, tiny_pool

from recast_peft import RecastConfig, RecastConfigError, TaskPool, get_recast_model
from recast_peft.composition import mixed_batch


class TestMixedBatch:
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize(
        "fields",
        [{}, {"num_classes": 3}, {"lora_config": LoraConfig(r=2, target_modules=["fc1"])}, {"num_templates": 1}],
        ids=["coefficients", "classifier", "lora", "compressed"],
    )
    def test_of_no_sample_is_a_batch(self, fields, grad, images):
        model, pool = model_with_pool(2 if not fields else 0, **fields)
        pool.add("first", "first")
        with torch.set_grad_enabled(grad):
            for tasks in ({"task_ids": pool.ids([])}, {"task_ids": []}, {"adapter_names": []}):
                assert len(model(images[:0], **tasks)) == 0
                with pytest.raises(RecastConfigError, match="should be the same as the number of inputs, but got 0 and 2"):
                    model(images[:2], **tasks)

    def test_of_several_pools_is_given_arrays_or_refused(self, images):
        model, pool = model_with_pool(2)
        other = TaskPool(model, slot="other")
        other.add("first", "first")
        numbers = pool.ids(["task1", "task0"])
        for array, tasks in ((numbers.numpy(), numbers), (np.array(["first", "first"]), ["first", "first"])):
            assert torch.equal(model(images[:2], task_ids=array), model(images[:2], task_ids=tasks))
        for tasks in (5, iter([0, 1]), {"task1": 0}, [[0], [1]], np.array([True, False])):
            with pytest.raises(RecastConfigError, match="task_ids must be whole numbers of shape"):
                model(images[:2], task_ids=tasks)

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

    @pytest.mark.parametrize(
        "owned",
        [
            {"train_norms": True, "num_classes": 3},
            {"modules_to_save": ["blocks.1"]},
            {"modules_to_save": ["mlp.fc1"]},
            {"partners": ["adaptformer"]},
            {"partners": ["piggyback"]},
            {"lora_config": LoraConfig(r=2, target_modules=["fc1"])},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_whatever_the_active_task_owns(self, owned, images):
        model, pool = model_with_pool(2)
        names = ["task1", None, "task0"]
        model.base_model.set_adapter(pool.slot)
        expected = model(images[:3], task_ids=pool.ids(names))
        model.add_adapter("owner", RecastConfig(target_modules=TARGETS, **owned))
        model.set_adapter("owner")
        move(model)
        model.eval()
        assert not torch.allclose(model(images[:3])[0, :3], expected[0, :3], atol=1e-3)
        torch.testing.assert_close(model(images[:3], task_ids=pool.ids(names)), expected, rtol=1e-5, atol=1e-5)

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

    def test_of_a_class_of_its_own_that_would_swallow_task_ids(self):
        class Own(PeftModelForSequenceClassification):
            pass

        model = Own(text_model("SEQ_CLS"), RecastConfig(task_type="SEQ_CLS"), "first").eval()
        pool = TaskPool(model)
        pool.add("task")
        with pytest.raises(RecastConfigError, match=r"pool\.batch"):
            model(TOKENS, task_ids=pool.ids(["task", None]))


class TestMessages:
    def test_of_bad_tasks_of_a_call(self, tokens):
        pool = tiny_pool()
        pool.add("a")
        for tasks in (["a", 3], "aa", 3, torch.zeros(2), [[0, 0]], [2**70, 0]):
            with pytest.raises(RecastConfigError, match=r"task_ids must be .*pool\.ids"):
                pool.model(tokens, task_ids=tasks)
        with pytest.raises(RecastConfigError, match="in a list"):
            pool.ids("a")
        with pytest.raises(RecastConfigError, match="no task 'b'; it has 1: a"):
            pool.model(tokens, task_ids=["a", "b"])
        with pytest.raises(RecastConfigError, match="source is a int"):
            pool.add("b", 3)
