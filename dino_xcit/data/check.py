"""Look at every image of a data set before training on it: which are broken, which are there twice, how large they are.

python -m dino_xcit.data check SRC [--part train|val] [--report FILE.jsonl] [--workers N]
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Literal, TextIO

import numpy as np
from annotated_types import Ge, MinLen
from numpy.typing import NDArray

from dino_xcit.bounds import FilePath, Positional
from dino_xcit.cli import parse
from dino_xcit.data import Source, UndecodableImage, decode, open_source
from dino_xcit.data.each_image import each_image
from dino_xcit.data.header import read_header
from dino_xcit.data.worker import usable_cores
from dino_xcit.errors import InputError, printable
from dino_xcit.runtime.logging import counted, progress_bar


@dataclass(frozen=True)
class CheckConfig:
    """Settings of python -m dino_xcit.data check: read and decode every image of a data set.

    It reports which images cannot be read, which are there twice, byte for byte, how large they are, and how quickly
    this machine reads and decodes them. The exit code is 1 where an image cannot be read.
    """

    source: Annotated[str, MinLen(1), Positional] = ""
    """The images, whatever --data-path takes: a folder, a list, tar:..., sample:...; --source may be left out."""
    part: Literal["", "train", "val"] = ""
    """Which part of the source, where it has parts."""
    report: FilePath = ""
    """Write a line an image to this .jsonl file."""
    workers: Annotated[int, Ge(-1)] = -1
    """Processes; 0: this one, -1: as many as there are cores."""


_DIGEST = 32
_PIXELS = "pixels"
"""What stands in the place of a format where a source holds pixels."""


@dataclass(frozen=True)
class Looked:
    """What was seen of one image."""

    index: int
    width: int = 0
    height: int = 0
    size: int = 0
    """Bytes of the file, or of the pixels where the source holds pixels."""
    format: str = ""
    """JPEG, PNG ... by what the file is, whatever it is called."""
    digest: bytes = b""
    """SHA-256 of these bytes."""
    cause: str = ""
    """Why it cannot be read; empty where it can."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


class Seen:
    """What was seen of all images, 49 bytes for each, and a text for each broken one."""

    def __init__(self, images: int) -> None:
        self.sides = np.zeros((images, 2), dtype=np.int32)
        """[images, (width, height)] in pixels; 0 where an image cannot be read."""
        self.lengths = np.zeros(images, dtype=np.int64)
        """[images] in bytes."""
        self.digests = np.zeros((images, _DIGEST), dtype=np.uint8)
        self.formats = np.zeros(images, dtype=np.uint8)
        """Places in ``format_names``."""
        self.format_names: list[str] = [""]
        self.causes: dict[int, str] = {}
        self.read_seconds = self.decode_seconds = 0.0
        """Sums over the images, in the processes that did it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, one: Looked) -> None:
        """Take in one image."""
        self.read_seconds += one.read_seconds
        self.decode_seconds += one.decode_seconds
        if one.cause:
            self.causes[one.index] = one.cause
            return
        if one.format not in self.format_names:
            self.format_names.append(one.format)
        self.sides[one.index] = one.width, one.height
        self.lengths[one.index] = one.size
        self.formats[one.index] = self.format_names.index(one.format)
        self.digests[one.index] = np.frombuffer(one.digest, dtype=np.uint8)

    def row(self, index: int) -> dict[str, object]:
        """One image's line in a report."""
        width, height = self.sides[index].tolist()
        readable = index not in self.causes
        return {
            "index": index,
            "width": width,
            "height": height,
            "bytes": int(self.lengths[index]),
            "format": self.format_names[self.formats[index]],
            "digest": self.digests[index].tobytes().hex() if readable else "",
            "cause": self.causes.get(index, ""),
        }

    def readable(self) -> NDArray[np.int64]:
        """Indices of the images that can be read."""
        mask = np.ones(len(self), dtype=bool)
        mask[list(self.causes)] = False
        return np.flatnonzero(mask)

    def same(self) -> list[NDArray[np.int64]]:
        """Indices of images whose bytes are the same, a group each, in the order of their first ones."""
        indices = self.readable()
        words = self.digests[indices].view(np.uint64)
        order = np.lexsort((indices, *words.T))
        new = np.ones(len(order), dtype=bool)
        new[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
        starts = np.flatnonzero(new)
        lengths = np.diff(np.append(starts, len(order)))
        groups = [indices[order[starts[i] : starts[i] + lengths[i]]] for i in np.flatnonzero(lengths > 1)]
        return sorted(groups, key=lambda group: int(group[0]))


@dataclass
class Report:
    """What was seen, for a person."""

    url: str
    images: int
    seconds: float = 0.0
    bytes: int = 0
    """Of the images that can be read."""
    formats: dict[str, int] = field(default_factory=dict)
    """Images a format, the most frequent first."""
    read_seconds: float = 0.0
    """For an image, in the mean, in the process that reads it."""
    decode_seconds: float = 0.0
    classes: dict[str, int] = field(default_factory=dict)
    """Images a class; empty without labels."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(name, cause) of each image that cannot be read."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Names of images whose bytes are the same, a group each."""
    across_classes: int = 0
    """How many of these groups have more than one label."""
    sides: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(shorter, longer) side in pixels of the smallest, the median and the largest image, by the shorter side."""

    def lines(self) -> Iterator[str]:
        """For the screen."""
        speed = f"{self.images / max(self.seconds, 1e-9):,.0f} images/s"
        yield f"{counted(self.images, 'image')} of {self.url} in {self.seconds:.1f} s ({speed})"
        per_image = f"{1e3 * self.read_seconds:.2f} ms reading and {1e3 * self.decode_seconds:.2f} ms decoding"
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items()) or "nothing"
        yield f"{formats}; {self.bytes / 1e9:,.3f} GB; an image takes a process {per_image}"
        if self.classes:
            least, most = (pick(self.classes, key=lambda name: self.classes[name]) for pick in (min, max))
            few, many = f"{self.classes[least]:,} ({least})", f"{self.classes[most]:,} ({most})"
            alike = self.classes[least] == self.classes[most]
            sizes = counted(self.classes[least], "image") + " each" if alike else f"{few} to {many} images"
            yield f"{counted(len(self.classes), 'class')} of {sizes}"
        else:
            yield "no labels"
        if self.sides:
            yield "sizes: " + ", ".join(f"{name} {a} x {b}" for name, (a, b) in self.sides.items())
        yield f"{len(self.broken):,} cannot be read" + (":" if self.broken else "")
        yield from (f"  {name}: {cause}" for name, cause in self.broken[:10])
        if len(self.broken) > 10:
            yield f"  ... and {len(self.broken) - 10:,} more"
        extra = sum(len(group) - 1 for group in self.duplicates)
        tail = f", {self.across_classes:,} of the groups under different labels" if self.across_classes else ""
        copies = "is a copy of another" if extra == 1 else "are copies of others"
        yield f"{extra:,} {copies}, byte for byte{tail}" + (":" if self.duplicates else "")
        yield from (f"  {' = '.join(group[:4])}{' ...' * (len(group) > 4)}" for group in self.duplicates[:10])
        if len(self.duplicates) > 10:
            yield f"  ... and {len(self.duplicates) - 10:,} more groups"


def look(source: Source, index: int) -> Looked:
    """Read and decode one image."""
    began = read = time.perf_counter()
    try:
        item, _ = source.read(index)
        read = time.perf_counter()
        picture = decode(item, source.name(index))
    except InputError as error:
        cause = error.cause if isinstance(error, UndecodableImage) else str(error)
        return Looked(index, cause=cause)
    decoded = time.perf_counter()
    data = item if isinstance(item, bytes) else np.ascontiguousarray(item).tobytes()
    kind = read_header(item).format if isinstance(item, bytes) else _PIXELS
    digest = hashlib.sha256(data).digest()
    return Looked(index, picture.width, picture.height, len(data), kind, digest, "", read - began, decoded - read)


def check(source: Source, workers: int = -1) -> tuple[Report, Seen]:
    """Read and decode every image, in several processes; what was seen of all, and of each.

    Args:
        source: what to look at; read in its own order.
        workers: processes; 0 or 1: this one; -1: as many as there are cores.
    """
    began = time.perf_counter()
    seen = Seen(len(source))
    looked = each_image(source, range(len(source)), look, usable_cores() if workers < 0 else workers)
    with closing(looked), progress_bar(len(source), f"checking {source.url}", shown=True) as bar:
        for one in looked:
            seen.add(one)
            bar.update()
    report = summarise(source, seen)
    report.seconds = time.perf_counter() - began
    return report, seen


def summarise(source: Source, seen: Seen) -> Report:
    """A report of what was seen."""
    report = Report(source.url, len(source), bytes=int(seen.lengths.sum()))
    readable = seen.readable()
    counted = Counter({seen.format_names[place]: int(n) for place, n in enumerate(np.bincount(seen.formats[readable]))})
    report.formats = {name: count for name, count in counted.most_common() if count}
    if len(readable):
        report.read_seconds, report.decode_seconds = (
            total / len(readable) for total in (seen.read_seconds, seen.decode_seconds)
        )
    if source.labels is not None and source.classes is not None:
        # Every label is a class's number: sources see to it.
        counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
        report.classes = dict(zip(source.classes, counts, strict=True))
    report.broken = [(source.name(index), cause) for index, cause in sorted(seen.causes.items())]
    same = seen.same()
    report.duplicates = [[source.name(int(index)) for index in group] for group in same]
    if source.labels is not None:
        labels = source.labels
        report.across_classes = sum(len(np.unique(labels[group])) > 1 for group in same)
    if len(readable):
        sides = np.sort(seen.sides[readable], axis=1)
        order = np.lexsort((sides[:, 1], sides[:, 0]))
        places = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
        report.sides = {name: (int(sides[at, 0]), int(sides[at, 1])) for name, at in places.items()}
    return report


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0 if every image can be read, 1 if not.

    Raises:
        InputError: a mistake in the command, or no such data.
    """
    config = parse(CheckConfig, argv, "python -m dino_xcit.data check SRC")
    source = open_source(config.source, config.part or None)
    with _report_file(config.report) as rows:  # before hours of reading, in case it cannot be written
        report, seen = check(source, config.workers)
        for text in report.lines():
            print(printable(text))
        if rows is not None:
            try:
                for index in range(len(seen)):
                    rows.write(json.dumps(seen.row(index) | {"name": source.name(index)}) + "\n")
                rows.flush()
            except OSError as error:
                raise _unwritable(config.report, error) from error
            print(f"a line an image: {config.report}", file=sys.stderr)
    return 1 if report.broken else 0


def _report_file(name: str) -> AbstractContextManager[TextIO | None]:
    if not name:
        return nullcontext()
    try:
        return open(name, "w", encoding="utf-8")
    except OSError as error:
        raise _unwritable(name, error) from error


def _unwritable(name: str, error: OSError) -> InputError:
    return InputError(f"cannot write {name}: {error.strerror}; choose another --report")
