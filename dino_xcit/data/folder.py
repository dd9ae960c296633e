"""Images in folders: one folder a class, a plain heap of photographs, or a list of paths."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class FileSource:
    """Image files by path. Paths are kept in one byte string, so that a million of them cost loaders little."""

    def __init__(
        self, url: str, root: Path, paths: list[str], labels: list[int] | None, classes: tuple[str, ...] | None
    ) -> None:
        """``paths`` are relative to ``root`` or absolute, already in the order they shall have."""
        self.url = url
        self.classes = classes
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self._root = root
        encoded = [os.fsencode(path) for path in paths]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def _relative(self, index: int) -> str:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._text[start : self._ends[index]].tobytes())

    def name(self, index: int) -> str:
        return str(self._root / self._relative(index))

    def read(self, index: int) -> tuple[Item, int | None]:
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise InputError(f"cannot read the image {path}: {error.strerror}") from error
        return data, None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        labels = self.labels

        def lines() -> list[str]:
            out = [str(self._root)]
            for index in range(len(self)):
                try:
                    status = os.stat(self.name(index))
                    state = f"{status.st_size} {status.st_mtime_ns}"
                except OSError:
                    state = "gone"
                out.append(f"{self._relative(index)} {state} {'' if labels is None else labels[index]}")
            return out

        return hash_lines(lines())


def open_folder(root: Path, url: str) -> FileSource:
    """A folder of images.

    Images that lie directly in ``root`` make it a heap without labels, sub-folders included. Otherwise each
    sub-folder that holds images, at any depth, is a class named after it, numbered in sorted order (the layout of
    torchvision's ImageFolder).

    Raises:
        InputError: there is no image.
    """
    top = _scan(root)
    images = sorted(entry.name for entry in top if entry.is_file() and _is_image(entry.name))
    folders = sorted(entry.name for entry in top if entry.is_dir() and not entry.name.startswith("."))
    by_folder = {name: _images_below(root, name) for name in folders}
    if images:
        everything = sorted(images + [path for paths in by_folder.values() for path in paths])
        return FileSource(url, root, everything, None, None)
    classes = tuple(name for name in folders if by_folder[name])
    if not classes:
        raise InputError(
            f"no image in {root}: expected files ending in {', '.join(IMAGE_SUFFIXES[:4])} ... in it or in one "
            "sub-folder a class"
        )
    paths = [path for name in classes for path in by_folder[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_folder[name]]
    return FileSource(url, root, paths, labels, classes)


def open_list(file: Path, url: str) -> FileSource:
    """A text file with the path of one image a line, absolute or relative to the file's folder; no labels.

    Raises:
        InputError: it lists nothing, or its first path does not exist.
    """
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise InputError(f"the file list {file} names no image: expected one path a line")
    if not (file.parent / paths[0]).is_file():
        raise InputError(
            f"the file list {file} names {paths[0]!r}, which is no file: paths are absolute or relative to "
            f"{file.parent}"
        )
    return FileSource(url, file.parent, paths, None, None)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {error.strerror}") from error


def _images_below(root: Path, name: str) -> list[str]:
    """Paths, relative to ``root`` and sorted, of the images anywhere below ``root / name``."""
    found: list[str] = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        relative = os.path.relpath(folder, root)
        found += [os.path.join(relative, file) for file in files if _is_image(file)]
    return sorted(found)
