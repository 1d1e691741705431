"""transformers: its own adapter verbs, its auto classes, its models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from language_models import IDS, bert, call, gpt2, learn, llama, t5, vit
from models import layers_of, move, randomise, reference_model, seeded
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftModel,
    PeftModelForSequenceClassification,
    TaskType,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.integrations import peft as transformers_peft

from recast_peft import RecastBaseMismatchError, RecastConfig, RecastError, RecastLoadError, TaskPool, get_recast_model
from recast_peft.hub.task_files import task_sizes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore:Already found a `peft_config`")


def whisper() -> nn.Module:
    sides = {
        f"{side}_{size}": number
        for side in ("encoder", "decoder")
        for size, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    sizes = {"vocab_size": 20, "num_mel_bins": 8, "d_model": 16, "max_source_positions": 20, "max_target_positions": 20}
    config = WhisperConfig(**sides, **tokens, **sizes, suppress_tokens=[], begin_suppress_tokens=[])
    return seeded(lambda: WhisperForConditionalGeneration(config))


class TestModels:
    @pytest.mark.parametrize("task_type", [TaskType.SEQ_2_SEQ_LM, TaskType.FEATURE_EXTRACTION])
    def test_that_take_no_token_ids_are_called_with_what_they_take(self, task_type: TaskType) -> None:
        """PEFT's class for the task_type gives every model input_ids, which ends in two values for one argument."""
        generator = torch.Generator().manual_seed(0)
        inputs = {"input_features": torch.rand(2, 8, 40, generator=generator), "decoder_input_ids": IDS[:2]}
        plain = whisper()
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(task_type=task_type)).eval()
        start = call(plain, **inputs)
        assert torch.equal(call(model, **inputs), start)
        randomise(model)
        live = call(model, **inputs)
        assert not torch.allclose(live, start, atol=1e-4)
        mixed = call(model, **inputs, adapter_names=["default", "__base__"])
        torch.testing.assert_close(mixed, torch.stack([live[0], start[1]]))
        assert model(inputs["input_features"], labels=IDS[:2]).loss.requires_grad
        assert len(model.generate(inputs["input_features"], max_new_tokens=2, do_sample=False)) == 2

    @pytest.mark.parametrize(
        ("build", "inputs", "task_type"),
        [
            (bert, {"input_ids": IDS}, TaskType.SEQ_CLS),
            (llama, {"input_ids": IDS}, TaskType.CAUSAL_LM),
            (gpt2, {"input_ids": IDS}, TaskType.CAUSAL_LM),
            (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}, TaskType.SEQ_2_SEQ_LM),
            (vit, {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}, None),
        ],
        ids=["bert", "llama", "gpt2", "t5", "vit"],
    )
    def test_work_with_the_defaults_from_conversion_to_reload(
        self, build: Callable[[], nn.Module], inputs: dict[str, Tensor], task_type: TaskType | None, tmp_path: Path
    ) -> None:
        plain = build()
        start = call(plain, **inputs)
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(task_type=task_type)).eval()
        layers = layers_of(model)
        assert len(layers) % 2 == 0
        assert all(re.search("mlp|intermediate|output|DenseReluDense", name) for name in layers)
        assert not any("attention" in name for name in layers)
        assert torch.equal(call(model, **inputs), start)
        randomise(model)
        live = call(model, **inputs)
        torch.testing.assert_close(live, call(reference_model(plain, model), **inputs), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(live, start, atol=1e-3)
        model(**inputs).logits.float().square().sum().backward()
        assert all(layer.recast_coefficients["default"].grad.abs().sum() > 0 for layer in layers.values())
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert torch.equal(call(again, **inputs), live)
        model.merge_adapter()
        torch.testing.assert_close(call(model, **inputs), live, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(call(model, **inputs), live)

    def test_generate_the_same_and_with_a_task_for_each_sample(self) -> None:
        plain = llama()
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(task_type=TaskType.CAUSAL_LM), "first").eval()
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        start = plain.generate(IDS, **options)
        assert torch.equal(model.generate(input_ids=IDS, **options), start)
        model.add_adapter("second", RecastConfig(task_type=TaskType.CAUSAL_LM))
        expected = {"__base__": start}
        for seed, name in enumerate(("first", "second"), start=3):
            randomise(model, name, seed)
            model.set_adapter(name)
            expected[name] = model.generate(input_ids=IDS, **options)
        assert len({tuple(rows.flatten().tolist()) for rows in expected.values()}) == 3
        names = ["second", "__base__", "first", "second"]
        mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
        for i, name in enumerate(names):
            assert torch.equal(mixed[i], expected[name][i])

    @pytest.mark.parametrize("build", [llama, t5])
    def test_generate_with_beams_for_each_sample(self, build: Callable[[], nn.Module]) -> None:
        task_type = TaskType.CAUSAL_LM if build is llama else TaskType.SEQ_2_SEQ_LM
        model = get_recast_model(build(), RecastConfig(task_type=task_type), "first").eval()
        model.add_adapter("second", RecastConfig(task_type=task_type))
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
        expected = {}
        for seed, name in enumerate(("first", "second"), start=3):
            randomise(model, name, seed)
            model.set_adapter(name)
            expected[name] = model.generate(input_ids=IDS, **options)
        names = ["second", "first", "first", "second"]
        mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
        for i, name in enumerate(names):
            length = min(mixed.shape[1], expected[name].shape[1])
            assert torch.equal(mixed[i, :length], expected[name][i, :length])

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoint_their_activations_to_the_same_gradients(self, reentrant: bool) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = get_recast_model(llama(), RecastConfig(task_type=TaskType.CAUSAL_LM))
            randomise(model)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model(input_ids=IDS, labels=IDS).loss.backward()
            gradients.append([layer.recast_coefficients["default"].grad for layer in layers_of(model).values()])
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.abs().sum() > 0

    def test_with_tied_embeddings_refuse_them_as_a_target(self) -> None:
        with pytest.raises(RecastError, match="tied"):
            get_recast_model(gpt2(), RecastConfig(target_modules=["wte", "lm_head"]))


class TestAdapterVerbs:
    @pytest.fixture(autouse=True)
    def any_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A release of transformers may ask for a PEFT that is not out yet, and then refuses its own verbs."""
        monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0.21.0")

    def test_add_switch_and_disable(self) -> None:
        model = bert()
        start = call(model, input_ids=IDS)
        model.add_adapter(RecastConfig(target_modules=["query", "value"]), "first")
        assert torch.equal(call(model, input_ids=IDS), start)
        model.add_adapter(RecastConfig(target_modules=["query", "value"], group_size=1), "second")
        live = {}
        for seed, name in enumerate(("first", "second")):
            randomise(model, name, seed)
            model.set_adapter(name)
            assert model.active_adapters() == [name]
            live[name] = call(model, input_ids=IDS)
        assert not torch.equal(live["first"], live["second"])
        model.disable_adapters()
        assert torch.equal(call(model, input_ids=IDS), start)
        model.enable_adapters()
        assert torch.equal(call(model, input_ids=IDS), live["second"])
        model.set_adapter(["first", "second"])
        assert not torch.equal(call(model, input_ids=IDS), live["second"])
        model.delete_adapter("second")
        model.set_adapter("first")
        assert torch.equal(call(model, input_ids=IDS), live["first"])

    def test_switch_between_tasks_with_a_head_and_without(self) -> None:
        model = bert()
        start = call(model, input_ids=IDS)
        model.add_adapter(RecastConfig(target_modules=["query"], num_classes=3), "headed")
        model.add_adapter(RecastConfig(target_modules=["query"], num_classes=4), "other")
        model.add_adapter(RecastConfig(target_modules=["query"]), "plain")
        learn(model, "headed", 1)
        model.set_adapter("plain")
        assert torch.equal(call(model, input_ids=IDS), start)
        assert model.config.num_labels == 2
        for names in ("headed", ["plain", "headed"]):
            model.set_adapter(names)
            assert call(model, input_ids=IDS).shape == (4, 3)
            assert model.config.num_labels == 3
        with pytest.raises(RecastError, match="got headed, other, which have a module"):
            model.set_adapter(["headed", "other"])

    @pytest.mark.parametrize("sharing", [None, "roles"])
    def test_save_and_load(self, sharing: str | None, tmp_path: Path) -> None:
        model = bert()
        model.add_adapter(RecastConfig(target_modules=["query", "value"], coefficient_sharing=sharing))
        randomise(model)
        model.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        loaded = bert()
        loaded.load_adapter(str(tmp_path))
        assert torch.equal(call(loaded, input_ids=IDS), call(model, input_ids=IDS))
        via_peft = PeftModel.from_pretrained(bert(), tmp_path).eval()
        assert torch.equal(call(via_peft, input_ids=IDS), call(model, input_ids=IDS))

    def test_give_keys_as_PEFT_does(self, tmp_path: Path) -> None:
        """transformers puts PEFT's beginning before the keys of a state dict; a file that has it twice was written by 0.1."""
        config = RecastConfig(target_modules=["query", "value"], coefficient_sharing="roles")
        model = get_recast_model(bert(), config)
        randomise(model)
        inside = get_peft_model_state_dict(model.get_base_model())
        prefixed = {f"base_model.model.{key}": value for key, value in inside.items()}
        assert prefixed.keys() == get_peft_model_state_dict(model).keys()
        model.save_pretrained(tmp_path)
        expected = call(model.eval(), input_ids=IDS)
        twice = {f"base_model.model.{key}": value for key, value in prefixed.items()}
        for entries in (inside, prefixed, twice):
            save_file({key: value.clone() for key, value in entries.items()}, tmp_path / "adapter_model.safetensors")
            loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
            assert torch.equal(call(loaded, input_ids=IDS), expected)
            pool = TaskPool(get_recast_model(bert(), config).eval())
            pool.add("task", tmp_path)
            pool.add("given", entries)
            for name in pool:
                with pool.use(name):
                    torch.testing.assert_close(call(pool.model, input_ids=IDS), expected)
            assert task_sizes(tmp_path).coefficients == 2 * 2  # two layers, two templates, and values share those of queries

    def test_load_what_PEFT_saved_a_classifier_and_norms_with_the_coefficients(self, tmp_path: Path) -> None:
        model = get_recast_model(bert(), RecastConfig(target_modules=["query"], num_classes=5, train_norms=True)).eval()
        randomise(model)
        move(model, "modules_to_save", size=1.0)
        model.save_pretrained(tmp_path)
        loaded = bert()
        loaded.load_adapter(str(tmp_path), "task.of.mine")
        assert call(loaded, input_ids=IDS).shape == (len(IDS), 5)
        assert torch.equal(call(loaded, input_ids=IDS), call(model, input_ids=IDS))
        assert "_load_pretrained_model" not in vars(loaded)

    def test_load_all_of_a_task_or_nothing(self, tmp_path: Path) -> None:
        model = get_recast_model(bert(), RecastConfig(target_modules=["query"]))
        randomise(model)
        state = get_peft_model_state_dict(model)
        state.pop(next(iter(state)))
        model.save_pretrained(tmp_path)
        other = bert()
        start = call(other, input_ids=IDS)
        with pytest.raises(RecastLoadError, match="missing"):
            other.load_adapter(
                peft_config=RecastConfig.from_pretrained(str(tmp_path)), adapter_state_dict=state, adapter_name="mine"
            )
        assert not layers_of(other)
        assert torch.equal(call(other, input_ids=IDS), start)

    def test_refuse_the_wrong_base(self, tmp_path: Path) -> None:
        model = get_recast_model(bert(), RecastConfig(target_modules=["query"]))
        randomise(model)
        model.save_pretrained(tmp_path)
        other = bert(seed=1)
        start = call(other, input_ids=IDS)
        with pytest.raises(RecastBaseMismatchError, match="query"):
            other.load_adapter(str(tmp_path))
        assert not layers_of(other)
        assert torch.equal(call(other, input_ids=IDS), start)


class TestAutoClasses:
    def test_build_the_base_and_load_the_task(self, tmp_path: Path) -> None:
        bert().save_pretrained(tmp_path / "base")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = get_recast_model(base, RecastConfig(target_modules=["query"], task_type=TaskType.SEQ_CLS)).eval()
        assert isinstance(model, PeftModelForSequenceClassification)
        randomise(model)
        model.save_pretrained(tmp_path / "task")
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "task").eval()
        assert torch.equal(call(loaded, input_ids=IDS), call(model, input_ids=IDS))

    def test_of_transformers_take_a_task_s_folder_for_a_model(self, tmp_path: Path) -> None:
        bert().save_pretrained(tmp_path / "base")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = get_recast_model(base, RecastConfig(target_modules=["query"])).eval()
        randomise(model)
        model.save_pretrained(tmp_path / "task")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "task").eval()
        assert layers_of(loaded)
        assert torch.equal(call(loaded, input_ids=IDS), call(model, input_ids=IDS))


def test_the_classifier_of_a_timm_model_inside_a_transformers_model_is_found() -> None:
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=4)
    model = get_recast_model(TimmWrapperForImageClassification(config), RecastConfig(num_classes=3))
    assert "timm_model.fc" in {name.partition(".modules_to_save")[0] for name in heads_of(model)}
    assert model(torch.ones(1, 3, 160, 160)).logits.shape == (1, 3)


def heads_of(model: PeftModel) -> list[str]:
    return [name for name, _ in model.get_base_model().named_parameters() if ".modules_to_save." in name]
