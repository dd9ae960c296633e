"""Images in folders: one folder per class, a flat folder, or a list of paths; local or remote."""

from __future__ import annotations

import codecs
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dino_xcit.data import storage
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.source import Item, hash_lines, number_classes
from dino_xcit.errors import InputError, one_line, printable
from dino_xcit.runtime import logging as log

ARRAY_SUFFIX = ".npy"
"""Arrays are images where there are no others, as they are often something else beside images."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

MIN_KEPT = 10_000
"""Minimum number of images for which the index is stored. Smaller folders are listed quickly."""
RESULT_FILES = frozenset({"metrics.jsonl", "vectors.npy"})
"""Files that mark a sub-folder as a run or a collection of this project, which is not data."""

_UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".exr", ".tga")
"""Suffixes of unsupported image formats. Skipped files with these suffixes, or with none, are reported."""
_MAX_LIST_BYTES = 4 << 30
_SETTLED = 2_000_000_000
"""Age in nanoseconds from which a folder's mtime is trusted: some file systems store whole seconds."""


class FileSource:
    """Image files by path. The paths are a memory-mapped index, which workers share.

    Args:
        url: URL of the source.
        root: Folder of the relative paths.
        index: Columns ``name`` (paths, relative to ``root`` or absolute) and, with labels, ``label`` and ``class``.
        version: Hash of the listed sizes and times; empty: :meth:`fingerprint` reads them from the file system.
    """

    def __init__(self, url: str, root: str, index: Index, version: str = "") -> None:
        self.url = url
        self.classes = tuple(index.strings["class"]) if "class" in index.strings else None
        self.labels = index.numbers.get("label")
        self.label_problem = "".join(index.strings.get("label_problem", ()))
        """Why expected labels are missing; else empty."""
        self._root, self._index, self._version = root, index, version
        self._names = index.strings["name"]

    def __reduce__(self) -> tuple[Any, ...]:
        return FileSource, (self.url, self._root, self._index, self._version)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return _joined(self._root, self._names[index])

    def read(self, index: int) -> tuple[Item, int | None]:
        data = storage.read_file(self.name(index), storage.MAX_IMAGE_BYTES)
        return data, None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash the root, names, labels, and the files' sizes and times (not those of remote files in a list)."""
        if self._version:
            return hash_lines([self._root, self._version])

        def lines() -> Iterable[str]:
            yield self._root
            for index, relative in enumerate(self._names):
                state = storage.state(_joined(self._root, relative))
                yield f"{relative} {state} {'' if self.labels is None else self.labels[index]}"

        return hash_lines(lines())


def open_folder(root: str, url: str) -> FileSource:
    """Open a local or remote folder of images.

    If ``root`` directly contains images, it is a flat folder without labels, sub-folders included. Otherwise each
    sub-folder that contains images, at any depth, is a class named after it, numbered in sorted order (the layout of
    torchvision's ImageFolder). Hidden files and folders, and results of this project, are skipped.

    The index of a local folder is cached and valid until the mtime of a folder changes. A remote folder is listed each
    time.

    Raises:
        InputError: The folder contains no image, or cannot be listed.
    """
    if storage.is_remote(root):
        root = root.rstrip("/")
        listed = storage.files_below(root)
        found = _Found()
        own = {path.rpartition("/")[0] for path in listed if path.rpartition("/")[2] in RESULT_FILES} - {""}
        for path in listed:
            parents = {str(parent) for parent in PurePosixPath(path).parents}
            if not own & parents and not any(part.startswith(".") for part in path.split("/")):
                found.add(path)
        version = hash_lines(f"{path} {listed[path]}" for path in sorted(found.images or found.arrays))
        index = cached(f"folder:{root}", lambda: found.index(root, version), lambda one: _is_of(one, version))
        source = FileSource(url, root, index, version)
    else:
        index = cached(f"folder:{os.path.abspath(root)}", lambda: _walk(root), _is_unchanged(root))
        source = FileSource(url, root, index)
    for warning in index.strings["warning"]:
        log.warn_once(warning)
    return source


def open_list(file: str, url: str) -> FileSource:
    """Open a text file with one image path per line, without labels.

    Paths are absolute, URLs, or relative to the folder of the file. The file may be remote. Lines that begin with # and
    have no image suffix are comments.

    Raises:
        InputError: The list is empty, its first path does not exist, or a path chains file systems.
    """
    data = storage.read_file(file, _MAX_LIST_BYTES)
    # Not splitlines, which also splits at characters that file names may contain.
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    paths = [line for line in lines if line and not (line.startswith("#") and not _is_image(line))]
    folder = storage.folder_of(file)
    if b"\0" in data:
        raise InputError(f"the file list {file} is not text: expected one path per line")
    if not paths:
        raise InputError(f"the file list {file} names no image: expected one path per line")
    # fsspec can chain file systems, and some of them execute code.
    chain = next((path for path in paths if storage.is_remote(path) and "::" in path), None)
    if chain is not None:
        raise InputError(f"the file list {file} names {chain!r}, a chain of file systems: expected paths or plain URLs")
    if not storage.is_file(_joined(folder, paths[0])):
        raise InputError(
            f"the file list {file} names {paths[0]!r}, which is not a file: expected absolute paths, or paths "
            f"relative to {folder}"
        )
    version = hash_lines([folder, *paths])
    strings = {"name": Strings.pack(paths), "version": Strings.pack([version])}
    index = cached(
        f"list:{file if storage.is_remote(file) else os.path.abspath(file)}",
        lambda: Index({}, strings, keep=len(paths) >= MIN_KEPT),
        lambda one: _is_of(one, version),
    )
    return FileSource(url, folder, index)


def open_files(paths: Iterable[str]) -> FileSource:
    """Open image files, and folders of images without their classes.

    Raises:
        InputError: A path does not exist, or a folder contains no image.
    """
    names: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            folder = open_folder(path, path)
            names += map(folder.name, range(len(folder)))
        elif os.path.isfile(path):
            names.append(path)
        else:
            raise InputError(f"no image at {path!r}: there is no such file or folder; check the path")
    return FileSource(" ".join(paths), "", Index({}, {"name": Strings.pack(names)}))


class _Found:
    """Paths of images below a root, with slashes, and counts of skipped files."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.arrays: list[str] = []
        self.skipped: Counter[str] = Counter()

    def add(self, path: str) -> None:
        suffix = PurePosixPath(path).suffix.lower()
        if _is_image(path):
            self.images.append(path)
        elif suffix == ARRAY_SUFFIX:
            self.arrays.append(path)
        elif suffix in _UNREAD:
            self.skipped[suffix] += 1
        elif not suffix or suffix[1:].isdigit():  # "IMG 2.10" has no suffix
            self.skipped["without a suffix"] += 1

    def index(self, root: str, version: str = "") -> Index:
        """Build the index of a flat folder, or of one folder per class.

        Raises:
            InputError: There is no image.
        """
        if self.images and self.arrays:  # they may be masks or features
            self.skipped[ARRAY_SUFFIX] = len(self.arrays)
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common())
        found = self.images or self.arrays
        if not found:
            there = f" (skipped: {skipped})" if skipped else ""
            raise InputError(
                f"no image in {root}{there}: expected files ending in {', '.join(IMAGE_SUFFIXES[:4])} ... in it or in "
                "one sub-folder per class"
            )
        warnings = (
            [f"{printable(root)}: skipped {skipped}; images end in {' '.join(IMAGE_SUFFIXES)}"] if skipped else []
        )
        strings = {"version": Strings.pack([version]), "warning": Strings.pack(warnings)}
        keep = len(found) >= MIN_KEPT
        images = sorted(found, key=lambda path: (path.partition("/")[0], path))
        loose = [path for path in found if "/" not in path]
        if loose:
            if len(loose) < len(images):
                problem = f"{len(loose):,} of {len(images):,} images lie beside its folders, such as {min(loose)}"
                strings["label_problem"] = Strings.pack([problem])
            return Index({}, strings | {"name": Strings.pack(sorted(images))}, keep)
        labels, classes = number_classes([path.partition("/")[0] for path in images])
        order = np.argsort(labels, kind="stable")  # Unicode spellings of one class may not be adjacent
        names = Strings.pack(images[place] for place in order)
        return Index({"label": labels[order]}, strings | {"name": names, "class": Strings.pack(classes)}, keep)


def _walk(root: str) -> Index:
    """List a local folder at all depths. Follows links, except those to a folder above.

    Raises:
        InputError: A folder cannot be listed.
    """
    began, found = time.time_ns(), _Found()
    times: dict[str, int] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while waiting:
        relative, above = waiting.pop()
        folder = os.path.join(root, relative)
        listed_at = _time(folder)  # before the listing, so that a later change is noticed
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:  # skipping the folder could lose a class
            remedy = f"make it readable, or move it out of {root}" if relative else "check the path"
            raise InputError(f"cannot list the folder {folder}: {one_line(error)}; {remedy}") from error
        times[relative] = listed_at
        if relative and any(entry.name in RESULT_FILES for entry in entries):
            continue
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith(".") or path == "lost+found":
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                found.skipped["broken links"] += 1
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in above:
                    found.skipped["links to a folder above"] += 1
                else:
                    waiting.append((path, (*above, real)))
            else:
                found.add(path)
    index = found.index(root)
    # The target of a broken link can reappear without a change of any folder here.
    settled = not found.skipped["broken links"] and max(times.values()) < began - _SETTLED and min(times.values()) >= 0
    return Index(
        {**index.numbers, "folder_time": np.array(list(times.values()), dtype=np.int64)},
        {**index.strings, "folder": Strings.pack(times)},
        keep=index.keep and settled,
    )


def _is_unchanged(root: str) -> Callable[[Index], bool]:
    """Return a check of whether an index of a local folder is up to date, for :func:`cached`."""

    def accept(index: Index) -> bool:
        times = zip(index.strings["folder"], index.numbers["folder_time"].tolist(), strict=True)
        return _is_of(index, "") and all(_time(os.path.join(root, folder)) == seen for folder, seen in times)

    return accept


def _is_of(index: Index, version: str) -> bool:
    return list(index.strings["version"]) == [version]


def _time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def _joined(root: str, path: str) -> str:
    """Join a path to ``root`` unless it is absolute or a URL."""
    if storage.is_remote(path):
        return path
    if storage.is_remote(root):
        return path if path.startswith("/") else f"{root}/{path}"
    return str(Path(root) / path)
