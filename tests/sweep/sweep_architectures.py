"""Convert one small model of every architecture with ``RecastConfig()`` and check what has to hold of it.

    python tests/sweep/sweep_architectures.py --library timm
    python tests/sweep/sweep_architectures.py --library transformers --jobs 4
    python tests/sweep/sweep_architectures.py --library timm --only eva

What is checked stands in ``checks.py``. A line for each model, then the failures; the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds the package "sweep"

from sweep.checks import Case, Result, check_case, shorten

LIBRARIES = ("timm", "transformers")
COLUMNS = "{:<9} {:<24} {:<34} {:>7} {:>7} {:>7} {:>6} {:>8} {:>6}  {}"


@cache
def find_cases(library: str) -> dict[str, Case]:
    """The cases of one library by the name of their family."""
    if library == "timm":
        from sweep.timm_cases import timm_cases

        return timm_cases()
    from sweep.transformers_cases import transformers_cases

    return transformers_cases()


def check_family(library: str, family: str) -> Result:
    """The checks of one family; what a worker process does."""
    torch.set_num_threads(1)
    return check_case(find_cases(library)[family])


def check_all(library: str, families: list[str], jobs: int) -> Iterator[tuple[str, Result]]:
    """Results as they come."""
    if jobs == 1:
        for family in families:
            yield family, check_family(library, family)
        return
    # fork would copy the threads' locks of torch
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(check_family, library, family): family for family in families}
        for future in as_completed(futures):
            yield futures[future], future.result()


def table_row(family: str, result: Result) -> str:
    """One line of the table."""
    return COLUMNS.format(
        "FAILED" if result.failures else "ok",
        family,
        result.name,
        f"{result.parameters / 1e6:.2f}M",
        result.targets,
        result.coefficients,
        len(result.unused),
        f"{result.merge_difference:.0e}" if result.merge_difference else "0",
        f"{result.seconds:.1f}",
        result.leaves,
    )


def update_variants(recount: bool) -> None:
    """Record timm's smallest variants anew if asked to, else say which families are not recorded."""
    from sweep.timm_cases import record_variants, unrecorded_families

    if recount:
        record_variants()
    elif unrecorded := unrecorded_families():
        print(f"not recorded, and so not checked (--recount finds their smallest variants): {', '.join(unrecorded)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: both")
    parser.add_argument("--only", metavar="NAME", action="append", help="a family or a model; can be given again")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at the same time (default: 1)")
    parser.add_argument("--recount", action="store_true", help="look for timm's smallest variants anew, and write them down")
    options = parser.parse_args(arguments)
    failed: list[tuple[str, Result]] = []
    total = 0
    for library in options.library or LIBRARIES:
        if library == "timm":
            update_variants(options.recount)
        cases = find_cases(library)
        families = [f for f, case in cases.items() if not options.only or {f, case.name} & set(options.only)]
        if not families:
            continue
        header = ("", "family", f"{library} model", "params", "targets", "numbers", "unused", "merged", "s", "targets by name")
        tqdm.write(COLUMNS.format(*header))
        results = check_all(library, families, options.jobs)
        for family, result in tqdm(results, total=len(families), desc=library, unit="model"):
            tqdm.write(table_row(family, result))
            total += 1
            if result.unused:
                tqdm.write(f"{'':<10}without effect on the output: {shorten(result.unused)}")
            if result.failures:
                failed.append((family, result))
                tqdm.write("".join(f"{'':<10}{failure}\n" for failure in result.failures), end="")
    if not total:
        parser.error(f"--only {options.only}: no such family or model")
    print(f"{total - len(failed)} of {total} architectures passed" + "".join(f"\n  failed: {f} ({r.name})" for f, r in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
