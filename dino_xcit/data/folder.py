"""Images in folders: one folder a class, a plain heap of photographs, or a list of paths; here or elsewhere."""

from __future__ import annotations

import codecs
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from dino_xcit.data import files
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.passed_over import PassedOver
from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError, one_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

KEPT_FROM = 10_000
"""So many images make an index worth a place on the disk: fewer are listed quicker than anybody notices."""

_MOST_BYTES = 1 << 30
"""Of one image."""
_MOST_LIST = 4 << 30
_RECOVERED = "lost+found"
"""Some disks have this folder at their top, and nobody may look into it."""
_SETTLED = 2_000_000_000
"""Nanoseconds: some file systems' times are whole seconds, so that a folder changed twice in one looks the same."""


class FileSource:
    """Image files by path. The paths are an index, so that a million of them cost loaders little."""

    def __init__(self, url: str, root: str, index: Index, version: str = "") -> None:
        """``index``: ``name``, paths relative to ``root`` or absolute; with labels also ``label`` and ``class``.

        ``version`` changes with the files' content where that was listed; empty: the files are asked.
        """
        self.url = url
        self.classes = tuple(index.strings["class"]) if "class" in index.strings else None
        self.labels = index.numbers.get("label")
        self._root, self._index, self._version = root, index, version
        self._names = index.strings["name"]

    def __reduce__(self) -> tuple[Any, ...]:
        return FileSource, (self.url, self._root, self._index, self._version)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return _joined(self._root, self._names[index])

    def read(self, index: int) -> tuple[Item, int | None]:
        path = self.name(index)
        data = files.read_file(path, _MOST_BYTES)
        return data, None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Of names, labels, and the files' sizes and times; of remote files in a list the names alone are known.

        A folder that was moved is another one: what is kept of it, such as the paths beside extracted vectors, would
        lead nowhere.
        """
        labels = self.labels
        if self._version:
            return hash_lines([self._root, self._version])

        def lines() -> list[str]:
            out = [self._root]
            for index, relative in enumerate(self._names):
                path, state = _joined(self._root, relative), ""
                if not files.is_remote(path):
                    try:
                        status = os.stat(path)
                        state = f"{status.st_size} {status.st_mtime_ns}"
                    except OSError:
                        state = "gone"
                out.append(f"{relative} {state} {'' if labels is None else labels[index]}")
            return out

        return hash_lines(lines())


def open_folder(root: str, url: str) -> FileSource:
    """A folder of images, on this machine or remote.

    Images that lie directly in ``root`` make it a heap without labels, sub-folders included. Otherwise each
    sub-folder that holds images, at any depth, is a class named after it, numbered in sorted order (the layout of
    torchvision's ImageFolder).

    What was found is kept, and found again at once as long as no folder's time has changed. A remote folder is
    listed each time: nothing there tells of a change.

    Raises:
        InputError: there is no image, or the folder cannot be listed.
    """
    if files.is_remote(root):
        root = root.rstrip("/")
        listed = files.files_below(root)
        images = [path for path in listed if _is_image(path.rpartition("/")[2]) and not path.startswith(".")]
        version = hash_lines(f"{path} {listed[path]}" for path in sorted(images))
        others = PassedOver(path for path in listed if not _is_image(path.rpartition("/")[2]))
        index = cached(
            f"folder:{root}", lambda: _arranged(root, images, version, others), lambda one: _is_sound(one, version)
        )
        return FileSource(url, root, index, version)
    return FileSource(url, root, cached(f"folder:{os.path.abspath(root)}", lambda: _walk(root), _is_unchanged(root)))


def open_list(file: str, url: str) -> FileSource:
    """A text file with the path of one image a line; no labels.

    Paths are absolute, URLs, or relative to the file's folder. The file may be remote itself.

    Raises:
        InputError: it lists nothing, its first path does not exist, or it names a chain of file systems.
    """
    data = files.read_file(file, _MOST_LIST)
    # Not splitlines, which also splits at letters that a file's name may have. Some editors begin with a mark.
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    paths = [line for line in lines if line and not line.startswith("#")]
    folder = files.folder_of(file)
    if b"\0" in data:
        raise InputError(f"the file list {file} is no text: expected one path a line")
    if not paths:
        raise InputError(f"the file list {file} names no image: expected one path a line")
    # Among the file systems that fsspec would chain are some that run what they find.
    chain = next((path for path in paths if files.is_remote(path) and "::" in path), None)
    if chain is not None:
        raise InputError(
            f"the file list {file} names {chain!r}, a chain of file systems: write plain paths or URLs in its place"
        )
    if not files.is_file(_joined(folder, paths[0])):
        raise InputError(
            f"the file list {file} names {paths[0]!r}, which is no file: write paths that are absolute, or relative to "
            f"{folder}"
        )
    version = hash_lines([folder, *paths])
    strings = {"name": Strings.pack(paths), "version": Strings.pack([version])}
    index = cached(
        f"list:{file if files.is_remote(file) else os.path.abspath(file)}",
        lambda: Index({}, strings, keep=len(paths) >= KEPT_FROM),
        lambda one: _is_sound(one, version),
    )
    return FileSource(url, folder, index)


def _walk(root: str) -> Index:
    """List a local folder at all depths."""
    began = time.time_ns()
    times: dict[str, int] = {".": _time(root)}
    try:
        with os.scandir(root) as entries:
            top = list(entries)
    except OSError as error:
        raise _unlistable(root, root, error) from error
    images = [entry.name for entry in top if entry.is_file() and _is_image(entry.name)]
    others = PassedOver(entry.name for entry in top if entry.is_file() and not _is_image(entry.name))
    for entry in top:
        if not entry.name.startswith(".") and entry.name != _RECOVERED and _leads_on(entry):
            images += _images_below(root, entry.name, times, others)
    index = _arranged(root, images, "", others)
    settled = max(times.values()) < began - _SETTLED and min(times.values()) >= 0
    return Index(
        {**index.numbers, "folder_time": np.array(list(times.values()), dtype=np.int64)},
        {**index.strings, "folder": Strings.pack(times)},
        keep=index.keep and settled,
    )


def _images_below(root: str, name: str, times: dict[str, int], others: PassedOver) -> list[str]:
    """Paths, relative to ``root``, of the images anywhere below ``root/name``; links are followed, but not in circles.

    ``times`` takes each folder's time, ``others`` what is no image.

    Raises:
        InputError: a folder cannot be listed.
    """
    found: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [(name, ())]
    while waiting:
        relative, above = waiting.pop()
        folder = os.path.join(root, relative)
        real = os.path.realpath(folder)
        if real in above:
            continue
        times[relative] = _time(folder)  # before it is listed, so that a change meanwhile is noticed
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = os.path.join(relative, entry.name)
                    if _leads_on(entry):
                        waiting.append((path, (*above, real)))
                    elif _is_image(entry.name):
                        found.append(path)
                    else:
                        others.note(entry.name)
        except OSError as error:  # passed over, it would be a class that is missing
            raise _unlistable(folder, root, error) from error
    return found


def _unlistable(folder: str, root: str, error: OSError) -> InputError:
    remedy = "check the path" if folder == root else f"make it readable, or move it out of {root}"
    return InputError(f"cannot list the folder {folder}: {one_line(error)}; {remedy}")


def _leads_on(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _arranged(root: str, images: list[str], version: str, others: PassedOver) -> Index:
    """An index of images by their paths below ``root``: a heap, or a class a folder. What is passed over is said."""
    if not images:
        there = f" (there are {others})" if str(others) else ""
        raise InputError(
            f"no image in {root}{there}: expected files ending in {', '.join(IMAGE_SUFFIXES[:4])} ... in it or in one "
            "sub-folder a class"
        )
    others.warn(root, " ".join(IMAGE_SUFFIXES))
    keep = len(images) >= KEPT_FROM
    about = {"version": Strings.pack([version])}
    tops = [path.replace(os.sep, "/").partition("/") for path in images]
    if any(not slash for _, slash, _ in tops):
        return Index({}, {"name": Strings.pack(sorted(images)), **about}, keep)
    ordered = sorted(zip((top for top, _, _ in tops), images, strict=True))
    classes = sorted({top for top, _ in ordered})
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[top] for top, _ in ordered], dtype=np.int64)
    names = Strings.pack(path for _, path in ordered)
    return Index({"label": labels}, {"name": names, "class": Strings.pack(classes), **about}, keep)


def _is_unchanged(root: str) -> Any:
    """Whether an index of a local folder still holds: for :func:`cached`."""

    def accept(index: Index) -> bool:
        times = index.numbers["folder_time"].tolist()
        same = all(
            _time(os.path.join(root, folder)) == seen
            for folder, seen in zip(index.strings["folder"], times, strict=True)
        )
        return same and _is_sound(index, "")

    return accept


def _is_sound(index: Index, version: str) -> bool:
    """Whether a stored index is of these files, and every label has a class."""
    if list(index.strings["version"]) != [version] or len(index.strings["name"]) == 0:
        return False
    labels = index.numbers.get("label")
    if labels is None:
        return "class" not in index.strings
    if len(labels) != len(index.strings["name"]):
        return False
    return bool(labels.min() >= 0 and labels.max() < len(index.strings["class"]))


def _time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _joined(root: str, path: str) -> str:
    """A path below ``root``, or one that stands for itself."""
    if files.is_remote(path):
        return path
    if files.is_remote(root):
        return path if path.startswith("/") else f"{root}/{path}"
    return str(Path(root) / path)
