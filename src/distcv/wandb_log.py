"""The log that W&B's client keeps of a run (``.wandb``), as wandb 0.31 writes it.

After a head of seven bytes, records in blocks of 32 KiB as LevelDB's log has them
(https://github.com/google/leveldb/blob/main/doc/log_format.md), with CRC-32 as their checksum.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEAD = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32768
PART = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Log(NamedTuple):
    """A log of W&B's client."""

    path: Path
    records: list[Any]

    @property
    def run(self) -> Any:
        """Its run_id, project, entity (unless it is the user's own) and start_time, or None."""
        return next((record.run for record in self.records if record.HasField("run")), None)

    @property
    def steps(self) -> list[int]:
        """The steps of its rows."""
        return [one.history.step.num for one in self.records if one.HasField("history")]

    @property
    def artifacts(self) -> list[Any]:
        """Its artifacts, the last one first."""
        return [one.artifact for one in reversed(self.records) if one.HasField("artifact")]

    @property
    def synced(self) -> Path:
        """The file that tells that it was sent, as ``wandb sync`` has it."""
        return self.path.with_suffix(".wandb.synced")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a log (``wandb.proto.wandb_internal_pb2.Record``), to the last whole one.

    Raises:
        ValueError: it is no such log, or damaged before its end.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # generated

    data = path.read_bytes()
    if not data.startswith(HEAD):
        raise ValueError(f"{path} is not a log of wandb 0.31's form")
    place, held = len(HEAD), b""
    while place + PART.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < PART.size:
            place += left
            continue
        checksum, length, kind = PART.unpack_from(data, place)
        body = data[place + PART.size : place + PART.size + length]
        if kind == 0 or len(body) < length:  # it was being written
            return
        if zlib.crc32(bytes([kind]) + body) != checksum:
            raise ValueError(f"{path} is damaged at byte {place}")
        place += PART.size + length
        held = body if kind in (WHOLE, FIRST) else held + body
        if kind in (WHOLE, LAST):
            yield Record.FromString(held)


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write a log of these records."""
    data = bytearray(HEAD)
    for record in records:
        body, first = record.SerializeToString(), True
        while first or body:
            left = BLOCK - len(data) % BLOCK
            if left < PART.size:
                data += bytes(left)
                left = BLOCK
            part, body = body[: left - PART.size], body[left - PART.size :]
            kind = (FIRST if body else WHOLE) if first else (MIDDLE if body else LAST)
            data += PART.pack(zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    path.write_bytes(data)
