"""Programs with one guard taken out, which the fault suites have to notice."""

import os
import re
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
SKIPS, THREE = "nonfinite.skips", "nonfinite.three"
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
        "the deletion of what a killed save has left",
        "checkpoint.py",
        "            shutil.rmtree(path, ignore_errors=True)\n",
        "            pass\n", CALLS,
    ),
    Mutant(
        "fsync of a folder before leftovers are deleted",
        "checkpoint.py",
        "        sync(folder)\n        _clear(folder)\n",
        "        _clear(folder)\n", CALLS,
    ),
    Mutant(
        "fsync of the rows",
        "run_folder.py",
        "        self._write_rows()\n        sync(self.metrics)\n",
        "        self._write_rows()\n", CALLS,
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
    Mutant(
        "the refusal of a damaged environment.json",
        "run_folder.py",
        "        except (ValueError, KeyError, TypeError, RecursionError) as error:\n",
        "        except (KeyError, RecursionError) as error:\n", "damage.run_folder_files",
    ),
    Mutant(
        "NaN in the loss of all processes where one has it",
        "runtime/__init__.py",
        "        return loss_sum * (loss_sum.detach() * 0 + share)\n",
        "        return loss_sum * share\n", SKIPS,
    ),
    Mutant(
        "the word to a fused optimizer that a gradient is not finite",
        "runtime/strategies.py",
        "        self.optimizer.found_inf = nonfinite  # type: ignore[attr-defined]\n",
        "        self.optimizer.found_inf = None  # type: ignore[attr-defined]\n", SKIPS,
    ),
    Mutant(
        "BatchNorm's statistics put back after a skipped step",
        "loop.py",
        "        kept.put_back_if(skips[-1].bool())\n",
        "        pass\n", SKIPS,
    ),
    Mutant(
        "an average of weights that leaves out skipped steps",
        "optim.py",
        " * (1 - skipped)\n",
        "\n", SKIPS,
    ),
    Mutant(
        "weights and moments put back after a skipped step",
        "optim.py",
        "            before.put_back_if(self.found_inf.bool())\n",
        "            pass\n", SKIPS,
    ),
    Mutant(
        "the third skipped step in a row",
        "training.py",
        "self.skipped_in_a_row >= SKIPS\n",
        "self.skipped_in_a_row > SKIPS\n", THREE,
    ),
    Mutant(
        "the lower learning rate after a rollback",
        "loop.py",
        "        lr *= progress.lr_factor\n",
        "        pass\n", THREE,
    ),
    Mutant(
        "rows cut off at a rollback",
        "saving.py",
        "        self._in_folder(lambda: folder.cut_metrics(before.step, evaluation_due=due))\n",
        "        pass\n", THREE,
    ),
    Mutant(
        "the look at whether the launcher lives",
        "preempt.py",
        "        return self.signalled or self.orphaned() or any(",
        "        return self.signalled or any(", "stops",
    ),
    Mutant(
        "a second signal left unheard while it saves",
        "preempt.py",
        "self.signalled and not self.saving and self.launcher is None\n",
        "self.signalled and self.launcher is None\n", "stops",
    ),
    Mutant(
        "the agreement to stop in an evaluation",
        "loop.py",
        'if stop and runtime.device.type == "cpu" and stop_agreed(runtime, stop):\n',
        "if False:\n", "stops",
    ),
    Mutant(
        "the agreement of all processes to stop",
        "loop.py",
        "        if stops:\n",
        "        if stop.pending():\n", "stops",
    ),
    Mutant(
        "each process's own statistics of BatchNorm",
        "training.py",
        "                if len(each) == runtime.processes:\n",
        "                if False:\n", "stops",
    ),
    Mutant(
        "the patience of the heartbeat",
        "runtime/heartbeat.py",
        "        if silent <= self.timeout or peer.left:\n",
        "        if True:\n", "ranks",
    ),
    Mutant(
        "the word on the rank that was lost",
        "runtime/__init__.py",
        "if self.heartbeat is None or not _is_lost_connection(error):\n", "if True:\n", "ranks",
    ),
    Mutant(
        "the place in the epoch at which a run goes on",
        "loop.py",
        "    training.batches.seek(progress.step)\n",
        "    training.batches.seek(0)\n", "resumes",
    ),
    Mutant(
        "random numbers that are a step's own",
        "loop.py",
        "            runtime.seed_step(progress.step, part)\n",
        "            pass\n", "resumes",
    ),
    Mutant(
        "the kernel's lock on a run folder",
        "lease.py",
        "            self.lock.acquire(timeout=wait)\n",
        "            pass\n", "two_jobs",
    ),
    Mutant(
        "the look at whether another has taken over",
        "lease.py",
        '        if seen is None or _record(seen).get("token", self.token) != self.token:\n',
        "        if False:\n", "two_jobs",
    ),
    Mutant(
        "the broadcast by which all wait for a save",
        "runtime/__init__.py",
        "        value, failed = self.from_main((value, refused is not None))\n",
        "        failed = False\n", "kills.instants",
    ),
    Mutant(
        "the end of what an evaluation holds",
        "loop.py",
        "    wrong = torch.zeros(2, len(training.test_labels), device=runtime.device)\n",
        "    wrong = torch.zeros(2, len(training.test_labels), device=runtime.device)\n"
        "    vars(training).setdefault('kept', []).append(wrong)\n", "memory",
    ),
)  # fmt: skip


def try_mutant(mutant: Mutant, data_dir: Path) -> str | None:
    """The first thing that the small suite finds wrong with the mutated program, if it does."""
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
    if ran.returncode == 0:
        return None
    said = (line for line in ran.stdout.splitlines() if line.startswith("  "))
    return without_places(next(said, ran.stderr[-300:]))


def without_places(text: str) -> str:
    """Without the folders of this machine: of each absolute path its last part."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\",:()]+/)+", "", text)
