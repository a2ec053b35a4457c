"""The wheel away from the clone, and what the README says."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distcv.config import load_recipe, recipe_names
from distcv.data.readers import Arrays
from support.forked import Forked
from support.trained_runs import make_trained_run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(
    (ROOT / f"docs/{name}.md").read_text() for name in ("slurm", "tracking", "reporting")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next(out.glob("distcv-*.whl"))


@pytest.mark.slow
def test_recipes_launch_files_and_templates_travel_in_the_wheel(wheel: Path) -> None:
    """Users of the wheel would lack recipes, launch files, Slurm templates or commands."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "launch", "slurm"):
        paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        files = {f"distcv/{path.relative_to(ROOT)}" for path in paths}
        assert files and files <= inside
    assert "distcv/train.py" in inside
    (entries,) = (name for name in inside if name.endswith("entry_points.txt"))
    listed = zipfile.ZipFile(wheel).read(entries).decode()
    commands = [line for line in shell_lines() if line.startswith("python -m distcv.")]
    for module in {line.split()[2] for line in commands}:
        assert f"{module.replace('.', '-')} = {module}" in listed
    assert {"distcv/report/page.html.j2", "distcv/report/style.css"} <= inside
    assert not any(name.startswith(("tests/", "data/", "runs/")) for name in inside)


@pytest.mark.slow
def test_the_wheel_works_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    """An installed wheel could not train, or would record another repository's commit."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}

    def python(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert python("-c", "import distcv; print(distcv.__file__)").startswith(str(site))
    print_all = (
        "import sys; from distcv.train import main\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = ['train', '--recipe', name, '--print-config']; main()"
    )
    printed = python("-c", print_all, *recipe_names())
    assert printed == "".join(load_recipe(name).to_yaml() for name in recipe_names())
    flags = "--model gap --dataset synthetic --max-steps 5 --name w"
    python("-m", "distcv.train", *flags.split())
    result = json.loads((tmp_path / "runs/w/result.json").read_text())
    assert result["steps"] == 5
    assert result["commit"] is None, "the folder's own repository is not distcv's"


def shell_lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGES, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(re.split("  #| > ", line)[0].strip() for line in lines))


OF_RUNS = {f"distcv.{name}" for name in ("results", "compare", "predict", "sync")}
OF_RUNS_AND_DATA = {"distcv.report", "distcv.export"}


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in shell_lines() if "distcv." in line])
def test_every_command_of_the_readme_is_understood(
    line: str, tmp_path: Path, mnist: Arrays, cifar10: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command copied from the README or the docs would fail for a wrong flag or name.

    That the main commands run whole is seen in CI and elsewhere.
    """
    words = shlex.split(line)
    module = next(word for word in words if word.startswith("distcv."))
    flags = [word for word in words[words.index(module) + 1 :] if word not in ("--", "--slurm")]
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    if "--help" in flags or "--tyro-print-completion" in flags or module == "distcv.summary":
        extra: list[str] = []
    elif module == "distcv.train":
        extra = ["--print-config"]
    elif module in OF_RUNS | OF_RUNS_AND_DATA:
        extra = ["--data-dir", str(ROOT / "data")] if module in OF_RUNS_AND_DATA else []
        result = json.loads((ROOT / "results/gap.json").read_text())[0]
        for name in ("runs/a", "runs/b", "runs/gap-1", "seeds/a/0", "seeds/b/0"):
            made = make_trained_run(tmp_path / name, torch.from_numpy(mnist.test_images[:64]))
            (made / "result.json").write_text(json.dumps(result))
        Image.fromarray(mnist.test_images[0, 0]).save(tmp_path / "digit.png")
    elif module == "distcv.dashboard":
        extra = [] if "--print" in flags else ["--print"]
    else:
        extra = ["--data-dir", str(ROOT / "data"), *(["--dry-run"] if "--watch" in flags else [])]
        if module == "distcv.bench":
            extra += "--only-own --seconds 0.1 --repeats 1 --batch-size 4".split()
    for name in ("launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("sbatch", "sinfo"):  # a Slurm that agrees to anything
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.chdir(tmp_path)
    ran = Forked(module, [*flags, *extra], os.environ | {"PATH": path}, tmp_path / "said")
    _, err = ran.communicate(timeout=120)
    assert ran.returncode == 0, err


def test_the_readme_s_table_of_networks_is_right() -> None:
    """Users would choose a network by a wrong parameter count in the README's table."""
    from distcv.models import MODELS

    rows = re.findall(r"`(\w+)` \| ([\d,]+) \| (?:MNIST|CIFAR-10)", README)
    assert {name: int(count.replace(",", "")) for name, count in rows} == {
        name: model.params for name, model in MODELS.items()
    }


def bench_file(name: str) -> Any:
    return json.loads((ROOT / f"results/bench/{name}.json").read_text())


def images_per_second(name: str) -> float:
    return statistics.median(bench_file(name)["images_per_second"]["distcv"])


def row_of_loops(name: str) -> str:
    """A row of the first table in docs/performance.md, made of its result file."""
    found, rate = bench_file(name), images_per_second(name)
    mfu = rate * found["flops_per_image"] / found["matmul_flops"]
    cells = [
        f"[{name}](../results/bench/{name}.json)",
        f"{rate:,.0f}",
        f"{found['ratio']['bare']:.3f}",
        f"{found['ratio']['conventional']:.2f}",
        f"{100 * mfu:.0f} %",
        f"{found['memory']['ratio']:.2f}",
        f"{found['seconds_to_first_step']:.1f} s",
        str(len(found["images_per_second"]["distcv"])),
    ]
    return f"| {' | '.join(cells)} |"


def row_of_changes(name: str, base: str) -> str:
    """How a row of the table of changes begins: images/s, and their ratio to those without."""
    rate = images_per_second(name)
    return (
        f"| [{name}](../results/bench/{name}.json) | {rate:,.0f} | "
        f"{rate / images_per_second(base):.2f} |"
    )


def row_of_recipes(name: str) -> str:
    """A row of the table of recipes: last epoch, mean and standard deviation over the seeds."""
    rows = bench_file(name)["trainings"]

    def spread(key: str, digits: int) -> str:
        values = [row[key] for row in rows]
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    cells = [f"[{name}](../results/bench/{name}.json)", spread("last_accuracy", 2) + " %"]
    cells += [str(len(rows)), spread("last_seconds", 0), spread("wall_seconds", 0)]
    return f"| {' | '.join(cells)} |"


def test_tables_of_the_page_on_speed_come_from_the_result_files() -> None:
    """docs/performance.md would promise users speeds or accuracies that were not measured."""
    page = (ROOT / "docs/performance.md").read_text()
    rows = re.findall(r"^(\| \[([\w/-]+)\].*)$", page, re.MULTILINE)
    assert len(rows) > 5
    for row, name in rows:
        if name.startswith("changes/"):
            assert row.startswith(row_of_changes(name, name.split("-")[0]))
        elif name.startswith("recipes/"):
            assert row.startswith(row_of_recipes(name))
        else:
            assert row == row_of_loops(name)


def test_shell_scripts_are_sound() -> None:
    """A syntax error in a launch or Slurm script would end a user's job."""
    for script in [ROOT / ".ci/run", *ROOT.glob("slurm/*.sh"), *ROOT.glob("launch/*.sh")]:
        subprocess.run(["bash", "-n", str(script)], check=True)
