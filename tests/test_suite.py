"""The tests themselves: what each is for, and that they run side by side without harm."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.parallel import HELD

TESTS = Path(__file__).parent


def test_each_test_says_what_a_user_would_lose() -> None:
    """Whoever sees a test fail would have to guess what that means for a user."""
    silent = [
        f"{path.name}::{node.name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not (ast.get_docstring(node) or "").split("\n")[0].endswith(".")
    ]
    assert silent == []


# Each test notes when it began and ended, and in which process.
NOTING = """
import os, time, pytest

@pytest.fixture(scope="module")
def made():
    return os.getpid()

@pytest.fixture(autouse=True)
def noted(request):
    began = time.time()
    yield
    with open("noted", "a") as file:
        file.write(f"{request.node.originalname} {os.getpid()} {began} {time.time()}\\n")

@pytest.mark.parametrize("number", range(12))
def test_beside(number):
    time.sleep(0.05)

@pytest.mark.parametrize("number", range(6))
def test_together(number, made):
    time.sleep(0.05)
"""
ALONE = """
import time, pytest
from test_noting import noted

@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_alone(number):
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_what_runs_alone_has_nothing_beside_it_and_groups_stay_together(tmp_path: Path) -> None:
    """A test of speed would fail, or pass, by what runs beside it, and nobody trust a red run."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_noting.py").write_text(NOTING)
    (tmp_path / "tests/test_timing.py").write_text(ALONE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n    slow\n")
    command = [sys.executable, "-m", "pytest", "-p", "support.parallel", "-n", "3", "--dist"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    del env[HELD]
    ran = subprocess.run(
        [*command, "loadgroup", "--no-loadscope-reorder", "tests"], cwd=tmp_path,
        env=env | {"PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0 and "21 passed" in ran.stdout, ran.stdout + ran.stderr
    rows = [line.split() for line in (tmp_path / "noted").read_text().splitlines()]
    spans = {name: [] for name in ("test_alone", "test_beside", "test_together")}
    for name, process, began, ended in rows:
        spans[name].append((float(began), float(ended), process))
    assert len({process for *_, process in spans["test_together"]}) == 1
    assert len({process for *_, process in spans["test_beside"]}) > 1, "several workers"
    begin, end = min(spans["test_alone"])[0], max(one[1] for one in spans["test_alone"])
    others = spans["test_beside"] + spans["test_together"]
    assert [one for one in others if one[0] < end and one[1] > begin] == []
