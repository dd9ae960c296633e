"""Write any data set as WebDataset shards, optionally with smaller images: ``python -m dino_xcit.data pack SRC DST``.

Files in DST: ``shard-000000.tar`` ..., ``classes.json`` if there are labels, ``pack.json`` (source, options, and
images, bytes and SHA-256 of each shard), and ``unreadable.jsonl`` if there are unreadable images.

A shard is complete once ``pack.json`` lists it. One process writes in the order of the images; workers read, decode and
resize. The output bytes therefore do not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shlex
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
from annotated_types import Ge, Le, MinLen
from filelock import FileLock, Timeout
from PIL import Image

from dino_xcit.bounds import FilePath, Positional, ZeroIsAuto, refuse_changed
from dino_xcit.cli import parse
from dino_xcit.data import Source, UndecodableImage, decode, open_source
from dino_xcit.data.channels import format_of
from dino_xcit.data.decode import decode_image, read_header
from dino_xcit.data.measure import choose_white_level
from dino_xcit.data.open import parts_of
from dino_xcit.data.source import Item
from dino_xcit.data.workers import each_image, usable_cores
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import counted, progress_bar
from dino_xcit.transform import WHITE, PixelFormat

MANIFEST, CLASSES, UNREADABLE = "pack.json", "classes.json", "unreadable.jsonl"
SHARD_MB = 256
MAX_UNREADABLE = 1000
"""Maximum number of consecutive unreadable images: more suggest a lost disk."""
MAX_NAME = 3000
"""Maximum bytes of a name in a key, as readers refuse paths of 4096 bytes."""

_VERSION = 1
_OURS = (CLASSES, ".lock", f".{CLASSES}.tmp", f".{MANIFEST}.tmp")
"""Files that may precede the manifest."""
_SUFFIXES = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm", "NPY": "npy",
}  # fmt: skip
"""Suffix of a member by the format of its bytes, as file names may be wrong (ImageNet has a PNG named .JPEG)."""


@dataclass(frozen=True)
class PackConfig:
    """Write the images of a data set as WebDataset shards.

    After an interruption the same command continues with the first incomplete shard. Train on the result with
    --data-path 'tar:DST/shard-*.tar'. Members are named NUMBER_NAME.jpg, with the label in NUMBER_NAME.cls. NAME is the
    path of the image in the source, with dots and slashes encoded as in a URL (%2E, %2F).
    """

    source: Annotated[str, MinLen(1), Positional] = ""
    """Data set, in any format of --data-path: a folder, a list, tar:... (the flag --source may be omitted)."""
    destination: Annotated[FilePath, MinLen(1), Positional] = ""
    """New or empty local folder for the shards (the flag --destination may be omitted)."""
    part: Literal["", "train", "val"] = ""
    """Part of the source, if it has parts. Required for a folder with train and val."""
    channels: Annotated[int, Ge(1)] = 3
    """Number of channels of the images, as in run_pretrain.py. Files with another number than 3 are copied unchanged,
    without --max-side."""
    max_side: Annotated[int, Ge(0)] = 0
    """Maximum length of the LONGER side in pixels (like FFCV's max_resolution, unlike ImageNet's resize of the shorter
    side). 0: no maximum, all files are copied unchanged. Larger images are resized with antialiasing, rotated upright
    by EXIF and saved as JPEG without chroma subsampling. Smaller images are copied unchanged, except rotated JPEGs,
    which are saved again upright. Crops cover the same share of the area as before but have fewer pixels: a view is
    enlarged, and therefore blurred, if sqrt(share x width x height) is less than its size. At 512 and 4:3 this affects
    224-pixel views of less than 25.5 % of the area, and 96-pixel views of less than 4.7 %."""
    quality: Annotated[int, Ge(1), Le(100)] = 90
    """JPEG quality of resized images."""
    white_level: Annotated[int, Ge(0), Le(WHITE), ZeroIsAuto] = WHITE
    """White value of 16-bit greyscale images, which resizing converts to 8 bits; auto (or 0): measured on 64 images."""
    shard_mb: Annotated[int, Ge(0)] = 0
    """Shard size in MB. 0: 256, or no limit with --shard-images."""
    shard_images: Annotated[int, Ge(0)] = 0
    """Images per shard. 0: no limit."""
    workers: Annotated[int, Ge(-1)] = -1
    """Number of processes. 0: the main process only; -1: one per core."""
    strict: bool = False
    """Exit with code 1 if an image is unreadable."""

    def check(self) -> None:
        """Check combinations of settings.

        Raises:
            InputError: Settings exclude each other.
        """
        if not self.max_side:
            refuse_changed(self, ("quality", "white_level"), "without --max-side")
        if self.channels != 3:
            refuse_changed(self, ("max_side",), f"with {self.channels} channels")
        if self.shard_mb and self.shard_images:
            raise InputError("shard_mb and shard_images are both given, expected one of them")


@dataclass(frozen=True)
class Options:
    """Settings that determine the bytes of the shards, named like the flags."""

    max_side: int | None = None
    quality: int = 90
    white_level: int = WHITE
    shard_mb: int | None = None
    """A shard ends with the image that brings it to this size."""
    shard_images: int | None = None
    channels: int = 3

    def is_full(self, images: int, written: int) -> bool:
        """Whether a shard with this number of images and bytes is full."""
        by_bytes = self.shard_mb is not None and written >= self.shard_mb * 1_000_000
        return by_bytes or (self.shard_images is not None and images >= self.shard_images)


@dataclass(frozen=True)
class Shard:
    """A written shard. Unreadable images between ``first`` and ``end`` are not in it."""

    name: str
    first: int
    """Index of its first image in the source."""
    end: int
    """Index of the first image of the next shard."""
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """One image, ready to be written into a shard."""

    index: int
    label: int | None = None
    suffix: str = ""
    """Suffix of the member, without the dot."""
    data: bytes = b""
    cause: str = ""
    """Why the image is unreadable; empty if it is readable."""


@dataclass
class Packing:
    """State of a folder of shards."""

    path: Path
    source: str
    fingerprint: str
    images: int
    """Number of images of the source."""
    options: Options
    shards: list[Shard] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """``index``, ``name`` and ``cause`` of each unreadable image."""
    complete: bool = False

    @property
    def end(self) -> int:
        """Index of the first image after the last shard."""
        return self.shards[-1].end if self.shards else 0

    def remove_other_shards(self) -> None:
        """Remove shards that are not in the manifest, as the new ones may be fewer. Other files stay."""
        ours = {shard.name for shard in self.shards}
        for path in self.path.glob(f"shard-{'[0-9]' * 6}.tar"):
            if path.name not in ours:
                path.unlink()

    def save(self) -> None:
        """Write the manifest and the list of unreadable images."""
        lines = "".join(json.dumps(row) + "\n" for row in self.unreadable).encode()
        if lines:
            atomic.write(self.path / UNREADABLE, lambda file: file.write(lines))
        else:
            (self.path / UNREADABLE).unlink(missing_ok=True)
        packed = sum(shard.images for shard in self.shards)
        values = asdict(self) | {"version": _VERSION, "packed": packed}
        for name in ("path", "unreadable"):
            del values[name]
        atomic.write_json(self.path / MANIFEST, values)


def pack(source: Source, destination: Path, options: Options, workers: int) -> tuple[Packing, int]:
    """Write the missing shards of a source.

    Args:
        source: Images to pack.
        destination: Local folder: absent, empty, or with the same packing interrupted.
        options: Settings of the shards. An interrupted packing continues only with the same options.
        workers: Number of worker processes, and before that of threads that verify existing shards.

    Returns:
        The state of the folder, and the number of images read by this call.

    Raises:
        InputError: The folder is in use, contains other files, is not writable, or the disk is full; no image is
            readable; or a worker was killed.
    """
    _check_destination(destination, source)
    work = partial(pack_image, options=options)
    with _explaining_errors(destination), contextlib.ExitStack() as stack:
        destination.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(FileLock(destination / ".lock", timeout=0))
        except Timeout as error:
            raise InputError(f"another process packs into {destination}: wait for it, or give another DST") from error
        packing = _begun(source, destination, options, workers)
        if packing.complete:
            return packing, 0
        packing.remove_other_shards()
        begin = packing.end
        bar = stack.enter_context(progress_bar(len(source), f"packing {source.url}", shown=True, done=begin))
        images = stack.enter_context(contextlib.closing(each_image(source, range(begin, len(source)), work, workers)))
        readable = _readable(images, source, packing, bar)
        image = next(readable, None)
        while image is not None:
            image = _write_shard(packing, image, readable, source)
        if not packing.shards:
            cause = packing.unreadable[0]["cause"] if packing.unreadable else "there is none"
            raise InputError(
                f"none of the {len(source):,} images of {source.url} can be read, the first because: {cause}; run "
                f"python -m dino_xcit.data check {source.url}"
            )
        packing.complete = True
        packing.save()
    return packing, len(source) - begin


def _begun(source: Source, path: Path, options: Options, readers: int) -> Packing:
    """Load the state of an interrupted packing, up to the first missing or changed shard, or begin a new one."""
    packing = Packing(path, source.url, source.fingerprint(), len(source), options)
    if not (path / MANIFEST).exists():
        foreign = sorted(entry.name for entry in os.scandir(path) if entry.name not in _OURS)
        if foreign:
            raise InputError(f"cannot pack into {path}: it has {foreign[0]} and no {MANIFEST}; give an empty folder")
        atomic.remove_leftovers(path)
        if source.classes is not None:
            atomic.write_json(path / CLASSES, list(source.classes))
        packing.save()
        return packing
    restart = f"give another DST, or start over after: rm -r {shlex.quote(str(path))}"
    try:
        before = json.loads((path / MANIFEST).read_bytes())
        if before["version"] != _VERSION:
            raise ValueError(f"version {before['version']!r}, expected {_VERSION}")
        begun = Options(**before["options"])
        shards = [Shard(**row) for row in before["shards"]]
        lines = (path / UNREADABLE).read_text("utf-8").splitlines() if (path / UNREADABLE).exists() else []
        unreadable = [json.loads(line) for line in lines]
        same = (before["fingerprint"], before["images"]) == (packing.fingerprint, packing.images)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path / MANIFEST} is damaged ({type(error).__name__}: {str(error)[:100]}): {restart}"
        ) from error
    if begun != options:
        raise InputError(f"{path} was begun with {begun}, this command has {options}: use the same options, {restart}")
    if not same:
        raise InputError(
            f"{path} was begun from {before['source']} with {before['images']:,} images, this command packs "
            f"{source.url} with {len(source):,}, and they differ (files added, removed, changed or moved): {restart}"
        )
    with ThreadPoolExecutor(max(1, readers)) as pool:
        intact = list(pool.map(partial(_is_intact, path), shards))
    packing.shards = shards[: intact.index(False) if False in intact else None]
    packing.complete = bool(before["complete"]) and all(intact)
    packing.unreadable = [row for row in unreadable if packing.complete or row["index"] < packing.end]
    atomic.remove_leftovers(path)
    return packing


def _is_intact(path: Path, shard: Shard) -> bool:
    try:
        return atomic.digest_of(path / shard.name) == atomic.Digest(shard.bytes, shard.sha256)
    except OSError:
        return False


def _readable(packed: Iterator[Packed], source: Source, packing: Packing, bar: Any) -> Iterator[Packed]:
    """Yield the readable images, and record the unreadable ones.

    Raises:
        InputError: :data:`MAX_UNREADABLE` consecutive images are unreadable.
    """
    in_a_row = 0
    for one in packed:
        bar.update()
        if not one.cause:
            in_a_row = 0
            yield one
            continue
        name = source.name(one.index)
        packing.unreadable.append({"index": one.index, "name": name, "cause": one.cause})
        in_a_row += 1
        if in_a_row == MAX_UNREADABLE:
            raise InputError(
                f"{in_a_row:,} images in a row cannot be read, the last of them {name} ({one.cause}): check the disk "
                "and run the same command, or remove them and give another DST"
            )


def _write_shard(packing: Packing, image: Packed, readable: Iterator[Packed], source: Source) -> Packed | None:
    """Write one shard that begins with ``image``; return the first image of the next shard, or None."""
    following: Packed | None = image
    images = 0

    def fill(file: Any) -> None:
        nonlocal following, images
        written = 0
        while following is not None and not (images and packing.options.is_full(images, written)):
            key = key_of(following.index, relative_name(source.url, source.name(following.index)))
            if following.label is not None:
                written += _add_member(file, f"{key}.cls", str(following.label).encode())
            written += _add_member(file, f"{key}.{following.suffix}", following.data)
            images += 1
            following = next(readable, None)
        file.write(bytes(2 * tarfile.BLOCKSIZE))  # end of archive

    name = f"shard-{len(packing.shards):06d}.tar"
    digest = atomic.write(packing.path / name, fill)
    end = packing.images if following is None else following.index
    packing.shards.append(Shard(name, packing.end, end, images, digest.size, digest.sha256))
    packing.save()
    return following


def _add_member(file: Any, name: str, data: bytes) -> int:
    """Write one member without owner and date, for reproducible bytes; return their number."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    for part in (header, data, padding):
        file.write(part)
    return len(header) + len(data) + len(padding)


def pack_image(source: Source, index: int, options: Options) -> Packed:
    """Read and decode an image, and resize it if it is too large.

    Args:
        source: Source of the image.
        index: Index in the source.
        options: ``channels``; ``max_side``, ``quality`` and ``white_level`` of resized images.
    """
    max_side = options.max_side
    try:
        item, label = source.read(index)
        if options.channels != 3:
            return _packed_unchanged(index, item, label, source.name(index), options.channels)
        image = decode(item, source.name(index), options.white_level)
    except InputError as error:
        return Packed(index, cause=error.cause if isinstance(error, UndecodableImage) else str(error))
    too_large = max_side is not None and max(image.size) > max_side
    if isinstance(item, np.ndarray):
        if not too_large:
            return Packed(index, label, "png", _saved(Image.fromarray(item), "PNG"))
    else:
        header = read_header(item)
        is_turned_jpeg = header.format == "JPEG" and header.is_turned
        if not too_large and (max_side is None or not is_turned_jpeg):
            return Packed(index, label, _SUFFIXES[header.format], item)
    if too_large:
        assert max_side is not None
        scale = max_side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return Packed(index, label, "jpg", _saved(image, "JPEG", quality=options.quality, subsampling="4:4:4", comment=b""))


def _packed_unchanged(index: int, item: Item, label: int | None, name: str, channels: int) -> Packed:
    """Check an image that is not RGB, and pack its bytes (pixels as NPY)."""
    decode_image(item, name, PixelFormat(channels, value_range=(0.0, 1.0)))  # any range: only to check the file
    if isinstance(item, bytes):
        return Packed(index, label, _SUFFIXES[format_of(item)], item)
    buffer = io.BytesIO()
    np.save(buffer, item)
    return Packed(index, label, "npy", buffer.getvalue())


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def key_of(index: int, name: str) -> str:
    """Return the WebDataset key of an image, the member's name before the dot: number, underscore, encoded name.

    A key ends at the first dot, and readers take folders for classes. Dots, slashes, percent signs and unprintable
    characters are therefore encoded as in a URL. ``urllib.parse.unquote(key.partition("_")[2],
    errors="surrogateescape")`` restores the name, truncated after :data:`MAX_NAME` bytes.
    """
    room, kept = MAX_NAME, []
    for letter in name:
        plain = letter.isprintable() and letter not in "./\\%"
        readable = letter if plain else "%2E" if letter == "." else quote(letter, safe="", errors="surrogateescape")
        room -= len(readable.encode())
        if room < 0:
            break
        kept.append(readable)
    return f"{index:08d}_{''.join(kept)}"


def relative_name(url: str, name: str) -> str:
    """Return the name of an image relative to the folder or list of its source."""
    for base in (url, re.sub(r"[^/\\]*$", "", url)):
        folder = base.rstrip("/\\")
        if folder and name.startswith((f"{folder}/", f"{folder}\\")):
            return name[len(folder) + 1 :]
    return name


def _check_destination(path: Path, source: Source) -> None:
    if "://" in str(path) or re.match(r"\w+:/[^/]", str(path)):  # Path merges double slashes
        raise InputError(f"cannot pack into {path}: expected a local folder; pack there, then copy it")
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot pack into {path}: it is a file; give a folder that is absent or empty")
    origin = Path(source.url)  # os.path.isdir also accepts a pattern that is too long for a path
    if os.path.isdir(origin) and path.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"cannot pack into {path}: it is inside SRC ({origin}); give a folder outside")


@contextlib.contextmanager
def _explaining_errors(path: Path) -> Iterator[None]:
    """Turn OSErrors while a folder is written into InputErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left on the disk for {path}: free some space, then run the same command, which continues "
                "with the incomplete shard"
            ) from error
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another DST") from error


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit code: 1 if an image is unreadable and --strict is given, else 0.

    Raises:
        InputError: The command line is invalid, or :func:`pack` failed.
    """
    config = parse(PackConfig, argv, "python -m dino_xcit.data pack SRC DST")
    shard_mb = config.shard_mb or (None if config.shard_images else SHARD_MB)
    workers = usable_cores() if config.workers < 0 else config.workers
    began = time.perf_counter()
    source = _opened(config.source, config.part or None)
    white_level = choose_white_level(source, config.white_level) if config.max_side else WHITE
    options = Options(
        config.max_side or None, config.quality, white_level, shard_mb, config.shard_images or None, config.channels
    )  # fmt: skip
    packing, seen = pack(source, Path(config.destination), options, workers)
    images, size = (sum(getattr(shard, name) for shard in packing.shards) for name in ("images", "bytes"))
    print(
        f"{packing.path}: {counted(images, 'image')} in {counted(len(packing.shards), 'shard')}, {size / 1e9:,.2f} GB"
    )
    seconds = max(time.perf_counter() - began, 1e-9)
    rate = f"{counted(seen, 'image')} in {seconds:.1f} s ({seen / seconds:,.0f} images/s)"
    print(rate if seen else "already complete")
    if packing.unreadable:
        unreadable = counted(len(packing.unreadable), "image")
        print(f"skipped {unreadable} that cannot be read, listed in {packing.path / UNREADABLE}")
    print(f"use with --data-path {shlex.quote(f'tar:{packing.path}/shard-*.tar')}")
    return 1 if packing.unreadable and config.strict else 0


def _opened(url: str, part: str | None) -> Source:
    path = os.path.expanduser(url)
    if not os.path.exists(path):
        return open_source(url, part)
    if part is None and len(parts_of(path)) > 1:
        raise InputError(f"{url} has the parts train and val: pack each separately, with --part train and --part val")
    return open_source(os.path.abspath(path), part)  # absolute: names do not depend on the current folder
