"""One trajectory everywhere: the same losses, samples and state under every strategy.

Rounding differs between strategies, and a young network at a high rate amplifies it tenfold a step
(so do two threads against one). So these trainings start from a common checkpoint, at a low rate.
"""

import ast
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.forked import ONE_THREAD, Forked
from support.runs import ROOT, STRATEGY, ranks
from support.shared import made_once, shared_folder

PACKAGE = ROOT / "src/distcv"

# Without BatchNorm, with everything that has a state; and with it, by SGD with momentum. What the
# recipes say of these is given, too, since recipes go on changing: how far a rounding grows depends
# on how far a network has come, and on its rate.
PINNED = "--epochs 4 --warmup 0.25 --momentum 0.9 --translate 1 --rotate 0 --scale 0"
PLAIN = (
    "--model lighter --batch-size 65 --optimizer adamw --weight-decay 0.05 --ema-decay 0.9 "
    f"--clip-norm 1 {PINNED}"
)
NORMED = f"--model gap --batch-size 64 --optimizer sgd --weight-decay 1e-4 --sync-bn {PINNED}"
MUON = PLAIN.replace("adamw", "muon")
FLAGS = {"plain": PLAIN.split(), "normed": NORMED.split(), "muon": MUON.split()}
YOUNG = {
    "plain": ["--lr", "0.003"], "normed": ["--lr", "0.1", "--warmup", "0.1"],
    "muon": ["--lr", "0.003"],
}  # fmt: skip
LATER = {
    "plain": ["--lr", "0.0003", "--clip-norm", "0.5"], "normed": ["--lr", "0.0003"],
    "muon": ["--lr", "0.0003", "--clip-norm", "0.5"],
}  # fmt: skip
ACCUMULATED = ["--gradient-accumulation-steps", "2"]
START, MIDDLE, END = 100, 120, 140

WRITERS = ["single", "ddp x2", "fsdp2 x2", "zero2 x2", "zero3 x2"]
OTHERS = ["ddp x4", "zero1 x2"]
ELSEWHERE = ["ddp x3", *(f"{name} x{n}" for name in ("fsdp2", "zero2", "zero3") for n in (1, 3))]
# The networks with BatchNorm have two groups of parameters, with and without weight decay.
READERS = [
    *(("plain", reader) for reader in WRITERS + ELSEWHERE),
    *(("normed", reader) for reader in ("single", "zero1 x3")),
]


class Trajectories:
    """Runs `trajectory.py` and keeps what it found."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.folder, self.data_dir = folder, data_dir

    def run(self, where: str, flags: list[str], **order: Any) -> dict[str, Any]:
        """``where`` is a strategy and a number of processes, such as ``zero2 x3``."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        out = place / "said.json"
        order |= {"out": str(out), "data": str(self.data_dir)}
        name, processes = (where + " x1").split(" x")[:2]
        arguments = [json.dumps(order), "--schedule", "constant", *flags]
        environments: list[dict[str, str]] = [{}]
        if where != "single":
            environments = [each | STRATEGY[name] for each in ranks(int(processes))]
        self.run_together(arguments, environments, place)
        said: dict[str, Any] = json.loads(out.read_text())
        expected = ("single", "1") if where == "single" else tuple(where.split(" x"))
        joined = ("single" if where == "ddp x1" else said["strategy"], str(said["processes"]))
        assert joined == expected
        return said

    def run_together(
        self, arguments: list[str], environments: list[dict[str, str]], place: Path
    ) -> None:
        """Processes that all must do well; the first one that doesn't ends the others."""
        started = [
            Forked(
                "support.trajectory", arguments, os.environ | ONE_THREAD | env, place / str(rank)
            )
            for rank, env in enumerate(environments)
        ]
        try:
            deadline = time.monotonic() + 300
            while any(process.poll() is None for process in started):
                if any(process.poll() for process in started) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in started:
                process.kill()
        printed = ["".join(process.communicate()) for process in started]
        assert not any(process.returncode for process in started), "\n".join(printed)

    def young(self, kind: str) -> Path:
        """The checkpoint from which all trajectories of a kind start."""
        flags = [*FLAGS[kind], *YOUNG[kind]]

        def make(folder: Path) -> None:
            self.run("single", flags, steps=START + 1, save=[START, str(folder)])

        return made_once(self.folder / kind, make) / f"step-{START:08d}"

    def once(self, key: tuple[str, ...], train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a training found that the first test to ask for it makes, on whatever worker."""

        def make(folder: Path) -> None:
            (folder / "found.json").write_text(json.dumps(train()))

        name = re.sub(r"[^\w.]+", "-", " ".join(key))
        folder = made_once(self.folder / "found" / name, make)
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return found

    def curve(self, where: str, kind: str, *flags: str) -> dict[str, Any]:
        """Forty steps from the common start; a checkpoint is left in the middle."""

        def train() -> dict[str, Any]:
            path = str(self.young(kind))
            saved = None if flags else [MIDDLE, str(self.written(where, kind).parent)]
            every = [*FLAGS[kind], *LATER[kind], *flags]
            return dict(self.run(where, every, steps=END, resume=[path], save=saved)[path])

        return self.once((where, kind, *flags), train)

    def brief(self, where: str, flags: str) -> dict[str, Any]:
        """Eight steps from the common start."""

        def train() -> dict[str, Any]:
            path = str(self.young("plain"))
            both = [*FLAGS["plain"], *LATER["plain"], *flags.split()]
            return dict(self.run(where, both, steps=START + 8, resume=[path])[path])

        return self.once(("brief", where, flags), train)

    def written(self, where: str, kind: str) -> Path:
        """The checkpoint that is written in the middle of a curve."""
        return self.folder / f"{kind} {where}" / f"step-{MIDDLE:08d}"


@pytest.fixture(scope="session")
def trajectories(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: object
) -> Trajectories:
    folder = shared_folder(tmp_path_factory) / "trajectories"
    folder.mkdir(exist_ok=True)
    return Trajectories(folder, data_dir.resolve())


def close(one: list[float], other: list[float]) -> bool:
    return other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("where", WRITERS[1:] + OTHERS)
@pytest.mark.parametrize("kind", ["plain", "normed", "accumulated"])
def test_forty_steps_are_the_same_everywhere(
    kind: str, where: str, trajectories: Trajectories
) -> None:
    """Another strategy or process count would give the user another loss curve."""
    arguments = ["plain", *ACCUMULATED] if kind == "accumulated" else [kind]
    one = trajectories.curve("single", *arguments)
    other = trajectories.curve(where, *arguments)
    assert len(one["losses"]) == 40 and not one["differing"]
    assert min(one["losses"][20:]) < min(one["losses"][:5]), "it should learn"
    assert other["samples"] == one["samples"]
    assert not other["differing"], "what was restored is not what was written"
    assert close(one["losses"], other["losses"])
    assert other["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert close([one["test_loss"]], [other["test_loss"]])
    assert len(one["mistakes"]) == 64 and set(one["mistakes"]) == set(other["mistakes"])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ddp x2", "fsdp2 x2", "fsdp2 x3"])
def test_muon_takes_the_same_steps_wherever_it_works(
    where: str, trajectories: Trajectories
) -> None:
    """Under DDP or FSDP2, `--optimizer muon` would learn differently than on one process."""
    one, other = (trajectories.curve(place, "muon") for place in ("single", where))
    assert min(one["losses"][20:]) < min(one["losses"][:5]), "it should learn"
    assert other["samples"] == one["samples"] and not other["differing"]
    assert close(one["losses"], other["losses"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reader"), READERS)
def test_a_checkpoint_written_anywhere_resumes_anywhere(
    kind: str, reader: str, trajectories: Trajectories
) -> None:
    """A stopped run could not resume under another strategy or process count with its state.

    The cross matrix: each reader resumes what each of the five writers left.
    """
    whole = {writer: trajectories.curve(writer, kind) for writer in WRITERS}
    paths = {writer: str(trajectories.written(writer, kind)) for writer in WRITERS}
    flags = [*FLAGS[kind], *LATER[kind]]
    said = trajectories.run(reader, flags, steps=END, resume=list(paths.values()))
    for writer, path in paths.items():
        resumed = said[path]
        assert resumed["differing"] == [], f"{writer} -> {reader}: state"
        assert resumed["samples"] == whole[writer]["samples"][-len(resumed["samples"]) :]
        expected = whole[writer]["losses"][MIDDLE - START :]
        assert close(expected, resumed["losses"]), f"{writer} -> {reader}: losses"
    assert close([whole[WRITERS[-1]]["test_loss"]], [said[paths[WRITERS[-1]]]["test_loss"]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "where", "tolerance"),
    [
        *(("--precision fp16", where, 1e-3) for where in WRITERS[1:]),  # 8e-5
        (f"--precision fp16 {' '.join(ACCUMULATED)}", "zero2 x2", 1e-3),
        ("--precision bf16 --compile", "fsdp2 x2", 1e-2),  # 7e-4
    ],
)
def test_half_precision_and_compilation_work_everywhere(
    flags: str, where: str, tolerance: float, trajectories: Trajectories
) -> None:
    """Half precision or --compile would fail, or clip wrongly, under one of the strategies.

    Beside each, how far eight steps parted: bfloat16 has 8 bits, float16 11.
    """
    one, other = (trajectories.brief(place, flags) for place in ("single", where))
    assert not other["differing"]
    assert other["losses"] == pytest.approx(one["losses"], rel=tolerance)
    # And the gradient is clipped by its own norm, not by that of the scaled one; the next losses
    # and norms tell.
    full = trajectories.brief("single", "")
    for half in (one, other):
        both = zip(half["norms"], full["norms"], strict=True)
        told = [(norm, expected) for norm, expected in both if norm is not None]
        assert len(told) >= 6, "an overflow is rare"
        assert [norm for norm, _ in told] == pytest.approx([e for _, e in told], rel=2e-2)


def test_after_an_overflow_under_deepspeed_the_scale_falls() -> None:
    """After an overflow, fp16 under DeepSpeed would skip every step and learn nothing."""
    from distcv.runtime.zero import Zero

    zero: Any = Zero.__new__(Zero)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(1))
    zero.zero = SimpleNamespace(torch_autocast_gradscaler=scaler, overflow=False)
    zero.stepped()
    assert scaler.get_scale() == 1024
    zero.zero.overflow = True
    zero.stepped()
    assert scaler.get_scale() == 512


@pytest.mark.slow
def test_sgd_scales_its_loss_under_fsdp2(trajectories: Trajectories) -> None:
    """SGD with fp16 under FSDP2 would apply gradients that are still scaled, and diverge."""
    flags = [*NORMED.split(), "--lr", "0.02", "--warmup", "0", "--precision", "fp16"]
    flags += ["--batch-size", "32"]
    one, other = (
        trajectories.run(where, flags, steps=8)["start"]["losses"]
        for where in ("single", "fsdp2 x2")
    )
    assert other == pytest.approx(one, rel=2e-2)  # 0.7 %
    assert one[-1] < one[0] - 0.15, "it should learn"


def main_branches(tree: ast.AST) -> list[ast.AST]:
    """What is executed on the main process only."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp) and "is_main" in ast.unparse(node.test):
            found += node.body if isinstance(node, ast.If) else [node.body]
    return found


COLLECTIVES = {
    "sum", "gather", "nonfinite", "roll_back", "wait", "from_main", "on_main", "weights", "whole",
    "optimizer_tensors",
    "on_host", "read", "snapshot", "shared_statistics", "evaluate", "close", "backward", "barrier",
    "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast_object_list", "full_tensor",
}  # fmt: skip


def collectives_in(nodes: list[ast.AST]) -> set[str]:
    calls = [n.func for top in nodes for n in ast.walk(top) if isinstance(n, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
    return names & COLLECTIVES


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_collective_under_a_branch_of_the_main_process(path: Path) -> None:
    """A run on several processes would hang in a collective that only rank 0 enters."""
    assert not collectives_in(main_branches(ast.parse(path.read_text())))


def test_a_collective_under_such_a_branch_would_be_found() -> None:
    """The check for collectives on rank 0 alone would find none, and runs could hang."""
    code = "if runtime.is_main:\n    loss = runtime.sum(loss)\n"
    assert collectives_in(main_branches(ast.parse(code))) == {"sum"}
