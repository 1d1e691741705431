"""A bank that does not follow from the pretrained weights is stored once, and tasks know it by name and fingerprint."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fitted_models import FIELDS, X, fitted
from hub_server import HubServer
from models import outputs, randomise, tiny_vit
from peft import PeftModel
from safetensors.torch import load_file, save_file

from recast_peft import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastError,
    RecastLoadError,
    StoredBank,
    fit_bank,
    get_recast_model,
    load_bank,
)
from recast_peft.banks.files import BANK_CONFIG, BANK_WEIGHTS, StoredGroup, find_bank
from recast_peft.mimicry import Gradient
from recast_peft.storage.tensors import checksum

QUICK = Gradient(steps=5, progress=False)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[PeftModel, Path, Path]:
    """A model on a fitted bank, and the folders of its bank and its task."""
    model = fitted()
    model.save_bank(tmp_path / "bank")
    model.save_pretrained(tmp_path / "task")
    return model, tmp_path / "bank", tmp_path / "task"


class TestRoundTrip:
    def test_of_bank_and_task(self, stored: tuple[PeftModel, Path, Path]) -> None:
        model, bank, task = stored
        loaded = PeftModel.from_pretrained(tiny_vit(), task).eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))
        assert not torch.allclose(outputs(loaded, X), outputs(tiny_vit(), X))
        config = json.loads((task / "adapter_config.json").read_text())
        assert config["bank"] == {"name": str(bank), "fingerprint": load_bank(bank).fingerprint}
        assert config["mimicry"] == QUICK.to_dict()

    def test_a_task_stays_small(self, stored: tuple[PeftModel, Path, Path]) -> None:
        _, bank, task = stored
        assert sorted(p.name for p in bank.iterdir()) == [BANK_CONFIG, BANK_WEIGHTS]
        assert not (task / BANK_WEIGHTS).exists()

    def test_further_tasks_use_the_bank_of_the_model(self, stored: tuple[PeftModel, Path, Path]) -> None:
        model, bank, task = stored
        model.add_adapter("new", RecastConfig(**FIELDS))
        assert model.peft_config["new"].bank_reference["fingerprint"] == load_bank(bank).fingerprint
        assert model.load_adapter(task, "again") is not None
        model.set_adapter("again")
        assert len({id(layer) for layer in model.base_model.model.recast_banks.values()}) == 4

    def test_new_tasks_on_a_stored_bank(self, stored: tuple[PeftModel, Path, Path]) -> None:
        model, bank, _ = stored
        for given in (str(bank), load_bank(bank), {"name": str(bank), "fingerprint": load_bank(bank).fingerprint}):
            config = RecastConfig(bank=given)  # type: ignore[arg-type]
            fresh = get_recast_model(tiny_vit(), config).eval()
            with model.disable_adapter():
                assert torch.equal(outputs(fresh, X), outputs(model, X))

    def test_a_bank_beside_the_task_is_found(self, stored: tuple[PeftModel, Path, Path], tmp_path: Path) -> None:
        model, bank, task = stored
        shutil.copytree(task, tmp_path / "elsewhere")
        for file in bank.iterdir():
            shutil.move(file, tmp_path / "elsewhere" / file.name)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "elsewhere").eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))

    def test_merging_gives_a_plain_model(self, stored: tuple[PeftModel, Path, Path]) -> None:
        model = stored[0]
        before = outputs(model, X)
        plain = model.merge_and_unload()
        assert not any("recast" in name for name, _ in plain.named_modules())
        torch.testing.assert_close(outputs(plain, X), before)

    def test_through_the_hub(self, stored: tuple[PeftModel, Path, Path], hub: HubServer) -> None:
        model, bank, _ = stored
        pushed = model.push_bank_to_hub("ada/bank", base_model="timm/some-vit", license="mit")
        assert pushed.name == "ada/bank"
        files = hub.repositories["ada/bank"].find("main").files
        assert {BANK_CONFIG, BANK_WEIGHTS, "README.md"} <= set(files)
        assert b"timm/some-vit" in files["README.md"]
        assert load_bank("ada/bank").fingerprint == load_bank(bank).fingerprint
        model.save_pretrained(bank.parent / "task2")
        loaded = PeftModel.from_pretrained(tiny_vit(), bank.parent / "task2").eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))

    def test_in_bfloat16_it_is_the_same_bank(self, stored: tuple[PeftModel, Path, Path], tmp_path: Path) -> None:
        model, bank, task = stored
        half = copy.deepcopy(model).to(torch.bfloat16)
        half.save_bank(tmp_path / "half")
        with pytest.warns(UserWarning, match="were rounded"):  # their fingerprint is that of the others
            rounded = load_bank(tmp_path / "half")
        assert rounded.fingerprint == load_bank(bank).fingerprint
        config = RecastConfig.from_pretrained(task)
        config.bank = rounded
        loaded = PeftModel.from_pretrained(tiny_vit(), task, config=config).eval()
        torch.testing.assert_close(outputs(loaded, X), outputs(model, X), rtol=0.05, atol=0.05)


class TestRefusal:
    def test_of_a_task_whose_bank_is_gone(self, stored: tuple[PeftModel, Path, Path]) -> None:
        model, bank, task = stored
        plain = tiny_vit()
        moved = bank.rename(bank.parent / "moved")
        with pytest.raises(
            RecastBankError,
            match=r"needs the template bank .*bank.* load_bank\(folder_or_repository\)".replace(" load", "[\\s\\S]*load"),
        ):
            PeftModel.from_pretrained(plain, task)
        assert not any("recast" in key for key in plain.state_dict())
        config = RecastConfig.from_pretrained(task)
        config.bank = load_bank(moved)
        loaded = PeftModel.from_pretrained(plain, task, config=config).eval()
        assert torch.equal(outputs(loaded, X), outputs(model, X))

    def test_of_a_task_on_another_bank(self, stored: tuple[PeftModel, Path, Path], tmp_path: Path) -> None:
        _, bank, task = stored
        other = fitted(seed=1)
        with pytest.raises(RecastBankError, match="another template bank than that of the model"):
            other.load_adapter(task, "second")
        assert list(other.peft_config) == ["default"]
        config = RecastConfig.from_pretrained(task)
        config.bank = other.save_bank(tmp_path / "other")
        plain = tiny_vit()
        with pytest.raises(RecastBankError, match="made on another template bank"):
            PeftModel.from_pretrained(plain, task, config=config)
        assert not any("recast" in key for key in plain.state_dict())
        shutil.rmtree(bank)
        shutil.copytree(tmp_path / "other", bank)
        with pytest.raises(RecastBankError, match="holds"):
            PeftModel.from_pretrained(tiny_vit(), task)

    def test_of_a_task_of_exact_banks_on_fitted_ones(self, tmp_path: Path) -> None:
        exact = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]))
        randomise(exact)
        exact.save_pretrained(tmp_path / "exact")
        model = fitted(target_modules=["qkv"], num_templates=None)
        with pytest.raises(RecastBankError, match="does not share"):
            model.load_adapter(tmp_path / "exact", "second")

    def test_of_a_bank_for_other_pretrained_weights(self, stored: tuple[PeftModel, Path, Path]) -> None:
        plain = tiny_vit(seed=5)
        with pytest.raises(RecastBaseMismatchError, match="made for other pretrained weights"):
            get_recast_model(plain, RecastConfig(bank=str(stored[1])))
        assert not any("recast" in key for key in plain.state_dict())

    def test_of_a_bank_for_another_architecture(self, stored: tuple[PeftModel, Path, Path]) -> None:
        with pytest.raises(RecastBankError, match="does not fit group"):
            get_recast_model(tiny_vit(width=16), RecastConfig(bank=str(stored[1])))

    def test_of_banks_that_follow_from_the_base(self, tmp_path: Path) -> None:
        with pytest.raises(RecastBankError, match="nothing to store"):
            get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"])).save_bank(tmp_path)
        with pytest.raises(RecastBankError, match="nothing to store"):
            fit_bank(tiny_vit(), RecastConfig(target_modules=["qkv"]))
        with pytest.raises(RecastBankError, match="nothing to store"):
            fit_bank(tiny_vit(), RecastConfig(target_modules=["qkv"], num_directions=2))

    def test_of_a_converted_model_by_fit_bank(self) -> None:
        with pytest.raises(RecastConfigError, match="converted already"):
            fit_bank(fitted(), RecastConfig(**FIELDS))

    def test_of_a_damaged_file(self, stored: tuple[PeftModel, Path, Path]) -> None:
        _, bank, _ = stored
        raw = bytearray((bank / BANK_WEIGHTS).read_bytes())
        raw[-3] ^= 1
        (bank / BANK_WEIGHTS).write_bytes(raw)
        with pytest.raises(RecastLoadError, match="damaged"):
            load_bank(bank)
        (bank / BANK_WEIGHTS).write_bytes(raw[:40])
        with pytest.raises(RecastLoadError, match="damaged or incomplete"):
            load_bank(bank)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 99}, "another format"),
            ({"groups": {"a": {"kind": "tied", "members": ["x"], "templates": 1}}}, "kind 'tied'"),
            ({"groups": {"a": {"kind": "dense", "members": [], "templates": 1}}}, "has the members"),
            ({"groups": {"a": {"kind": "dense", "members": ["x"], "templates": 1}}}, "lacks a.templates"),
            ({"groups": {}}, "of which its groups do not speak"),
            ({"groups": []}, "'groups' of .* expected an object"),
            ({"version": "1"}, "'version' of"),
            ({"base_fingerprint": {"x": 3}}, "'base_fingerprint' of"),
            ({"base_fingerprint": {}}, "does not say which pretrained weight blocks.0.* stands for"),
            ({"mimicry": 3}, "'mimicry' of"),
            ({"history": [3]}, "'history' of"),
            ({"content": "0" * 16}, "is not what recast_bank.json says"),
            ({"fingerprint": "0" * 16}, "is not the bank that it says it is"),
        ],
    )
    def test_of_a_header_that_misstates(self, stored: tuple[PeftModel, Path, Path], change: dict, message: str) -> None:
        path = stored[1] / BANK_CONFIG
        header = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps(header))
        with pytest.raises(RecastLoadError, match="another format" if "format" in change else "is damaged: it is not what was"):
            load_bank(stored[1])
        del header["checksum"]  # as in files of earlier versions
        path.write_text(json.dumps(header))
        with pytest.raises(RecastLoadError, match=message):
            load_bank(stored[1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t * -3, "is not the bank that it says it is"),
            (lambda t: t * float("nan"), "infinity or NaN"),
            (lambda t: torch.cat([t, t], 1), "another shape|is not the bank that it says it is"),
            (lambda t: torch.cat([t, t], 0), "another shape"),
            (lambda t: t.to(torch.int8), "int8"),
            (lambda t: t[:0], "another shape|has shape"),
            (lambda t: t.reshape(-1), "another shape|has shape"),
        ],
    )
    @pytest.mark.parametrize("part", ["templates", "base"])
    def test_of_other_tensors_under_the_same_fingerprint(
        self, stored: tuple[PeftModel, Path, Path], part: str, change: Any, message: str
    ) -> None:
        tensors = load_file(stored[1] / BANK_WEIGHTS)
        key = next(key for key in tensors if key.endswith(f".{part}"))
        tensors[key] = change(tensors[key]).contiguous()
        rewrite(stored[1], tensors)
        plain = tiny_vit()
        before = [(name, id(module)) for name, module in plain.named_modules()]
        with pytest.raises(RecastLoadError, match=message):
            load_bank(stored[1])
        with pytest.raises(RecastLoadError):
            PeftModel.from_pretrained(plain, stored[2])
        assert [(name, id(module)) for name, module in plain.named_modules()] == before
        assert all(
            torch.equal(a, b) for a, b in zip(plain.state_dict().values(), tiny_vit().state_dict().values(), strict=True)
        )

    def test_of_templates_that_were_swapped_between_groups(self, stored: tuple[PeftModel, Path, Path]) -> None:
        tensors = load_file(stored[1] / BANK_WEIGHTS)
        first, second = [key for key in tensors if key.endswith(".templates") and "qkv" in key][:2]
        tensors[first], tensors[second] = tensors[second], tensors[first]
        rewrite(stored[1], tensors)
        with pytest.raises(RecastLoadError, match="is not the bank that it says it is"):
            load_bank(stored[1])

    @pytest.mark.parametrize("bank", [3, {}, {"path": "x"}, {"name": 3}])
    def test_of_what_is_no_bank(self, bank: object) -> None:
        with pytest.raises(RecastConfigError, match="bank="):
            RecastConfig(bank=bank)  # type: ignore[arg-type]

    def test_saving_a_task_before_its_bank_warns(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="save_bank"):
            fitted().save_pretrained(tmp_path)


class TestNames:
    """A task's file may have been written by anybody: the bank that it names is not read from anywhere."""

    def renamed(self, task: Path, name: str) -> None:
        path = task / "adapter_config.json"
        config = json.loads(path.read_text())
        config["bank"]["name"] = name
        path.write_text(json.dumps(config))

    @pytest.mark.parametrize("how", ["absolute", "up", "link"])
    def test_a_path_that_leads_elsewhere_is_not_followed(
        self, stored: tuple[PeftModel, Path, Path], how: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret"
        shutil.move(stored[1], elsewhere)
        (stored[2] / "link").symlink_to(elsewhere)
        up = f"../../{elsewhere.relative_to(elsewhere.parents[1])}"
        assert (stored[2] / up).is_dir()
        self.renamed(stored[2], {"absolute": str(elsewhere), "up": up, "link": "link"}[how])
        with pytest.raises(RecastBankError, match="stay in their folder(.|\n)*load_bank"):
            PeftModel.from_pretrained(tiny_vit(), stored[2])

    def test_a_folder_of_the_working_directory_is_none(
        self, stored: tuple[PeftModel, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "work" / "a").mkdir(parents=True)
        shutil.move(stored[1], tmp_path / "work" / "a" / "bank")
        monkeypatch.chdir(tmp_path / "work")
        self.renamed(stored[2], "a/bank")
        with pytest.raises(RecastBankError, match="not at hand(.|\n)*no 'bank' beside it or the folder above: lay it there"):
            PeftModel.from_pretrained(tiny_vit(), stored[2])

    def test_a_task_and_its_bank_move_together(self, stored: tuple[PeftModel, Path, Path], tmp_path: Path) -> None:
        for number, place in enumerate(("task", "tasks/one", "task")):
            new = tmp_path / f"new{number}"
            shutil.copytree(stored[2], new / place)
            shutil.copytree(stored[1], new / "task" / "bank" if number == 2 else new / "bank")
        self.renamed(tmp_path / "new2" / "task", "bank")
        shutil.rmtree(stored[1])
        for place in ("new0/task", "new1/tasks/one", "new2/task"):
            loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / place).eval()
            assert torch.equal(outputs(loaded, X), outputs(stored[0], X))

    def test_a_path_that_the_caller_gives_is_followed(self, stored: tuple[PeftModel, Path, Path], tmp_path: Path) -> None:
        (tmp_path / "far").mkdir()
        shutil.move(stored[1], tmp_path / "far" / "away")
        assert get_recast_model(tiny_vit(), RecastConfig(bank=str(tmp_path / "far" / "away"))) is not None


class TestWriting:
    def test_a_bank_is_replaced_in_one_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = (fit_bank(tiny_vit(), RecastConfig(**FIELDS, mimicry=Gradient(steps=5, seed=s))) for s in (0, 1))
        first.save(tmp_path)

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("recast_peft.banks.files.write_json", killed)
            with pytest.raises(KeyboardInterrupt):
                second.save(tmp_path)
        # the JSON beside it is still that of the first one
        assert json.loads((tmp_path / BANK_CONFIG).read_text())["fingerprint"] == first.fingerprint
        assert load_bank(tmp_path).fingerprint == second.fingerprint != first.fingerprint

    def test_another_format_without_a_header_beside_it_is_refused(
        self, stored: tuple[PeftModel, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bank = load_bank(stored[1])
        with monkeypatch.context() as patch:
            patch.setattr("recast_peft.banks.files.FORMAT", 99)
            bank.save(tmp_path / "new")
        (tmp_path / "new" / BANK_CONFIG).unlink()
        with pytest.raises(RecastLoadError, match=r"another format\n  format of the file: 99"):
            load_bank(tmp_path / "new")

    def test_files_of_earlier_versions_are_read(self, stored: tuple[PeftModel, Path, Path]) -> None:
        before = load_bank(stored[1])
        rewrite(stored[1], load_file(stored[1] / BANK_WEIGHTS))
        again = load_bank(stored[1])
        assert (again.fingerprint, again.groups.keys()) == (before.fingerprint, before.groups.keys())


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a bank file as earlier versions did: without checksums, the header in the JSON alone."""
    save_file(tensors, folder / BANK_WEIGHTS, metadata={"format": "pt"})
    header = json.loads((folder / BANK_CONFIG).read_text())
    for key in ("checksum", "rounded"):
        del header[key]
    (folder / BANK_CONFIG).write_text(json.dumps({**header, "content": checksum(tensors)}))


class TestStoredBank:
    def test_shows_what_it_is_and_no_tensors(self) -> None:
        bank = StoredBank({"g": StoredGroup(("a", "b"), torch.ones(1, 2, 2), torch.ones(2, 1))}, name="x", fingerprint="f")
        assert repr(bank) == "StoredBank(groups=1, dense; name='x', version=1, fingerprint='f')"

    def test_fingerprint_tells_contents_apart_and_ignores_the_name(self) -> None:
        group = StoredGroup(("a", "b"), torch.ones(1, 2, 2), torch.ones(2, 1))
        other = StoredGroup(("a", "b"), torch.ones(1, 2, 2) * 1.001, torch.ones(2, 1))
        one = StoredBank({"g": group}).fingerprint
        assert StoredBank({"g": group}, name="x").fingerprint == one
        assert StoredBank({"g": other}).fingerprint != one

    def test_a_config_does_not_copy_it(self) -> None:
        bank = StoredBank({"g": StoredGroup(("a", "b"), torch.ones(1, 2, 2), torch.ones(2, 1))})
        config = RecastConfig(bank=bank)
        assert copy.deepcopy(config).bank is bank
        assert config.to_dict()["bank"] == bank.reference


@pytest.mark.parametrize("name", ["x" * 50_000, "a/" * 5000 + "b", "nul\0"])
def test_a_name_that_no_file_has_is_no_bank(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecastError, match="no template bank at|expected a path"):
        load_bank(name)
    with pytest.raises(RecastBankError):
        find_bank({"name": name, "fingerprint": "0" * 16}, str(tmp_path))
