"""Every benchmark, one after the other, each in a process of its own; then its tables as Markdown.

    python examples/benchmarks/run_all.py --output benchmark_output
    python examples/benchmarks/run_all.py --output benchmark_output --only training_step inference
    python examples/benchmarks/run_all.py --output benchmark_output --tables    # only print what was measured before

``mimicry`` takes most of an hour, since it runs the paper's fits whole; ``fleet`` and ``soak`` take ten minutes each, and
``export`` needs the extra of that name. They are left out unless they are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from timing import PRECISIONS, markdown

FOLDER = Path(__file__).resolve().parent
BENCHMARKS = [
    "training_step",
    "inference",
    "swaps",
    "mixed_batch",
    "single_layer",
    "grown_banks_cost",
    "files",
    "conversion",
]
ON_DEVICE = ["training_step", "inference", "swaps", "mixed_batch"]
IN_PRECISION = ["training_step", "inference", "mixed_batch"]
ON_REQUEST = ["mimicry", "fleet", "soak", "export"]


def run(name: str, options: argparse.Namespace) -> None:
    """Run one benchmark; its results are in the output folder afterwards."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--output", str(options.output), "--clock", options.clock]
    command += ["--threads", str(options.threads)]
    if options.quick:
        command.append("--quick")
    if name in ON_DEVICE:
        command += ["--device", options.device]
    if name in IN_PRECISION:
        command += ["--precision", options.precision]
    begin = time.perf_counter()
    print(f"\n== {name}", flush=True)
    subprocess.run(command, check=True)
    print(f"== {name} took {time.perf_counter() - begin:.0f} s", flush=True)


def tables(output: Path) -> str:
    """What the output folder holds, as Markdown."""
    parts = []
    for name in [*BENCHMARKS, *ON_REQUEST]:
        path = output / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        how = f"{found['clock']} time" + (", quick: no measurement" if found["quick"] else "")
        parts.append(f"## {name}\n\n{found['machine']} ({how})")
        parts += [f"{title}:\n\n{markdown(rows)}" for title, rows in found["tables"].items()]
    return "\n\n".join(parts)


def main(given: list[str] | None = None) -> None:
    """Run what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    parser.add_argument("--only", nargs="+", choices=[*BENCHMARKS, *ON_REQUEST], default=BENCHMARKS)
    parser.add_argument("--tables", action="store_true", help="run nothing: print the tables that are there")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that everything runs, measures nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="see the benchmarks (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, where a benchmark can run on it (default: %(default)s)")
    about = "of those that can run on a device (default: %(default)s)"
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help=about)
    options = parser.parse_args(given)
    for name in [] if options.tables else options.only:
        run(name, options)
    print(f"\n{tables(options.output)}")


if __name__ == "__main__":
    main()
