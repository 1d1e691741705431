"""Cells as a table of plain text."""

from __future__ import annotations

from recast_peft.planning.table import aligned, text_table


def test_a_table_has_a_line_below_its_header_and_numbers_to_the_right() -> None:
    assert text_table(["bank", "layers"], [["qkv", "12"], ["blocks.0", "3"]]) == "\n".join(
        [
            "bank      layers",
            "--------  ------",
            "qkv           12",
            "blocks.0       3",
        ]
    )


def test_a_line_ends_without_spaces() -> None:
    assert aligned([["a", "b"], ["longer", ""]]) == ["a       b", "longer"]


def test_a_table_without_rows_is_its_header() -> None:
    assert text_table(["a", "bc"], []) == "a  bc\n-  --"
