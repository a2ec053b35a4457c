"""The fault suites: ``python tests/faults`` tries them whole and writes docs/reliability.md.

Names of modules, or MODULE.FUNCTION, choose some. --small: as much as CI tries; writes to the
terminal only. --mutants: takes one guard after the other out of the program, and sees whether the
small suites notice; with names, the guards that these are to notice. --report: writes
docs/reliability.md anew from results/faults/. Ends with 1 if a fault was not survived.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from distcv.data import DATASETS  # noqa: E402
from distcv.data.cache import load_arrays  # noqa: E402
from distcv.environment import describe_environment  # noqa: E402
from faults.core import Outcome, Place, survived  # noqa: E402
from faults.mutants import MUTANTS, try_mutant  # noqa: E402
from faults.page import PAGE, RESULTS, SUITES, page, read  # noqa: E402


def surroundings() -> dict[str, Any]:
    """Of this machine and program, what belongs beside a figure."""
    keys = ("commit", "python", "versions", "cpu", "cores")
    found = describe_environment()
    return {key: found[key] for key in keys}


def try_suite(name: str, folder: Path, data_dir: Path, *, whole: bool) -> list[Outcome]:
    """What came of one suite, or of one function of it."""
    module, _, function = name.partition(".")
    run = getattr(importlib.import_module(f"faults.{module}"), function or "run")
    place = Place(folder / name, data_dir, whole)
    place.folder.mkdir(parents=True)
    outcomes: list[Outcome] = run(place)
    return outcomes


def write(name: str, **contents: Any) -> None:
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(contents | surroundings(), indent=1) + "\n")


def try_mutants(suites: list[str], data_dir: Path) -> bool:
    """Try those that these suites are to notice, or all; whether one was not noticed."""
    before = {} if not suites else {row["without"]: row for row in read("mutants")["mutants"]}
    rows, commit = [], surroundings()["commit"]
    for mutant in MUTANTS:
        if suites and mutant.suite not in suites:
            rows.append(before[mutant.without])
            continue
        found = try_mutant(mutant, data_dir)
        print(f"without {mutant.without}: {found or 'NOT NOTICED'}", flush=True)
        row = {"without": mutant.without, "suite": mutant.suite, "found": found}
        rows.append(row | {"commit": commit})
    write("mutants", mutants=rows)
    return any(row["found"] is None for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--small", action="store_true", help="as much as CI tries")
    parser.add_argument("--mutants", action="store_true", help="try the mutants")
    parser.add_argument("--report", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    data_dir = Path(os.environ.get("DISTCV_TEST_DATA", TESTS.parent / "data"))
    failed = False
    if not arguments.report:
        load_arrays(DATASETS["mnist"], data_dir, print)
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
            for name in [] if arguments.mutants else arguments.names or SUITES:
                began = time.monotonic()
                outcomes = try_suite(name, Path(scratch), data_dir, whole=not arguments.small)
                seconds = round(time.monotonic() - began, 1)
                for one in outcomes:
                    print(f"{name}: {one.fault}: {one.survived} of {one.tried}; {one.lost}")
                    print("".join(f"  {line}\n" for line in one.failures), end="", flush=True)
                failed |= not all(map(survived, outcomes))
                if not arguments.small and name in SUITES:
                    held = [asdict(one) for one in outcomes]
                    write(name, outcomes=held, seconds=seconds)
            if arguments.mutants:
                failed |= try_mutants(arguments.names, data_dir)
    if not arguments.small:
        PAGE.write_text(page())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
