"""A card shows what files hold as text, keeps what its owner wrote, and is the same when it is written again."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import tiny_vit

from recast_peft import RecastConfig, get_recast_model, write_model_card
from recast_peft.storage.cards import BEGIN, END, code, hub_link, merge_card, one_line, own_parts, plain_text, quoted

EVIL = [
    END,
    BEGIN,
    f"a {END} b {BEGIN} c",
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "a | b |\n| c | d |",
    "`code` ```\n# Title\n```",
    "\x1b[31mred\x00\u202e",
    "\n---\nlicense: evil\n---\n",
    "\\[x\\](y)",
]


@pytest.mark.parametrize("value", EVIL)
def test_a_value_is_text_in_one_line(value: str) -> None:
    for shown in (plain_text(value), code(value), quoted(value), one_line(value)):
        assert "\n" not in shown
        assert not any(ord(c) < 32 for c in shown)
    assert "<" not in plain_text(value)
    assert not [c for place, c in enumerate(plain_text(value)) if c in "[]|`" and plain_text(value)[place - 1] != "\\"]
    assert code(value).count("`") == 2
    assert END not in code(value)


def test_a_link_is_of_a_repository() -> None:
    assert hub_link("google/vit") == "[google/vit](https://huggingface.co/google/vit)"
    assert hub_link("javascript:alert(1)") == "`javascript:alert(1)`"
    assert len(one_line("x" * 10_000)) < 1100


@pytest.mark.parametrize("value", EVIL)
def test_no_value_makes_a_card_grow_or_lets_text_out(value: str, tmp_path: Path) -> None:
    results = {value: value, "accuracy": 0.5, "dataset": value}
    config = RecastConfig(
        id2label={0: value, 1: "x"}, results=results, backbone={"library": "timm", "name": value, "class": value}
    )
    model = get_recast_model(tiny_vit(), config, "task")
    card = tmp_path / "task" / "README.md"
    model.save_pretrained(str(tmp_path))
    first = card.read_bytes()
    card.write_bytes(first + b"\nMine, below.\n")
    again = card.read_bytes()
    for _ in range(3):
        model.save_pretrained(str(tmp_path))
        write_model_card(tmp_path / "task")
    assert len(card.read_bytes()) < len(again) + 40  # the name of the folder may stand where that of the repository did
    settled = card.read_bytes()
    write_model_card(tmp_path / "task")
    assert card.read_bytes() == settled
    text = settled.decode()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.rstrip().endswith("Mine, below.")
    assert "<script>" not in text.partition("---\n\n")[2]
    assert "license: evil" not in text.partition("\n---")[0]


def test_marks_of_the_owner_do_not_confuse(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"# Mine\n\n{END}\n\n{BEGIN}\n\nlost?\n")
    merge_card(card, {"tags": ["recast"]}, "ours")
    text = card.read_text()
    assert text.count(BEGIN) == 1
    assert "lost?" in text
    assert "# Mine" in text
    assert own_parts(card) == {"task": "ours"}


def test_a_card_that_cannot_be_read_stays_as_text(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: [mit\n---\n\n# Caf\xe9\n")
    merge_card(card, {"tags": ["recast"]}, "ours")
    content = card.read_bytes()
    assert b"# Caf\xe9" in content
    assert b"license: [mit" in content
    merge_card(card, {"tags": ["recast"]}, "ours")
    assert card.read_bytes() == content


@pytest.mark.parametrize(
    "said",
    ["base_model:\n- ada/one\n- ada/two", "model-index: of mine", "model-index:\n- name: of mine", "eval_results: 3"],
)
def test_metadata_of_the_owner_that_the_hub_does_not_know_stay(said: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\n{said}\n---\nmine\n")
    for _ in range(2):
        merge_card(card, {"library_name": "peft", "tags": ["recast"]}, "ours")
        assert said in card.read_text()
        assert "mine" in card.read_text()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_metadata_and_line_ends_of_another_editor_stay(mark: bytes, end: bytes, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(mark + b"---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nline\n".replace(b"\n", end))
    merge_card(card, {"tags": ["recast"], "license": "other"}, "ours\n\nand more")
    first = card.read_bytes()
    kept = b"\r\n" if end == b"\r\n" else b"\n"
    expected = b"---\nlicense: mit\ntags:\n- mine\n- recast\n---\n\n# Mine\n\nline\n\n".replace(b"\n", kept)
    assert first.startswith(expected + BEGIN.encode() + kept)
    assert first.count(kept) == first.count(b"\n")
    merge_card(card, {"tags": ["recast"], "license": "other"}, "ours\n\nand more")
    assert card.read_bytes() == first
