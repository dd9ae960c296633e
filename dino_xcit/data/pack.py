"""Any data set as WebDataset shards, on request with smaller pictures: ``python -m dino_xcit.data pack SRC DST``.

DST gets ``shard-000000.tar`` ..., ``classes.json`` where there are labels, ``pack.json`` (what was packed how, and each
shard's images, bytes and SHA-256), and ``unreadable.jsonl`` where an image could not be read.

A shard counts when ``pack.json`` lists it. One process writes, in the images' order; others read, decode and shrink.
So the bytes depend neither on the number of processes nor on how often the command was killed and repeated.
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

from dino_xcit.bounds import FilePath, Positional
from dino_xcit.cli import parse
from dino_xcit.data import Source, UndecodableImage, decode, open_source
from dino_xcit.data.decode import read_header
from dino_xcit.data.open import parts_of
from dino_xcit.data.workers import each_image, usable_cores
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import counted, progress_bar

MANIFEST, CLASSES, UNREADABLE = "pack.json", "classes.json", "unreadable.jsonl"
SHARD_MB = 256
MAX_UNREADABLE = 1000
"""Consecutive unreadable images after which the disk is taken to be gone."""
MAX_NAME = 3000
"""Bytes of a name in a key: readers refuse paths of 4096."""

_VERSION = 1
_OURS = (CLASSES, ".lock", f".{CLASSES}.tmp", f".{MANIFEST}.tmp")
"""Files that may be there before the manifest is."""
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm"}
"""Of a member, by what its bytes are: a file's own name may be wrong (ImageNet has a PNG called JPEG)."""


@dataclass(frozen=True)
class PackConfig:
    """Settings of python -m dino_xcit.data pack: write the images of a data set into WebDataset shards.

    Killed at any moment, the same command continues with the shard it was at. Train on the result with --data-path
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


@dataclass(frozen=True)
class Options:
    """What the bytes of the shards depend on. The names are the flags'."""

    max_side: int | None = None
    quality: int = 90
    shard_mb: int | None = None
    """A shard ends with the image that makes it so many million bytes long."""
    shard_images: int | None = None

    def is_full(self, images: int, written: int) -> bool:
        """Whether a shard of so many images and bytes ends here."""
        by_bytes = self.shard_mb is not None and written >= self.shard_mb * 1_000_000
        return by_bytes or (self.shard_images is not None and images >= self.shard_images)


@dataclass(frozen=True)
class Shard:
    """A shard that was written."""

    name: str
    first: int
    """Which image of the source it begins with."""
    end: int
    """Which image the next one begins with; those between that are not in it could not be read."""
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """One image on its way into a shard."""

    index: int
    label: int | None = None
    suffix: str = ""
    """Of the member, without a dot."""
    data: bytes = b""
    cause: str = ""
    """Why it cannot be read; empty where it can."""


@dataclass
class Packing:
    """What is in a folder of shards."""

    path: Path
    source: str
    fingerprint: str
    images: int
    """Of the source."""
    options: Options
    shards: list[Shard] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """``index``, ``name`` and ``cause`` of each image of the shards that is left out."""
    complete: bool = False

    @property
    def end(self) -> int:
        """Which image comes after the last shard."""
        return self.shards[-1].end if self.shards else 0

    def remove_other_shards(self) -> None:
        """Remove the shards that are written again: the new ones can be fewer. A file of another name stays."""
        ours = {shard.name for shard in self.shards}
        for path in self.path.glob(f"shard-{'[0-9]' * 6}.tar"):
            if path.name not in ours:
                path.unlink()

    def save(self) -> None:
        """Write manifest and list of unreadable images."""
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
    """Write what is missing of the shards of a source.

    Args:
        source: what to pack.
        destination: a local folder: absent, empty, or one in which the same packing was begun.
        options: how; the same as before where it was begun.
        workers: processes that read, decode and shrink; before that, threads that verify the shards that are there.

    Returns:
        What is in the folder, and how many images this call read (fewer than there are where it was begun before).

    Raises:
        InputError: the folder is in use, another pack's or somebody else's, cannot be written, or is full; no image can
            be read; a process was killed.
    """
    _refuse_odd_places(destination, source)
    work = partial(pack_image, max_side=options.max_side, quality=options.quality)
    with _explaining_errors(destination), contextlib.ExitStack() as stack:
        destination.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(FileLock(destination / ".lock", timeout=0))
        except Timeout as error:
            raise InputError(
                f"another process packs into {destination}: wait for it to end, or give another DST"
            ) from error
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
                f"none of the {len(source):,} images of {source.url} can be read, the first because: {cause}; look at "
                f"SRC with: python -m dino_xcit.data check {source.url}"
            )
        packing.complete = True
        packing.save()
    return packing, len(source) - begin


def _begun(source: Source, path: Path, options: Options, readers: int) -> Packing:
    """What is there of this packing; what comes after the first missing or changed shard is written again."""
    packing = Packing(path, source.url, source.fingerprint(), len(source), options)
    if not (path / MANIFEST).exists():
        foreign = sorted(entry.name for entry in os.scandir(path) if entry.name not in _OURS)
        if foreign:
            raise InputError(f"cannot pack into {path}: it holds {foreign[0]} and no {MANIFEST}; give an empty folder")
        atomic.remove_leftovers(path)
        if source.classes is not None:
            atomic.write_json(path / CLASSES, list(source.classes))
        packing.save()
        return packing
    anew = f"give another DST, or begin again after: rm -r {shlex.quote(str(path))}"
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
            f"{path / MANIFEST} is damaged ({type(error).__name__}: {str(error)[:100]}): {anew}"
        ) from error
    if begun != options:
        raise InputError(f"{path} was begun with {begun}, this command has {options}: repeat it as it was, or {anew}")
    if not same:
        raise InputError(
            f"{path} was begun from {before['source']} with {before['images']:,} images, this command packs "
            f"{source.url} with {len(source):,}, and they differ (a file was added, removed, changed or moved): {anew}"
        )
    with ThreadPoolExecutor(max(1, readers)) as pool:
        are_there = list(pool.map(partial(_is_there, path), shards))
    packing.shards = shards[: are_there.index(False) if False in are_there else None]
    packing.complete = bool(before["complete"]) and all(are_there)
    packing.unreadable = [row for row in unreadable if packing.complete or row["index"] < packing.end]
    atomic.remove_leftovers(path)
    return packing


def _is_there(path: Path, shard: Shard) -> bool:
    try:
        return atomic.digest_of(path / shard.name) == atomic.Digest(shard.bytes, shard.sha256)
    except OSError:
        return False


def _readable(packed: Iterator[Packed], source: Source, packing: Packing, bar: Any) -> Iterator[Packed]:
    """The images that can be read; the others are noted.

    Raises:
        InputError: a great many in a row cannot.
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
    """Write one shard that begins with ``image``; the image that the next one begins with."""
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
        file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive

    name = f"shard-{len(packing.shards):06d}.tar"
    digest = atomic.write(packing.path / name, fill)
    end = packing.images if following is None else following.index
    packing.shards.append(Shard(name, packing.end, end, images, digest.size, digest.sha256))
    packing.save()
    return following


def _add_member(file: Any, name: str, data: bytes) -> int:
    """One member without owner and date, so that the same input gives the same bytes; how many they are."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    for part in (header, data, padding):
        file.write(part)
    return len(header) + len(data) + len(padding)


def pack_image(source: Source, index: int, max_side: int | None, quality: int) -> Packed:
    """Read and decode an image, and make it smaller if need be.

    Args:
        source: where from.
        index: which.
        max_side: pixels that the longer side has at most; None: every file's bytes are kept.
        quality: of the JPEGs that are written, 1 to 100.
    """
    try:
        item, label = source.read(index)
        picture = decode(item, source.name(index))
    except InputError as error:
        return Packed(index, cause=error.cause if isinstance(error, UndecodableImage) else str(error))
    too_large = max_side is not None and max(picture.size) > max_side
    if isinstance(item, np.ndarray):
        if not too_large:
            return Packed(index, label, "png", _saved(Image.fromarray(item), "PNG"))
    else:
        header = read_header(item)
        lies_on_its_side = header.format == "JPEG" and header.is_turned
        if not too_large and (max_side is None or not lies_on_its_side):
            return Packed(index, label, _SUFFIXES[header.format], item)
    if too_large:
        assert max_side is not None
        scale = max_side / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return Packed(index, label, "jpg", _saved(picture, "JPEG", quality=quality, subsampling="4:4:4", comment=b""))


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def key_of(index: int, name: str) -> str:
    """The part of a member's name before the dot: the image's number, an underscore, and its name in readable form.

    WebDataset ends a key at the first dot, and readers take folders for classes: so dots, slashes, percent signs and
    what cannot be printed are written as in a URL. ``urllib.parse.unquote(key.partition("_")[2],
    errors="surrogateescape")`` is the name again, or its beginning where it is very long.
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
    """An image's name without the folder or list that its source was opened from."""
    for base in (url, re.sub(r"[^/\\]*$", "", url)):
        folder = base.rstrip("/\\")
        if folder and name.startswith((f"{folder}/", f"{folder}\\")):
            return name[len(folder) + 1 :]
    return name


def _refuse_odd_places(path: Path, source: Source) -> None:
    if "://" in str(path) or re.match(r"\w+:/[^/]", str(path)):  # a Path has one slash of two
        raise InputError(f"cannot pack into {path}: DST is a local folder; pack there, then copy it")
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot pack into {path}: it is a file; give a folder that is absent or empty")
    origin = Path(source.url)  # perhaps: a pattern may be longer than any path
    if os.path.isdir(origin) and path.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"cannot pack into {path}: it lies in {origin}, which is packed; give a folder outside")


@contextlib.contextmanager
def _explaining_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system while a folder is written, as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left on the disk for {path}: free some space, then run the same command, which continues "
                "with the next shard"
            ) from error
        raise InputError(f"cannot write {path}: {error.strerror or error}; check it, or give another DST") from error


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0, or 1 under --strict where an image could not be read.

    Raises:
        InputError: a mistake in the command, or what :func:`pack` raises.
    """
    config = parse(PackConfig, argv, "python -m dino_xcit.data pack SRC DST")
    shard_mb = config.shard_mb or (None if config.shard_images else SHARD_MB)
    options = Options(config.max_side or None, config.quality, shard_mb, config.shard_images or None)
    workers = usable_cores() if config.workers < 0 else config.workers
    began = time.perf_counter()
    source = _opened(config.source, config.part or None)
    packing, seen = pack(source, Path(config.destination), options, workers)
    images, size = (sum(getattr(shard, name) for shard in packing.shards) for name in ("images", "bytes"))
    print(
        f"{packing.path}: {counted(images, 'image')} in {counted(len(packing.shards), 'shard')}, {size / 1e9:,.2f} GB"
    )
    seconds = max(time.perf_counter() - began, 1e-9)
    rate = f"{counted(seen, 'image')} in {seconds:.1f} s ({seen / seconds:,.0f} images/s)"
    print(rate if seen else "all of it was there already")
    if packing.unreadable:
        unreadable = counted(len(packing.unreadable), "image")
        print(f"left out: {unreadable} that cannot be read, listed in {packing.path / UNREADABLE}")
    print(f"use it as --data-path {shlex.quote(f'tar:{packing.path}/shard-*.tar')}")
    return 1 if packing.unreadable and config.strict else 0


def _opened(url: str, part: str | None) -> Source:
    path = os.path.expanduser(url)
    if not os.path.exists(path):
        return open_source(url, part)
    if part is None and len(parts_of(path)) > 1:
        raise InputError(f"{url} has the parts train and val: pack each on its own, with --part train and --part val")
    return open_source(os.path.abspath(path), part)  # so that a resumed packing finds the same names from anywhere
