"""The house: imports go down only, and only one room knows Accelerate and DeepSpeed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import distcv

PACKAGE = Path(distcv.__file__).parent
FLOORS = {
    "__init__": 0, "config": 0, "command": 0, "command_line": 0, "environment": 0,
    "intervals": 0, "durable": 0, "files": 0, "lease": 0,
    "counter_rng": 1, "models": 1, "data": 1, "augment": 1, "trivial_augment": 1, "optim": 1,
    "samples": 1, "wandb_api": 1, "wandb_log": 1,
    "runtime": 2,
    "arithmetic": 3,
    "checkpoint": 3, "run_folder": 3, "tracking": 3, "preempt": 3,
    "training": 4, "loop": 4, "saving": 4, "trained": 4,
    "train": 5, "summary": 5, "data.__main__": 5,
    "results": 5, "submit": 5, "doctor": 5, "bench": 5,
    "sync": 5, "dashboard": 5, "report": 5, "compare": 5, "predict": 5, "export": 5,
}  # fmt: skip


def room_of(module: str) -> str:
    return module if module in FLOORS else module.split(".")[0]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, also in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down_only(module: str) -> None:
    """A user who imports one module, such as distcv.data, would load the training loop too."""
    here = room_of(module)
    assert here in FLOORS, f"{module} stands on no floor: give it one in this table"
    for name in imports(modules()[module]):
        if name.startswith("distcv."):
            there = room_of(name.removeprefix("distcv."))
            if there in FLOORS and there != here:
                assert FLOORS[there] <= FLOORS[here], f"{module} imports {name} from above"


@pytest.mark.parametrize("module", sorted(modules()))
def test_only_the_runtime_knows_accelerate(module: str) -> None:
    """A new Accelerate release could break modules that need none, such as distcv.report."""
    known = {name.split(".")[0] for name in imports(modules()[module])}
    if room_of(module) != "runtime":
        assert not known & {"accelerate", "deepspeed"}


def test_a_room_from_above_would_be_seen(tmp_path: Path) -> None:
    """An import inside a function would escape the layer check and slow a user's command."""
    path = tmp_path / "config.py"
    path.write_text("def f():\n    from distcv.loop import evaluate\n")
    assert "distcv.loop" in imports(path)


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "command_line",
        "environment",
        "models",
        "data",
        "train",
        "summary",
        "report",
        "compare",
        "predict",
        "export",
        "sync",
        "dashboard",
        "results.check",
    ],
)
def test_what_is_read_before_the_work_does_not_load_torch(module: str) -> None:
    """Users would wait seconds for torch to load before a typo is refused."""
    code = f"import sys, distcv.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rooms_stay_small() -> None:
    """Users who read or adapt the source would face modules of more than 350 lines."""
    for module, path in modules().items():
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{module} has {lines} lines: what is it doing?"
