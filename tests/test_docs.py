"""What README and documentation show is run, as it stands; links lead somewhere; the site builds without a warning.

A page's blocks of Python run in order and share their names. A block after ``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from exported import onnx_tools
from hub_server import HubServer, folder_content
from test_layers import ROOMS
from timm.models import save_for_hf

import recast_peft
from recast_peft import PARTNERS
from recast_peft.composition.kinds import KINDS
from recast_peft.mimicry import METHODS
from recast_peft.parts import PARTS
from recast_peft.planning.roles import SHORTHANDS

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), ROOT / "llms.txt", *(ROOT / "docs").rglob("*.md"))
)
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n+)?```python\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[str]:
    """The Python of a page that is meant to run."""
    return [code for left_out, code in BLOCK.findall((ROOT / page).read_text()) if not left_out]


# what a page shows at full size, and what is run in its place
SMALLER = {
    "docs/tutorials/first_task.md": {
        "size=64": "size=32",
        "train_size=300, test_size=400": "train_size=40, test_size=40",
        "epochs=8": "epochs=1",
    },
    "docs/how_to/export.md": {
        'timm.create_model("test_vit"': 'timm.create_model("test_vit", depth=1',
        "num_hidden_layers=2": "num_hidden_layers=1",
    },
    "docs/how_to/sequences.md": {
        "nn.Identity(), data)": "nn.Identity(), data, classifier=IncrementalClassifier(8, projections=200))",
    },
}
# what a page needs that is not installed for the tests
NEEDS = {
    "docs/how_to/trl.md": "trl",
    "docs/tutorials/language_model.md": "trl",
}


@pytest.fixture
def hub(hub: HubServer, tmp_path: Path) -> HubServer:
    """The Hub on this machine with the pretrained backbones of the pages, with weights drawn at random."""
    for name in ("test_vit.r160_in1k", "tf_efficientnet_lite0.in1k"):
        torch.manual_seed(0)
        save_for_hf(timm.create_model(name), tmp_path / name, safe_serialization=True)
        hub.add(f"timm/{name}", folder_content(tmp_path / name))
    return hub


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables to which a page may add rows are as they were when it has run."""
    named, listed = (SHORTHANDS, METHODS, PARTNERS), (PARTS, KINDS)
    before = [table.copy() for table in named], [table.copy() for table in listed]
    yield
    for table, old in zip(named, before[0], strict=True):
        table.clear()
        table.update(old)  # type: ignore[arg-type]
    for table, old in zip(listed, before[1], strict=True):
        table[:] = old  # type: ignore[assignment]


def pushed(names: dict[str, Any], hub: HubServer, printed: str) -> None:
    assert list(names["model"].peft_config) == ["cars", "birds"]
    assert len(hub.repositories["ada/vit-tasks"].commits) == 2
    card = hub.repositories["ada/vit-flowers"].find("main").files["README.md"].decode()
    assert "| accuracy | 0.93 |" in card
    assert "license: mit" in card


def nothing_forgotten(names: dict[str, Any], hub: HubServer, printed: str) -> None:
    assert "forgetting: +0.000" in printed


def counting(names: dict[str, Any], hub: HubServer, printed: str) -> None:
    shares = {name: float(value) for name, value in re.findall(r"^(counts [\w ]+): (\d\.\d+)$", printed, flags=re.MULTILINE)}
    assert shares["counts up"] > shares["counts up without the task"] + 0.2
    assert shares["counts down"] > shares["counts down before"] + 0.2


# what else has to hold when a page has run
AFTERWARDS: dict[str, Callable[[dict[str, Any], Any, str], None]] = {
    "docs/how_to/hub.md": pushed,
    "docs/how_to/sequences.md": nothing_forgotten,
    "docs/tutorials/language_model.md": counting,
}


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page)])
def test_the_snippets_of_a_page_run_in_order(page, request, tables, tmp_path, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(page, "torch"))
    code = "\n".join(blocks(page))
    for shown, run in SMALLER.get(page, {}).items():
        assert shown in code
        code = code.replace(shown, run)
    if "export_onnx(" in code:
        onnx_tools()
    server = request.getfixturevalue("hub") if "pretrained=True" in code else None
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")  # dataclasses and pickles look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    names = module.__dict__
    exec(compile(code, page, "exec"), names)
    AFTERWARDS.get(page, lambda *_: None)(names, server, capsys.readouterr().out)


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    """Of the texts beside the site too, which its builder does not read."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    """A dead link or anchor and an unknown name of the code fail the build; an argument that is not in a signature warns."""
    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "recast_peft").symlink_to(ROOT / "recast_peft")
    for path in (ROOT / "zensical.toml", *ROOT.glob("*.md")):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe:" not in done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "pool.html").is_file()


def test_the_menu_names_every_page_once():
    menu = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(menu) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = re.findall(r"^::: recast_peft\.(\w+)$", pages, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(recast_peft.__all__) - {"__version__"} <= set(listed)


def test_what_the_pages_import_is_public_or_named_by_its_module():
    for page in TEXTS:
        for block in blocks(page):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "recast_peft":
                    assert {alias.name for alias in node.names} <= set(recast_peft.__all__), page


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text()))
    assert named <= targets
    assert set(re.findall(r"make (\w+)", (ROOT / ".ci" / "run").read_text())) <= named


@pytest.mark.parametrize("page", TEXTS)
def test_every_script_that_is_named_exists(page):
    text = (ROOT / page).read_text()  # a script of an earlier commit is named without "python"
    for script in re.findall(r"\b(?:(?<=python )examples|tests|recast_peft)/[\w/]+\.py", text):
        assert (ROOT / script).is_file(), script


def test_the_tree_holds_nothing_large():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    large = [name for name in listed if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 2_000_000]
    assert not large


def test_the_architecture_page_lists_the_rooms_in_the_order_of_imports():
    table = (ROOT / "docs" / "explanation" / "architecture.md").read_text().split("## Three ways")[0].split("|---|---|")[1]
    rooms = [room for cell in re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE) for room in re.findall(r"`(\w+)/?`", cell)]
    assert rooms == [room for room in ROOMS if not room.startswith("_")]
