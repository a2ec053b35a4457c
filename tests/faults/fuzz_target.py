"""One reader, fuzzed by atheris: ``python -m faults.fuzz_target TARGET FOLDER [OPTION …]``.

FOLDER is for scratch files and holds the first inputs in ``corpus``; the options are libFuzzer's.
A reader may return, or raise what it documents; anything else ends the process. Before, it tries
the inputs in ``bombs``, each in a fork, and prints of each its exit code, the memory that it took
in MiB, and seconds of the processor.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import atheris

# Coverage is taken of what is imported here; of PyYAML too, it would be ten times slower.
with atheris.instrument_imports(
    include=["distcv.config", "distcv.data", "distcv.files", "distcv.predict", "distcv.results",
             "distcv.checkpoint", "distcv.trained", "tarfile"]
):  # fmt: skip
    import tarfile  # noqa: F401

    from distcv import predict, results
    from distcv.config import InputError, load_recipe
    from distcv.data import DATASETS, DatasetInfo, layouts, readers

RGB = (3, 32, 32)
ROW = replace(DATASETS["cifar10"], train=50, test=10, sums=None)
Target = Callable[[bytes], object]


def idx(scratch: Path) -> Target:
    """An IDX file, zipped if the first byte is odd."""

    def read(data: bytes) -> None:
        zipped = bool(data[:1] and data[0] & 1)
        file = scratch / ("x.gz" if zipped else "x")
        file.write_bytes(gzip.compress(data[1:], 0) if zipped else data[1:])
        with readers.naming(file.name):
            array = readers.read_idx(file, (4, 3))
        assert array.shape == (4, 3)

    return read


def gz(scratch: Path) -> Target:
    """A zipped IDX file, byte by byte."""

    def read(data: bytes) -> None:
        file = scratch / "x.gz"
        file.write_bytes(data)
        with readers.naming(file.name):
            assert readers.read_idx(file, (4, 3)).shape == (4, 3)

    return read


def cifar(scratch: Path) -> Target:
    """A batch of CIFAR."""

    def read(data: bytes) -> None:
        pixels, labels = readers.read_cifar_batch(io.BytesIO(data), "labels")
        assert pixels.dtype == labels.dtype == "uint8"

    return read


def sheet(scratch: Path) -> Target:
    """A sheet of images in PNG."""

    def read(data: bytes) -> None:
        with readers.naming("sheet"):
            assert readers.parse_sheet(data, (1024, 10)).shape == (10, *RGB)

    return read


def labels(scratch: Path) -> Target:
    """Labels in JSON."""

    def read(data: bytes) -> None:
        assert readers.parse_json_labels(data).dtype == "uint8"

    return read


def archive(scratch: Path) -> Target:
    """CIFAR's archive, whose sum is right."""
    return _tar(scratch, ROW.files[0][0])


def package(scratch: Path) -> Target:
    """The npm package, whose sum is right."""
    assert ROW.npm is not None
    return _tar(scratch, ROW.npm.tarball)


def _tar(scratch: Path, name: str) -> Target:
    def read(data: bytes) -> None:
        zipped = gzip.compress(data, 0)
        (scratch / name).write_bytes(zipped)
        sha256 = hashlib.sha256(zipped).hexdigest()
        assert ROW.npm is not None
        info: DatasetInfo = replace(
            ROW, files=((ROW.files[0][0], sha256),), npm=replace(ROW.npm, sha256=sha256)
        )
        layouts.read_folder(info, scratch)

    return read


def image(scratch: Path) -> Target:
    """An image file of distcv.predict, whose decoders may raise anything."""

    def read(data: bytes) -> None:
        file = scratch / "x"
        file.write_bytes(data)
        try:
            pixels = predict.read_image(file, RGB)
        except Exception as error:
            raise InputError("skipped") from error
        assert pixels.shape == RGB

    return read


def recipe(scratch: Path) -> Target:
    """A recipe."""

    def read(data: bytes) -> None:
        file = scratch / "x.yaml"
        file.write_bytes(data)
        load_recipe(file)

    return read


def run(scratch: Path) -> Target:
    """result.json, metrics.jsonl or environment.json of a run, by the first byte."""
    (scratch / "config.yaml").write_text("model: gap\n")
    names = ("result.json", "metrics.jsonl", "environment.json")

    def read(data: bytes) -> None:
        (scratch / names[0]).write_text('{"test_accuracy": 1.0, "seconds": 1.0}')
        (scratch / names[data[0] % 3 if data else 0]).write_bytes(data[1:])
        results.read_rows(scratch)
        results.read_starts(scratch)
        with contextlib.suppress(OSError):
            results.read_run(scratch)

    return read


def checkpoint(scratch: Path) -> Target:
    """One file of a checkpoint, by the first byte; the manifest agrees unless it is that file."""
    from distcv.trained import open_run

    names = ("model.safetensors", "state.json", "MANIFEST.json")
    seeds = [file.read_bytes() for file in sorted((scratch / "corpus").iterdir())[:3]]
    whole = {names[seed[0]]: seed[1:] for seed in seeds}
    (scratch / "config.yaml").write_text("model: gap\n")
    folder = scratch / "checkpoints/step-00000030"
    folder.mkdir(parents=True)

    def read(data: bytes) -> None:
        changed = names[data[0] % 3 if data else 0]
        files = whole | {changed: data[1:]}
        manifest = {
            name: {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}
            for name, held in files.items() if name != names[2]
        }  # fmt: skip
        if changed != names[2]:
            files[names[2]] = json.dumps(manifest).encode()
        for name, held in files.items():
            (folder / name).write_bytes(held)
        assert isinstance(open_run(scratch).step, int)

    return read


TARGETS = {
    one.__name__: one
    for one in (idx, gz, cifar, sheet, labels, archive, package, image, recipe, run, checkpoint)
}


def main() -> None:
    name, folder, *options = sys.argv[1:]
    scratch = Path(folder).resolve()
    read = TARGETS[name](scratch)
    for seed in sorted((scratch / "corpus").iterdir()):
        read(seed.read_bytes())  # is as it should be: else nothing behind the first check is tried

    def once(data: bytes) -> None:
        with contextlib.suppress(InputError):
            read(data)

    for bomb in sorted((scratch / "bombs").iterdir()):
        print(f"{bomb.name}: {explode(once, bomb.read_bytes())}", flush=True)
    atheris.Setup([sys.argv[0], *options, str(scratch / "corpus")], once)
    atheris.Fuzz()


def explode(read: Target, data: bytes) -> str:
    """Exit code of a fork that reads this, the MiB and the processor's seconds that it took."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # if it waits for something
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # the machine is others', too
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = 1
        try:
            read(data)
            code = 0
        except BaseException:
            traceback.print_exc()
        used = resource.getrusage(resource.RUSAGE_SELF)
        os.write(theirs, f"{(used.ru_maxrss - before) >> 10} {used.ru_utime:.1f}".encode())
        os._exit(code)
    os.close(theirs)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = os.read(ours, 99).decode() or "0 0"
    os.close(ours)
    return f"{abs(code)} {told}"


if __name__ == "__main__":
    main()
