"""Data as URLs: ``open_source(URL, part)``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dino_xcit.data.decode import UndecodableImage, decode
from dino_xcit.data.folder import open_folder, open_list
from dino_xcit.data.sample import ArraySource, open_sample
from dino_xcit.data.source import Source, Subset
from dino_xcit.data.torchvision_source import TorchvisionSource
from dino_xcit.errors import InputError

__all__ = [
    "ArraySource",
    "Source",
    "Subset",
    "UndecodableImage",
    "decode",
    "open_parts",
    "open_source",
]

FORMS = "a folder, a .txt list of paths, sample:fashion-mnist, sample:fashion-mnist-full or torchvision:NAME"


def open_source(url: str, part: str | None = None) -> Source:
    """Open a data set.

    Args:
        url: a folder of images (one sub-folder a class, or a heap without labels), a ``.txt`` file with one path a
            line, ``sample:fashion-mnist``, ``sample:fashion-mnist-full`` or ``torchvision:NAME``. A trailing
            ``/train`` or ``/val`` on the last three chooses the part.
        part: ``train`` or ``val``. A folder that holds a folder of that name is opened there; one that does not is
            taken whole. None: the folder as it is; the training part of the others.

    Raises:
        InputError: nothing there, nothing readable in it, or an unknown form.
    """
    scheme, colon, rest = url.partition(":")
    if colon and scheme in ("sample", "torchvision"):
        name, _, named_part = rest.partition("/")
        chosen = named_part or part or "train"
        if chosen not in ("train", "val"):
            raise InputError(f"{url!r} has no part {chosen!r}: there are train and val")
        return open_sample(name, chosen) if scheme == "sample" else TorchvisionSource(name, chosen)
    path = Path(url).expanduser()
    if not path.exists():
        hint = f"; known forms: {FORMS}" if colon and "/" not in scheme else ""
        raise InputError(f"no data at {url!r}: there is no such file or folder{hint}")
    if path.is_file():
        if path.suffix.lower() != ".txt":
            raise InputError(f"{url!r} is a single file: expected {FORMS}")
        return open_list(path, url)
    if part and path.name != part and (path / part).is_dir():  # DIR/train may have a class of trains
        path = path / part
    return open_folder(path, str(path))


def open_parts(data: str | None, train_data: str | None, val_data: str | None) -> tuple[Source, Source]:
    """The labelled training and validation parts that an evaluator measures with.

    Args:
        data: a data set with both parts: a folder that holds ``train`` and ``val``, that ``train`` folder itself, or
            one of the named sets.
        train_data, val_data: either part on its own; wins over ``data``.

    Raises:
        InputError: a part is missing, has no labels, or the two disagree about their classes.
    """
    if data is not None:
        path = Path(data).expanduser()
        beside = all((path.parent / part).is_dir() for part in ("train", "val"))
        if path.name in ("train", "val") and path.is_dir() and (beside or not (path / "train").is_dir()):
            data = str(path.parent)
        elif data.startswith(("sample:", "torchvision:")):
            data = data.removesuffix("/train").removesuffix("/val")
    parts: list[Source] = []
    for part, given in (("train", train_data), ("val", val_data)):
        if given is not None:
            source = open_source(given, part if given.startswith(("sample:", "torchvision:")) else None)
        elif data is None:
            raise InputError(f"no {part} data: give --data-path DIR with DIR/train and DIR/val, or --{part}-data")
        elif not data.startswith(("sample:", "torchvision:")) and not (Path(data).expanduser() / part).is_dir():
            raise InputError(
                f"{data} holds no folder {part!r}: give --data-path DIR with DIR/train and DIR/val, or "
                f"--{part}-data DIR"
            )
        else:
            source = open_source(data, part)
        if source.labels is None:
            raise InputError(f"{source.url} has no labels, which measuring needs: expected one sub-folder a class")
        parts.append(source)
    train, val = parts
    if train.classes == val.classes:
        return train, val
    train_classes, val_classes = train.classes or (), val.classes or ()
    unknown = sorted(set(val_classes) - set(train_classes))
    if unknown:
        raise InputError(f"{val.url} has classes that {train.url} lacks: {', '.join(unknown[:5])}")
    number = np.asarray([train_classes.index(name) for name in val_classes], dtype=np.int64)
    return train, Subset(val, np.arange(len(val)), number, train_classes)
