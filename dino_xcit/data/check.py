"""Report the unreadable images, duplicates, sizes and classes of a data set.

python -m dino_xcit.data check SRC [--part train|val] [--channels N] [--value-range BLACK WHITE]
    [--white-level N|auto] [--report FILE.jsonl] [--workers N]
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Literal, TextIO

import numpy as np
from annotated_types import Ge, Le, MinLen

from dino_xcit.bounds import FilePath, Positional, ZeroIsAuto
from dino_xcit.cli import parse
from dino_xcit.data import Source, UndecodableImage, open_source
from dino_xcit.data.channels import format_of
from dino_xcit.data.decode import decode_image, read_header
from dino_xcit.data.measure import choose_white_level, measure_channels
from dino_xcit.data.open import parts_of
from dino_xcit.data.workers import each_image
from dino_xcit.errors import InputError, printable
from dino_xcit.runtime.logging import counted, progress_bar
from dino_xcit.transform import RGB, WHITE, PixelFormat, size_of

_SHOWN = 10


@dataclass(frozen=True)
class CheckConfig:
    """Read and decode every image of a data set.

    The report lists unreadable images, byte-identical duplicates, image sizes, mean and std of each channel, and the
    speed of reading and decoding on this machine. The exit code is 1 if an image is unreadable.
    """

    source: Annotated[str, MinLen(1), Positional] = ""
    """Data set, in any format of --data-path: a folder, a list, tar:... (the flag --source may be omitted)."""
    part: Literal["", "train", "val"] = ""
    """Part of the source, if it has parts. Default: both parts of a folder with train and val."""
    channels: Annotated[int, Ge(1)] = 3
    """Number of channels of the images, as in run_pretrain.py."""
    value_range: tuple[float, ...] = ()
    """Values of black and white, as in run_pretrain.py."""
    white_level: Annotated[int, Ge(0), Le(WHITE), ZeroIsAuto] = WHITE
    """White value of 16-bit images; auto (or 0): measured on 64 images."""
    report: FilePath = ""
    """Write one line per image to this .jsonl file."""
    workers: Annotated[int, Ge(-1)] = -1
    """Number of processes. 0: the main process only; -1: one per core."""

    def check(self) -> None:
        """Check the channels and the range together.

        Raises:
            InputError: The range is invalid.
        """
        PixelFormat(self.channels, value_range=self.value_range).check()


@dataclass(frozen=True)
class CheckedImage:
    """Findings for one image: its line in the report."""

    index: int
    name: str
    width: int = 0
    height: int = 0
    bytes: int = 0
    """Size of the file, or of the pixel array if the source returns pixels."""
    format: str = ""
    """Format by content, not by name: JPEG, PNG ...; ``pixels`` if the source returns pixels."""
    digest: str = ""
    """SHA-256 of the bytes."""
    cause: str = ""
    """Why the image is unreadable; empty if it is readable."""


@dataclass
class Report:
    """Findings for all images."""

    url: str
    images: int
    seconds: float = 0.0
    bytes: int = 0
    """Total size of the readable images."""
    formats: Counter[str] = field(default_factory=Counter)
    read_seconds: float = 0.0
    """Sum over the images, measured in the workers."""
    decode_seconds: float = 0.0
    classes: dict[str, int] = field(default_factory=dict)
    """Number of images per class; empty without labels."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(name, cause) of each unreadable image."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of names of byte-identical images."""
    across_classes: int = 0
    """Number of groups with more than one label."""
    sides: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(shorter, longer) side in pixels of the smallest, the median and the largest image, by the shorter side."""
    mean: tuple[float, ...] = ()
    """Mean of each channel on a sample, from 0 (black) to 1 (white); empty if none of it is readable."""
    std: tuple[float, ...] = ()
    """Std of each channel, likewise."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of the printed report."""
        speed = f"{self.images / max(self.seconds, 1e-9):,.0f} images/s"
        yield f"{counted(self.images, 'image')} of {self.url} in {self.seconds:.1f} s ({speed})"
        readable = max(1, self.images - len(self.broken))
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common()) or "nothing"
        reading, decoding = (1e3 * total / readable for total in (self.read_seconds, self.decode_seconds))
        yield f"{formats}; {self.bytes / 1e9:,.3f} GB; per image: {reading:.2f} ms reading, {decoding:.2f} ms decoding"
        if self.classes:
            least, most = (pick(self.classes, key=self.classes.__getitem__) for pick in (min, max))
            fewest, greatest = self.classes[least], counted(self.classes[most], "image")
            sizes = greatest if fewest == self.classes[most] else f"{fewest:,} ({least}) to {greatest} ({most})"
            yield f"{counted(len(self.classes), 'class')} of {sizes}"
        else:
            yield "no labels"
        if self.sides:
            yield "sizes: " + ", ".join(f"{name} {a} x {b}" for name, (a, b) in self.sides.items())
        for name, values in (("mean", self.mean), ("std", self.std)):
            numbers = " ".join(f"{value:.4f}" for value in values) or "not measured"
            yield f"{name} of each channel on a sample, from 0 (black) to 1 (white): {numbers}"
        yield f"{counted(len(self.broken), 'image')} cannot be read"
        yield from (f"  {name}: {cause}" for name, cause in self.broken[:_SHOWN])
        copies = sum(len(group) - 1 for group in self.duplicates)
        labels = f", {self.across_classes:,} of the groups under different labels" if self.across_classes else ""
        yield f"{counted(copies, 'copy')} of other images, byte for byte{labels}"
        yield from (f"  {' = '.join(group[:4])}{' ...' * (len(group) > 4)}" for group in self.duplicates[:_SHOWN])


def check_image(source: Source, index: int, format: PixelFormat = RGB) -> tuple[CheckedImage, float, float]:
    """Read and decode one image; return the findings and the seconds of reading and of decoding."""
    name, began = source.name(index), time.perf_counter()
    try:
        item, _ = source.read(index)
        read = time.perf_counter()
        height, width = size_of(decode_image(item, name, format))
    except InputError as error:
        cause = error.cause if isinstance(error, UndecodableImage) else str(error)
        return CheckedImage(index, name, cause=cause), 0.0, 0.0
    decoded = time.perf_counter()
    data = item if isinstance(item, bytes) else np.ascontiguousarray(item).tobytes()
    kind = "pixels"
    if isinstance(item, bytes):
        kind = read_header(item).format if format.channels == 3 else format_of(item)
    digest = hashlib.sha256(data).hexdigest()
    found = CheckedImage(index, name, width, height, len(data), kind, digest)
    return found, read - began, decoded - read


def check(source: Source, workers: int = -1, rows: TextIO | None = None, format: PixelFormat = RGB) -> Report:
    """Read and decode every image.

    Args:
        source: Images, read in the order of the source.
        workers: Number of processes. 0 or 1: the calling process only; -1: one per core.
        rows: File for one line of JSON per image.
        format: How the images are decoded.
    """
    began = time.perf_counter()
    report = Report(source.url, len(source))
    sides = np.zeros((len(source), 2), dtype=np.int32)
    first: dict[bytes, int] = {}
    copies: dict[int, list[int]] = {}
    images = each_image(source, range(len(source)), partial(check_image, format=format), workers)
    with closing(images), progress_bar(len(source), f"checking {source.url}", shown=True) as bar:
        for one, read_seconds, decode_seconds in images:
            bar.update()
            if rows is not None:
                rows.write(json.dumps(asdict(one)) + "\n")
            if one.cause:
                report.broken.append((one.name, one.cause))
                continue
            report.bytes += one.bytes
            report.formats[one.format] += 1
            report.read_seconds += read_seconds
            report.decode_seconds += decode_seconds
            sides[one.index] = sorted((one.width, one.height))
            original = first.setdefault(bytes.fromhex(one.digest[:32]), one.index)
            if original != one.index:
                copies.setdefault(original, [original]).append(one.index)
    groups = [copies[original] for original in sorted(copies)]
    report.duplicates = [[source.name(index) for index in group] for group in groups]
    if source.labels is not None and source.classes is not None:
        counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
        report.classes = dict(zip(source.classes, counts, strict=True))
        report.across_classes = sum(len(np.unique(source.labels[group])) > 1 for group in groups)
    sides = sides[sides[:, 0] > 0]
    if len(sides):
        order = np.lexsort((sides[:, 1], sides[:, 0]))
        places = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
        report.sides = {name: (int(sides[at, 0]), int(sides[at, 1])) for name, at in places.items()}
    report.seconds = time.perf_counter() - began
    with suppress(InputError):  # no image of the sample is readable
        report.mean, report.std = measure_channels(source, format)
    return report


def main(argv: Sequence[str]) -> int:
    """Run the check and return the exit code: 0 if every image is readable, else 1.

    Raises:
        InputError: The command line is invalid, the data cannot be opened, or the report cannot be written.
    """
    config = parse(CheckConfig, argv, "python -m dino_xcit.data check SRC")
    parts = [config.part] if config.part else parts_of(config.source) or [""]
    sources = [open_source(config.source, part or None) for part in parts]
    try:
        with ExitStack() as stack:  # opened first: an unwritable report fails before hours of reading
            rows = stack.enter_context(open(config.report, "w", encoding="utf-8")) if config.report else None
            reports = []
            for source in sources:
                white = choose_white_level(source, config.white_level, config.channels)
                format = PixelFormat(config.channels, white, config.value_range)
                reports.append(check(source, config.workers, rows, format))
    except OSError as error:
        if not config.report:
            raise
        raise InputError(f"cannot write {config.report}: {error.strerror}; give another --report") from error
    for text in (line for report in reports for line in report.lines()):
        print(printable(text))
    if config.report:
        print(f"one line per image: {config.report}", file=sys.stderr)
    return 1 if any(report.broken for report in reports) else 0
