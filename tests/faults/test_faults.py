"""The fault suites, sized down; ``python tests/faults`` tries them whole."""

import importlib
from pathlib import Path

import pytest

from faults.core import Place, survived
from faults.mutants import MUTANTS, SOURCE
from faults.page import PAGE, SUITES, page


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_faults_are_survived(name: str, tmp_path: Path, data_dir: Path, mnist: object) -> None:
    """A kill, a full disk, a damaged file or bad input would cost users a run or its result."""
    outcomes = importlib.import_module(f"faults.{name}").run(Place(tmp_path, data_dir, whole=False))
    for one in outcomes:
        print(one)
    assert any(one.tried for one in outcomes)
    assert [one for one in outcomes if not survived(one)] == []


def test_the_page_is_what_the_results_say() -> None:
    """Users would read claims in docs/reliability.md that the measured results do not support."""
    assert PAGE.read_text() == page()


def test_each_guard_of_the_mutants_stands_once_in_the_program() -> None:
    """A guard's mutation test would no longer run, and a guard without effect would stay hidden."""
    for mutant in MUTANTS:
        assert (SOURCE / "distcv" / mutant.file).read_text().count(mutant.old) == 1, mutant
