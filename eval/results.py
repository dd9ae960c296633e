"""Result files, written by the evaluation commands (``--json``) and read by eval.compare.

Accuracies and other shares are in percent.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

import dino_xcit
from dino_xcit.data import Source
from dino_xcit.data.source import AnnotatedSource, evenly_spaced
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime.atomic import write as atomic_write
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone

JsonObject = dict[str, object]
"""A JSON object of plain values."""
Setting = str | int | float
Unit = Literal["image", "query", "draw"]
"""Unit of a metric's mean: validation images, queries of a search, or few-shot draws."""

FORMAT = 2
"""Version of the file format, incremented by incompatible changes."""
KNN_PROTOCOL = "weighted k-NN on the L2-normalised class token, exact search (DINO, arXiv 2104.14294)"
"""Name of the protocol of the published k-NN results."""
SAMPLED = 64
"""Number of hashed images per source, enough to detect resized or re-encoded images."""
ALL = "all"
"""Setting ``draws`` of a few-shot metric with a single draw of all training images."""
PERCENT_TOLERANCE = 1e-4
"""Maximum difference in percentage points between a stored mean and the mean of its float32 values."""

Kind = TypeVar("Kind")


# ---- one metric


@dataclass(frozen=True)
class Metric:
    """A top-1 accuracy or another mean of shares, such as mAP, with the averaged values."""

    name: str
    """Display name, such as ``trained k=20 T=0.07 top-1``."""
    settings: Mapping[str, Setting]
    """Settings that identify the metric in its file; metrics of two files match if these are equal."""
    percent: float
    hits: NDArray[np.bool_] | None
    """[units]: correct or not, in the order of the validation images. None: unknown, or stored in ``values``."""
    baseline: bool = False
    """Whether the metric measures a baseline, such as raw pixels."""
    values: NDArray[np.float64] | None = None
    """[units] in percent, for units that are not hits: average precisions of queries, accuracies of draws."""
    unit: Unit = "image"
    which: str = ""
    """SHA-256 of the rows of the queries or draws; only metrics with equal hashes are paired. Empty for images."""

    @property
    def units(self) -> int | None:
        """Number of images, queries or draws; None if unknown."""
        found = self.hits if self.values is None else self.values
        return None if found is None else len(found)

    def to_dict(self) -> JsonObject:
        """Convert to plain values for JSON: packed bits of hits and little-endian float32 values, both in base64."""
        hits = None if self.hits is None else _base64(np.packbits(self.hits).tobytes())
        plain: JsonObject = {"name": self.name, "settings": dict(self.settings), "baseline": self.baseline}
        if self.unit == "image":
            return plain | {"top1": self.percent, "images": self.units, "hits": hits}
        values = None if self.values is None else _base64(self.values.astype("<f4").tobytes())
        plain |= {"percent": self.percent, "unit": self.unit, "which": self.which, "count": self.units}
        return plain | {"hits": hits, "values": values}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Metric:
        """Invert :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: a value is missing, of another type, or inconsistent.
        """
        of_images = plain.get("unit", "image") == "image"
        percent, count = (plain["top1"], plain["images"]) if of_images else (plain["percent"], plain["count"])
        hits = None if plain["hits"] is None else unpack(plain["hits"], count)
        packed = plain.get("values")
        values = None if packed is None else np.frombuffer(base64.b64decode(packed), "<f4").astype(np.float64)
        found = build_checked(cls, {**plain, "percent": percent, "hits": hits, "values": values})
        if not 0 <= percent <= 100:
            raise ValueError(f"{found.name} is {percent}, expected percent")
        units = 100.0 * hits if hits is not None else values
        if units is not None:
            if len(units) != count or not len(units):
                raise ValueError(f"{found.name} has {len(units)} values, expected {count}")
            if not abs(units.mean() - percent) <= PERCENT_TOLERANCE or not ((units >= 0) & (units <= 100)).all():
                raise ValueError(f"{found.name} is {percent:g}, but the mean of its values is {units.mean():g}")
        return found


def metric(name: str, settings: Mapping[str, Setting], hits: NDArray[np.bool_], baseline: bool = False) -> Metric:
    """Build a metric from hits [images]; 0 for no images, as JSON has no NaN."""
    return Metric(name, dict(settings), 100.0 * _mean(hits), hits, baseline)


def query_metric(
    name: str, settings: Mapping[str, Setting], found: NDArray[np.bool_] | NDArray[np.floating], rows: NDArray[np.int64]
) -> Metric:
    """Build a metric of a search.

    Args:
        found: [queries], hits or shares in percent.
        rows: [queries], row numbers of the query images.
    """
    which = hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()
    if found.dtype == np.bool_:
        hits = found.astype(np.bool_)
        return Metric(name, dict(settings), 100.0 * _mean(hits), hits, unit="query", which=which)
    values = np.clip(np.asarray(found, dtype=np.float64), 0, 100)  # rounding may give 100.00000000000001
    return Metric(name, dict(settings), _mean(values), None, values=values, unit="query", which=which)


def few_shot_metric(model: str, record: Mapping[str, Any], draws: int, seed: int) -> Metric:
    """Build the metric of mean top-1 over few-shot draws; a single draw of all images does not depend on the seed.

    Args:
        model: ``trained`` or the name of a baseline.
        record: a record of :func:`eval.knn.few_shot.few_shot`.
        draws, seed: values of the settings.
    """
    shots, k, temperature = record["shots"], record["k"], record["temperature"]
    how: dict[str, Setting] = {"draws": ALL} if record["takes_all"] else {"draws": draws, "seed": seed}
    drawn = "all images" if record["takes_all"] else f"{draws} draws of seed {seed}"
    name = f"{model} {shots} a class, {drawn}, k={k} T={temperature:g} top-1"
    settings: dict[str, Setting] = {"model": model, "shots": shots, **how, "k": k, "T": temperature}
    values = np.array(record["top1_draws"], dtype=np.float64)
    return Metric(name, settings, _mean(values), None, model != "trained", values, "draw", record["drawn"])


def unpack(packed: str, count: int) -> NDArray[np.bool_]:
    """Unpack hits [count] packed by :meth:`Metric.to_dict`.

    Raises:
        ValueError: the text is not base64 or holds another number of bits.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed, validate=True), dtype=np.uint8)).astype(np.bool_)
    if len(bits) != -(-count // 8) * 8 or bits[count:].any():
        raise ValueError(f"{len(bits)} bits of hits, expected {count}")
    return bits[:count]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


# ---- the file


@dataclass(frozen=True, kw_only=True)
class Images:
    """Identity of a set of images, independent of its location; results are paired if labels and contents agree."""

    images: int
    classes: int | None = None
    contents: str = ""
    """Hash of the bytes of :data:`SAMPLED` images, evenly spread; empty: unknown."""
    labels: str = ""
    """Hash of all labels in order."""
    names: str = ""
    """Hash of all names in order, without folder and suffix; empty in files written before names were stored."""

    def pairs_with(self, other: Images | None) -> bool:
        """Return whether images at equal positions are the same."""
        return other is not None and self.contents == other.contents != "" and self.labels == other.labels


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measurement with everything needed to repeat it."""

    format: int = FORMAT
    measure: str
    """``knn``, ``linear``, ``retrieval folder`` ..."""
    protocol: JsonObject
    """Settings that affect the metrics, by name."""
    results: object = None
    """Results as logged."""
    weights: JsonObject = field(default_factory=dict)
    data: dict[str, JsonObject]
    """``train`` and ``val``, or the sets of a retrieval benchmark: :func:`data_metadata`, :func:`images_metadata`."""
    transform: JsonObject
    metrics: tuple[Metric, ...] = ()
    """Metrics for ``python -m eval.compare``."""
    device: str = ""
    processes: int = 1
    seconds: float = 0.0
    """Duration of the run until the results."""
    date: str = ""
    versions: JsonObject = field(default_factory=dict)
    """Versions of the libraries that may affect a metric."""

    def __post_init__(self) -> None:
        names = [one.name for one in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"two metrics have the same name: {names}")

    def images(self) -> dict[str, Images]:
        """Return the identity of the images in each part of ``data``."""
        return {name: build_checked(Images, part) for name, part in self.data.items()}

    def to_dict(self) -> JsonObject:
        """Convert to plain values for JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"metrics": [one.to_dict() for one in self.metrics]}


def read_result(path: str) -> Result:
    """Read a result file.

    Raises:
        InputError: the file is missing, damaged, not a result file, of another format, or has no metrics to compare.
    """

    def refuse(why: str) -> NoReturn:
        raise InputError(f"{path} {why}; expected a result file: --json of an evaluation, or results.json of a run")

    try:
        content = json.loads(Path(path).expanduser().read_bytes(), parse_constant=_no_constant)
        if content["format"] != FORMAT:
            refuse(f"has format {content['format']!r:.20} instead of {FORMAT}: measure again")
        if not content["metrics"]:
            refuse(f"has no metrics of single images or queries ({content['measure']!r:.40}): measure again")
        result = build_checked(Result, content | {"metrics": tuple(map(Metric.from_dict, content["metrics"]))})
        images = result.images()
        for one in result.metrics:
            if one.unit == "image" and one.units not in (None, images["val"].images):
                raise ValueError(f"{one.name} is of {one.units} images, expected {images['val'].images}")
    except OSError as error:
        refuse(f"cannot be read: {one_line(error)}")
    except InputError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        refuse(f"is damaged or not a result file ({type(error).__name__}: {one_line(error)})")
    return result


def build_checked(kind: type[Kind], content: Mapping[str, Any]) -> Kind:
    """Build a dataclass from values with build_checked types; keys without a field are ignored.

    Raises:
        TypeError: a value is missing or of another type.
    """
    hints = get_type_hints(kind)
    values = {name: content[name] for name in hints if name in content}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.60}")
    return kind(**values)


def _fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value has the type of ``hint``; int is accepted as float, bool as neither."""
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if kind is Literal:
        return value in inside
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(one, inside[1]) for one in value.values())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically.

    Raises:
        InputError: the file cannot be written.
        ValueError: ``content`` has a number that JSON does not support, such as NaN.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another path") from error


# ---- parts of the file


def result_content(
    measure: str,
    protocol: Mapping[str, object],
    results: object,
    loaded: LoadedBackbone,
    data: Mapping[str, JsonObject],
    transform: EvalTransform,
    device: torch.device,
    seconds: float,
    metrics: Sequence[JsonObject] = (),
) -> JsonObject:
    """Build a :class:`Result` of this run as plain values.

    Args:
        metrics: each from :meth:`Metric.to_dict`.
    """
    return Result(
        measure=measure,
        protocol=dict(protocol),
        results=results,
        weights=weights_metadata(loaded),
        data=dict(data),
        transform=transform_metadata(transform),
        metrics=tuple(map(Metric.from_dict, metrics)),
        device=distributed.device_name(device),
        processes=distributed.world_size(),
        seconds=round(seconds, 2),
        date=now(),
        versions=versions(),
    ).to_dict()


def weights_metadata(loaded: LoadedBackbone) -> JsonObject:
    """Describe the weights: file, network and allowed differences in keys."""
    return {
        "path": str(loaded.path.absolute()),
        "asked_for": loaded.spec,
        "network": loaded.network,
        "arch": loaded.arch,
        "hash": loaded.hash,
        "allowed": list(loaded.allowed),
    }


def data_metadata(source: Source, fingerprint: str) -> JsonObject:
    """Describe a source.

    Args:
        fingerprint: fingerprint of ``source``; an argument because computing it visits every file.
    """
    classes = None if source.classes is None else len(source.classes)
    return {"url": source.url, "images": len(source), "classes": classes, "fingerprint": fingerprint}


def images_metadata(source: Source) -> JsonObject:
    """Compute the hashes of :class:`Images`; reads :data:`SAMPLED` images."""
    labels, names, contents = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for index in range(len(source)):
        labels.update(f"{None if source.labels is None else int(source.labels[index])}\n".encode())
        if isinstance(source, AnnotatedSource):
            labels.update(hashlib.sha256(source.annotation(index)).digest())
        names.update(f"{own_name(source.name(index))}\n".encode("utf-8", "surrogateescape"))
    for index in evenly_spaced(len(source), SAMPLED):
        item, _ = source.read(index)
        contents.update(item if isinstance(item, bytes) else item.tobytes())
    return {"contents": contents.hexdigest(), "labels": labels.hexdigest(), "names": names.hexdigest()}


def own_name(name: str) -> str:
    """Return an image's name without folder and suffix; for a packed image, the name before packing
    (:func:`dino_xcit.data.pack.key_of`)."""
    while True:
        base = name.rsplit("/", 1)[-1]
        stem = base.rpartition(".")[0] or base
        number, _, before = stem.partition("_")
        if not (number.isdecimal() and "%" in before):
            return stem
        name = unquote(before, errors="surrogateescape")


def transform_metadata(transform: EvalTransform) -> JsonObject:
    """Describe the transform as in JSON; Pillow's resize always antialiases."""
    plain: JsonObject = json.loads(json.dumps(transform.to_dict()))
    return plain | {"antialias": True}


def versions() -> JsonObject:
    """Return the versions of the libraries that may affect a metric."""
    import faiss  # slow, and not needed for reading results

    return {
        "dino_xcit": dino_xcit.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "faiss": faiss.__version__,
    }


def now() -> str:
    """Return the current time in UTC to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
