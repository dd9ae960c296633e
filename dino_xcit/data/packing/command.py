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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from dino_xcit.bounds import FilePath, Positional
from dino_xcit.cli import parse
from dino_xcit.data import Source, open_source
from dino_xcit.data.each_image import each_image
from dino_xcit.data.packing.folder import UNREADABLE, Options, PackFolder, Shard, Unread, explained, shard_name
from dino_xcit.data.packing.image import Packed, key_of, pack_image, relative_name
from dino_xcit.data.worker import usable_cores
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import counted, progress_bar

_SHARD_MB = 256
_IN_A_ROW = 1000
"""So many unreadable images one after the other are a disk that is gone rather than bad files."""


@dataclass(frozen=True)
class PackConfig:
    """Settings of python -m dino_xcit.data pack: write the images of a data set into WebDataset shards.

    Killed at any moment, the same command goes on with the shard it was at. Train on the result with --data-path
    'tar:DST/shard-*.tar'. A member is called NUMBER_NAME.jpg, beside NUMBER_NAME.cls with the label; NAME is the
    image's path in the source with its dots and slashes as in a URL (%2E, %2F).
    """

    source: Annotated[str, MinLen(1), Positional] = ""
    """The images, whatever --data-path takes: a folder, a list, tar:..., sample:...; --source may be left out."""
    destination: Annotated[FilePath, MinLen(1), Positional] = ""
    """A local folder, absent or empty; --destination may be left out."""
    part: Literal["", "train", "val"] = ""
    """Which part of the source, where it has parts."""
    max_side: Annotated[int, Ge(0)] = 0
    """Bound of the LONGER side in pixels (FFCV's max_resolution; not ImageNet's "resize the shorter side"); 0: none,
    every file's bytes are kept. A larger picture is shrunk, antialiased, turned upright by EXIF and saved as a JPEG
    without chroma subsampling. Smaller ones keep their bytes, except JPEGs that lie on their side, which are saved
    anew, upright. Crops are drawn as shares of the area, so they lie where they did, but have fewer pixels: a view is
    enlarged, and so blurred, where sqrt(share x width x height) is less than its size. At 512 and 4:3 that is a
    224-pixel view of less than 25.5 % of the area, and a 96-pixel view of less than 4.7 %."""
    quality: Annotated[int, Ge(1), Le(100)] = 90
    """Of JPEGs that are written."""
    shard_mb: Annotated[int, Ge(0)] = 0
    """Million bytes a shard; 0: 256, or no bound with --shard-images."""
    shard_images: Annotated[int, Ge(0)] = 0
    """Images a shard; 0: no bound."""
    workers: Annotated[int, Ge(-1)] = -1
    """Processes; 0: this one, -1: as many as there are cores."""
    strict: bool = False
    """Exit with code 1 if an image was left out."""

    def check(self) -> None:
        """Check how the settings go together.

        Raises:
            InputError: names the fields.
        """
        if self.shard_mb and self.shard_images:
            raise InputError("shard_mb and shard_images are both given, expected one of them")


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
    config = parse(PackConfig, argv, "python -m dino_xcit.data pack SRC DST")
    shard_mb = config.shard_mb or (None if config.shard_images else _SHARD_MB)
    options = Options(config.max_side or None, config.quality, shard_mb, config.shard_images or None)
    workers = usable_cores() if config.workers < 0 else config.workers
    began = time.perf_counter()
    folder, seen = pack(_opened(config.source, config.part or None), Path(config.destination), options, workers)
    _tell(folder, seen, time.perf_counter() - began)
    return 1 if folder.unread and config.strict else 0


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
