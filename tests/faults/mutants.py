"""Programs with one guard taken out, which the fault suites have to notice."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


class Mutant(NamedTuple):
    """What is taken out, where, and which suite, or function of a suite, is to notice."""

    without: str
    file: str
    old: str
    new: str
    suite: str


CALLS, BYTES, FOLDERS = "kills.system_calls", "damage.changed_bytes", "damage.odd_folders"
MUTANTS = (
    Mutant(
        "fsync of a file's bytes",
        "durable.py", "        os.fsync(file.fileno())\n", "", CALLS,
    ),
    Mutant(
        "fsync of a folder's names",
        "durable.py", "            os.fsync(descriptor)\n", "            pass\n", CALLS,
    ),
    Mutant(
        "fsync of the folder above a new one",
        "durable.py",
        "    path.mkdir(exist_ok=True)\n    sync(path.parent)\n",
        "    path.mkdir(exist_ok=True)\n", CALLS,
    ),
    Mutant(
        "fsync of the folder of a replaced file",
        "durable.py",
        "        temporary.unlink(missing_ok=True)\n    sync(path.parent)\n",
        "        temporary.unlink(missing_ok=True)\n", CALLS,
    ),
    Mutant(
        "fsync of a checkpoint before its commit",
        "checkpoint.py", "        sync(temporary)\n", "", CALLS,
    ),
    Mutant(
        "fsync of a checkpoint's commit",
        "checkpoint.py",
        "        temporary.rename(final)\n        sync(folder)\n",
        "        temporary.rename(final)\n", CALLS,
    ),
    Mutant(
        "the former checkpoint of a step, until its heir is there",
        "checkpoint.py",
        "            final.rename(replaced)\n", "            shutil.rmtree(final)\n", CALLS,
    ),
    Mutant(
        "the way back to a former checkpoint of a step",
        "checkpoint.py",
        'NAME = re.compile(r"(?:replaced-)?step-', 'NAME = re.compile(r"step-', CALLS,
    ),
    Mutant(
        "the hidden name of a checkpoint that is being deleted",
        "checkpoint.py",
        '                path.rename(path.with_name(f".{path.name}.old"))\n',
        "                shutil.rmtree(path)\n", CALLS,
    ),
    Mutant(
        "rows on the disk before the checkpoint that they belong to",
        "saving.py", "        self.folder.sync_rows()\n", "", CALLS,
    ),
    Mutant(
        "the check of SHA-256 sums",
        "checkpoint.py",
        '            if _sha256(path / name) != entry["sha256"]:\n',
        "            if False:\n", BYTES,
    ),
    Mutant(
        "the check that a checkpoint is a folder",
        "checkpoint.py",
        "        if not stat.S_ISDIR(path.lstat().st_mode):\n",
        "        if False:\n", FOLDERS,
    ),
    Mutant(
        "the check that all files are there, and no others",
        "checkpoint.py",
        "        if sizes.keys() != manifest.keys():\n", "        if not sizes:\n", FOLDERS,
    ),
    Mutant(
        "one line for an error of the disk, told to all processes",
        "runtime/__init__.py",
        "                refused = InputError(explain(error))\n",
        "                raise\n", "disk.before_step_1",
    ),
    Mutant(
        "the attempt to take the room that checkpoints need",
        "run_folder.py",
        "                os.posix_fallocate(file.fileno(), 0, size)\n",
        "                pass\n", "disk.before_step_1",
    ),
    Mutant(
        "the agreement on a step that is not finite",
        "runtime/__init__.py",
        "            dist.all_reduce(found, dist.ReduceOp.MAX)\n",
        "            pass\n", "nonfinite.skips",
    ),
)  # fmt: skip


def try_mutant(mutant: Mutant, data_dir: Path) -> bool:
    """Whether the small suite fails on the mutated program."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        source = Path(scratch) / "src"
        shutil.copytree(SOURCE, source)
        for name in ("configs", "launch", "slurm"):  # which the program looks for beside itself
            (source.parent / name).symlink_to(SOURCE.parent / name)
        file = source / "distcv" / mutant.file
        text = file.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file} has not one {mutant.old!r}"
        file.write_text(text.replace(mutant.old, mutant.new))
        ran = subprocess.run(
            [sys.executable, str(HERE), mutant.suite, "--small"],
            env=os.environ | {"PYTHONPATH": str(source), "DISTCV_TEST_DATA": str(data_dir)},
            capture_output=True,
            text=True,
            timeout=900,
        )
    return ran.returncode == 1
