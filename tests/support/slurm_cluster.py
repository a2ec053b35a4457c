"""A real Slurm cluster for tests, thrown away at their end, on one Linux machine.

This machine is the login node and runs slurmctld. A compute node is a set of namespaces (network,
host name, mounts, processes) with an address on a bridge, its own /dev/shm and /etc/hosts, and a
slurmd. All share the file system; no system file is written. All processes end with the tests',
however these end: the kernel kills a daemon with its parent, and a node's processes with its first.

What a real cluster has and this one has not: cgroups (memory isn't enforced, CUDA_VISIBLE_DEVICES
counts devices that aren't there) and accounting (no sacct; `job` is asked instead).
"""

import contextlib
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = "ip unshare nsenter setpriv munged slurmctld slurmd sbatch srun scontrol sinfo".split()
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
FROM_CLUSTER = ("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_")
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")  # requeued jobs skip these

# What happens to a partition's jobs when `high` needs their nodes.
PARTITIONS = {
    "debug": "PriorityTier=10 PreemptMode=OFF Default=YES",
    "low": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
    "low0": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "high": "PriorityTier=100 PreemptMode=OFF",
}

# slurmctld listens on the address that it finds for its host's name.
LOGIN = """
hostname login
mount --bind "$1" /etc/hosts
exec slurmctld -D
"""

# A node's first process, named as the node; $@ are its address and its hosts file. It reads a line
# when its cable is plugged in. As bash it reaps the orphans of jobs; a slurmd that ends, ends it.
NODE = """
read -r
hostname "$0"
mount --bind "$2" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
ip address add "$1/24" dev eth0
ip link set eth0 up
slurmd -D &
wait
"""


def missing() -> str | None:
    """What this machine lacks for a cluster and how to get it, in one line, or None."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"a Slurm cluster needs {', '.join(absent)}: apt-get install {PACKAGES} (on Linux)"
    if os.geteuid() != 0:
        return "a Slurm cluster of namespaces takes root: run these tests as root"
    probe = "unshare --net --uts --mount --pid --fork --mount-proc ip link add probe type bridge"
    ran = subprocess.run(probe.split(), capture_output=True, text=True, timeout=20)
    if ran.returncode:
        reason = " ".join(ran.stderr.split()) or "no bridge"
        return f"no namespaces ({reason}): give the container CAP_SYS_ADMIN and CAP_NET_ADMIN"
    return None


def output(words: Sequence[str], timeout: float = 120, check: bool = True, **more: Any) -> str:
    """What a command printed to stdout; AssertionError with its stderr if it fails."""
    ran = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **more)
    if check and ran.returncode:
        raise AssertionError(f"{shlex.join(words)}: exit {ran.returncode}\n{ran.stderr}")
    return str(ran.stdout)


def tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.is_file() else "(no file)"
    return "\n".join([f"--- {path}", *text.splitlines()[-30:]])


def free_network() -> ipaddress.IPv4Network:
    """A network 10.x.y.0/24 which this machine has no route into; each process begins elsewhere."""
    routes = [route["dst"] for route in json.loads(output(["ip", "-j", "-4", "route"]))]
    taken = [ipaddress.IPv4Network(to) for to in routes if to != "default"]
    for number in range(os.getpid(), os.getpid() + 2**16):
        network = ipaddress.IPv4Network((10 << 24 | number % 2**16 << 8, 24))
        if not any(network.overlaps(other) for other in taken):
            return network
    raise AssertionError("this machine has routes into all of 10.0.0.0/8")


def remove_left_overs() -> None:
    """Bridges and folders of clusters whose tests were killed; their processes ended with them."""
    for file in Path("/sys/class/net").glob("dcv*/bridge"):
        name = file.parent.name
        if not Path("/proc", name[3:]).exists() and not any(file.parent.glob("brif/*")):
            output(["ip", "link", "delete", name])
            shutil.rmtree(Path(tempfile.gettempdir(), name), ignore_errors=True)


class Cluster:
    """Compute nodes `node1`, `node2` … of 8 CPUs, 64 GB and two GPUs (links to /dev/null) each.

    The partitions are `debug` (the default), `low`, `low0` and `high`: see PARTITIONS.
    """

    def __init__(self, number: int = 2) -> None:
        self.nodes = [f"node{i}" for i in range(1, number + 1)]
        self.bridge = f"dcv{os.getpid()}"
        self.network = free_network()
        self.address = str(self.network[1])  # the login node's, on which nodes reach this machine
        self.folder = Path(tempfile.gettempdir(), self.bridge)  # short, as sockets' paths must be
        self._daemons: list[subprocess.Popen[str]] = []
        self._running: dict[str, subprocess.Popen[str]] = {}  # the `unshare` of each node

    @property
    def environment(self) -> dict[str, str]:
        """This environment, for clients of this cluster: without what another one has set."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(FROM_CLUSTER)}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start all; takes a second. Call `stop` also if this fails."""
        remove_left_overs()
        self.folder.mkdir()
        self._configure()
        output(["ip", "link", "add", self.bridge, "up", "type", "bridge"])
        output(["ip", "address", "add", f"{self.address}/24", "dev", self.bridge])
        munge = f"{self.folder}/munge"
        files = [f"--{kind}-file={munge}.{kind}" for kind in ("key", "pid", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge}.socket", *files)
        self._until(Path(f"{munge}.socket").exists, 20, "munged isn't up")
        hosts = str(self.folder / "hosts")
        self._daemon("unshare", "--uts", "--mount", "bash", "-euc", LOGIN, "slurmctld", hosts)
        self._until(lambda: "is UP" in self._ask("scontrol", "ping"), 30, "slurmctld isn't up")
        for node in self.nodes:
            self._power_on(node)
        for node in self.nodes:
            self._until_usable(node)

    def stop(self) -> None:
        """End what was started and remove what it made."""
        for node in list(self._running):
            self.crash(node)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.communicate()
        subprocess.run(["ip", "link", "delete", self.bridge], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, cwd: Path | None = None, timeout: float = 120, **env: str) -> str:
        """What a command printed on the login node; AssertionError with its stderr if it fails."""
        return output(words, cwd=cwd, env=self.environment | env, timeout=timeout)

    def on(self, node: str, *words: str, timeout: float = 120) -> str:
        """Likewise on a compute node, in the folder of the tests."""
        first = self._first(self._running[node])
        enter = f"nsenter -t {first} -n -u -m -p --wdns={Path.cwd()} --".split()
        return self.run(*enter, *words, timeout=timeout)

    def sbatch(self, *words: str, cwd: Path | None = None, **env: str) -> str:
        """Submit a job; its number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, timeout=60, **env).strip()

    def job(self, job: str) -> dict[str, str]:
        """The record of a job, or of a task of an array (`ID_TASK`), also for 600 s after its end.

        AssertionError if there is none, or several since each task of an array has its own.
        """
        lines = self.run("scontrol", "show", "job", "-o", job).splitlines()
        assert len(lines) == 1, f"job {job} has {len(lines)} records: name a task, like {job}_0"
        return dict(re.findall(r"(\w[\w:/]*)=(.*?)(?= \w[\w:/]*=|\s*$)", lines[0]))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, *states: str, restarts: int = 0, timeout: float = 60) -> str:
        """Wait until a job is in one of the states, having been restarted so often; the state.

        AssertionError, with the job's record and the ends of the logs, after `timeout` seconds or
        if the job ends otherwise.
        """
        end = time.monotonic() + timeout
        while True:
            record = self.job(job)
            state = record["JobState"]
            if state in states and int(record["Restarts"]) >= restarts:
                return state
            if state in FINAL or time.monotonic() > end:
                wanted = f"{' or '.join(states)} with {restarts} restarts within {timeout} s"
                log = tail(Path(record.get("StdOut", "")))
                raise AssertionError(self._story(f"job {job} is not {wanted}: {record}\n{log}"))
            time.sleep(0.2)

    def cancel_all(self) -> None:
        """End all jobs, without the time that they are given for it, and boot crashed nodes.

        Their processes are killed here: `scancel --signal=KILL` sends TERM first, as any scancel.
        """

        def none_left() -> bool:
            self._ask("scancel", "--me")
            for unshare in self._running.values():
                for process in psutil.Process(int(self._first(unshare))).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if process.name() not in ("slurmd", "slurmstepd"):
                            process.kill()
            return not self.run("squeue", "-h")

        for node in self.nodes:
            if node not in self._running:
                self.boot(node)
        self._until(none_left, 60, "jobs stay")

    def crash(self, node: str) -> None:
        """Power failure: the node is off the network, then all its processes are dead."""
        unshare = self._running.pop(node)
        cable = ["ip", "link", "delete", self._cable(node)]
        subprocess.run(cable, stderr=subprocess.DEVNULL)  # there is none if the start failed
        if unshare.poll() is None:
            os.kill(int(self._first(unshare) or unshare.pid), signal.SIGKILL)
        unshare.communicate()  # it waits for the node's first process, and that for all others

    def boot(self, node: str) -> None:
        """Start a crashed node again, once Slurm has seen that it is down, and wait for it."""
        # scontrol lists all flags of a state, of which sinfo shows one.
        show = ["scontrol", "show", "node", node, "--oneliner"]
        self._until(lambda: "State=DOWN" in self._ask(*show), 60, f"{node} isn't down")
        self._power_on(node)
        self._until_usable(node)

    def _node_state(self, node: str) -> str:
        return self._ask("sinfo", "-h", "-p", "debug", "-n", node, "-o", "%T").strip()

    def _until_usable(self, node: str) -> None:
        usable = ("idle", "mixed", "allocated")  # exactly: "idle*" doesn't answer
        self._until(lambda: self._node_state(node) in usable, 30, f"{node} isn't usable")

    def _ask(self, *words: str) -> str:
        """What a command printed to stdout, whether it failed or not."""
        return output(words, env=self.environment, check=False)

    def _until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            ended = [p for p in (*self._daemons, *self._running.values()) if p.poll() is not None]
            assert not ended and time.monotonic() < end, self._story(f"{what}; ended: {ended}")
            time.sleep(0.1)

    def _story(self, what: str) -> str:
        nodes = self._ask("sinfo", "-N", "-o", "%N %T %E")
        logs = [*sorted(self.folder.glob("*.out")), self.folder / "slurmctld.log"]
        return "\n".join([what, nodes, *map(tail, logs)])

    def _cable(self, node: str) -> str:
        return f"{self.bridge}n{node.removeprefix('node')}"  # at most 15 characters

    @staticmethod
    def _first(unshare: subprocess.Popen[str]) -> str:
        """The number, on this machine, of a node's first process; empty before there is one."""
        return Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().strip()

    def _power_on(self, node: str) -> None:
        spaces = "--net --uts --mount --pid --mount-proc --kill-child".split()
        address = str(self.network[10 + self.nodes.index(node)])
        hosts = str(self.folder / "hosts")
        unshare = self._start("unshare", *spaces, "bash", "-euc", NODE, node, address, hosts)
        self._running[node] = unshare
        self._until(lambda: self._first(unshare), 20, f"{node} doesn't start")
        cable = f"{self._cable(node)} up master {self.bridge} type veth peer name eth0"
        output(f"ip link add {cable} netns {unshare.pid}".split())
        assert unshare.stdin is not None
        unshare.stdin.write("\n")
        unshare.stdin.flush()

    def _daemon(self, *words: str) -> None:
        self._daemons.append(self._start(*words))

    def _start(self, *words: str) -> subprocess.Popen[str]:
        """Start a daemon, which Ctrl-C doesn't reach and which ends with the calling thread."""
        with (self.folder / f"{words[0]}.out").open("a") as file:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words], env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def _configure(self) -> None:
        at = {node: self.network[i] for i, node in enumerate(self.nodes, 10)}
        gpus = self.folder / "gpu"  # a mere number of GPUs, without files, is refused
        for gpu in range(2):
            Path(f"{gpus}{gpu}").symlink_to("/dev/null")
        self._write("gres.conf", "AutoDetect=off", f"Name=gpu File={gpus}[0-1]")
        settings = Path(__file__).with_suffix(".conf").read_text()
        self._write(
            "slurm.conf",
            settings.format(address=self.address, folder=self.folder),
            *(f"NodeName={n} NodeAddr={at[n]} CPUs=8 RealMemory=64000 Gres=gpu:2" for n in at),
            *(f"PartitionName={name} Nodes=ALL {own}" for name, own in PARTITIONS.items()),
        )
        # torch looks IPv4 addresses up in their IPv6 form too.
        names = [f"{at[n]} {n}\n::ffff:{at[n]} {n}" for n in at]
        self._write("hosts", "127.0.0.1 localhost", f"{self.address} login", *names)
        (self.folder / "munge.key").touch(0o400)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        for made in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / made).mkdir()

    def _write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))
