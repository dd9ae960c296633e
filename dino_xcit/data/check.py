"""Look at every image of a data set before training on it: which are broken, which are there twice, how large they are.

python -m dino_xcit.data check SRC [--part train|val] [--report FILE.jsonl] [--workers N]
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dino_xcit.console import progress_bar
from dino_xcit.data import Source, UndecodableImage, decode, open_source
from dino_xcit.data.loader import choose_workers
from dino_xcit.errors import InputError

USAGE = "python -m dino_xcit.data check SRC [--part train|val] [--report FILE.jsonl] [--workers N]"
_AT_ONCE = 64
"""Images a piece of work."""


@dataclass(frozen=True)
class Looked:
    """What was seen of one image."""

    index: int
    width: int = 0
    height: int = 0
    digest: str = ""
    """SHA-256 of the file's bytes, or of the pixels where the source holds pixels."""
    cause: str = ""
    """Why it cannot be read; empty where it can."""


@dataclass
class Report:
    """What was seen of all."""

    url: str
    images: int
    seconds: float = 0.0
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
        yield f"{self.images:,} images of {self.url} in {self.seconds:.1f} s ({speed})"
        if self.classes:
            least, most = (pick(self.classes, key=lambda name: self.classes[name]) for pick in (min, max))
            few, many = f"{self.classes[least]:,} ({least})", f"{self.classes[most]:,} ({most})"
            yield f"{len(self.classes):,} classes of {few} to {many} images"
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
        yield f"{extra:,} are there already, byte for byte{tail}" + (":" if self.duplicates else "")
        yield from (f"  {' = '.join(group[:4])}{' ...' * (len(group) > 4)}" for group in self.duplicates[:10])
        if len(self.duplicates) > 10:
            yield f"  ... and {len(self.duplicates) - 10:,} more groups"


_source: Source | None = None


def _take(source: Source) -> None:
    global _source
    _source = source


def _look(indices: Sequence[int]) -> list[Looked]:
    """In a worker: read and decode some images."""
    assert _source is not None
    return [look(_source, index) for index in indices]


def look(source: Source, index: int) -> Looked:
    """Read and decode one image."""
    try:
        item, _ = source.read(index)
        data = item if isinstance(item, bytes) else np.ascontiguousarray(item).tobytes()
        picture = decode(item, source.name(index))
    except UndecodableImage as error:
        return Looked(index, cause=error.cause)
    except InputError as error:
        return Looked(index, cause=str(error))
    return Looked(index, picture.width, picture.height, hashlib.sha256(data).hexdigest())


def check(source: Source, workers: int = -1) -> tuple[Report, list[Looked]]:
    """Read and decode every image, in several processes; what was seen of all, and of each in order."""
    began = time.perf_counter()
    pieces = [range(start, min(start + _AT_ONCE, len(source))) for start in range(0, len(source), _AT_ONCE)]
    count = min(choose_workers(workers, 1), len(pieces))
    seen: list[Looked] = []
    with progress_bar(len(source), f"checking {source.url}", shown=True) as bar:
        if count <= 1:
            _take(source)
            for piece in pieces:
                seen += _look(piece)
                bar.update(len(piece))
        else:
            context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
            with ProcessPoolExecutor(count, mp_context=context, initializer=_take, initargs=(source,)) as pool:
                for found in pool.map(_look, pieces):
                    seen += found
                    bar.update(len(found))
    report = summarise(source, seen)
    report.seconds = time.perf_counter() - began
    return report, seen


def summarise(source: Source, seen: Sequence[Looked]) -> Report:
    """A report of what was seen."""
    report = Report(source.url, len(source))
    if source.labels is not None and source.classes is not None:
        counts = Counter(source.labels.tolist())
        report.classes = {name: counts[label] for label, name in enumerate(source.classes)}
    report.broken = [(source.name(one.index), one.cause) for one in seen if one.cause]
    readable = [one for one in seen if not one.cause]
    groups: dict[str, list[int]] = {}
    for one in readable:
        groups.setdefault(one.digest, []).append(one.index)
    same = [group for group in groups.values() if len(group) > 1]
    report.duplicates = [[source.name(index) for index in group] for group in same]
    if source.labels is not None:
        report.across_classes = sum(len(set(source.labels[group].tolist())) > 1 for group in same)
    sides = sorted((min(one.width, one.height), max(one.width, one.height)) for one in readable)
    if sides:
        places = {"smallest": sides[0], "median": sides[len(sides) // 2], "largest": sides[-1]}
        report.sides = places
    return report


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0 if every image can be read, 1 if not.

    Raises:
        InputError: a mistake in the command, or no such data.
    """
    words = list(argv)
    if not words or words[0].startswith("-"):
        raise InputError(f"expected: {USAGE}")
    options = {"--part": "", "--report": "", "--workers": "-1"}
    rest = words[1:]
    while rest:
        name, *rest = rest
        if name not in options or not rest:
            raise InputError(f"cannot place {name!r}: expected: {USAGE}")
        options[name], *rest = rest
    if options["--part"] not in ("", "train", "val"):
        raise InputError(f"--part is {options['--part']!r}, expected train or val")
    if not options["--workers"].lstrip("-").isdigit():
        raise InputError(f"--workers is {options['--workers']!r}, expected a number")
    source = open_source(words[0], options["--part"] or None)
    report, seen = check(source, int(options["--workers"]))
    for line in report.lines():
        print(line)
    if options["--report"]:
        path = Path(options["--report"])
        rows = [json.dumps(asdict(one) | {"name": source.name(one.index)}) + "\n" for one in seen]
        try:
            path.write_text("".join(rows), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another --report") from error
        print(f"a line an image: {path}", file=sys.stderr)
    return 1 if report.broken else 0
