"""`launch/multinode.sh`: what it hands to Accelerate, and real trainings on two nodes."""

import contextlib
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from distcv.preempt import NOT_SAVED, STOPPED
from faults.core import wait_until
from support.runs import ROOT, Runs, free_port

SCRIPT = str(ROOT / "launch/multinode.sh")
BIN = str(Path(sys.executable).parent)
FROM_CLUSTER = ("SLURM", "PET_", "GLOO_", "NCCL_", "TORCH_DISABLE", "NNODES", "NODE_", "NPROC_",
                "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")  # fmt: skip


def environment(*first: Path, **more: str) -> dict[str, str]:
    """This environment without what a cluster or a launcher has set; `first` leads the PATH."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(FROM_CLUSTER)}
    path = os.pathsep.join([*map(str, first), BIN, os.environ["PATH"]])
    fixed = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT / "src")}
    return clean | fixed | {"OMP_NUM_THREADS": "1"} | more


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Stub:
    """Runs the script with an Accelerate that only prints what it was given."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.packages = folder / "bin", folder / "packages"
        for package in ("accelerate", "accelerate/commands"):
            write_program(self.packages / package / "__init__.py", "")
        write_program(
            self.packages / "accelerate/commands/launch.py",
            "import json, os, sys\n"
            "def main():\n"
            "    print(json.dumps({'args': sys.argv[1:], 'env': dict(os.environ)}))\n",
        )
        # As Slurm's: one host a line.
        write_program(
            self.bin / "scontrol",
            '#!/bin/sh\n[ "$1 $2" = "show hostnames" ] || exit 1\n'
            '[ "$3" = "n[3-4]" ] && printf "n3\\nn4\\n" || printf "%s\\n" "$3"\n',
        )

    def run(
        self, *words: str, cwd: Path = ROOT, inside: tuple[str, ...] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*inside, SCRIPT, *words], cwd=cwd,
            env=environment(self.bin, PYTHONPATH=str(self.packages), **env),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def told(
        self, *words: str, cwd: Path = ROOT, inside: tuple[str, ...] = (), **env: str
    ) -> tuple[dict[str, str], list[str], dict[str, str]]:
        """Accelerate's options, then what follows them, then its environment."""
        ran = self.run(*words, cwd=cwd, inside=inside, **env)
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout)
        args: list[str] = said["args"]
        at = args.index("-m")
        assert args[at + 1] == "distcv.train"
        options = dict(zip(args[0:at:2], args[1:at:2], strict=True))
        assert ran.stderr == self.waiting(options)
        return options, args[at + 2 :], said["env"]

    @staticmethod
    def waiting(options: dict[str, str]) -> str:
        """What a node says before it waits for others."""
        rank, nodes = options["--machine_rank"], options["--num_machines"]
        if nodes == "1":
            return ""
        place = f"{options['--main_process_ip']}:{options['--main_process_port']}"
        return (
            f"node {rank} of {nodes}: waiting for the others at {place} (if nothing follows, run "
            "--module distcv.doctor and no flags on all nodes: it names those that are missing)\n"
        )


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


def test_options_reach_accelerate_and_flags_the_training(stub: Stub) -> None:
    """Flags after `--` would be lost, split at spaces or taken for options of the launcher."""
    options, flags, _ = stub.told(
        "--config", "launch/fsdp2.yaml", "--nodes", "4", "--node-rank=2", "--head", "127.0.0.1",
        "--port", "1234", "--processes-per-node", "8",
        "--", "--model", "resnet18", "--name", "two words", "--", "--nodes", "9",
    )  # fmt: skip
    assert options == {
        "--config_file": "launch/fsdp2.yaml", "--num_machines": "4", "--machine_rank": "2",
        "--num_processes": "32", "--max_restarts": "0", "--main_process_ip": "127.0.0.1",
        "--main_process_port": "1234",
    }  # fmt: skip
    assert flags == ["--model", "resnet18", "--name", "two words", "--", "--nodes", "9"]


@pytest.mark.slow
def test_one_node_needs_no_address_and_takes_the_gpus(stub: Stub) -> None:
    """On a single machine, multinode.sh would demand an address or leave GPUs idle."""
    options, flags, env = stub.told()
    assert options == {
        "--config_file": str(ROOT / "launch/ddp.yaml"),
        "--num_machines": "1", "--machine_rank": "0", "--max_restarts": "0",
        "--num_processes": str(max(1, torch.cuda.device_count())), "--main_process_port": "0",
    }  # fmt: skip
    assert flags == [] and "GLOO_SOCKET_IFNAME" not in env


def test_names_of_torchrun_are_understood(stub: Stub) -> None:
    """A job script that sets torchrun's variables would start the wrong number of processes."""
    options, _, _ = stub.told(
        NNODES="3", NODE_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="4321", NPROC_PER_NODE="2"
    )
    assert options["--num_machines"] == "3" and options["--num_processes"] == "6"
    assert options["--machine_rank"] == "1" and options["--main_process_port"] == "4321"
    assert options["--main_process_ip"] == "127.0.0.1"


SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[3-4]",
         "SLURM_JOB_ID": "4012345", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip


def test_names_of_slurm_are_understood(stub: Stub) -> None:
    """Under Slurm, nodes would not find their head, or two jobs would use the same port."""
    options, _, _ = stub.told(**SLURM)
    assert options["--num_machines"] == "2" and options["--num_processes"] == "8"
    assert options["--machine_rank"] == "1" and options["--main_process_ip"] == "n3"
    port = options["--main_process_port"]
    assert 20000 <= int(port) < 32768
    assert stub.told(**SLURM | {"SLURM_JOB_ID": "4012346"})[0]["--main_process_port"] != port
    # A step on some of the job's nodes counts from the first of these.
    assert stub.told(**SLURM, SLURM_STEP_NODELIST="n4")[0]["--main_process_ip"] == "n4"


def test_options_come_before_torchrun_s_names_and_these_before_slurm_s(stub: Stub) -> None:
    """An explicit --nodes or --port would lose to a variable that the cluster sets."""
    mixed = SLURM | {"NNODES": "3", "MASTER_ADDR": "127.0.0.1"}
    options, _, _ = stub.told("--nodes", "5", "--port", "77", **mixed)
    assert options["--num_machines"] == "5" and options["--main_process_port"] == "77"
    assert options["--main_process_ip"] == "127.0.0.1" and options["--machine_rank"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "two"], "--nodes is 'two'"),
        (["--nodes", "0"], "--nodes is '0'"),
        (["--nodes", "08"], "--nodes is '08'"),
        (["--nodes", "2", "--node-rank", "2", "--head", "h"], "--node-rank is '2'"),
        (["--nodes", "2", "--node-rank", "-1", "--head", "h"], "--node-rank is '-1'"),
        (["--nodes", "2"], "--head is missing"),
        (["--nodes", "2", "--head", "127.0.0.1", "--port", "0"], "--port is '0'"),
        (["--port", "65536"], "--port is '65536'"),
        (["--processes-per-node", "gpu"], "--processes-per-node is 'gpu'"),
        (["--max-restarts", "1.5"], "--max-restarts is '1.5'"),
        (["--config", "launch/dpd.yaml"], "no file launch/dpd.yaml"),
        (["--model", "resnet18"], "--model: flags of distcv.train come after --"),
        (["resnet18"], "resnet18: flags"),
        (["--head"], "--head needs a value"),
    ],
)
def test_bad_input_is_refused_in_one_line(stub: Stub, words: list[str], said: str) -> None:
    """A typo in an option of multinode.sh would start a wrong job instead of being named."""
    own = [] if "--processes-per-node" in words else ["--processes-per-node", "1"]
    ran = stub.run(*own, *words)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert said in ran.stderr


def test_it_works_from_any_folder_and_stays_there(stub: Stub, tmp_path: Path) -> None:
    """Outside the clone, multinode.sh would miss its launch files or write runs elsewhere."""
    words = ["--config", "launch/zero1.yaml", "--processes-per-node", "1"]
    options, _, env = stub.told(*words, cwd=tmp_path)
    assert options["--config_file"] == str(ROOT / "launch/zero1.yaml")
    assert env["PWD"] == str(tmp_path)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/zero1.yaml").touch()
    assert stub.told(*words, cwd=tmp_path)[0]["--config_file"] == "launch/zero1.yaml"


def test_the_environment_beside_the_clone_is_used_unless_one_is_active(tmp_path: Path) -> None:
    """multinode.sh would not use the virtual environment that the user made or activated."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name, folder in (("clone's", clone / ".venv/bin"), ("path's", tmp_path / "bin")):
        for program in ("accelerate", "python3"):
            write_program(folder / program, f'#!/bin/sh\necho "{name}"\n')
    command = [str(clone / "launch/multinode.sh"), "--processes-per-node", "1"]
    for active, expected in (("", "clone's\n"), (sys.prefix, "path's\n")):
        env = environment(tmp_path / "bin", VIRTUAL_ENV=active)
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert ran.stdout == expected, ran.stderr


def test_help_says_what_there_is(stub: Stub) -> None:
    """`multinode.sh --help` would fail, or show source code instead of the options."""
    ran = stub.run("--help")
    assert ran.returncode == 0 and "--max-restarts M" in ran.stdout and "#" not in ran.stdout
    assert "set -euo" not in ran.stdout


def test_restarts_are_told_to_all_nodes(stub: Stub) -> None:
    """With --max-restarts, a failure on one node would leave the other nodes hanging."""
    words = ["--nodes", "2", "--head", "127.0.0.1", "--processes-per-node", "1"]
    options, _, env = stub.told(*words, "--max-restarts", "3")
    assert options["--max_restarts"] == "3" and options["--rdzv_backend"] == "c10d"
    assert "is_host=1" in options["--rdzv_conf"] and env["PET_LOCAL_ADDR"] == "127.0.0.1"
    options, _, env = stub.told(*words, "--max-restarts", "3", "--node-rank", "1")
    assert "is_host=0" in options["--rdzv_conf"]
    assert "--rdzv_backend" not in stub.told(*words)[0]


HEAD = "10.99.1.1"
ADDRESS = ["--head", HEAD, "--port", "29555"]


class Nodes:
    """Two network namespaces, joined by a cable, which share nothing else of the network."""

    def __init__(self) -> None:
        self.names = [f"distcv{os.getpid()}{side}" for side in "ab"]

    def make(self) -> None:
        a, b = self.names
        for line in (
            f"netns add {a}",
            f"netns add {b}",
            f"-n {a} link add cable0 type veth peer name cable1 netns {b}",
            f"-n {a} addr add {HEAD}/24 dev cable0",
            f"-n {b} addr add 10.99.1.2/24 dev cable1",
            f"-n {a} link set lo up",
            f"-n {b} link set lo up",
            f"-n {a} link set cable0 up",
            f"-n {b} link set cable1 up",
        ):
            subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def inside(self, rank: int) -> tuple[str, ...]:
        """What a command starts with to run on this node."""
        return ("ip", "netns", "exec", self.names[rank])


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        made.make()
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"network namespaces need Linux, root and iproute2's ip: {why.strip()}")
    finally:
        with contextlib.suppress(OSError):
            made.remove()


def test_gloo_and_nccl_use_the_interface_between_the_nodes(
    stub: Stub, nodes: Nodes, tmp_path: Path
) -> None:
    """On machines with several networks, processes would try one that doesn't connect them."""
    words = ["--nodes", "2", "--head", HEAD, "--processes-per-node", "1"]
    for rank, interface in ((0, "cable0"), (1, "cable1")):
        inside = nodes.inside(rank)
        _, _, env = stub.told(*words, "--node-rank", str(rank), inside=inside)
        assert env["GLOO_SOCKET_IFNAME"] == interface
        assert env["NCCL_SOCKET_IFNAME"] == f"={interface}"
    _, _, env = stub.told(*words, inside=inside, GLOO_SOCKET_IFNAME="a", NCCL_SOCKET_IFNAME="b")
    assert env["GLOO_SOCKET_IFNAME"] == "a" and env["NCCL_SOCKET_IFNAME"] == "b"


def test_a_head_that_calls_itself_127_0_1_1_is_reached(
    stub: Stub, nodes: Nodes, tmp_path: Path
) -> None:
    """Nodes would not reach a head whose own name resolves to 127.0.1.1.

    As Debian writes it into /etc/hosts.
    """
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 thehead\n")
    mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
    inside = (*nodes.inside(0), "unshare", "-m", "sh", "-c", mount, str(hosts))
    words = ["--nodes", "2", "--head", "thehead", "--processes-per-node", "1"]
    _, _, env = stub.told(*words, inside=inside)
    assert "GLOO_SOCKET_IFNAME" not in env, "there is no way out, so nothing better is known"
    route = f"ip -n {nodes.names[0]} route add default via 10.99.1.2"
    subprocess.run(route.split(), check=True)
    _, _, env = stub.told(*words, "--max-restarts", "1", inside=inside)
    assert env["GLOO_SOCKET_IFNAME"] == "cable0" and env["PET_LOCAL_ADDR"] == HEAD


def start(
    rank: int, folder: Path, inside: tuple[str, ...], *words: str, **env: str
) -> subprocess.Popen[bytes]:
    """Run the script on one node; what it says goes to a file of `folder`."""
    with (folder / f"node{rank}").open("wb") as said:
        return subprocess.Popen(
            [*inside, SCRIPT, "--nodes", "2", "--node-rank", str(rank), "--processes-per-node",
             "1", *words],
            env=environment(**env), stdout=said, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip


def stop(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.terminate()  # the launcher ends what it started
    for process in started:
        process.wait(timeout=60)


def finish(folder: Path, started: list[subprocess.Popen[bytes]]) -> str:
    """Wait for the nodes, which must do well; what the head said."""
    try:
        codes = [process.wait(timeout=300) for process in started]
    finally:
        stop(started)
    said = [(folder / f"node{rank}").read_text() for rank in range(len(started))]
    assert codes == [0] * len(started), "\n\n".join(said)
    return said[0]


FLAGS = ["--model", "lighter", "--optimizer", "adamw", "--lr", "0.0003", "--batch-size", "65",
         "--log-every", "1", "--checkpoint-every", "5", "--max-steps", "20"]  # fmt: skip


class Trained(NamedTuple):
    folder: Path
    flags: list[str]

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [row["loss"] for row in rows if row["event"] == "train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: object) -> Trained:
    """20 steps of one process, in the run folder `one`."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*FLAGS, "--runs-dir", str(folder), "--data-dir", str(data_dir.resolve())]
    words = [sys.executable, "-m", "distcv.train", *flags, "--name", "one"]
    subprocess.run(words, check=True, env=environment(), capture_output=True, timeout=300)
    return Trained(folder, flags)


def start_doctor(rank: int, folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    """The doctor on one of two nodes, which waits for the other so long."""
    words = ["--config", "launch/cpu.yaml", "--module", "distcv.doctor", "--head", "127.0.0.1"]
    flags = ["--timeout", str(seconds), "--dataset", "synthetic"]
    return start(rank, folder, (), *words, "--port", free_port(), "--", *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "missed"),
    [(0, "rank 1 of 2 did not come within 2 s"), (1, "doesn't reach MASTER_ADDR 127.0.0.1")],
)
def test_the_doctor_names_a_node_that_never_comes(rank: int, missed: str, tmp_path: Path) -> None:
    """The doctor would hang or crash instead of naming the missing node."""
    assert start_doctor(rank, tmp_path, 2).wait(timeout=60) == 1
    said = (tmp_path / f"node{rank}").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("wrong")]
    assert missed in line
    assert "Traceback" not in said and "waiting for the others" not in said


def children_of(pid: int, words: str) -> list[psutil.Process]:
    """The children of a script whose command lines hold these words."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # others come and go
            if words in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_doctor_that_waits(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C or a cancelled job would leave a doctor running on the node."""
    script = start_doctor(0, tmp_path, 600)
    try:
        wait_until(lambda: children_of(script.pid, "python3 -m distcv.doctor"), 60, "doctor")
        (doctor,) = children_of(script.pid, "python3 -m distcv.doctor")
        script.send_signal(how)
        assert script.wait(timeout=20) != 0
        assert not doctor.is_running()
    finally:
        stop([script])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "fsdp2", "zero1"])
def test_two_nodes_learn_the_curve_of_one_process(
    config: str, trained: Trained, nodes: Nodes, tmp_path: Path
) -> None:
    """Training on two nodes would fail, or follow another loss curve than on one process."""
    if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'distcv[deepspeed]'")
    words = ["--config", f"launch/{config}.yaml", *ADDRESS]
    flags = ["--", *trained.flags, "--name", config]
    both = [start(rank, tmp_path, nodes.inside(rank), *words, *flags) for rank in (0, 1)]
    said = finish(tmp_path, both)
    assert "2 processes on 2 nodes" in said
    result = json.loads((trained.folder / config / "result.json").read_text())
    assert result["processes"] == 2
    assert trained.losses(config) == pytest.approx(trained.losses("one"), rel=1e-5)


@pytest.mark.slow
def test_after_a_process_is_killed_all_start_again(
    trained: Trained, nodes: Nodes, tmp_path: Path
) -> None:
    """If a process dies on one node, the other node would hang, or both would start from step 0."""
    words = ["--config", "launch/cpu.yaml", "--max-restarts", "1", *ADDRESS]
    flags = ["--", *trained.flags, "--name", "killed"]
    both = [start(rank, tmp_path, nodes.inside(rank), *words, *flags) for rank in (0, 1)]
    try:
        Runs(trained.folder, tmp_path).wait_for_step("killed", 8)
        (launcher,) = psutil.Process(both[0].pid).children()
        (worker,) = launcher.children()
        worker.kill()
    except BaseException:
        stop(both)
        raise
    assert "resuming after step" in finish(tmp_path, both)
    assert trained.losses("killed") == pytest.approx(trained.losses("one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_the_training_and_the_exit_code_says_so(
    how: signal.Signals, trained: Trained, tmp_path: Path
) -> None:
    """A preempted job would end unsaved, be restarted, or leave with a code that isn't requeued."""
    flags = [*trained.flags, "--max-steps", "2000", "--name", how.name]
    words = ["--config", "launch/cpu.yaml", "--processes-per-node", "2", "--max-restarts", "2"]
    with (tmp_path / "said").open("wb") as said:
        script = subprocess.Popen([SCRIPT, *words, "--", *flags], env=environment(),
                                  stdout=said, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        Runs(trained.folder, tmp_path).wait_for_step(how.name, 8)
        script.send_signal(how)
        assert script.wait(timeout=60) == 75
    finally:
        stop([script])
    text = (tmp_path / "said").read_text()
    assert text.count("stopped after step") == 1, "no restart"
    assert "Traceback" not in text and "Error" not in text


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_wrong_input_ends_in_its_line_and_exit_code(processes: str) -> None:
    """The line about a wrong flag would be buried under a traceback of the launcher."""
    words = ["--config", "launch/cpu.yaml", "--processes-per-node", processes, "--"]
    ran = subprocess.run([SCRIPT, *words, "--batch-size", "0"], cwd=ROOT, env=environment(),
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: --batch-size 0") and ran.stderr.count("\n") == 1


NOT_HEAD = "is_host=0,read_timeout=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "module", "said"),
    [
        (["--num_machines", "2", "--rdzv_conf", "timeout=2"], "distcv.train",
         "error: this node's launcher misses the others (Timed out after"),
        (["--num_machines", "2", "--rdzv_backend", "c10d", "--rdzv_conf", NOT_HEAD],
         "distcv.train", "error: this node's launcher misses the others (The connection"),
        (["--num_machines", "1"], "distcv.nothing", "Root Cause (first observed failure):"),
    ],
)  # fmt: skip
def test_the_launcher_tells_what_the_processes_can_t(
    options: list[str], module: str, said: str
) -> None:
    """A node that can't reach the others would show a traceback instead of the remedy."""
    command = [sys.executable, "launch/accelerate_launch.py", "--config_file", "launch/cpu.yaml"]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    ran = subprocess.run([*command, *place, *options, "-m", module], cwd=ROOT, env=environment(),
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert ran.returncode == 1 and said in ran.stderr
    assert ("Traceback" in ran.stderr) == (module == "distcv.nothing")


def test_the_launcher_tells_that_deepspeed_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users without DeepSpeed would see a traceback instead of the command that installs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    config = str(ROOT / "launch/zero2.yaml")
    words = ["--config_file", config, "--num_processes", "1", "-m", "distcv.train"]
    monkeypatch.setattr(sys, "argv", ["accelerate_launch.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "launch/accelerate_launch.py"), run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: the launch file asks for DeepSpeed, which is not installed: pip install "
        "'distcv[deepspeed]', or use launch/fsdp2.yaml\n"
    )


def test_the_launcher_knows_the_exit_codes_of_a_training() -> None:
    """Exit code 74 or 75 would become 1, and a batch script would take a stop for a crash."""
    found = runpy.run_path(str(ROOT / "launch/accelerate_launch.py"), run_name="launch")
    assert found["TOLD"] == (2, NOT_SAVED, STOPPED)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_signal_ends_a_node_that_waits_for_others(restarts: str, tmp_path: Path) -> None:
    """A node that waits for others would ignore SIGTERM, and its job would seem to have failed.

    There is no training yet that could save; the exit code is that of one.
    """
    place = ["--head", "127.0.0.1", "--port", free_port(), "--max-restarts", restarts]
    script = start(1, tmp_path, (), "--config", "launch/cpu.yaml", *place, "--", "--model", "gap")
    try:
        wait_until(lambda: children_of(script.pid, "accelerate_launch.py"), 60, "launcher")
        time.sleep(5)  # till it waits
        script.terminate()
        assert script.wait(timeout=20) == 75
    finally:
        stop([script])


SECRET = "planted-5d1f0c"


def files_with(secret: str, folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_deepspeed_on_two_nodes_leaves_no_secret_behind(tmp_path: Path) -> None:
    """A user's secrets would be left in a plain file in the home folder.

    With its default launcher, Accelerate appends the environment to .deepspeed_env.
    """
    env = {"A_SECRET": SECRET, "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    words = ["--config", "launch/zero3.yaml", "--head", "127.0.0.1", "--port", free_port()]
    words += ["--", "--help"]
    finish(tmp_path, [start(rank, tmp_path, (), *words, **env) for rank in (0, 1)])
    assert files_with(SECRET, tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_a_secret_left_behind_would_be_found(tmp_path: Path) -> None:
    """The test for leaked secrets would pass even when Accelerate writes them to a file."""
    lines = (ROOT / "launch/zero1.yaml").read_text().splitlines()
    config = tmp_path / "pdsh.yaml"
    config.write_text("\n".join(line for line in lines if "multinode_launcher" not in line))
    env = {"A_SECRET": SECRET, "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    words = ["--config", str(config), "--head", "127.0.0.1", "--port", free_port()]
    start(0, tmp_path, (), *words, "--", "--help", **env).wait(timeout=120)
    assert files_with(SECRET, tmp_path) == [".deepspeed_env"]
