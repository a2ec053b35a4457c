"""Check what a training needs, where it is going to run: ``python -m distcv.doctor``.

By itself, under any ``accelerate launch``, or on the nodes of a Slurm job. Each process looks for
itself; the first one prints what they found, as one line where they agree.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro
from pydantic import Field

from distcv.command import run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Strict
from distcv.data import find_dataset
from distcv.environment import set_thread_environment

if TYPE_CHECKING:
    from distcv.runtime.probe import World


class Arguments(Strict):
    """The flags of ``distcv.doctor``."""

    runs_dir: Path = Field(Path("runs"), description="Folder that holds the run folders.")
    data_dir: Path = Field(Path("data"), description="Folder in which data sets are kept.")
    dataset: str = Field("mnist", description="Data set that must be there; nothing is fetched.")
    timeout: float = Field(
        60.0, ge=1, description="Seconds that a process waits for the others, and for an exchange."
    )
    slurm: bool = Field(False, description="Check Slurm and, inside of a job, the job.")
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = Field(
        False, description="Print the checks as JSON to stdout, and their lines to stderr."
    )


class Line(NamedTuple):
    """What one process has found."""

    status: Literal["ok", "warn", "wrong"]
    text: str
    subject: str = ""
    """What all processes must say the same of, if they must."""


class Finding(NamedTuple):
    """A line with the processes that said it."""

    status: str
    text: str
    ranks: list[int]
    places: str
    """The same in words; empty where there is nothing to tell apart."""


Look = Callable[["World", Arguments], Iterator[Line]]


def main() -> int:
    """Run all checks; exit code 1 if something is wrong, on all processes."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.doctor",
        description="Check versions, devices, the exchange between processes, folders, data and "
        "W&B on the processes that it is started on. Exit code 1 if something is wrong.",
    )
    find_dataset(arguments.dataset)
    set_thread_environment()
    from distcv.doctor import machine, places, slurm
    from distcv.runtime.probe import join

    checks: dict[str, Look] = {
        "versions": machine.versions,
        "devices": machine.devices,
        "processes": machine.processes,
        "exchange": machine.exchange,
        "head node": machine.head_node,
        "runs folder": places.runs_folder,
        "data": places.data,
        "W&B": places.wandb,
    }
    if arguments.slurm:
        checks["Slurm"] = slurm.site
        checks["job"] = slurm.job
    out = sys.stderr if arguments.as_json else sys.stdout
    found = []
    try:
        world = join(arguments.timeout)
        for name, look in checks.items():
            hosts = dict(world.hosts)
            world.say(name, lines_of(look, world, arguments))
            if world.rank:
                continue
            heard = world.hear_all(name)
            said = {rank: [Line(*line) for line in lines] for rank, lines in heard.items()}
            for one in findings(said, hosts):
                where = f" ({one.places})" if one.places else ""
                print(f"{one.status:<5}  {name:<11}  {one.text}{where}", file=out, flush=True)
                found.append({"check": name, **one._asdict()})
        if world.rank == 0 and arguments.as_json:
            print(json.dumps(found, indent=1), flush=True)
        return world.leave(int(any(one["status"] == "wrong" for one in found)))
    except (OSError, RuntimeError) as error:  # the way to rank 0 is blocked, so it can't be told
        print(f"wrong  {'processes':<11}  {one_line(error)}", file=out, flush=True)
        return 1


def lines_of(look: Look, world: "World", arguments: Arguments) -> list[Line]:
    """What a check has found; an exception that ends it is its last line."""
    lines = []
    try:
        for line in look(world, arguments):
            lines.append(line)
    except InputError as error:
        lines.append(Line("wrong", str(error)))
    except Exception as error:  # whatever it is, the other checks go on
        lines.append(Line("wrong", f"{type(error).__name__}: {one_line(error)}"))
    return lines


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def findings(said: dict[int, list[Line]], hosts: dict[int, str]) -> list[Finding]:
    """Lines that are equal as one; those that differ though they must not as one that is wrong.

    `said` has the lines of one check by rank, `hosts` the host of each process that came.
    """
    ranks: dict[Line, list[int]] = {}
    for rank, lines in sorted(said.items()):
        for line in dict.fromkeys(lines):
            ranks.setdefault(line, []).append(rank)
    speakers = [rank for rank in sorted(said) if said[rank]]
    found: dict[str, Finding] = {}
    for line, own in ranks.items():
        same = [other for other in ranks if other.subject == line.subject and other.status == "ok"]
        if line.subject and line in same[:-1] + same[1:]:  # at least two
            told = "; ".join(f"{other.text} ({in_words(ranks[other], hosts)})" for other in same)
            text = f"{told}: install the same everywhere"
            found[text] = Finding("wrong", text, sorted(said), "")
        else:
            told = "" if own == speakers == [0] else in_words(own, hosts)
            found[line.text] = Finding(line.status, line.text, own, told)
    if silent := [rank for rank in hosts if rank not in said]:
        text = "no answer in time: look for its last words"
        found[text] = Finding("wrong", text, silent, in_words(silent, hosts))
    return list(found.values())


def in_words(ranks: list[int], hosts: dict[int, str]) -> str:
    """Processes in words: how many if it is all of them, or one on each host, else their ranks."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    first = {hosts[rank]: rank for rank in sorted(hosts, reverse=True)}
    on = f"{len(names)} host{'s' * (len(names) > 1)}"
    if len(ranks) == len(hosts):
        return f"{len(ranks)} processes on {on}"
    if len(first) > 1 and sorted(ranks) == sorted(first.values()):
        return on
    own = {name: [str(rank) for rank in ranks if hosts[rank] == name] for name in names}
    return "; ".join(f"rank {', '.join(numbers)} on {name}" for name, numbers in own.items())


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)
