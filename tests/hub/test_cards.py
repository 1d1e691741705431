"""The card of a saved task: what it counts, links and shows, and what of it stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from hub_tasks import files_of, learn, make_backbone, make_model, metadata, output
from peft import PeftModel
from torch import nn
from transformers import ViTForImageClassification

from recast_peft import (
    ReadoutConfig,
    RecastConfig,
    RecastConfigError,
    RecastLayer,
    RecastLoadError,
    get_recast_model,
    push_bank_to_hub,
    push_task_to_hub,
    push_tasks_to_hub,
    readout_bank,
    write_model_card,
)


class TestTheCard:
    def save(self, folder: Path, **fields: Any) -> str:
        config = RecastConfig(**fields)
        model = make_model("default", config=config)
        model.save_pretrained(folder)
        return (folder / "README.md").read_text()

    def test_counts_what_the_file_holds(self, tmp_path: Path) -> None:
        # 4 blocks, both feed-forward layers, each in 2 groups of 2: 2 roles x 4 layers x 2 templates
        card = self.save(tmp_path / "flowers", modules_to_save=["classifier"])
        head = 5 * 16 + 5
        size = (tmp_path / "flowers" / "adapter_model.safetensors").stat().st_size
        assert f"| Numbers trained | {16 + head} (16 coefficients) |" in card
        assert f"| Size | {size:,} bytes" in card
        assert "| Targets | 8 modules in 4 banks:" in card
        assert "exact" in card

    def test_says_what_the_numbers_stand_between(self, tmp_path: Path) -> None:
        assert ": 32 numbers between 2 main directions of weights of " in self.save(tmp_path, num_directions=2)

    def test_tells_the_banks_of_a_readout_and_of_biases_apart(self, tmp_path: Path) -> None:
        bank = readout_bank(make_backbone().eval(), torch.randn(8, 3, 16, 16))
        bank = bank.save(tmp_path / "bank")
        card = self.save(tmp_path, num_classes=3, partners=[ReadoutConfig(bank=bank)])
        assert f"| Bank of the readout | `{tmp_path / 'bank'}`, fingerprint {bank.fingerprint} |" in card
        assert "Bank of biases" not in card

    def test_takes_results_as_a_config_does(self, tmp_path: Path) -> None:
        before = self.save(tmp_path)
        with pytest.raises(RecastConfigError, match="finite numbers alone, since JSON holds no nan"):
            write_model_card(tmp_path, results={"accuracy": float("nan")})
        assert (tmp_path / "README.md").read_text() == before
        write_model_card(tmp_path, results={"accuracy": torch.tensor(0.5)})
        assert "| accuracy | 0.5 |" in (tmp_path / "README.md").read_text()

    def test_counts_the_norms_that_a_task_owns(self, tmp_path: Path) -> None:
        counts = {}
        for norms in (False, True):
            config = RecastConfig(train_norms=norms)
            make_model("default", config=config).save_pretrained(tmp_path / str(norms))
            card = (tmp_path / str(norms) / "README.md").read_text()
            counts[norms] = int(re.search(r"\| Numbers trained \| ([\d,]+)", card)[1].replace(",", ""))
        owned = sum(p.numel() for m in make_backbone().modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
        assert owned > 0
        assert counts[True] == counts[False] + owned

    def test_says_how_it_is_compressed_and_how_well(self, tmp_path: Path) -> None:
        card = self.save(tmp_path / "flowers", num_templates=1)
        assert "compressed: 4 templates stand for 8 pretrained weights" in card
        assert "exact" not in card
        plain, errors, cosines = make_backbone(), [], []
        composed = make_model("default", config=RecastConfig(num_templates=1)).base_model
        for layer in (module for module in composed.modules() if isinstance(module, RecastLayer)):
            wanted, mine = plain.get_submodule(layer.module_name).weight, layer.compose([])
            errors.append(((mine - wanted).norm() / wanted.norm()).item())
            cosines.append(torch.cosine_similarity(mine.flatten(), wanted.flatten(), dim=0).item())
        assert max(errors) > 0.1
        shown = re.search(r"cosine to them ([\d.]+) in the mean and ([\d.]+) at worst, relative error ([\d.]+)", card)
        expected = (sum(cosines) / 8, min(cosines), sum(errors) / 8)
        assert [float(number) for number in shown.groups()] == [pytest.approx(value, abs=1e-3) for value in expected]

    def test_links_the_base_model(self, tmp_path: Path) -> None:
        known = {"library": "transformers", "name": "google/vit", "class": "ViTForImageClassification", "revision": "abc"}
        card = self.save(tmp_path / "flowers", backbone=known)
        data = metadata(card)
        assert data["base_model"] == "google/vit"
        assert data["base_model_relation"] == "adapter"
        assert data["library_name"] == "peft"
        assert {"recast", "peft", "transformers", "base_model:adapter:google/vit"} <= set(data["tags"])
        assert data["pipeline_tag"] == "image-classification"
        assert "[google/vit](https://huggingface.co/google/vit), revision `abc`" in card

    def test_does_not_link_a_folder_of_this_machine(self, tmp_path: Path) -> None:
        make_backbone().save_pretrained(tmp_path / "base")
        base = ViTForImageClassification.from_pretrained(tmp_path / "base")
        get_recast_model(base).save_pretrained(tmp_path / "flowers")
        assert "base_model" not in metadata((tmp_path / "flowers" / "README.md").read_text())

    def test_loads_by_the_lines_that_it_shows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_backbone().save_pretrained(tmp_path / "base")
        base = ViTForImageClassification.from_pretrained(tmp_path / "base")
        model = get_recast_model(base)
        learn(model, "default", 3)
        model.save_pretrained(tmp_path / "flowers")
        lines = re.search(r"```python\n(.*?)```", (tmp_path / "flowers" / "README.md").read_text(), re.DOTALL)[1]
        assert len([line for line in lines.splitlines() if line]) <= 3
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(lines, names)
        assert torch.equal(output(names["model"]), output(model.eval()))

    def test_shows_accuracy_to_the_hub(self, tmp_path: Path) -> None:
        known = {"library": "timm", "name": "a.b", "class": "X", "num_classes": 5, "license": "cc-by-4.0"}
        self.save(tmp_path / "flowers", backbone=known, results={"accuracy": 0.5, "dataset": "CUB Birds"})
        data = metadata(Path(write_model_card(tmp_path / "flowers", repo_id="ada/birds")).read_text())
        (result,) = data["model-index"][0]["results"]
        assert result["dataset"] == {"name": "CUB Birds", "type": "cub-birds"}
        assert result["metrics"][0]["value"] == 0.5
        assert data["license"] == "cc-by-4.0"
        again = write_model_card(tmp_path / "flowers", repo_id="eve/birds", results={"accuracy": 0.75})
        (index,) = metadata(Path(again).read_text())["model-index"]
        assert (index["name"], index["results"][0]["metrics"][0]["value"]) == ("eve/birds", 0.75)

    def test_takes_a_license_over_what_it_knew(self, tmp_path: Path) -> None:
        self.save(tmp_path / "flowers", backbone={"library": "timm", "name": "a.b", "license": "cc-by-4.0"})
        path = write_model_card(tmp_path / "flowers", license="mit")
        assert metadata(Path(path).read_text())["license"] == "mit"

    def test_takes_the_place_of_pefts_template_alone(self, tmp_path: Path) -> None:
        card = self.save(tmp_path / "flowers")
        assert "Framework versions" not in card
        own = "---\ntags: [mine]\n---\n\n# My model\n"
        (tmp_path / "flowers" / "README.md").write_text(own)
        card = self.save(tmp_path / "flowers")
        assert "# My model" in card
        assert "AutoRecastModel" in card
        assert {"mine", "recast"} <= set(metadata(card)["tags"])

    def test_is_not_written_for_a_config_alone(self, tmp_path: Path) -> None:
        RecastConfig().save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json"}

    def test_of_a_folder_without_a_task_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RecastLoadError, match=r"adapter_config\.json"):
            write_model_card(tmp_path)
        RecastConfig().save_pretrained(tmp_path)
        with pytest.raises(RecastLoadError, match=r"adapter_model\.safetensors"):
            write_model_card(tmp_path)

    def test_stays_when_the_trainer_writes_its_own(self, tmp_path: Path) -> None:
        model = make_model("default")
        model.save_pretrained(tmp_path)
        (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# What the Trainer wrote\n")
        model.create_or_update_model_card(str(tmp_path))
        card = (tmp_path / "README.md").read_text()
        assert "# What the Trainer wrote" in card
        assert "AutoRecastModel" in card


class TestOfARepository:
    def test_lists_them_in_the_card(self, hub: HubServer) -> None:
        push_tasks_to_hub(make_model("cars", "birds"), "ada/all", results={"cars": {"accuracy": 0.5}})
        card = files_of(hub, "ada/all")["README.md"].decode()
        assert "| [cars](cars/README.md) | 16 | accuracy 0.5 |" in card
        assert "| [birds](birds/README.md) | 16 | - |" in card
        assert {"recast", "peft"} <= set(metadata(card)["tags"])

    def test_twice_lists_them_once(self, hub: HubServer) -> None:
        model = make_model("default", "cars")
        for _ in range(2):
            push_tasks_to_hub(model, "ada/all")
        card = files_of(hub, "ada/all")["README.md"].decode()
        assert card.count("[cars](cars/README.md)") == 1
        assert card.count("recast: begin") == 1

    def test_keeps_those_that_are_not_pushed_now(self, hub: HubServer) -> None:
        push_tasks_to_hub(make_model("cars", "birds"), "ada/all", results={"cars": {"accuracy": 0.5}})
        push_task_to_hub(make_model("flowers"), "ada/all")
        push_tasks_to_hub(make_model("cats", "my dogs"), "ada/all")
        push_tasks_to_hub(make_model("fish", "cats"), "ada/all")
        card = files_of(hub, "ada/all")["README.md"].decode()
        assert re.findall(r"^\| \[(.+?)\].* \| 16 \| (.+) \|$", card, re.M) == [
            ("birds", "-"),
            ("cars", "accuracy 0.5"),
            ("cats", "-"),
            ("my dogs", "-"),
            ("fish", "-"),
        ]
        assert card.count("A task learned with") == card.count("## More tasks in this repository") == 1
        assert "## Tasks in" not in card
        assert 'from_pretrained("ada/all")' in card

    @pytest.mark.parametrize("names", [("cars", "birds"), ("default", "cars", "birds")])
    def test_names_the_base_models_of_all(self, hub: HubServer, names: tuple[str, ...]) -> None:
        def on(base: str, *tasks: str) -> PeftModel:
            known = {"library": "transformers", "name": base, "class": "ViTForImageClassification"}
            model = get_recast_model(make_backbone(), RecastConfig(backbone=known), adapter_name=tasks[0])
            for task in tasks[1:]:
                model.add_adapter(task, RecastConfig(backbone=known))
            return model

        for base, tasks in (("google/vit", names), ("meta/deit", ("fish", "cups"))):
            push_tasks_to_hub(on(base, *tasks), "ada/all")
        data = metadata(files_of(hub, "ada/all")["README.md"])
        assert set(data["base_model"]) == {"google/vit", "meta/deit"}
        assert {"base_model:adapter:google/vit", "base_model:adapter:meta/deit"} <= set(data["tags"])
        text = files_of(hub, "ada/all")["README.md"].decode()
        assert "(https://huggingface.co/google/vit)" in text
        if "default" not in names:
            assert "(https://huggingface.co/meta/deit), [google/vit]" in text
        push_tasks_to_hub(on("meta/deit", "one", "two"), "ada/other")
        assert metadata(files_of(hub, "ada/other")["README.md"])["base_model"] == "meta/deit"

    def test_lists_none_that_was_taken_away(self, hub: HubServer) -> None:
        push_tasks_to_hub(make_model("cars", "birds"), "ada/all")
        files = files_of(hub, "ada/all")
        rest = {path: content for path, content in files.items() if not path.startswith("cars/")}
        hub.repositories["ada/all"].commit("main", rest, "without cars")
        push_tasks_to_hub(make_model("fish", "cats"), "ada/all")
        card = files_of(hub, "ada/all")["README.md"].decode()
        assert re.findall(r"^\| \[(.+?)\]", card, re.M) == ["birds", "cats", "fish"]

    def test_and_of_a_bank_keeps_what_the_other_wrote(self, hub: HubServer) -> None:
        push_tasks_to_hub(make_model("default", "cars"), "ada/all")
        bank = readout_bank(make_backbone().eval(), torch.randn(8, 3, 16, 16))
        for _ in range(2):
            push_bank_to_hub(bank, "ada/all")
            push_task_to_hub(make_model("default"), "ada/all")
        card = files_of(hub, "ada/all")["README.md"].decode()
        for text in ("A task learned with", "[cars](cars/README.md)", "template banks. Tasks name", bank.fingerprint):
            assert card.count(text) == 1

    def test_on_a_new_branch_begins_with_the_card_of_main(self, hub: HubServer) -> None:
        hub.add("ada/all", {"README.md": b"---\ntags: [mine]\n---\n\n# Of all tasks\n"})
        push_task_to_hub(make_model("default"), "ada/all", revision="next")
        card = files_of(hub, "ada/all", "next")["README.md"].decode()
        assert "# Of all tasks" in card
        assert "mine" in metadata(card)["tags"]

    def test_on_this_machine_keeps_those_that_are_not_saved_now(self, tmp_path: Path) -> None:
        model = make_model("default", "cars", "birds")
        for names in (["cars"], ["birds"], ["default"], ["cars"]):
            model.save_pretrained(tmp_path, selected_adapters=names)
        card = (tmp_path / "README.md").read_text()
        assert re.findall(r"^\| \[(.+?)\]", card, re.M) == ["cars", "birds"]
        assert card.count("A task learned with") == card.count("## More tasks in this repository") == 1
