"""A disk that loses what was not synced, fed with the system calls that a run has made.

What a file holds, and which names a folder has, are each in a list of versions: the first one is on
the disk for certain, the later ones came after the last sync, and any of them may be there after a
power loss, in whatever mix. Of a file, a part may be there of what was written last.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
OPENED = re.compile(r'AT_FDCWD(?:<[^>]*>)?, "(.*?)", (\S+?)(?:, .*)?', re.DOTALL)
ON_FILE = re.compile(r"\d+<([^>]*)>(?:, (.*))?", re.DOTALL)
NAME = re.compile(r'(?:(?:AT_FDCWD|\d+)(?:<([^>]*)>)?, )?"(.*?)"')

Tree = dict[Path, bytes | None]  # None: a folder


class Call(NamedTuple):
    """One system call that went well."""

    name: str
    arguments: str
    result: int


def read_calls(trace: Path) -> list[Call]:
    """The calls of one process, of a file that strace has written."""
    found = (CALL.match(line) for line in trace.read_text().splitlines())
    calls = [Call(one[1], one[2], int(one[3])) for one in found if one]
    return [call for call in calls if call.result >= 0]


def written(call: Call) -> tuple[Path, bytes] | None:
    """File and bytes of a write."""
    if call.name != "write" or not (match := ON_FILE.fullmatch(call.arguments)):
        return None
    data = ast.literal_eval("b" + match[2].rsplit(", ", 1)[0])
    return Path(match[1]), data[: call.result]


class Disk:
    """The part of a file system below one folder, which is empty at the start."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[int, list[dict[str, int]]] = {0: [{}]}
        self.files: dict[int, list[bytes]] = {}
        self.number = itertools.count(1)

    def make(self, call: Call) -> None:
        """Make a system call that was made on the real disk."""
        name, arguments = call.name, call.arguments
        if name == "openat":
            if match := OPENED.fullmatch(arguments):
                self._open(Path(match[1]), match[2])
        elif name in ("write", "ftruncate", "fsync"):
            match = ON_FILE.fullmatch(arguments)
            assert match, arguments
            node = self._find(Path(match[1]))
            if node is None:
                return
            if name == "fsync":
                self._sync(node)
            elif name == "ftruncate":
                size = int(match[2])
                now = self.files[node][-1]
                self.files[node].append(now[:size].ljust(size, b"\0"))
            else:
                data = written(call)
                assert data is not None
                self.files[node].append(self.files[node][-1] + data[1])
        elif name.startswith(("mkdir", "rename", "unlink", "rmdir")):
            places = [Path(folder or "/") / own for folder, own in NAME.findall(arguments)]
            if all(place.is_relative_to(self.root) for place in places):
                self._rename(name, places)

    def _open(self, path: Path, flags: str) -> None:
        node = self._find(path)
        if node is None and "O_CREAT" in flags and path.is_relative_to(self.root):
            node = next(self.number)
            self.files[node] = [b""]
            self._name(path.parent, {path.name: node})
        elif node in self.files and "O_TRUNC" in flags:
            self.files[node].append(b"")

    def _rename(self, name: str, places: list[Path]) -> None:
        path = places[0]
        if name.startswith("mkdir"):
            node = next(self.number)
            self.folders[node] = [{}]
            self._name(path.parent, {path.name: node})
        elif name.startswith("rename"):
            assert path.parent == places[1].parent, "between folders it would be two changes"
            if path != places[1]:
                self._name(path.parent, {path.name: None, places[1].name: self._find(path)})
        else:
            self._name(path.parent, {path.name: None})

    def _name(self, folder: Path, changed: dict[str, int | None]) -> None:
        node = self._find(folder)
        assert node is not None, folder
        now = self.folders[node][-1] | changed
        self.folders[node].append({k: v for k, v in now.items() if v is not None})

    def _sync(self, node: int) -> None:
        versions: list[bytes] | list[dict[str, int]] = (
            self.files[node] if node in self.files else self.folders[node]
        )
        del versions[:-1]

    def _find(self, path: Path) -> int | None:
        if not path.is_relative_to(self.root):
            return None
        node: int | None = 0
        for part in path.relative_to(self.root).parts:
            node = self.folders[node][-1].get(part) if node in self.folders else None
        return node

    def after_power_loss(self, *, all_orders: bool) -> Iterator[Tree]:
        """What may be there: any version of each folder, or the first and last one; files likewise.

        Files go together: all of them as they were synced last, or all written, or in part.
        """
        open_ = [node for node, versions in self.folders.items() if len(versions) > 1]
        choices = [range(len(self.folders[n])) if all_orders else (0, -1) for n in open_]
        for chosen in itertools.product(*choices):
            version = dict(zip(open_, chosen, strict=True))
            for part in ("synced", "all", "half"):
                yield dict(self._tree(0, Path(), version, part))

    def _tree(
        self, node: int, path: Path, version: dict[int, int], part: str
    ) -> Iterator[tuple[Path, bytes | None]]:
        if node in self.files:
            yield path, self._content(node, part)
            return
        yield path, None
        for name, child in self.folders[node][version.get(node, -1)].items():
            yield from self._tree(child, path / name, version, part)

    def _content(self, node: int, part: str) -> bytes:
        first, last = self.files[node][0], self.files[node][-1]
        if part != "half" or first is last:
            return first if part == "synced" else last
        return last[: (len(first) + len(last)) // 2]


def build(tree: Tree, folder: Path) -> None:
    """Write such a state into an empty folder."""
    for path, data in tree.items():
        if data is None:
            (folder / path).mkdir(exist_ok=True)
        else:
            (folder / path).write_bytes(data)
