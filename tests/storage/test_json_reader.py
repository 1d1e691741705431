"""JSON from elsewhere: one clear error for whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from recast_peft.errors import RecastConfigError, RecastLoadError
from recast_peft.storage import json_reader
from recast_peft.storage.json_reader import parse_json, parse_value, read_json

BAD = {  # with what is said of it
    "empty": (b"", "not valid JSON: Expecting value"),
    "cut": (b'{"a": 1', "not valid JSON: Expecting ','"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "not valid JSON: 'utf-8'"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON: 'utf-8'"),
    "deep lists": (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 64 deep"),
    "so deep that Python gives up": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "a key twice": (b'{"a": 1, "a": 2}', "of an object's 2 keys, number 1 stands in it twice"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "not UTF-8"),
    "half a surrogate pair in a key": (b'{"\\ud800": 1}', "not UTF-8"),
    "digits without end": (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    "a list": (b"[]", "holds a list"),
    "null": (b"null", "holds nothing"),
    "true": (b"true", "holds true or false"),
    "a number": (b"12", "holds a whole number"),
    "a text": (b'"a"', "holds a text"),
    "two values": (b"{} {}", "not valid JSON: Extra data"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_json_is_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    content, said = BAD[kind]
    file.write_bytes(content)
    with pytest.raises(RecastLoadError, match=f"a bank's header.*{said}"):
        read_json(file, "a bank's header")
    with pytest.raises(RecastConfigError):
        read_json(file, error=RecastConfigError)


def test_a_file_that_is_too_large_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(RecastLoadError, match="cannot be read"):
        read_json(file)
    with pytest.raises(RecastLoadError, match="cannot be read"):
        read_json(tmp_path)
    file.write_text('{"a": "' + "x" * 200 + '"}')
    assert read_json(file).text("a") == "x" * 200
    monkeypatch.setattr(json_reader, "MAX_BYTES", 100)
    with pytest.raises(RecastLoadError, match="larger than 100 bytes"):
        read_json(file)


def test_values_by_kind() -> None:
    fields = parse_json(
        '{"t": "é", "n": 3, "f": 0.5, "b": true, "l": ["a"], "v": [1, 2.5], "o": {"p": {"q": 1}}, "z": null}', "it"
    )
    assert (fields.text("t"), fields.integer("n", 0, 9), fields.number("f"), fields.flag("b")) == ("é", 3, 0.5, True)
    assert fields.texts("l") == ["a"]
    assert fields.numbers("v") == [1, 2.5]
    assert fields.object("o").object("p").integer("q", 1, 1) == 1
    assert fields.object_by_name("o")["p"]["q"] == 1
    assert fields.text("absent", None) is None
    assert fields.text("z", None) is None
    assert dict(fields)["n"] == 3


@pytest.mark.parametrize(
    ("ask", "value"),
    [
        ("text", "1"),
        ("flag", "1"),
        ("number", "true"),
        ("number", "NaN"),
        ("number", "1e999"),
        ("numbers", "[1, null]"),
        ("texts", '"ab"'),
        ("texts", "[1]"),
        ("text_by_name", '{"a": 1}'),
        ("object", "[]"),
        ("objects", "[1]"),
        ("object_by_name", '{"a": 1}'),
        ("text", "null"),
    ],
)
def test_another_kind_of_value_is_refused_with_its_name(ask: str, value: str) -> None:
    fields = parse_json(f'{{"width": {value}}}', "the header of a bank")
    with pytest.raises(RecastLoadError, match="width.*of the header of a bank"):
        getattr(fields, ask)("width")


@pytest.mark.parametrize("value", ["true", "1.0", "-1", "11", '"1"', "null"])
def test_a_whole_number_has_bounds(value: str) -> None:
    with pytest.raises(RecastLoadError, match="from 0 to 10"):
        parse_json(f'{{"n": {value}}}', "it").integer("n", 0, 10)
    with pytest.raises(RecastLoadError, match="list of whole numbers from 0 to 10"):
        parse_json(f'{{"n": [{value}]}}', "it").integers("n", 0, 10)


def test_a_missing_value_and_any_value() -> None:
    with pytest.raises(RecastLoadError, match="has no 'n'"):
        parse_json("{}", "it").text("n")
    assert parse_value("[1]", "it") == [1]
