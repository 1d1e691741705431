"""growth_report: how much of its sources a grown bank keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..banks.files import StoredBank
from ..errors import RecastBankError
from ..planning.table import text_table
from .sources import check_bank


@dataclass(frozen=True)
class GrownGroup:
    """One group of a grown bank.

    Attributes:
        bank: its name.
        members: target modules in it.
        num_templates: all templates, the plain ones included.
        num_grown: grown templates.
        energy: share of the sources' squared norm that the first 1, 2, ... grown templates keep.
        nbytes: bytes of the grown templates as they are stored.
        num_coefficients: numbers that one task trains for the group.
    """

    bank: str
    members: int
    num_templates: int
    num_grown: int
    energy: tuple[float, ...]
    nbytes: int
    num_coefficients: int


@dataclass(frozen=True)
class GrowthReport:
    """What ``growth_report`` found; ``print(report)`` shows it as a table, ``analysis.plotting.plot_growth`` as a picture.

    Attributes:
        groups: one row for each group that has grown templates.
        version: version of the bank.
    """

    groups: tuple[GrownGroup, ...]
    version: int

    @property
    def num_coefficients(self) -> int:
        """Numbers that one task trains on the bank, with one coefficient set and nothing shared."""
        return sum(group.num_coefficients for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        most = max(group.num_grown for group in self.groups)
        header = ("bank", "members", "templates", "bytes", *(f"energy {i + 1}" for i in range(most)))
        rows = []
        for group in self.groups:
            energy = [f"{share:.3f}" for share in group.energy] + [""] * (most - len(group.energy))
            counts = (str(group.members), str(group.num_templates), f"{group.nbytes:,}")
            rows.append((group.bank, *counts, *energy))
        return f"{text_table(header, rows)}\nversion {self.version}, {self.num_coefficients} numbers per task"


def growth_report(bank: StoredBank) -> GrowthReport:
    """How much of its sources a grown bank keeps, group by group and by the number of templates.

    Args:
        bank: bank that ``grow_bank``, ``grow_bias_bank``, ``extend_bank`` or ``practice_bank`` made. In one that was extended,
            each template is counted against the sources that it was made from.

    Returns:
        the report; ``print`` shows it as a table.

    Raises:
        RecastBankError: if the bank was not grown.
    """
    check_bank(bank)
    groups = tuple(
        GrownGroup(name, len(g.members), g.num_templates, len(g.grown), g.grown.energy, g.grown.nbytes, g.num_coefficients)
        for name, g in bank.groups.items()
        if g.grown is not None and g.offset is None
    )
    if not groups:
        raise RecastBankError("growth_report needs a bank that grow_bank made; this one has no grown templates")
    return GrowthReport(groups, bank.version)
