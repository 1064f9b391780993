"""Compute what a disk may hold after a power cut: replay a recorded run without steps that were not yet durable.

A file's bytes are durable once the file is synced; a name is durable once its folder is synced. Of all other steps any
part may be missing, in any order: POSIX promises no more, and file systems differ. Missing bytes may leave the file
shorter, or zeros in it. A rename is one step. Syncing a file does not make its name durable.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.crash.trap import Event


@dataclass
class Disk:
    """Folders and files by our own numbers, because the system uses inode numbers again."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})  # 0 is the root
    files: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> "Disk":
        return Disk({node: dict(names) for node, names in self.folders.items()}, dict(self.files))

    def tree(self, node: int = 0, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Return every path with its content (None for a folder), in the order of names."""
        for name, inner in sorted(self.folders[node].items()):
            if inner in self.folders:
                yield prefix + name, None
                yield from self.tree(inner, f"{prefix}{name}/")
            else:
                yield prefix + name, self.files[inner]

    def write(self, folder: Path) -> None:
        """Write these files into an empty folder."""
        for path, content in self.tree():
            if content is None:
                (folder / path).mkdir()
            else:
                (folder / path).write_bytes(content)


@dataclass(frozen=True, slots=True)
class Step:
    """A recorded call, by the numbers of a Disk."""

    kind: str  # "name": puts and removes names; "write", "truncate" or "fsync"
    node: int  # the file or folder
    put: tuple[int, str] | None = None  # the number of a folder, and a name in it
    removed: tuple[int, str] | None = None
    offset: int = 0
    data: bytes = b""
    site: str = ""
    description: str = ""

    @property
    def needs(self) -> frozenset[int]:
        """Return what must be synced to make this step durable."""
        if self.kind != "name":
            return frozenset({self.node})
        return frozenset(location[0] for location in (self.put, self.removed) if location is not None)

    def apply(self, disk: Disk) -> None:
        match self.kind:
            case "write":
                old = disk.files[self.node].ljust(self.offset, b"\0")
                disk.files[self.node] = old[: self.offset] + self.data + old[self.offset + len(self.data) :]
            case "truncate":
                disk.files[self.node] = disk.files[self.node][: self.offset].ljust(self.offset, b"\0")
            case "name":
                if self.removed is not None:
                    folder, name = self.removed
                    if disk.folders[folder].get(name) == self.node:
                        del disk.folders[folder][name]
                if self.put is not None:
                    disk.folders[self.put[0]][self.put[1]] = self.node


class Recording:
    """The steps of a run, and the disk at its start."""

    def __init__(self, start: Disk, steps: Sequence[Step]):
        self.start, self.steps = start, list(steps)
        for step in steps:  # every node exists from the start, but is invisible without a name
            if step.kind == "name" and step.put is not None and step.node not in start.folders:
                start.files.setdefault(step.node, b"")

    @property
    def sites(self) -> list[str]:
        """Return the lines of the project that sync, in the order of their first call."""
        return list(dict.fromkeys(_line(step) for step in self.steps if step.kind == "fsync"))

    def without(self, site: str) -> "Recording":
        """Return the run without the syncs of one line."""
        steps = (
            replace(s, kind="nothing") if s.kind == "fsync" and _line(s) == site else s for s in self.steps
        )
        return Recording(self.start.copy(), list(steps))

    def loose(self, point: int) -> frozenset[int]:
        """Return which of the first `point` steps are not durable after them."""
        done = self.steps[:point]
        synced = {step.node: i for i, step in enumerate(done) if step.kind == "fsync"}
        changes = ((i, step) for i, step in enumerate(done) if step.kind in ("name", "write", "truncate"))
        return frozenset(i for i, s in changes if not all(synced.get(node, -1) > i for node in s.needs))

    def states(
        self, draw: random.Random, drawn: int, than: "Recording | None" = None
    ) -> Iterator[tuple[bool, str, Disk]]:
        """Yield (whether the run had ended, missing steps, the disk) for power cuts after every step, each state once.

        Of the steps that are not durable, these are missing: all, none, each one alone, all but one, and `drawn` random
        sets. With `than` only steps that are durable in that other run can be missing, and at least one is.
        """
        seen = set()
        for point in reversed(range(len(self.steps) + 1)):
            loose = sorted(self.loose(point) - (than.loose(point) if than else frozenset()))
            if than and not loose:
                continue
            for missing, zeros in _choices(loose, draw, drawn):
                disk = self._disk(point, missing, zeros)
                key = (point == len(self.steps), tuple(disk.tree()))
                if key not in seen:
                    seen.add(key)
                    yield key[0], self._told(point, missing, zeros), disk

    def drawn(self, draw: random.Random) -> tuple[bool, str, Disk]:
        """Draw one of `states`; in one of four the power is cut after the end."""
        point = len(self.steps) if draw.random() < 0.25 else draw.randint(0, len(self.steps))
        missing, zeros = draw.choice(list(_choices(sorted(self.loose(point)), draw, 4)))
        return point == len(self.steps), self._told(point, missing, zeros), self._disk(point, missing, zeros)

    def _disk(self, point: int, missing: frozenset[int], zeros: frozenset[int]) -> Disk:
        disk = self.start.copy()
        for i, step in enumerate(self.steps[:point]):
            if i in zeros and step.kind == "write":
                step = replace(step, data=bytes(len(step.data)))
            elif i in missing or i in zeros:
                continue
            step.apply(disk)
        return disk

    def _told(self, point: int, missing: frozenset[int], zeros: frozenset[int]) -> str:
        lost = [self.steps[i].description for i in sorted(missing)] + [
            f"zeros in {self.steps[i].description}" for i in sorted(zeros)
        ]
        return f"power cut after step {point} of {len(self.steps)} without {_few(lost)}"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing missing"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _line(step: Step) -> str:
    """Return the innermost line of the project that asked for a sync."""
    return step.site.partition(" < ")[0]


def _choices(
    loose: Sequence[int], draw: random.Random, drawn: int
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """Return (missing steps, steps that write zeros) of those that are not durable."""
    every, none = frozenset(loose), frozenset()
    yield none, none
    yield every, none
    yield none, every
    for one in loose:
        yield frozenset({one}), none
        yield every - {one}, none
        yield none, frozenset({one})
    for _ in range(drawn if len(loose) > 1 else 0):
        fates = {i: draw.choice("present missing zeros".split()) for i in loose}
        yield (
            frozenset(i for i in loose if fates[i] == "missing"),
            frozenset(i for i in loose if fates[i] == "zeros"),
        )


def recording(root: Path, events: Sequence[Event], before: "Snapshot") -> Recording:
    """Return the steps of recorded calls below `root`, whose files were `before` at first."""
    nodes, live = dict(before.nodes), before.disk.copy()
    steps: list[Step] = []

    def location(path: str) -> tuple[int, str]:
        *folders, name = Path(path).relative_to(root).parts
        node = 0
        for folder in folders:
            node = live.folders[node][folder]
        return node, name

    def named(path: str) -> int:
        if Path(path) == root:
            return 0
        folder, name = location(path)
        return live.folders[folder][name]

    def step(event: Event) -> Step:
        description = f"{event.kind} {Path(event.path).relative_to(root)}"
        match event.kind:
            case "create" | "mkdir":
                node = nodes[event.inode] = 1 + max([*live.folders, *live.files, *nodes.values()])
                if event.kind == "mkdir":
                    live.folders[node] = {}
                else:
                    live.files[node] = b""
                return Step("name", node, put=location(event.path), description=description)
            case "rename":
                return Step(
                    "name",
                    named(event.path),
                    put=location(event.other),
                    removed=location(event.path),
                    description=description,
                )
            case "link":
                return Step("name", named(event.path), put=location(event.other), description=description)
            case "unlink":
                return Step("name", named(event.path), removed=location(event.path), description=description)
            case "fsync":
                return Step("fsync", nodes[event.inode], site=event.site, description=description)
        return Step(
            event.kind, nodes[event.inode], offset=event.offset, data=event.data, description=description
        )

    for event in events:
        steps.append(step(event))
        steps[-1].apply(live)
    start = before.disk.copy()
    for node in live.folders:
        start.folders.setdefault(node, {})
    return Recording(start, steps)


@dataclass(frozen=True)
class Snapshot:
    """The files of a folder, and our numbers of the system's inodes."""

    disk: Disk
    nodes: dict[int, int]


def snapshot(root: Path) -> Snapshot:
    """Return the files below a folder now, all of them durable."""
    disk, nodes = Disk(), {root.stat().st_ino: 0}

    def enter(folder: Path, node: int) -> None:
        for path in sorted(folder.iterdir()):
            inner = nodes[path.stat().st_ino] = len(nodes)
            disk.folders[node][path.name] = inner
            if path.is_dir():
                disk.folders[inner] = {}
                enter(path, inner)
            else:
                disk.files[inner] = path.read_bytes()

    enter(root, 0)
    return Snapshot(disk, nodes)
