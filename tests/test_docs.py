"""What README and documentation show is run, as it stands; links lead somewhere; the site builds without a warning.

A page's blocks of Python run in order and share their names. A block after ``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer, connect, folder_content
from timm.models import save_for_hf

import recast_peft

ROOT = Path(__file__).parents[1]
TEXTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n+)?```python\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[str]:
    """The Python of a page that is meant to run."""
    return [code for left_out, code in BLOCK.findall((ROOT / page).read_text()) if not left_out]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Hub on this machine that has the pretrained backbone of the pages, with weights drawn at random."""
    with HubServer().running() as server:
        connect(server, monkeypatch, tmp_path / "cache")
        torch.manual_seed(0)
        save_for_hf(timm.create_model("test_vit"), tmp_path / "base", safe_serialization=True)
        server.add("timm/test_vit.r160_in1k", folder_content(tmp_path / "base"))
        yield server


def pushed(names: dict[str, Any], hub: HubServer, printed: str) -> None:
    assert list(names["model"].peft_config) == ["cars", "birds"]
    assert len(hub.repositories["ada/vit-tasks"].commits) == 2
    card = hub.repositories["ada/vit-flowers"].find("main").files["README.md"].decode()
    assert "| accuracy | 0.93 |" in card
    assert "license: mit" in card


def nothing_forgotten(names: dict[str, Any], hub: HubServer, printed: str) -> None:
    assert "forgetting: +0.000" in printed


# what else has to hold when a page has run
AFTERWARDS: dict[str, Callable[[dict[str, Any], HubServer, str], None]] = {
    "docs/how_to/hub.md": pushed,
    "docs/how_to/sequences.md": nothing_forgotten,
}


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page)])
def test_the_snippets_of_a_page_run_in_order(page, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    AFTERWARDS.get(page, lambda *_: None)(names, hub, capsys.readouterr().out)


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
    for script in re.findall(r"python ((?:examples|tests)/[\w/]+\.py)", (ROOT / page).read_text()):
        assert (ROOT / script).is_file(), script


def test_the_tree_holds_nothing_large():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    large = [name for name in listed if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 2_000_000]
    assert not large
