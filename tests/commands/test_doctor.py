"""The doctor: what it finds alone, between processes that do wrong on purpose, and of services."""

import base64
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from wandb.sdk.lib.wbauth import wbnetrc

from distcv.doctor import Arguments, Finding, Line, Look, findings, lines_of, machine, places, slurm
from distcv.environment import available_cores
from distcv.runtime.probe import World, join, within
from support.clock import unhindered_seconds
from support.loopback import Serve
from support.runs import ONE_THREAD, ROOT, free_port, launched
from support.wandb_server import ENTITY, KEY, WandbServer

DOCTOR = [sys.executable, "-m", "distcv.doctor"]
FOREIGN = ("SLURM", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC", "ACCELERATE",
           "WANDB_", "GLOO_", "NCCL_")  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """This environment without what a cluster or a launcher has set; W&B is not asked."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return clean | ONE_THREAD | {"WANDB_MODE": "offline"} | more


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    def lines(self, check: str, status: str | None = None) -> list[str]:
        """The lines of a check, without its name."""
        words = [line.split(maxsplit=1) for line in self.out.splitlines()]
        return [
            rest.removeprefix(check).strip()
            for said, rest in words
            if rest.startswith(f"{check} ") and status in (None, said)
        ]

    def wrong(self) -> list[str]:
        return [line for line in self.out.splitlines() if line.startswith("wrong")]


def ask(*flags: str, command: list[str] = DOCTOR, cwd: Path = ROOT, **env: str) -> Answer:
    ran = subprocess.run(
        [*command, *flags], cwd=cwd, env=environment(**env), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    return Answer(ran.returncode, ran.stdout, ran.stderr)


def together(script: Path, folders: list[Path], *flags: str, **env: str) -> list[Answer]:
    """Start `script` in each of the folders, as a process of its own host `a`, `b` and so on."""
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(folders))}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *flags], cwd=folder, text=True,
            env=environment(**env, RANK=str(rank), SLURMD_NODENAME="ab"[rank]),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=120) for one in started]
    finally:
        for one in started:
            one.kill()
    return [Answer(one.returncode, *text) for one, text in zip(started, said, strict=True)]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)


def look_at(look: Look, **fields: Any) -> list[Line]:
    """What a check says in this process, which is alone."""
    return lines_of(look, join(5), Arguments(**fields))


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
    (folder / name).chmod(0o755)


# ---- One process ----


@pytest.mark.slow
def test_a_machine_in_order_is_found_so(mnist: object, data_dir: Path, tmp_path: Path) -> None:
    """The doctor would report faults on a sound machine, or leave folders behind."""
    flags = ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "new/runs"), "--json"]
    said = ask(*flags)
    assert said.code == 0, said
    checks = json.loads(said.out)
    assert {one["status"] for one in checks} == {"ok"}
    texts = {check: [o["text"] for o in checks if o["check"] == check] for check in
             ("versions", "exchange", "runs folder", "data", "W&B")}  # fmt: skip
    assert any(text.startswith("torch ") for text in texts["versions"])
    assert texts["exchange"] == ["skipped: one process"]
    assert "writable, shared and locked" in texts["runs folder"][0]
    assert texts["data"] == [f"mnist in {data_dir}/distcv, verified"]
    assert "WANDB_MODE is offline" in texts["W&B"][0]
    assert len(said.err.splitlines()) == len(checks), "the lines, and no warnings"
    assert list(tmp_path.iterdir()) == [], "the folder of runs and its parent are gone again"


@pytest.mark.slow
def test_all_that_is_wrong_is_told_with_its_remedy(tmp_path: Path) -> None:
    """Users would not learn that data or runs folder are unusable, nor what to do."""
    file = tmp_path / "file"
    file.touch()
    said = ask("--data-dir", str(tmp_path), "--runs-dir", str(file / "runs"))
    assert said.code == 1
    assert said.lines("data", "wrong") == [
        f"mnist is not in {tmp_path}/distcv: python -m distcv.data --dataset mnist --data-dir "
        f"{tmp_path}"
    ]
    assert said.lines("runs folder") == [f"{file}/runs: Not a directory: choose --runs-dir"]
    assert len(said.wrong()) == 2 and said.err == ""


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--help"], 0, "--runs-dir"),
        (["--dataset", "mnits"], 2, "error: unknown dataset 'mnits': did you mean 'mnist'?\n"),
        (["--timeout", "0"], 2, "error: --timeout 0"),
    ],
)
def test_help_and_refusals_come_without_torch(flags: list[str], code: int, text: str) -> None:
    """A typo in a doctor flag would give a traceback, or wait seconds for torch to load."""
    script = (
        f"import sys; sys.argv[1:] = {flags}\nfrom distcv.doctor import command\n"
        "try:\n    command()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    said = ask(command=[sys.executable, "-c", script])
    assert said.code == code and text in said.out + said.err
    assert "Traceback" not in said.err


def test_damaged_data_are_found(mnist: object, data_dir: Path, tmp_path: Path) -> None:
    """The doctor would call a damaged data set verified."""
    (tmp_path / "distcv").mkdir()
    for suffix in ("json", "uint8"):
        shutil.copy(data_dir / f"distcv/mnist.{suffix}", tmp_path / "distcv")
    with (tmp_path / "distcv/mnist.uint8").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    (line,) = look_at(places.data, data_dir=tmp_path)
    assert line.status == "wrong" and "the bytes of train_images are damaged" in line.text
    assert "python -m distcv.data --dataset mnist" in line.text


def test_data_without_files_need_none(tmp_path: Path) -> None:
    """The doctor would ask for files of the synthetic data set, which has none."""
    said = look_at(places.data, data_dir=tmp_path, dataset="synthetic")
    assert said == [Line("ok", "synthetic needs no files")]


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nearly full disk would pass the check and stop a run later."""
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    wrong = [one.text for one in look_at(places.runs_folder, runs_dir=tmp_path) if one[0] != "ok"]
    assert wrong == [f"{tmp_path}: 0.30 GB free: make room, or --runs-dir"]


def test_a_folder_that_takes_no_locks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system whose locks have no effect, two runs could write to one folder."""
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)  # as on some network file systems
    first, second = look_at(places.runs_folder, runs_dir=tmp_path)
    assert first.status == "wrong" and "a lock that rank 0 holds was given here too" in first.text
    assert second.status == "ok" and "writable, " in second.text and "locked" not in second.text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_folder_without_locks_is_found(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users would not learn that the file system of their runs folder has no locks."""

    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = look_at(places.runs_folder, runs_dir=tmp_path)
    assert first.status == "wrong" and f"{tmp_path} has no locks (" in first.text
    assert os.strerror(number) in first.text and "--runs-dir" in first.text
    assert second.status == "ok" and "writable, " in second.text and "locked" not in second.text
    assert list(tmp_path.iterdir()) == []


def test_more_threads_than_cores_are_found(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users would not learn that their processes run more threads than there are cores."""
    processes = available_cores() + 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    wrong = [one.text for one in look_at(machine.devices) if one.status == "wrong"]
    assert any(f"{available_cores()} cores" in text and f"{processes} x" in text for text in wrong)


def test_gpus_that_torch_does_not_see_are_found(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users would not learn that torch sees none of the GPUs that their job was given."""
    stub(tmp_path, "nvidia-smi", "echo 'GPU 0: NVIDIA H200'; echo 'GPU 1: NVIDIA H200'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    wrong = [one.text for one in look_at(machine.devices, slurm=True) if one.status == "wrong"]
    assert wrong[0].startswith("the driver has 2 GPUs, torch sees none: ")
    assert wrong[1] == "Slurm gave 2 GPUs on this node, torch sees 0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert not any("driver" in one.text for one in look_at(machine.devices))


def test_more_processes_than_gpus_are_found(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users would not learn that they start more processes on a node than it has GPUs."""
    from distcv.runtime import launch

    monkeypatch.setattr(launch, "stay_on_cpu", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda number: type("Made", (), {"name": "NVIDIA H200", "total_memory": 141 * 2**30}),
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = look_at(machine.devices)
    assert said[0].text.startswith("1 x NVIDIA H200 (141 GiB)")
    assert said[-1].text == "2 processes on this node, which has 1 GPU: lower --num_processes"
    assert said[-1].status == "wrong"


def test_a_check_that_fails_is_a_line() -> None:
    """An error in one check would end the doctor and hide what the others find."""

    def look(world: World, arguments: Arguments) -> Iterator[Line]:
        yield Line("ok", "so far")
        raise KeyError("MASTER_ADDR\nand more")

    world = join(1)
    assert lines_of(look, world, Arguments()) == [
        Line("ok", "so far"), Line("wrong", r"KeyError: 'MASTER_ADDR\nand more'")
    ]  # fmt: skip


def test_what_takes_too_long_is_left_behind() -> None:
    """A server or an exchange that never answers would keep the doctor waiting forever."""
    began = unhindered_seconds()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.1, lambda: time.sleep(3))
    assert unhindered_seconds() - began < 2
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


# ---- Versions and lines of several processes ----

NEEDED = ["Python>=3.11", "torch>=2.11", "wandb>=0.31", "filelock>=3.15", "tqdm>=4.66",
          "deepspeed>=0.19; extra == 'deepspeed'", "pytest>=8.4; extra == 'dev'"]  # fmt: skip
INSTALLED = {"Python": "3.11.7", "torch": "2.15.0+cu132", "torchvision": "0.30", "wandb": "0.31.0",
             "accelerate": "1.15.0", "filelock": "3.15", "tqdm": "4.70"}  # fmt: skip


def version_texts(changed: dict[str, str], status: str) -> list[str]:
    installed = INSTALLED | changed
    lines = machine.version_lines(NEEDED, lambda name: installed.get(name) or None)
    return [line.text for line in lines if line.status == status]


def test_versions_that_will_do_are_shown() -> None:
    """Users would be told to replace packages that are new enough."""
    assert version_texts({}, "wrong") == []
    shown = version_texts({}, "ok")
    assert shown[:2] == ["Python 3.11.7", "torch 2.15.0+cu132"]
    assert "deepspeed is not installed: only launch/zero*.yaml need it" in shown
    assert not any("tqdm" in text or "pytest" in text for text in shown)


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("Python", "3.10.2", "Python 3.10.2, distcv needs >=3.11: install a newer one"),
        ("torch", "2.9.1", "torch 2.9.1, distcv needs >=2.11: pip install 'torch>=2.11'"),
        ("torch", "2.11.0.dev1", "torch 2.11.0.dev1, distcv needs >=2.11: "),
        ("wandb", "", "wandb is not installed: pip install 'wandb>=0.31'"),
        ("filelock", "3.9", "filelock 3.9, distcv needs >=3.15: pip install 'filelock>=3.15'"),
        ("deepspeed", "0.18", "deepspeed 0.18, distcv needs >=0.19: "),
        ("accelerate", "", "accelerate is not installed: pip install 'accelerate'"),
    ],
)
def test_a_version_below_the_minimum_is_found(name: str, version: str, text: str) -> None:
    """Users would not learn which package is too old or missing, nor how to install it."""
    (wrong,) = version_texts({name: version}, "wrong")
    assert wrong.startswith(text)


HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


def test_equal_lines_are_shown_once_and_others_with_their_place() -> None:
    """A report on many ranks would repeat every line, or not say which rank differs."""
    same, own = Line("ok", "torch 2.15.0", "torch"), Line("ok", "1 x H200")
    said = {rank: [same, own] if rank == 2 else [same] for rank in HOSTS}
    assert findings(said, HOSTS) == [
        Finding("ok", "torch 2.15.0", [0, 1, 2, 3], "4 processes on 2 hosts"),
        Finding("ok", "1 x H200", [2], "rank 2 on b"),
    ]
    assert findings({0: [own], 1: [], 2: [own], 3: []}, HOSTS)[0].places == "2 hosts"
    assert findings({0: [own], 1: [own], 2: [], 3: []}, HOSTS)[0].places == "rank 0, 1 on a"
    assert findings({0: [own], 1: [], 2: [], 3: []}, HOSTS)[0].places == "", "it speaks for all"
    assert findings({0: [own]}, {0: "a"})[0].places == ""


def test_a_difference_between_processes_is_wrong() -> None:
    """Ranks with different versions of torch would pass the check."""
    said = {rank: [Line("ok", "torch 2.15.0", "torch"), Line("ok", "cores")] for rank in HOSTS}
    said[2] = [Line("ok", "torch 2.14.1", "torch"), Line("ok", "cores")]
    assert findings(said, HOSTS) == [
        Finding(
            "wrong",
            "torch 2.15.0 (rank 0, 1 on a; rank 3 on b); torch 2.14.1 (rank 2 on b): install the "
            "same everywhere",
            [0, 1, 2, 3],
            "",
        ),
        Finding("ok", "cores", [0, 1, 2, 3], "4 processes on 2 hosts"),
    ]


def test_a_process_that_says_nothing_is_named() -> None:
    """A rank that does not answer would go unreported, and its node would look sound."""
    said = {rank: [Line("ok", "cores")] for rank in (0, 1, 2)}
    found, silent = findings(said, HOSTS)
    assert found.places == "rank 0, 1 on a; rank 2 on b"
    assert silent.status == "wrong" and silent.places == "rank 3 on b"


# ---- Several processes ----


@pytest.mark.slow
def test_two_processes_measure_their_exchange(
    mnist: object, data_dir: Path, tmp_path: Path
) -> None:
    """Users would not learn whether ranks can exchange tensors, nor how fast."""
    flags = ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path)]
    said = ask(*flags, command=[*launched(2), "-m", "distcv.doctor"])
    (exchange,) = said.lines("exchange", "ok")
    assert exchange.startswith("gloo: sum right, latency 0.000"), exchange
    assert 0.01 < float(exchange.split()[-2]) < 1000, "GB/s"
    (torch,) = [line for line in said.lines("versions") if line.startswith("torch ")]
    assert torch.endswith(" (2 processes on 1 host)")
    assert said.lines("processes") == [f"2 on {socket.gethostname()}"]
    assert "writable, shared and locked" in said.lines("runs folder")[0]
    assert len(said.lines("data")) == 1 and said.lines("head node") == []
    enough = available_cores() >= 2
    assert (said.code, said.wrong() == []) == ((0, True) if enough else (1, False)), said
    assert list(tmp_path.iterdir()) == []


# What rank 1 does other than it should; its folder of runs is another one, too.
MISCHIEF = """
import importlib.metadata as metadata, os, time
import torch.distributed as dist
from distcv.doctor import command
from distcv.runtime import probe

def other_version(name):
    return "99.0" if name == "wandb" else version(name)

def wrong_sum(tensor):
    all_reduce(tensor)
    tensor += 1

version, all_reduce, how = metadata.version, dist.all_reduce, os.environ["HOW"]
if os.environ["RANK"] == "1":
    if how == "differs":
        metadata.version, dist.all_reduce = other_version, wrong_sum
    if how == "hangs":
        probe.exchange = lambda world: time.sleep(100)
    if how == "dies":
        probe.exchange = lambda world: os._exit(9)
command()
"""


@pytest.fixture
def misbehave(tmp_path: Path) -> Callable[[str], list[Answer]]:
    """Starts two processes, on hosts `a` and `b` as they believe; what they answered."""
    (tmp_path / "script.py").write_text(MISCHIEF)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()

    def start(how: str) -> list[Answer]:
        flags = ["--timeout", "60" if how == "differs" else "5", "--dataset", "synthetic"]
        return together(tmp_path / "script.py", folders, *flags, HOW=how)

    return start


@pytest.mark.slow
def test_what_is_wrong_on_another_rank_is_named(
    misbehave: Callable[[str], list[Answer]], tmp_path: Path
) -> None:
    """A fault on another node would be missed, or blamed on the wrong rank."""
    first, second = misbehave("differs")
    assert (first.code, second.code) == (1, 1)
    assert second.out == second.err == "", "only the main process speaks"
    (versions,) = first.lines("versions", "wrong")
    assert "(rank 0 on a); wandb 99.0 (rank 1 on b): install the same everywhere" in versions
    assert first.lines("exchange", "wrong") == ["gloo gives a wrong sum (rank 1 on b)"]
    assert first.lines("head node", "ok")[0].endswith("(rank 0 on a)")
    (head,) = first.lines("head node", "wrong")
    assert head.startswith("MASTER_ADDR 127.0.0.1 is 127.0.0.1 here, which is this node and not")
    assert head.endswith("(rank 1 on b)")
    (folder,) = first.lines("runs folder", "wrong")
    assert folder.startswith(f"{tmp_path}/b/runs isn't shared: a file of rank 0 isn't seen here")
    assert "writable, " in first.lines("runs folder", "ok")[0]
    assert first.lines("data") == ["synthetic needs no files (2 processes on 2 hosts)"]
    assert len(first.wrong()) == 4


@pytest.mark.slow
def test_a_process_that_hangs_in_the_exchange_holds_nobody_up(
    misbehave: Callable[[str], list[Answer]],
) -> None:
    """One rank that hangs would keep the doctor from finishing its other checks."""
    first, second = misbehave("hangs")
    assert (first.code, second.code) == (1, 1) and second.out == ""
    (line,) = first.lines("exchange")
    assert line.startswith("no all-reduce within 5 s: ")
    assert first.lines("data"), "the other checks go on"


@pytest.mark.slow
def test_a_process_that_dies_is_named_once(misbehave: Callable[[str], list[Answer]]) -> None:
    """A rank that dies would not be named, or be reported again by every later check."""
    first, second = misbehave("dies")
    assert (first.code, second.code) == (1, 9)
    lost = [line for line in first.wrong() if "no answer in time" in line]
    assert len(lost) == 1 and lost[0].endswith("(rank 1 on b)")
    assert first.lines("data", "ok") == ["synthetic needs no files"]


@pytest.mark.slow
def test_a_process_that_never_comes_is_named(tmp_path: Path) -> None:
    """Users would not learn which ranks did not start, nor the port that they must reach."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    env = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    began = time.monotonic()
    said = ask("--timeout", "2", "--dataset", "synthetic", cwd=tmp_path, RANK="0", **env)
    assert time.monotonic() - began < 30 and said.code == 1
    assert said.lines("processes", "wrong") == [
        f"rank 1, 2 of 3 did not come within 2 s: start all nodes, let them reach 127.0.0.1 at "
        f"port {port}, or raise --timeout"
    ]
    assert said.lines("exchange") == ["skipped: processes are missing"]
    assert len(said.wrong()) == 1


@pytest.mark.slow
def test_without_the_head_the_others_say_where_they_looked(tmp_path: Path) -> None:
    """On a node that cannot reach rank 0, users would not learn the address that it tried."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = str(taken.getsockname()[1])
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        said = ask("--timeout", "1", cwd=tmp_path, RANK="1", SLURMD_NODENAME="b", **env)
    assert said.code == 1 and said.err == ""
    (line,) = said.lines("processes", "wrong")
    assert line.startswith("rank 1 on b doesn't reach MASTER_ADDR localhost (")
    assert f"at MASTER_PORT {port} within 1 s: Connection refused" in line


@pytest.mark.slow
def test_a_port_that_something_else_has_is_named(serve: Serve, tmp_path: Path) -> None:
    """A MASTER_PORT in use would give a traceback instead of the advice to choose another."""
    port = str(serve({}).server_port)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in "01":
        said = ask("--timeout", "1", cwd=tmp_path, RANK=rank, **env)
        (line,) = said.lines("processes", "wrong")
        assert f"MASTER_PORT {port} is in use by something else, choose another --port" in line
        assert said.code == 1 and "Traceback" not in said.err


# ---- W&B ----


@pytest.fixture
def ask_wandb(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """Asks with a base URL and a key; status and text of the answer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(places, "ANSWERS_WITHIN_S", 1.0)

    def ask(url: str, key: str | None = None) -> tuple[str, str]:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        (line,) = look_at(places.wandb)
        assert KEY not in line.text and (not key or key not in line.text), "keys are secrets"
        return line.status, line.text

    return ask


@pytest.fixture
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def test_a_key_that_the_server_accepts(
    ask_wandb: Callable[..., tuple[str, str]],
    wandb_server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A valid W&B key in netrc or in the environment would be reported as missing."""
    accepted = ("ok", f"{wandb_server.url} accepts the key of {ENTITY}")
    wbnetrc.write_netrc_auth(host=wandb_server.url, api_key=KEY)  # as wandb login does
    assert ask_wandb(wandb_server.url) == accepted, "from netrc"
    (tmp_path / ".netrc").rename(tmp_path / "other")
    assert ask_wandb(wandb_server.url)[1].endswith("runs are logged offline (wandb login)")
    monkeypatch.setenv("NETRC", "~/other")
    assert ask_wandb(wandb_server.url) == accepted, "from the file that NETRC names"
    (tmp_path / "other").unlink()
    assert ask_wandb(wandb_server.url, KEY) == accepted
    assert wandb_server.unknown == set()


def test_a_key_that_the_server_refuses(
    ask_wandb: Callable[..., tuple[str, str]], wandb_server: WandbServer
) -> None:
    """A wrong W&B key would pass the check, and the training would refuse to start."""
    status, text = ask_wandb(wandb_server.url, "0" * 40)
    assert status == "wrong" and text.startswith(f"{wandb_server.url} refuses the key: wandb login")


def test_without_a_key_runs_are_logged_offline(
    ask_wandb: Callable[..., tuple[str, str]], wandb_server: WandbServer
) -> None:
    """Users without a W&B key would not be told that their runs are logged offline."""
    text = f"{wandb_server.url} answers, no key is set: runs are logged offline (wandb login)"
    assert ask_wandb(wandb_server.url) == ("ok", text)


@pytest.mark.slow
def test_a_server_out_of_reach_is_said(ask_wandb: Callable[..., tuple[str, str]]) -> None:
    """Users with a key would not be warned that W&B is out of reach and runs stay offline."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused = f"{url} is out of reach ([Errno 111] Connection refused): runs are logged offline"
        assert ask_wandb(url) == ("ok", refused)
        silent.listen()
        status, text = ask_wandb(url, KEY)
        assert status == "warn" and text.endswith("runs are logged offline") and "out of" in text
    assert ask_wandb("nonsense", KEY)[0] == "warn"


def test_a_server_that_fails_is_said(
    ask_wandb: Callable[..., tuple[str, str]], serve: Serve
) -> None:
    """An error of the W&B server would be taken for a refused key, or not be reported."""
    url = serve({}).url  # it answers 501 to a POST
    status, text = ask_wandb(url, KEY)
    assert status == "warn" and "501" in text and text.endswith("runs are logged offline")


def test_the_key_is_not_sent_to_where_a_server_redirects(
    ask_wandb: Callable[..., tuple[str, str]],
    wandb_server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A redirect could send the user's W&B key to another server."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Redirect(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{wandb_server.url}/graphql")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Redirect) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        ask_wandb(f"http://127.0.0.1:{server.server_port}", KEY)
        thread.join()
    word = base64.b64encode(f"api:{KEY}".encode()).decode()
    assert len(wandb_server.requests) == 1
    assert word not in str(wandb_server.requests[0].headers)


# ---- Slurm, played by stubs ----

STUBS = {
    "sinfo": 'printf "debug* 2 idle\\ndebug* 1 down*\\nlow 3 mixed\\n"',
    "scontrol": """
        case "$*" in
            "show config")
                echo "Configuration data as of 2026-01-01T00:00:00"
                echo "JobRequeue              = ${REQUEUE:-1}"
                echo "KillExtra               = "
                echo "KillWait                = ${KILL:-30} sec" ;;
            "show partition"*)
                echo "PartitionName=debug GraceTime=0 TRES=cpu=2,node=2 PreemptMode=OFF State=UP"
                echo "PartitionName=low GraceTime=${GRACE:-60} PreemptMode=REQUEUE State=UP" ;;
            "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
            "show job"*) echo "JobId=7 Requeue=${REQUEUE:-1} Restarts=0" ;;
            *) exit 9 ;;
        esac
    """,
    "squeue": 'echo "1:23:45"',
}  # fmt: skip


@pytest.fixture
def stubs(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in STUBS.items():
        stub(tmp_path, name, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_a_site_that_requeues_is_described(stubs: None) -> None:
    """Users would not learn whether the site requeues jobs, nor how long a job has to save."""
    assert look_at(slurm.site) == [
        Line("ok", "debug*: 2 idle, 1 down*; low: 3 mixed"),
        Line("ok", "JobRequeue is 1: jobs are requeued"),
        Line("ok", "KillWait is 30 s"),
        Line("ok", "GraceTime of low is 60 s"),
    ]
    assert look_at(slurm.job) == [Line("ok", "not inside of one")]


def test_a_site_that_leaves_no_time_is_warned_of(
    stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users would not be warned of a site that kills jobs before they can save."""
    for name, value in {"REQUEUE": "0", "KILL": "5", "GRACE": "29"}.items():
        monkeypatch.setenv(name, value)
    warned = [line.text.split(",")[0] for line in look_at(slurm.site) if line.status == "warn"]
    assert warned == [
        "JobRequeue is 0: jobs must ask for it by --requeue",
        "KillWait is 5 s",
        "GraceTime of low is 29 s",
    ]


def test_a_job_is_described_with_the_nodes_that_did_not_come(
    stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users would not learn that a node of their job took no part in the check."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
    for name, value in (job | {"SLURMD_NODENAME": "n2"}).items():
        monkeypatch.setenv(name, value)
    first, absent = look_at(slurm.job)
    assert first == Line("ok", "job 7 on n1, n2, tasks per node 1(x2), 1:23:45 left")
    assert absent.status == "wrong" and absent.text.startswith("n1 did not take part: srun ")
    monkeypatch.setenv("REQUEUE", "0")
    assert Line("warn", "this job won't be requeued: sbatch --requeue") in look_at(slurm.job)


@pytest.mark.slow
def test_a_machine_without_slurm_is_told_so(tmp_path: Path) -> None:
    """With --slurm but no Slurm on the PATH, users would not learn what is missing."""
    stub(tmp_path / "bin", "git", "exit 1")
    flags = ["--slurm", "--dataset", "synthetic"]
    said = ask(*flags, cwd=tmp_path, PATH=str(tmp_path / "bin"))
    assert said.code == 1 and len(said.wrong()) == 1
    assert said.lines("Slurm", "wrong")[0].startswith("sinfo is not on the PATH")
