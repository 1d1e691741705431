"""Single values: what is kept of them, and what is said of those that cannot be meant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from recast_peft import (
    RecastConfigError,
    collapse_coefficient_sets,
    convert_to_lora,
    push_task_to_hub,
    push_tasks_to_hub,
    save_compressed_model,
)
from recast_peft.validation import (
    COUNT,
    DEEPEST,
    LONGEST_NAME,
    Unexpected,
    check_arguments,
    check_is_task,
    checked_names,
    flag,
    function,
    indices,
    names,
    names_or_pattern,
    number,
    number_above,
    one_of,
    optional,
    plain,
    resolve_options,
    share,
    shown,
    text,
    whole_number,
)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("check", "value", "kept"),
    [
        (optional(text), None, None),
        (flag, False, False),
        (text, "a", "a"),
        (whole_number(0, 3), 3, 3),
        (one_of(None, "a"), None, None),
        (names, {"b", "a"}, ["a", "b"]),
        (names, ("b", "a"), ["b", "a"]),
        (names_or_pattern, r"a\d", r"a\d"),
        (indices, range(2), [0, 1]),
        (indices, 4, 4),
        (number, 2, 2),
        (share, 0.0, 0.0),
        (plain, {"a": (1, None)}, {"a": [1, None]}),
    ],
)
def test_what_is_kept(check: Any, value: Any, kept: Any) -> None:
    assert check(value) == kept


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (flag, 1),
        (text, ""),
        (text, "a" * (LONGEST_NAME + 1)),
        (text, 3),
        *((whole_number(1, 3), value) for value in (0, 4, True, 1.0, "1", None)),
        (one_of(1, "a"), True),
        (one_of(1, "a"), [1]),
        *((names, value) for value in ("a", {"a": 1}, [1], [""], ["a" * (LONGEST_NAME + 1)])),
        *((names_or_pattern, value) for value in ("(", "", "(" * 500, "a{99999999999}")),
        *((indices, value) for value in (-1, [-1], [True], "0", 1.0)),
        *((number, value) for value in (math.nan, math.inf, True, "1")),
        *((share, value) for value in (1, -0.1, math.nan)),
        *((number_above(0), value) for value in (0, -1, math.nan, math.inf, True, None, "1")),
        (function, 1),
        *((plain, value) for value in ({1: 2}, [object()], nested(DEEPEST + 1))),
    ],
)
def test_what_is_refused(check: Any, value: Any) -> None:
    with pytest.raises(Unexpected, match=r"\w"):
        check(value)


def test_a_list_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recast_peft.validation.MOST_NAMES", 2)
    for check, value in ((names, ["a"] * 3), (indices, [0] * 3)):
        assert len(check(value[:2])) == 2
        with pytest.raises(Unexpected):
            check(value)


def test_arguments_are_refused_by_name() -> None:
    check_arguments(COUNT, steps=3, sets=1)
    for value in (0, True, None, 1.0, torch.tensor(2)):
        with pytest.raises(RecastConfigError, match=r"sets=.*: expected a whole number of at least 1"):
            check_arguments(COUNT, steps=3, sets=value)


@pytest.mark.parametrize("name", ["b", ["a"], {}, None, torch.tensor(1)])
def test_what_is_no_name_of_a_task_is_refused(name: Any) -> None:
    check_is_task("a", {"a": 1})
    with pytest.raises(RecastConfigError, match=r"no RECAST task .*; its tasks: a"):
        check_is_task(name, {"a": 1})


class TestNamesOfTasks:
    @pytest.mark.parametrize("given", ["a", ["a"], ("a",), {"a": 1}, iter(["a"])])
    def test_are_a_list_however_they_were_given(self, given: Any) -> None:
        assert checked_names("adapter_names", given) == ["a"]

    @pytest.mark.parametrize("given", [None, 1, b"a", ["a", 1], [None], [b"a"]])
    def test_are_texts(self, given: Any) -> None:
        with pytest.raises(RecastConfigError, match="adapter_names: expected the name of a task, or a list of names, got"):
            checked_names("adapter_names", given)

    def test_that_would_act_twice_are_named_once(self) -> None:
        assert checked_names("adapter_names", ["a", "b", "a"]) == ["a", "b", "a"]
        with pytest.raises(RecastConfigError, match="a task is named twice"):
            checked_names("adapter_names", ["a", "b", "a"], once=True)


def test_messages_stay_short_and_safe() -> None:
    deep = nested(50_000)
    for value in (deep, "a" * 10**6, list(range(10**5)), {n: n for n in range(1000)}):
        assert 0 < len(shown(value)) < 1000
    while deep:  # Python's own destructor of such a list is recursive
        deep = deep.pop()


class TestOptionsByName:
    @dataclass
    class Kind:
        size: int = 1

        def __post_init__(self) -> None:
            self.size + 1

    def resolve(self, given: Any) -> Any:
        return resolve_options("field", given, self.Kind, {"kind": self.Kind})

    def test_are_found(self) -> None:
        own = self.Kind(3)
        assert self.resolve(own) is own
        assert self.resolve("kind") == self.Kind()
        assert self.resolve({"method": "kind", "size": 2}) == self.Kind(2)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (3, "field=3: expected a name"),
            ({"size": 1}, "with a 'method'"),
            ({"method": ["kind"]}, "with a 'method'"),
            ("kin", "did you mean 'kind'"),
            ("telepathy", "expected one of kind$"),
            ({"method": "kind", "sise": 1}, "no option 'sise'; its options: size"),
            ({"method": "kind", 3: 1}, "no option 3"),
            ({"method": "kind", "size": "a"}, "of the wrong type"),
        ],
    )
    def test_are_refused(self, given: Any, message: str) -> None:
        with pytest.raises(RecastConfigError, match=message):
            self.resolve(given)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: convert_to_lora(model, 2),
        lambda model: push_task_to_hub(model, "ada/task"),
        lambda model: push_tasks_to_hub(model, "ada/tasks"),
        lambda model: save_compressed_model(model, "compressed"),
        lambda model: collapse_coefficient_sets(model),
    ],
)
def test_what_needs_a_task_says_so_of_a_plain_model(call: Any) -> None:
    with pytest.raises(RecastConfigError, match="get_recast_model"):
        call(nn.Linear(2, 2))
