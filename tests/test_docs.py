"""Everything that README and the documentation show is run, as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# hub.md and sequences.md need a server and data, and are run by test_auto.py and test_sequential.py
PAGES = [
    "README.md",
    "docs/tasks.md",
    "docs/mixing.md",
    "docs/architecture.md",
    "docs/mimicry.md",
    "docs/grown_banks.md",
    "docs/benchmarks.md",
]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    code = blocks(page)
    assert code
    for block in code:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))])
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text())) <= targets
    assert set(re.findall(r"make (\w+)", (ROOT / ".ci" / "run").read_text())) <= set(
        re.findall(r"make (\w+)", (ROOT / "README.md").read_text())
    )


def test_every_script_that_is_named_exists():
    for page in ("README.md", *(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))):
        for script in re.findall(r"python ((?:examples|tests)/[\w/]+\.py)", (ROOT / page).read_text()):
            assert (ROOT / script).is_file(), f"{page}: {script}"


def test_the_tree_holds_nothing_large():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    import subprocess

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    large = [name for name in listed if name and (ROOT / name).exists() and (ROOT / name).stat().st_size > 2_000_000]
    assert not large
