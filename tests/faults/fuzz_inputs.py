"""What the fuzzer begins with, and inputs that unfold: for ``fuzz``."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from distcv.config import load_recipe
from distcv.data.readers import idx_header
from faults.hostile_files import small_cifar
from support.data_files import cifar_batches, npm_cifar10, python2_pickle, python3_pickle, tar_gz
from support.report_runs import make_run

KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def picture(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def corpus(folder: Path) -> dict[str, list[bytes]]:
    """Small inputs of each kind, as they should be; ``folder`` is for scratch."""
    arrays, _ = small_cifar()
    tars = [tar_gz(cifar_batches(arrays, python2_pickle)), npm_cifar10(arrays)[1]]
    pixels, labels = arrays.test_images.reshape(10, -1)[:2, :9], arrays.test_labels.tolist()
    batches = [write(pixels, labels[:2]) for write in (python2_pickle, python3_pickle)]
    sheet = np.ascontiguousarray(arrays.test_images.reshape(10, 3, 1024).transpose(0, 2, 1))
    array = idx_header((4, 3)) + bytes(range(12))
    run = make_run(folder / "run", weights=True)
    rows = (run / "metrics.jsonl").read_bytes().splitlines()[-2:]
    texts = [(run / "result.json").read_bytes(), b"\n".join(rows)]
    texts.append((run / "environment.json").read_bytes())
    (saved,) = (run / "checkpoints").iterdir()
    files = ("model.safetensors", "state.json", "MANIFEST.json")
    return {
        "idx": [b"\0" + array, b"\1" + array],
        "gz": [gzip.compress(array)],
        "cifar": batches,
        "sheet": [picture(sheet, "PNG")],
        "labels": [json.dumps(labels).encode()],
        "archive": [gzip.decompress(tars[0])],
        "package": [gzip.decompress(tars[1])],
        "image": [picture(sheet[:, :20], kind) for kind in KINDS],
        "recipe": [load_recipe(name).to_yaml().encode() for name in ("gap", "resnet18")],
        "run": [bytes([i]) + text for i, text in enumerate(texts)],
        "checkpoint": [bytes([i]) + (saved / name).read_bytes() for i, name in enumerate(files)],
    }


# Inputs that unfold

HUGE = 1 << 60


def png(width: int, height: int, *chunks: tuple[bytes, bytes], mode: int = 2) -> bytes:
    """A PNG file of this size, black, with more chunks before the pixels.

    Of one that must not be read, the first rows are enough.
    """
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    row = 1 + width * {2: 3, 6: 4}[mode]
    squeeze = zlib.compressobj(1)
    rows = height if mode == 6 else min(height, 32)
    data = b"".join(squeeze.compress(bytes(row)) for _ in range(rows))
    pixels = data + squeeze.flush()
    named = ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in named
    )


def header(name: str = "x", **fields: object) -> bytes:
    one = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(one, field, value)
    return one.tobuf(tarfile.GNU_FORMAT)


def bombs(whole: bool) -> dict[str, dict[str, bytes]]:
    """By reader and name."""
    zeros = gzip.compress(bytes(1 << 20)) * 1024  # a gibibyte
    squeezed = zlib.compress(bytes(1 << 27), 1)
    claims = {
        "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "memo by text": b"Np99999999999\n.",
        "bytes": b"\x80\x04\x8e" + HUGE.to_bytes(8, "little") + b".",
        "bytearray": b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".",
        "text": b"\x80\x04\x8d" + HUGE.to_bytes(8, "little") + b".",
        "number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "frame": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"N.",
        "lists": b"\x80\x04" + b"]" * (1 << 24) + b".",
        "marks": b"\x80\x04" + b"(" * (1 << 24) + b".",
        "nested lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "shape": python2_pickle(np.zeros((1, 1), np.uint8), [1]).replace(
            b"M\x01\0M", b"J\0\0\0\x7fM"
        ),
    }
    tars = {
        "a long name": header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 33) + bytes(1 << 20),
        "a pax header": header(type=tarfile.XHDTYPE, size=1 << 33) + bytes(1 << 20),
        "members": header() * 100_000,
        "a member": header("cifar-10-batches-py/data_batch_1", size=1 << 33) + bytes(1 << 20),
    }
    pictures = {
        "60000 x 60000": png(60_000, 60_000),
        "8193 x 8192": png(8193, 8192),
        "a text": png(32, 32, (b"zTXt", b"a\0\0" + squeezed)),
        "a profile": png(32, 32, (b"iCCP", b"a\0\0" + squeezed)),
        "GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
        "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0,
                                   0, 0, 0, 0, 0),
        "PPM": b"P6 60000 60000 255\n" + bytes(99),
        "JPEG": bytes.fromhex("ffd8 ffc0 0011 08 ffdc ffdc 03 011100 021100 031100 ffda"),
    }  # fmt: skip
    if whole:
        pictures["8192 x 8192, read"] = png(8192, 8192, mode=6)
    size = (1 << 63) - 1
    return {
        "idx": {
            "dimensions": b"\0" + idx_header((1 << 31, 1 << 31)),
            "many dimensions": b"\0\0\0\x08\xff" + b"\xff" * 1020,
            "zipped": b"\1" + idx_header((4, 3)) + bytes(1 << 24),
        },
        "gz": {"zeros": zeros, "after a header": gzip.compress(idx_header((4, 3))) + zeros},
        "cifar": claims,
        "sheet": {
            "60000 x 60000": png(60_000, 60_000),
            "pixels": png(1024, 10, (b"IDAT", squeezed)),
            "a text": png(1024, 10, (b"zTXt", b"a\0\0" + squeezed)),
        },
        "labels": {
            "nested": b"[" * (1 << 24),
            "lists": b"[" + b"[]," * (1 << 22) + b"1]",
            "a number": b"[" + b"9" * (1 << 20) + b"]",
        },
        "archive": tars,
        "package": tars | {"a sheet": header("package/data_batch_1.png", size=len(zeros)) + zeros},
        "image": pictures,
        "recipe": {
            "nested": b"[" * 10_000,
            "flat": b"lr_milestones: [" + b"1," * 10_000 + b"]",
            "long": b"#" * (1 << 25),
            "aliases": b"a: &a [x,x]\n" + b"".join(
                b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9))
                for c in range(ord("b"), ord("n"))
            ),
        },
        "run": {
            "nested": b"\0" + b"[" * (1 << 23),
            "lists": b"\0[" + b"[]," * 4_000_000 + b"1]",
            "starts": b'\2{"starts": [' + b"{}," * 5_000 + b"{}]}",
            "rows": b"\1" + b'{"event":1,"step":1,"epoch":1}\n' * 30_000,
        },
        "checkpoint": {
            "a header": b"\0" + b"\xff" * 8 + b"{}",
            "a header of a gigabyte": b"\0" + (1 << 30).to_bytes(8, "little") + b"{}",
            "a tensor": b"\0" + safetensors(dtype="F32", shape=[size], data_offsets=[0, size]),
            "nested": b"\0" + (1 << 20).to_bytes(8, "little") + b'{"a":' * (1 << 18),
            "a state of lists": b"\1[" + b"[]," * 10_000_000 + b"1]",
            "a manifest of lists": b"\2[" + b"[]," * 10_000_000 + b"1]",
        },
    }  # fmt: skip


def safetensors(**tensor: object) -> bytes:
    text = json.dumps({"conv.weight": tensor}).encode()
    return len(text).to_bytes(8, "little") + text
