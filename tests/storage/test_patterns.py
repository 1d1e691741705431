"""Regular expressions from files end soon, or are not run."""

from __future__ import annotations

import re
import time

import pytest

from recast_peft.errors import RecastConfigError
from recast_peft.storage.patterns import check_pattern

NAME = "a" * 60 + "." + "b" * 40


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*\.)?layer\d+\.[1-9]\d*\.conv[12]",
        "all-linear",
        r"blocks\.[01]\..*qkv",
        r".*\.(q|v)_proj",
        r"(a|b){1,3}c",
        r"(a{1,4}){1,4}b",
        r"(a{1,16}|b{3,9})[0-9a-f]{40}",
        r"(.*\.)?(layers|blocks|h)\.(\d|1\d|2[0-3])\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
        r"(block|layer)+.*",
        r".*\.q|.*\.k|.*\.v|.*\.o|.*\.fc1",
        r"(?i)(?:Q|k)_proj(?=x)|(x)?(?(1)a|b)",
        r"(?:x\d{1,2}\.)?fc[12]",
        "",
        "|".join(rf"layer1\.{i}\.conv1" for i in range(500)),
    ],
)
def test_what_people_write_is_let_pass(pattern: str) -> None:
    check_pattern(pattern, "it")
    begun = time.perf_counter()
    re.fullmatch(pattern, NAME)
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z0-9.]+)+)+\Z!",
        r"(a*)*b",
        r"(a|a)*(a|a)*(a|a)*(a|a)*b",
        r".*.*.*.*x",
        r"(?:a{1,16}){1,16}b",
        r"(?:a{1,50}){1,50}b",
        r"(a{1,2})*b",
        r"(a|aa)*b",
        r"(|a)*b",
        r"(?i)(a|Aa)*b",
        r"(?i)(s|\u017fs)*b",
        r"(?:a|aa){16}(?:a|aa){16}b",
        r"(?=(?:a|aa){16}(?:a|aa){16}b)",
        r"(x)?(?(1)a|.*.*.*.*y)",
        "(a|aa)" * 40 + "b",
        "a?" * 40 + "a" * 40 + "b",
        r"(?=(a+)+b)",
        r"(a+)\1b",
        r"(?P<x>(?:a+?)+)",
        "(" * 500,
        "[",
        "a" * 1000 + "+",
        "a" * 100_001,
    ],
)
def test_what_may_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(RecastConfigError, match="the LoRA part's targets is the regular expression"):
        check_pattern(pattern, "the LoRA part's targets")
