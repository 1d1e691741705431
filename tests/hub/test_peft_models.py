"""What PEFT's model classes do beside with tasks of this library."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from models import converted, outputs, randomise, small_transformer, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model

from recast_peft import AdaptFormerConfig, RecastConfig, RecastConfigError, RecastLoadError, TaskPool, get_recast_model

CONFIG = RecastConfig(target_modules=["qkv"], init_weights=False)


class TestTheFolderOfTasks:
    def test_is_taken_for_its_only_task(self, tmp_path: Path) -> None:
        saved = get_recast_model(tiny_vit(), CONFIG, "cars")
        saved.save_pretrained(tmp_path)
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "other")
        model.load_adapter(tmp_path, "again")
        model.set_adapter("again")
        assert torch.equal(model(vit_input()), saved(vit_input()))

    def test_of_several_says_which_there_are(self, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), CONFIG, "cars")
        model.add_adapter("birds", CONFIG)
        model.save_pretrained(tmp_path)
        with pytest.raises(RecastLoadError, match="holds 2 tasks, in birds, cars: say which one with subfolder="):
            model.load_adapter(tmp_path, "again")
        model.load_adapter(tmp_path, "again", subfolder="birds")
        (tmp_path / "empty").mkdir()
        with pytest.raises(RecastLoadError, match="empty holds no task"):
            model.load_adapter(tmp_path / "empty", "more")
        assert list(model.peft_config) == ["cars", "birds", "again"]


OTHER_TYPE = r"given: +peft_type=.*\n +expected: 'RECAST'"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"peft_type": null}', OTHER_TYPE),
        (b"{}", OTHER_TYPE),
        (b'{"peft_type": ["RECAST"]}', OTHER_TYPE),
        (b'{"peft_type": "' + b"x" * 10_000 + b'"}', OTHER_TYPE),
        (b'["x"]', "a JSON object"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("from_the_hub", [True, False])
def test_what_is_no_config_of_peft_is_told(
    hub: HubServer, tmp_path: Path, content: bytes, expected: str, from_the_hub: bool
) -> None:
    hub.add("ada/odd", {"adapter_config.json": content})
    (tmp_path / "adapter_config.json").write_bytes(content)
    model = get_recast_model(tiny_vit(), CONFIG, "cars")
    for name in ("other", "cars"):
        with pytest.raises(RecastConfigError, match=expected) as caught:
            model.load_adapter("ada/odd" if from_the_hub else tmp_path, name)
        assert len(str(caught.value)) < 1000
    assert list(model.peft_config) == ["cars"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_classes", [3, 4]),
        ("partners", [["adaptformer"], None]),
        ("modules_to_save", [["blocks.0.mlp"], None]),
        ("results", [{"accuracy": 0.5}, {"accuracy": 0.25}]),
    ],
)
def test_a_config_is_used_again_with_another_value(tmp_path: Path, field: str, values: list[Any]) -> None:
    config = RecastConfig(target_modules=["qkv"], init_weights=False)
    model, expected = get_recast_model(tiny_vit(), CONFIG, "first"), {}
    for name, value in zip(("cars", "birds"), values, strict=True):
        setattr(config, field, value)
        model.add_adapter(name, config)
        model.set_adapter(name)
        expected[name] = model.eval()(vit_input())
    model.save_pretrained(tmp_path)
    for name, value in zip(("cars", "birds"), values, strict=True):
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / name).eval()
        assert torch.equal(loaded(vit_input()), expected[name])
        if field == "results":
            assert loaded.peft_config["default"].results == value


def test_what_is_trained_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    config = RecastConfig(target_modules=["qkv"], num_classes=5, train_norms=True, head_module="head")
    model = get_recast_model(tiny_vit(), config, "cars")
    model.add_adapter("birds", RecastConfig(target_modules=["qkv"], num_classes=3, head_module="head"))
    model.print_trainable_parameters()
    shown = capsys.readouterr().out
    # 4 layers in groups of two; 5 classes of 8 features with biases; 8 scales and 8 shifts in each of 4 norms
    assert "of these: coefficients: 8 || classifier: 45 || others: 64\n" in shown


def test_nothing_that_is_trained_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_recast_model(tiny_vit(), CONFIG, "cars")
    model.requires_grad_(False)
    model.print_trainable_parameters()
    assert "of these: none" in capsys.readouterr().out


def test_a_task_may_have_any_name_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_recast_model(tiny_vit(), CONFIG, "cast")
        model.add_adapter("t", CONFIG)
    assert list(model.peft_config) == ["cast", "t"]


@pytest.mark.parametrize("given", [("task", {"num_classes": 3}), ("task", "folder/task"), (RecastConfig(), "task")])
def test_what_is_no_config_is_refused(given):
    model = converted()
    with pytest.raises(RecastConfigError, match=r"add_adapter\(.*expected a name and a RecastConfig"):
        model.add_adapter(*given)
    assert list(model.peft_config) == ["default"]


def test_a_keyword_that_load_adapter_does_not_have_is_told(tmp_path: Path) -> None:
    model = converted()
    model.save_pretrained(tmp_path)
    with pytest.raises(RecastConfigError, match=r"is_trainble=True\): there is no such argument; did you mean 'is_trainable'"):
        model.load_adapter(tmp_path, "second", is_trainble=True)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path, "second", is_trainable=True, local_files_only=True, offload_dir=None, token=None)  # PEFT's


class TestLoadingOverATask:
    """PEFT reads the numbers alone, and leaves what the file's config says of them."""

    OTHERS = (
        ("lora_config", {"lora_config": LoraConfig(r=1, lora_alpha=2)}, {"lora_config": LoraConfig(r=1, lora_alpha=20)}),
        (
            "lora_config",
            {"lora_config": LoraConfig(r=1, alpha_pattern={"qkv": 2})},
            {"lora_config": LoraConfig(r=1, alpha_pattern={"qkv": 20})},
        ),
        ("partners", {"partners": [AdaptFormerConfig(scale=0.1)]}, {"partners": [AdaptFormerConfig(scale=1.0)]}),
        ("coefficient_sharing", {}, {"coefficient_sharing": 2}),
        ("groups", {"group_size": 4}, {"group_size": 2}),
    )

    @pytest.mark.parametrize(("field", "own", "other"), OTHERS)
    def test_takes_no_numbers_that_would_mean_something_else(self, field: str, own: dict, other: dict, tmp_path: Path) -> None:
        stored = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], init_weights=False, **other), "cars")
        stored.save_pretrained(tmp_path)
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **own), "cars").eval()
        before = outputs(model, vit_input())
        with pytest.raises(RecastConfigError, match=f"{field} differs"):
            model.load_adapter(tmp_path / "cars", "cars")
        assert torch.equal(outputs(model, vit_input()), before)

    def test_of_the_same_kind_takes_its_names_of_classes_too(self, tmp_path: Path) -> None:
        def tagged(*names: str) -> torch.nn.Module:
            labels = dict(enumerate(names))
            return get_recast_model(small_transformer("bert"), RecastConfig(num_classes=2, id2label=labels), "tags")

        tagged("cat", "dog").save_pretrained(tmp_path)
        model = tagged("no", "yes")
        model.load_adapter(tmp_path / "tags", "tags")
        assert model.config.id2label == {0: "cat", 1: "dog"}
        model.save_pretrained(tmp_path / "again")
        assert RecastConfig.from_pretrained(tmp_path / "again" / "tags").id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("first", [True, False], ids=["safetensors first", "pickle first"])
def test_numbers_of_an_earlier_format_are_not_taken_for_the_new_ones(first: bool, tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), CONFIG, "cars").eval()
    model.add_adapter("birds", CONFIG)
    model.save_pretrained(tmp_path, safe_serialization=first)
    randomise(model, "cars", seed=3)
    model.save_pretrained(tmp_path, safe_serialization=not first, selected_adapters=["cars"])
    for name in ("cars", "birds"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / name).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))


def test_tasks_do_not_take_each_others_folder_where_names_differ_in_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_recast_model(tiny_vit(), CONFIG, "Cat")
    model.add_adapter("cat", CONFIG)
    model.save_pretrained(tmp_path / "told apart")
    assert (tmp_path / "told apart" / "Cat").is_dir()
    assert (tmp_path / "told apart" / "cat").is_dir()
    mkdir = Path.mkdir

    def as_other_systems_do(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.parent.is_dir() and path.name.lower() in {other.name.lower() for other in path.parent.iterdir()}:
            raise FileExistsError(path)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", as_other_systems_do)
    with pytest.raises(RecastConfigError, match="task 'cat' would lie in the folder of another one"):
        model.save_pretrained(tmp_path / "new")
    assert not [file for file in (tmp_path / "new").rglob("*") if file.is_file()]


@pytest.mark.parametrize("leads_to", ["first", "."])
def test_tasks_whose_folders_a_link_makes_one_are_not_saved_over_each_other(leads_to: str, tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "first")
    model.save_pretrained(tmp_path)
    (tmp_path / "second").symlink_to(leads_to)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    randomise(model)
    for name in ("second", "default"):
        model.add_adapter(name, RecastConfig(target_modules=["qkv"]))
    with pytest.raises(RecastConfigError, match="task 'second' .*a link leads from there to the folder of task"):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("lies_there", ["a file", "another task"])
def test_no_task_is_saved_where_one_of_them_cannot_be(lies_there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_recast_model(tiny_vit(), CONFIG)
    model.add_adapter("cars", CONFIG)
    if lies_there == "a file":
        (tmp_path / "cars").write_text("mine")
    else:  # as macOS and Windows take "Cars" for "cars"
        model.save_pretrained(tmp_path, selected_adapters=["cars"])
        names = os.listdir
        monkeypatch.setattr(os, "listdir", lambda folder: [name.replace("cars", "Cars") for name in names(folder)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    randomise(model, "cars", seed=3)
    with pytest.raises(RecastConfigError, match="task 'cars' cannot be saved to .*of its own"):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class TestNames:
    @pytest.mark.parametrize("names", [["cars", 1], [None], 1])
    def test_that_are_no_texts_are_not_saved(self, names: Any, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), CONFIG, "cars")
        with pytest.raises(RecastConfigError, match="selected_adapters: expected the name of a task, or a list of names, got"):
            model.save_pretrained(tmp_path / "new", selected_adapters=names)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("name", ["", "typo"])
    def test_that_no_task_has_are_refused_as_in_peft(self, name: str, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), CONFIG, "cars")
        with pytest.raises(ValueError, match=r"invalid `selected_adapters` .* are \['cars'\]"):
            model.save_pretrained(tmp_path / "new", selected_adapters=[name])
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("name", [None, 1, b"a"])
    def test_of_new_tasks_are_texts(self, name: Any) -> None:
        model = get_recast_model(tiny_vit(), CONFIG, "cars")
        with pytest.raises(RecastConfigError, match="adapter_name=.* expected a name"):
            model.add_adapter(name, CONFIG)
        assert [*model.peft_config] == ["cars"]


class TestAModelWhoseTasksWereAllDeleted:
    @pytest.fixture(params=[True, False], ids=["PEFT's", "ours"])
    def model(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
        model = get_recast_model(tiny_vit(), CONFIG, "cars").eval()
        if request.param:
            folder = tmp_path_factory.mktemp("tasks")
            model.save_pretrained(folder)
            model = PeftModel.from_pretrained(tiny_vit(), folder / "cars", "cars")
        model.delete_adapter("cars")
        return model

    def test_is_the_pretrained_model(self, model: PeftModel) -> None:
        plain = outputs(tiny_vit().eval(), vit_input())
        assert torch.equal(outputs(model, vit_input()), plain)
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), plain)
        assert torch.equal(model(vit_input(), adapter_names=["__base__"] * len(vit_input())), plain)
        assert model.active_adapters == []
        assert not any("recast_coefficients" in name for name in model.state_dict())
        assert model.get_nb_trainable_parameters()[0] == 0
        assert model.get_base_model() is model.base_model.model
        model.merge_adapter()
        assert torch.equal(outputs(model.merge_and_unload(), vit_input()), plain)

    def test_says_that_there_is_no_task(self, model: PeftModel, tmp_path: Path) -> None:
        with pytest.raises(RecastConfigError, match="the model has no task to save: add one"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        with pytest.raises(RecastConfigError, match=r"like=None: the model has the tasks \(none\)"):
            TaskPool(model)
        with pytest.raises(RecastConfigError, match="has no RECAST task None; its tasks: none"):
            model.save_bank(tmp_path)

    @pytest.mark.parametrize("is_loaded", [False, True], ids=["added", "loaded"])
    def test_the_next_task_is_active(self, model: PeftModel, is_loaded: bool, tmp_path: Path) -> None:
        saved = get_recast_model(tiny_vit(), CONFIG, "birds").eval()
        saved.save_pretrained(tmp_path)
        if is_loaded:
            model.load_adapter(tmp_path, "birds")
        else:
            model.add_adapter("birds", CONFIG)
        assert (model.active_adapter, model.active_adapters) == ("birds", ["birds"])
        # 4 layers in groups of two
        assert model.get_nb_trainable_parameters()[0] == (0 if is_loaded else 8)
        assert torch.equal(outputs(model, vit_input()), outputs(saved, vit_input()))


LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["fc1"], init_lora_weights=False)


@pytest.mark.parametrize(
    ("fields", "other", "differs"),
    [
        ({}, {"lora_alpha": 8}, "lora_config"),
        ({"partners": [AdaptFormerConfig(scale=0.1)]}, {"partners": [AdaptFormerConfig(scale=0.5)]}, "partners"),
    ],
    ids=["LoRA", "partner"],
)
def test_a_task_that_computes_otherwise_takes_no_place_in_a_model_of_pefts_own_either(
    fields: dict[str, Any], other: dict[str, Any], differs: str, tmp_path: Path
) -> None:
    """PEFT reads the numbers alone; they would act as those of the task that was there."""
    for name, own in {"one": fields, "two": other}.items():
        part = replace(LORA, lora_alpha=own.get("lora_alpha", 4))
        config = RecastConfig(target_modules=["qkv"], lora_config=part, partners=own.get("partners"))
        model = get_recast_model(tiny_vit(), config)
        randomise(model)
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "one").eval()
    before = outputs(loaded, vit_input())
    with pytest.raises(RecastConfigError, match=f"cannot take the place of 'default': {differs} differs"):
        loaded.load_adapter(tmp_path / "two", "default")
    assert torch.equal(outputs(loaded, vit_input()), before)
    loaded.load_adapter(tmp_path / "one", "default")
    made = get_peft_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_classes=None), "own")
    made.load_adapter(tmp_path / "one", "default")
    with pytest.raises(RecastConfigError, match=f"{differs} differs"):
        made.load_adapter(tmp_path / "two", "default")


def test_peft_s_own_model_without_any_task_is_the_pretrained_one(tmp_path: Path) -> None:
    saved = get_recast_model(tiny_vit(), CONFIG, "cars")
    saved.save_pretrained(tmp_path)
    model = get_peft_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "first")
    model.delete_adapter("first")
    assert type(model) is PeftModel
    plain = outputs(tiny_vit(), vit_input())
    assert torch.equal(outputs(model, vit_input()), plain)
    with model.disable_adapter():
        assert torch.equal(outputs(model, vit_input()), plain)
    with pytest.raises(KeyError, match="'first': activate one of second with"):
        model.add_adapter("second", RecastConfig(target_modules=["qkv"]))
        model(vit_input())
    model.delete_adapter("second")
    model.load_adapter(tmp_path / "cars", "cars")
    model.set_adapter("cars")
    assert torch.equal(outputs(model, vit_input()), outputs(saved, vit_input()))
