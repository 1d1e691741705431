"""Does RECAST add to LoRA? LoRA alone, RECAST alone, and both as one task, at the same ranks.

    python examples/benchmarks/mixing.py --output mixing_output

The learning rates are those that the search of ``accuracy.py`` finds for each part alone; a task of two parts uses both, and
trains its classifier as LoRA alone does. With
``--runs accuracy_output/runs.jsonl`` runs that ``accuracy.py`` has made are not made again.
"""

from __future__ import annotations

from dataclasses import replace

from accuracy import PROBE, collect, lora, make_study, parser, recast_all_four, show, tuned
from study import Method, recast_method
from study_tables import Row, paired


def both(coefficients: Method, matrices: Method) -> Method:
    """One task of two parts that were tuned apart."""
    fields = {key: value for key, value in coefficients.settings.items() if key != "config"}
    lora_fields = {key: value for key, value in matrices.settings.items() if key != "config"}
    name = f"RECAST + {matrices.name}"
    made = recast_method(name, fields, coefficients.lrs["recast_"], lora_fields, matrices.lrs[""])
    return replace(made, head_lr=matrices.head_lr, head_decay=matrices.head_decay)


def added(rows: list[Row]) -> str:
    """What RECAST adds to each LoRA, pair by pair on the same images and seeds: as Markdown."""
    lines = ["| RECAST added to | gain | standard error | refitted: gain | standard error |", "|---" * 5 + "|"]
    by_name = {row.name: row for row in rows}
    for row in rows:
        together = by_name.get(f"RECAST + {row.name}")
        if together is not None:
            cells = [*paired(together.accuracies, row.accuracies), *paired(together.refitted, row.refitted)]
            lines.append(
                f"| {row.name} | " + " | ".join(f"{c:{'.2f' if i % 2 else '+.2f'}}" for i, c in enumerate(cells)) + " |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the study; returns the rows."""
    made = parser(__doc__, "mixing_output")
    made.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8], help="of LoRA")
    options = made.parse_args(arguments)
    study = make_study(options)
    ranks = (1, 8) if options.quick else options.ranks
    alone = {PROBE.name: [PROBE], "RECAST": [recast_all_four(1)], "LoRA": [lora(rank) for rank in ranks]}
    families = tuned(study, alone, options)
    if "RECAST" in families:
        families["RECAST + LoRA"] = [both(families["RECAST"][0], matrices) for matrices in families.get("LoRA", [])]
    rows = collect(study, families, options)
    show(rows, options, f"LoRA with and without RECAST's coefficients, mean of {len(options.tasks)} tasks")
    print(f"\n{added(rows)}")
    return rows


if __name__ == "__main__":
    main()
