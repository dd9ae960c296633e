"""Any data set as WebDataset shards, on request with smaller pictures: ``python -m dino_xcit.data pack SRC DST``.

DST gets ``shard-000000.tar`` ..., ``classes.json`` where there are labels, ``pack.json`` (what was packed how, and each
shard's images, bytes and SHA-256), and ``unreadable.jsonl`` where an image could not be read.

A shard appears under its name when it is whole, and counts when ``pack.json`` lists it. One process writes, in the
images' order; others read, decode and shrink. So the bytes do not depend on how many there are, or on how often the
command was killed and given again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dino_xcit.data import Source, open_source
from dino_xcit.data.command_line import CommandLine, count
from dino_xcit.data.each_image import each_image
from dino_xcit.data.packing.folder import UNREADABLE, Options, PackFolder, Shard, Unread, explained, shard_name
from dino_xcit.data.packing.image import Packed, key_of, pack_image, relative_name
from dino_xcit.data.worker import usable_cores
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import counted, progress_bar

USAGE = (
    "python -m dino_xcit.data pack SRC DST [--part train|val] [--max-side N] [--quality Q] "
    "[--shard-mb N | --shard-images N] [--workers N] [--strict]"
)
_HELP = """\
Write the images of SRC, any form that --data-path takes, into WebDataset shards in the folder DST. Killed at any
moment, the same command goes on with the shard it was at. Train on the result with --data-path 'tar:DST/shard-*.tar'.

A member is called NUMBER_NAME.jpg, beside NUMBER_NAME.cls with the label; NAME is the image's path below SRC with its
dots and slashes as in a URL (%2E, %2F). Without --max-side every file's bytes are kept."""
_ABOUT_SIZES = """\
--max-side N bounds the LONGER side (FFCV's max_resolution; not ImageNet's "resize the shorter side"): a larger picture
is shrunk to it, antialiased, turned upright by EXIF and saved as a JPEG without chroma subsampling. Smaller ones keep
their bytes, but for JPEGs that lie on their side, which are saved anew, upright.
Crops are drawn as shares of the picture's area, so they lie where they did, but are made of fewer pixels: a view is
enlarged, and so blurred, where sqrt(share x width x height) is less than its size. At --max-side 512 and 4:3 that is a
224-pixel view of less than 25.5 % of the area, and a 96-pixel view of less than 4.7 %."""

_SHARD_MB = 256
_IN_A_ROW = 1000
"""So many unreadable images one after the other are a disk that is gone rather than bad files."""


class _OpenShard:
    """A shard while it is written."""

    def __init__(self, source: Source, options: Options, first: int) -> None:
        self.first = self.end = first
        self.images = 0
        self.unread: list[Unread] = []
        self._source, self._options = source, options

    def next_readable(self, packed: Iterator[Packed]) -> Packed | None:
        """The next image that could be read; those before it are noted.

        Raises:
            InputError: a great many in a row could not.
        """
        for in_a_row, one in enumerate(packed, start=1):
            self.end = one.index + 1
            if not one.cause:
                return one
            self.unread.append(Unread(one.index, self._source.name(one.index), one.cause))
            if in_a_row == _IN_A_ROW:
                raise InputError(
                    f"{_IN_A_ROW:,} images in a row cannot be read, the last of them {self.unread[-1].name} "
                    f"({one.cause}): is the disk there? If so, remove them; then run the same command"
                )
        return None

    def fill(self, first: Packed, packed: Iterator[Packed], file: Any) -> None:
        """Write an archive of ``first`` and what follows it until it is large enough."""
        written = 0
        one: Packed | None = first
        while one is not None:
            written += self._add(file, one)
            self.images += 1
            if self._options.is_full(self.images, written):
                break
            one = self.next_readable(packed)
        file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive

    def _add(self, file: Any, one: Packed) -> int:
        key = key_of(one.index, relative_name(self._source.url, self._source.name(one.index)))
        members = {} if one.label is None else {"cls": str(one.label).encode()}
        members[one.suffix] = one.data
        return sum(_add_member(file, f"{key}.{suffix}", data) for suffix, data in members.items())


def _add_member(file: Any, name: str, data: bytes) -> int:
    """One member, owned by nobody and of no date, so that the same input gives the same bytes; how many they are."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    for part in (header, data, padding):
        file.write(part)
    return len(header) + len(data) + len(padding)


def pack(source: Source, destination: Path, options: Options, workers: int) -> tuple[PackFolder, int]:
    """Write what is missing of the shards of a source.

    Args:
        source: what to pack.
        destination: a local folder: absent, empty, or one in which the same packing was begun.
        options: how; the same as before where it was begun.
        workers: processes that read, decode and shrink; before that, threads that compare what is there.

    Returns:
        The folder, and how many images this call went through (fewer than there are where it was begun before).

    Raises:
        InputError: the folder is another pack's or somebody else's, cannot be written, or is full; no image can be
            read; a process was killed.
    """
    work = partial(pack_image, max_side=options.max_side, quality=options.quality)
    with PackFolder(destination, source, options) as folder:
        missing = folder.missing(workers)
        seen = sum(end - first for _, first, end in missing)
        with progress_bar(len(source), f"packing {source.url}", shown=True, done=len(source) - seen) as bar:
            for number, first, end in missing:
                # A shard that was there before is made of the same images again, whatever its size.
                limits = options if number == len(folder.shards) else options.without_limits()
                with contextlib.closing(each_image(source, range(first, end), work, workers)) as images:
                    _write_shards(folder, source, limits, number, (first, end), _counted(images, bar))
        folder.finish()
    return folder, seen


def _counted(packed: Iterator[Packed], bar: Any) -> Iterator[Packed]:
    for one in packed:
        bar.update()
        yield one


def _write_shards(
    folder: PackFolder,
    source: Source,
    options: Options,
    number: int,
    piece: tuple[int, int],
    packed: Iterator[Packed],
) -> None:
    """Write the images of a piece of the source into shard ``number`` and the following ones."""
    first, end = piece
    while first < end:
        shard = _OpenShard(source, options, first)
        image = shard.next_readable(packed)
        if image is None:
            folder.note(first, end, shard.unread)
            return
        path = folder.path / shard_name(number)
        with explained(path):
            digest = atomic.write(path, partial(shard.fill, image, packed))
        folder.add(number, Shard(first, shard.end, shard.images, digest.size, digest.sha256), shard.unread)
        number, first = number + 1, shard.end


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0, or 1 under --strict where an image could not be read.

    Raises:
        InputError: a mistake in the command, or what :func:`pack` raises.
    """
    line = CommandLine(USAGE, _HELP, _ABOUT_SIZES)
    line.add_argument("source", metavar="SRC", help="what --data-path takes: a folder, a list, tar:..., sample:...")
    line.add_argument("destination", metavar="DST", help="a local folder, absent or empty")
    line.add_argument("--part", choices=("train", "val"), help="which part of SRC, where it has parts")
    line.add_argument("--max-side", type=count, metavar="N", help="pixels of the longer side (default: as it is)")
    line.add_argument("--quality", type=count, metavar="Q", default=90, help="of JPEGs that are written (default: 90)")
    limit = line.add_mutually_exclusive_group()
    limit.add_argument("--shard-mb", type=count, metavar="N", help=f"million bytes a shard (default: {_SHARD_MB})")
    limit.add_argument("--shard-images", type=count, metavar="N", help="images a shard")
    line.add_argument(
        "--workers", type=count, metavar="N", default=usable_cores(), help="processes (default: the cores)"
    )
    line.add_argument("--strict", action="store_true", help="exit code 1 if an image was left out")
    words = line.read(argv)
    if words.quality > 100:
        raise InputError(f"--quality is {words.quality}, expected 1 to 100")
    shard_mb = _SHARD_MB if words.shard_mb is None and words.shard_images is None else words.shard_mb
    options = Options(words.max_side, words.quality, shard_mb, words.shard_images)
    destination = Path(os.path.expanduser(words.destination))
    began = time.perf_counter()
    folder, seen = pack(_opened(words.source, words.part), destination, options, words.workers)
    _tell(folder, seen, time.perf_counter() - began)
    return 1 if folder.unread and words.strict else 0


def _opened(url: str, part: str | None) -> Source:
    path = os.path.expanduser(url)
    if not os.path.exists(path):
        return open_source(url, part)
    if part is None and all(os.path.isdir(os.path.join(path, name)) for name in ("train", "val")):
        raise InputError(f"{url} has the parts train and val: pack each on its own, with --part train and --part val")
    return open_source(os.path.abspath(path), part)  # so that a resumed packing finds the same names from anywhere


def _tell(folder: PackFolder, seen: int, seconds: float) -> None:
    images, size = (sum(getattr(shard, name) for shard in folder.shards) for name in ("images", "bytes"))
    print(f"{folder.path}: {counted(images, 'image')} in {counted(len(folder.shards), 'shard')}, {size / 1e9:,.2f} GB")
    if seen:
        print(f"{counted(seen, 'image')} in {seconds:.1f} s ({seen / max(seconds, 1e-9):,.0f} images/s)")
    else:
        print("all of it was there already")
    if folder.unread:
        unread = counted(len(folder.unread), "image")
        print(f"left out: {unread} that cannot be read, listed in {folder.path / UNREADABLE}")
    print(f"use it as --data-path {shlex.quote(f'tar:{folder.path}/shard-*.tar')}")
