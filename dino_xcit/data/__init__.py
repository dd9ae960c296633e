"""Data as URLs: ``open_source(URL, part)``."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

from dino_xcit.data import files
from dino_xcit.data.decode import UndecodableImage, decode
from dino_xcit.data.folder import open_folder, open_list
from dino_xcit.data.hf import is_folder_of_parquet, open_hf, open_parquet
from dino_xcit.data.imagenet import open_imagenet
from dino_xcit.data.sample import ArraySource, open_sample
from dino_xcit.data.source import MinimalSource, Source, Subset, completed
from dino_xcit.data.tar import open_tar
from dino_xcit.errors import InputError

__all__ = [
    "ArraySource",
    "Source",
    "Subset",
    "UndecodableImage",
    "decode",
    "open_parts",
    "open_source",
    "register_source",
]

FORMS = (
    "a folder, a .txt list of paths, tar:PATTERN, parquet:PATTERN, hf:NAME_OR_DIR, imagenet:DIR, "
    "sample:fashion-mnist, "
    "sample:fashion-mnist-full or torchvision:NAME"
)
NAMED = ("sample:", "torchvision:", "imagenet:", "hf:")
"""Sets by their names, which have a training and a validation part."""
FILES = ("tar:", "parquet:")
"""Sets by a pattern of the files of one part."""

Open = Callable[[str, str | None], MinimalSource]
_REGISTERED: dict[str, Open] = {}


def register_source(scheme: str, open: Open) -> None:
    """Make ``--data-path scheme:REST`` call ``open(REST, part)``, with ``train``, ``val`` or None for the part.

    Args:
        open: returns an object with ``len``, ``read(index) -> (bytes or pixels, label or None)`` and ``name(index)``;
            the other attributes of :class:`Source` where it has them. Loader processes share it, so it holds no open
            files.

    Raises:
        ValueError: the scheme is taken.
    """
    if f"{scheme}:" in (*NAMED, *FILES) or scheme in _REGISTERED or scheme in fsspec.available_protocols():
        raise ValueError(f"scheme {scheme!r} is taken: choose another name")
    _REGISTERED[scheme] = open


def open_source(url: str, part: str | None = None) -> Source:
    """Open a data set.

    Args:
        url: a folder of images (one sub-folder a class, or a heap without labels); a ``.txt`` file with one path a
            line; ``tar:PATTERN``, archives such as WebDataset's shards (``tar:/data/train-{000..146}.tar``);
            ``parquet:PATTERN``, Parquet files, or a folder of theirs; ``hf:NAME_OR_DIR``, a data set of the Hugging
            Face hub, or what ``save_to_disk`` wrote;
            ``imagenet:DIR``, ImageNet-1k as it is downloaded; ``sample:fashion-mnist``,
            ``sample:fashion-mnist-full`` or ``torchvision:NAME``. Folders, lists, archives
            and Parquet files may be remote (``s3://``, ``gs://``, ``hf://``, ``https://`` ...). A trailing
            ``/train`` or ``/val`` on the last four chooses the part.
        part: ``train`` or ``val``. A folder that holds a folder of that name is opened there; one that does not is
            taken whole, as are archives. In a folder of Parquet files, those whose names begin with it. None: the
            folder as it is; the training part of the others.

    Raises:
        InputError: nothing there, nothing readable in it, or an unknown form.
    """
    if not url.strip():  # an unset variable of a shell; as a path it would be the folder one is in
        raise InputError(f"no data given: expected {FORMS}")
    scheme, colon, rest = url.partition(":")
    if colon and scheme in _REGISTERED:
        return completed(_REGISTERED[scheme](rest, part), url)
    if colon and scheme in ("sample", "torchvision"):
        name, _, named_part = rest.partition("/")
        chosen = named_part or part or "train"
        if chosen not in ("train", "val"):
            raise InputError(f"{url!r} has no part {chosen!r}: expected {scheme}:{name}/train or {scheme}:{name}/val")
        if scheme == "sample":
            return open_sample(name, chosen)
        from dino_xcit.data.torchvision_source import TorchvisionSource  # torchvision takes two seconds to import

        return TorchvisionSource(name, chosen)
    if colon and scheme == "imagenet":
        named = re.fullmatch(r"(.+)/(train|val)/*", rest)
        return open_imagenet(named[1] if named else rest, named[2] if named else part or "train")
    if colon and scheme == "tar":
        return open_tar(rest, url)
    if colon and scheme == "parquet":
        return open_parquet(rest, part)
    if colon and scheme == "hf" and not rest.startswith("//"):
        return open_hf(rest, part)
    if files.is_remote(url):
        return _open_remote(url, part)
    path = Path(os.path.expanduser(url))
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        forms = ", ".join([FORMS, *(f"{name}:..." for name in _REGISTERED)])
        hint = f"known forms: {forms}" if colon and "/" not in scheme else "check the path"
        raise InputError(f"no data at {url!r}: there is no such file or folder; {hint}") from error
    except (OSError, ValueError) as error:  # no permission; a zero byte
        raise files.explained(str(path), error) from error
    if stat.S_ISREG(status.st_mode):
        if path.suffix.lower() != ".txt":
            raise InputError(f"{url!r} is a single file: expected {FORMS}")
        return open_list(str(path), url)
    if part and path.name != part and os.path.isdir(path / part):  # DIR/train may have a class of trains
        path = path / part
    return open_folder(str(path), str(path))


def _open_remote(url: str, part: str | None) -> Source:
    """A list or a folder that fsspec reads."""
    address = url.partition("?")[0].rstrip("/")
    if not files.is_remote(address):  # nothing behind the slashes
        raise InputError(f"{url!r} names no place: expected such as {address}//BUCKET/FOLDER")
    if address.lower().endswith(".txt"):
        return open_list(url, url)
    if address.lower().endswith(".tar"):
        raise InputError(f"{url!r} is an archive: expected tar:{url}")
    if part and not address.endswith(f"/{part}") and files.is_folder(f"{address}/{part}"):
        address = f"{address}/{part}"
    return open_folder(address, address)


def open_parts(data: str | None, train_data: str | None, val_data: str | None) -> tuple[Source, Source]:
    """The labelled training and validation parts that an evaluator measures with.

    Args:
        data: a data set with both parts: a folder that holds ``train`` and ``val``, that ``train`` folder itself, or
            one of the named sets.
        train_data, val_data: either part on its own, whatever :func:`open_source` opens; wins over ``data``.

    Raises:
        InputError: a part is missing, has no labels, or the two disagree about their classes.
    """
    if data is not None:
        if _has_parts(data) and not data.startswith(FILES):
            data = data.removesuffix("/train").removesuffix("/val")
        elif not data.startswith(FILES):
            data = _above_its_parts(data)
    parts: list[Source] = []
    for part, given in (("train", train_data), ("val", val_data)):
        if given is not None:
            source = open_source(given, part if _has_parts(given) else None)
        elif data is None:
            raise InputError(f"no {part} data: give --data-path DIR with DIR/train and DIR/val, or --{part}-data")
        elif data.startswith(FILES) and not _has_parts(data):
            raise InputError(
                f"{data} is one part: give --train-data and --val-data, each with the pattern of its own files"
            )
        elif not _has_parts(data) and not files.is_folder(_inside(data, part)):
            raise InputError(
                f"{data} holds no folder {part!r}: give --data-path DIR with DIR/train and DIR/val, or "
                f"--{part}-data DIR"
            )
        else:
            source = open_source(data, part)
        if source.labels is None:
            raise InputError(
                f"{source.url} has no labels, which measuring needs: expected one sub-folder a class, "
                "archives with .cls members, or Parquet files with a column 'label'"
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


def _has_parts(url: str) -> bool:
    """Whether a set that is no folder of images holds both parts."""
    if url.startswith("parquet:"):
        return is_folder_of_parquet(url.removeprefix("parquet:"))
    return (url.startswith(NAMED) and not url.startswith("hf://")) or url.partition(":")[0] in _REGISTERED


def _above_its_parts(data: str) -> str:
    """The folder that holds ``train`` and ``val``, where one of these is given; otherwise what is given."""
    if files.is_remote(data):
        above, _, name = data.rstrip("/").rpartition("/")
    else:
        path = Path(data).expanduser()
        above, name = str(path.parent), path.name
    if name not in ("train", "val") or not files.is_folder(data):
        return data
    beside = all(files.is_folder(_inside(above, part)) for part in ("train", "val"))
    return above if beside or not files.is_folder(_inside(data, "train")) else data


def _inside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if files.is_remote(folder) else str(Path(folder).expanduser() / name)
