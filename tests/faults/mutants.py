"""Programs with one guard taken out, which the fault suites have to notice."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


class Mutant(NamedTuple):
    """What is taken out, where, and which suite, or function of a suite, is to notice."""

    without: str
    file: str
    old: str
    new: str
    suite: str


MUTANTS: tuple[Mutant, ...] = ()


def try_mutant(mutant: Mutant, data_dir: Path) -> bool:
    """Whether the small suite fails on the mutated program."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        source = Path(scratch) / "src"
        shutil.copytree(SOURCE, source)
        file = source / "distcv" / mutant.file
        text = file.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file} has not one {mutant.old!r}"
        file.write_text(text.replace(mutant.old, mutant.new))
        ran = subprocess.run(
            [sys.executable, str(HERE), mutant.suite, "--small"],
            env=os.environ | {"PYTHONPATH": str(source), "DISTCV_TEST_DATA": str(data_dir)},
            capture_output=True,
            text=True,
            timeout=900,
        )
    return ran.returncode == 1
