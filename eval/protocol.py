"""What was measured, and how: the card that goes with every figure."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import faiss
import numpy
import PIL
import torch
import torchvision

import dino_xcit
from dino_xcit.data import ArraySource, Source
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone

Card = dict[str, object]
"""Plain values, ready for JSON."""

FORMAT = 1
"""Of result files; it rises when a reader of the one before would misunderstand."""

KNN_PROTOCOL = "weighted k-NN on the L2-normalised class token, exact search (DINO, arXiv 2104.14294)"
"""The name of the protocol of the published k-NN figures."""

LOOKED_AT = 64
"""Images of a source whose contents go into its card: enough to tell pictures that were resized or saved anew. That
one of the others is another picture, names and sizes have to tell."""


def weights_card(loaded: LoadedBackbone) -> Card:
    """Which network of which file, and what did not fit but was allowed."""
    return {
        "path": str(loaded.path.absolute()),
        "asked_for": loaded.spec,
        "network": loaded.network,
        "arch": loaded.arch,
        "hash": loaded.hash,
        "allowed": list(loaded.allowed),
    }


def data_card(source: Source, fingerprint: str) -> Card:
    """Which images.

    Args:
        fingerprint: of ``source``; handed in because it looks at every file.
    """
    classes = None if source.classes is None else len(source.classes)
    return {"url": source.url, "images": len(source), "classes": classes, "fingerprint": fingerprint}


def transform_card(transform: EvalTransform) -> Card:
    """How images were prepared, as JSON has it. Always antialiased: Pillow's resize weighs all pixels that a new one
    covers."""
    plain: Card = json.loads(json.dumps(transform.to_dict()))
    return plain | {"antialias": True}


def images_card(source: Source) -> Card:
    """Which images, whatever folder or archive they lie in: what two results must share to be compared in pairs.

    Returns:
        ``contents``: of the bytes of :data:`LOOKED_AT` images, evenly spread; ``labels``: of all label numbers in their
        order; ``names``: of all images' names in their order, without folder and ending, and as they were before
        packing; ``whole``: of the size of every file in their order, or of all pixels in memory, None where neither can
        be had without reading every image. Where these four are the same, the images are. ``order``: of classes and
        file names in their order; ``members``: of the same without their order. They tell what differs.
    """
    labels, order, names, members = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), 0
    for index in range(len(source)):
        label = None if source.labels is None else int(source.labels[index])
        labels.update(f"{label}\n".encode())
        group = "" if label is None else (source.classes[label] if source.classes else str(label))
        name = source.name(index)
        line = f"{group}\t{name.rsplit('/', 1)[-1]}\n".encode("utf-8", "surrogateescape")
        order.update(line)
        members += int.from_bytes(hashlib.sha256(line).digest())  # a sum has no order, and takes no memory
        names.update(f"{own_name(name)}\n".encode("utf-8", "surrogateescape"))
    contents = hashlib.sha256()
    for index in numpy.unique(numpy.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(numpy.int64)):
        item, _ = source.read(int(index))
        contents.update(item if isinstance(item, bytes) else item.tobytes())
    return {
        "contents": contents.hexdigest(),
        "labels": labels.hexdigest(),
        "names": names.hexdigest(),
        "whole": _whole(source),
        "order": order.hexdigest(),
        "members": f"{members % 2**256:064x}",
    }


def own_name(name: str) -> str:
    """An image's name without folder and ending; of one that was packed, its name before
    (:func:`dino_xcit.data.pack.key_of`)."""
    while True:
        base = name.rsplit("/", 1)[-1]
        stem = base.rpartition(".")[0] or base
        number, _, before = stem.partition("_")
        if not (number.isdecimal() and "%" in before):
            return stem
        name = unquote(before, errors="surrogateescape")


def _whole(source: Source) -> str | None:
    if isinstance(source, ArraySource):
        return hashlib.sha256(numpy.ascontiguousarray(source.images).data).hexdigest()
    digest = hashlib.sha256()
    try:
        for index in range(len(source)):
            digest.update(f"{os.stat(source.name(index)).st_size}\n".encode())
    except (OSError, ValueError):  # in an archive or elsewhere: a name is no path
        return None
    return digest.hexdigest()


def result_card(
    measure: str,
    protocol: Mapping[str, object],
    results: object,
    loaded: LoadedBackbone,
    data: Mapping[str, Card],
    transform: EvalTransform,
    device: torch.device,
    seconds: float,
    figures: Sequence[Card] = (),
) -> Card:
    """A measurement with everything that is needed to repeat it. Accuracies are percent.

    Args:
        measure: ``knn``, ``linear``, ...
        protocol: the settings that decide the figures, by name.
        results: the figures.
        data: the parts that took part, ``train`` and ``val``, as :func:`data_card` describes them.
        seconds: the whole run's, from its start to its figures.
        figures: the accuracies that ``python -m eval.compare`` may compare, image by image
            (:meth:`eval.figures.Figure.to_card`).
    """
    names = [one["name"] for one in figures]
    assert len(set(names)) == len(names), f"two figures of one name, which no reader takes: {names}"
    return {
        "format": FORMAT,
        "measure": measure,
        "protocol": dict(protocol),
        "results": results,
        "weights": weights_card(loaded),
        "data": dict(data),
        "transform": transform_card(transform),
        "figures": list(figures),
        "device": device_name(device),
        "processes": distributed.world_size(),
        "seconds": round(seconds, 2),
        "date": now(),
        "versions": versions(),
    }


def versions() -> Card:
    """Of the libraries that a figure may depend on."""
    return {
        "dino_xcit": dino_xcit.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "faiss": faiss.__version__,
    }


def device_name(device: torch.device) -> str:
    """``cuda (NVIDIA ...)`` or ``cpu (x86_64, 2 threads)``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(path: Path, content: object) -> None:
    """Write JSON beside ``path``, flush it, then rename; whatever happens, nothing is left beside it.

    Raises:
        InputError: it cannot be written there.
        ValueError: ``content`` has a number that JSON has no word for, such as NaN. Nothing has been written then.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # a full or read-only disk and a name that is too long, too
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
