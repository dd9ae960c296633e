"""Open data sets by URL: ``open_source(URL, part)``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

from dino_xcit.data import storage
from dino_xcit.data.folder import open_folder, open_list
from dino_xcit.data.hf import is_folder_of_parquet, open_hf, open_parquet
from dino_xcit.data.imagenet import open_imagenet
from dino_xcit.data.sample import open_sample
from dino_xcit.data.scenes import open_scenes
from dino_xcit.data.source import MinimalSource, Source, Subset, completed, split_part
from dino_xcit.data.tar import open_tar
from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log

FORMATS = (
    "a folder, a .txt list of paths, tar:PATTERN, parquet:PATTERN, hf:NAME_OR_DIR, imagenet:DIR, "
    "sample:fashion-mnist, sample:fashion-mnist-full, sample:scenes, sample:scene-objects or torchvision:NAME"
)
NAMED = ("sample:", "torchvision:", "imagenet:", "hf:")
"""Schemes of data sets with a training and a validation part."""
FILES = ("tar:", "parquet:")
"""Schemes of data sets by a pattern of the files of one part."""
_PARTS = {"train", "val", "valid", "validation", "test"}
"""Names of folders that are parts of a data set rather than classes."""

Open = Callable[[str, str | None], MinimalSource]
_REGISTERED: dict[str, Open] = {}


def register_source(scheme: str, open: Open) -> None:
    """Make ``--data-path scheme:REST`` call ``open(REST, part)``.

    Args:
        scheme: Name before the colon.
        open: Function of the address and the part (``train``, ``val`` or None). Returns an object with ``len``,
            ``read(index) -> (bytes or pixels, label or None)`` and ``name(index)``, and optionally the other attributes
            of :class:`Source`. Workers share the object, so it must not have open files.

    Raises:
        ValueError: The scheme is taken.
    """
    if f"{scheme}:" in (*NAMED, *FILES) or scheme in _REGISTERED or scheme in fsspec.available_protocols():
        raise ValueError(f"scheme {scheme!r} is taken: choose another name")
    _REGISTERED[scheme] = open


def open_source(url: str, part: str | None = None) -> Source:
    """Open a data set.

    Args:
        url: A folder of images (one sub-folder per class, or a flat folder without labels); a ``.txt`` file with one
            path per line; ``tar:PATTERN``, archives such as WebDataset shards (``tar:/data/train-{000..146}.tar``);
            ``parquet:PATTERN``, Parquet files, or a folder of them; ``hf:NAME_OR_DIR``, a data set of the Hugging
            Face hub, or a folder written by ``save_to_disk``; ``imagenet:DIR``, ImageNet-1k as downloaded;
            ``sample:fashion-mnist``, ``sample:fashion-mnist-full`` or ``torchvision:NAME``. Folders, lists, archives
            and Parquet files may be remote (``s3://``, ``gs://``, ``hf://``, ``https://`` ...). A trailing
            ``/train`` or ``/val`` on the last four selects the part.
        part: ``train`` or ``val``. Selects the part's sub-folder, or in a folder of Parquet files the file names that
            begin with the part. Folders without parts, and archives, are opened whole. None: the whole folder, or the
            training part of other formats.

    Raises:
        InputError: The data does not exist, has no readable image, or the format of the URL is unknown.
    """
    if not url.strip():  # such as an unset shell variable; as a path it would be the current folder
        raise InputError(f"no data given: expected {FORMATS}")
    scheme, colon, rest = url.partition(":")
    if colon and scheme in _REGISTERED:
        return completed(_REGISTERED[scheme](rest, part), url)
    if colon and scheme in ("sample", "torchvision", "imagenet"):
        name, named = split_part(rest)
        chosen = named or part or "train"
        if scheme == "sample":
            return open_scenes(name, chosen) if name.startswith("scene") else open_sample(name, chosen)
        if scheme == "imagenet":
            return open_imagenet(name, chosen)
        from dino_xcit.data.torchvision_source import TorchvisionSource  # torchvision takes two seconds to import

        return TorchvisionSource(name, chosen)
    if colon and scheme == "tar":
        return open_tar(rest, url)
    if colon and scheme == "parquet":
        return open_parquet(rest, part)
    if colon and scheme == "hf" and not rest.startswith("//"):
        return open_hf(rest, part)
    if storage.is_remote(url):
        address = url.partition("?")[0].rstrip("/")
        if not storage.is_remote(address):  # nothing after the slashes
            raise InputError(f"{url!r} has no path: expected a URL such as {address}//BUCKET/FOLDER")
    else:
        address = str(Path(os.path.expanduser(url)))
        try:
            os.stat(address)
        except (FileNotFoundError, NotADirectoryError) as error:
            known = f"known formats: {', '.join([FORMATS, *(f'{name}:...' for name in _REGISTERED)])}"
            hint = known if colon and "/" not in scheme else "check the path"
            raise InputError(f"no data at {url!r}: there is no such file or folder; {hint}") from error
        except (OSError, ValueError) as error:  # no permission; a zero byte
            raise storage.explained(address, error) from error
    is_folder = storage.is_folder(address)
    if address.lower().endswith(".txt") and not is_folder:
        return open_list(url if storage.is_remote(url) else address, url)
    if address.lower().endswith(".tar") and not is_folder:
        raise InputError(f"{url!r} is an archive: expected tar:{url}")
    if not is_folder and not storage.is_remote(url):
        raise InputError(f"{url!r} is a single file: expected {FORMATS}")
    folder = _folder_of_part(address, part) if is_folder else address
    return open_folder(folder, folder)


def open_parts(data: str | None, train_data: str | None, val_data: str | None) -> tuple[Source, Source]:
    """Open the labelled training and validation parts for an evaluator.

    Args:
        data: Data set with both parts: a folder with ``train`` and ``val``, this ``train`` folder itself, or a data set
            of the schemes :data:`NAMED`.
        train_data, val_data: URL of one part, for :func:`open_source`; overrides ``data``.

    Raises:
        InputError: A part is missing or has no labels, or the validation part has classes that training lacks.
    """
    if data is not None and not data.startswith(FILES):
        data = split_part(data)[0] if _has_parts(data) else _parent_of_parts(data)
    parts: list[Source] = []
    for part, given in (("train", train_data), ("val", val_data)):
        if given is not None:
            source = open_source(given, part if _has_parts(given) else None)
        elif data is None:
            raise InputError(f"no {part} data: give --data-path DIR with DIR/train and DIR/val, or --{part}-data")
        elif _has_parts(data):
            source = open_source(data, part)
        elif data.startswith(FILES):
            raise InputError(
                f"{data} is one part: give --train-data and --val-data, each with the pattern of its own files"
            )
        elif storage.is_folder(_inside(data, part)):
            source = open_source(_inside(data, part), part)
        else:
            if not storage.is_folder(data):
                open_source(data)  # raises if there is nothing
            raise InputError(
                f"{data} has no folder {part!r}: give --data-path DIR with DIR/train and DIR/val, or --{part}-data"
            )
        if source.labels is None:
            problem = getattr(source, "label_problem", "")
            raise InputError(
                f"{source.url} has no labels{f': {problem}' if problem else ''}; evaluation expects one sub-folder per "
                "class, archives with .cls members, or Parquet files with a column 'label'"
            )
        parts.append(source)
    train, val = parts
    if train.classes == val.classes:
        return train, val
    train_classes, val_classes = train.classes or (), val.classes or ()
    unknown = sorted(set(val_classes) - set(train_classes))
    if unknown:
        raise InputError(
            f"{val.url} has classes that {train.url} lacks: {', '.join(unknown[:5])}; give two parts of one data set"
        )
    number = np.asarray([train_classes.index(name) for name in val_classes], dtype=np.int64)
    return train, Subset(val, np.arange(len(val)), number, train_classes)


def parts_of(url: str) -> list[str]:
    """Return which of ``train`` and ``val`` a folder has as parts; empty for other sources."""
    folder = url if storage.is_remote(url) else str(Path(os.path.expanduser(url)))
    return [part for part in ("train", "val") if storage.is_folder(folder) and _folder_of_part(folder, part) != folder]


def has_validation(url: str) -> bool:
    """Whether :func:`open_parts` finds a validation part of ``url``, as far as names show."""
    return _has_parts(url) or (not url.startswith(FILES) and storage.is_folder(_inside(url, "val")))


def _has_parts(url: str) -> bool:
    """Whether a URL that is not a folder of images names a data set with both parts."""
    if url.startswith("parquet:"):
        return is_folder_of_parquet(url.removeprefix("parquet:"))
    return (url.startswith(NAMED) and not url.startswith("hf://")) or url.partition(":")[0] in _REGISTERED


def _folder_of_part(folder: str, part: str | None) -> str:
    """Return the sub-folder of a part, or the folder itself if its sub-folders are classes."""
    if part is None or folder.rpartition("/")[2] == part:  # DIR/train may have a class "train"
        return folder
    names = storage.subfolders(folder)
    if part not in names or not (names <= _PARTS or {"train", "val"} <= names):
        return folder
    if others := sorted(names - _PARTS):
        log.warn_once(f"{folder}: using the part {part}, ignoring the folders {', '.join(others[:5])}")
    return _inside(folder, part)


def _parent_of_parts(data: str) -> str:
    """Return the parent folder if a folder ``train`` or ``val`` of a data set is given; else the folder itself."""
    data = data.rstrip("/") if storage.is_remote(data) else str(Path(os.path.expanduser(data)))
    parent, _, name = data.rpartition("/")
    if name not in ("train", "val") or not storage.is_folder(data):
        return data
    beside = all(storage.is_folder(_inside(parent, part)) for part in ("train", "val"))
    return parent if beside or not storage.is_folder(_inside(data, "train")) else data


def _inside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"
