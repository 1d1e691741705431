"""Cells as a table of plain text: what plans and reports print."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as text, with a line below the header."""
    first, *others = aligned([header, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join([first, "  ".join("-" * width for width in widths), *others])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
