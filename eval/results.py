"""Result files: what was measured, how, and what came of it. Every runner writes one (``--json``), eval.compare reads
it.

Accuracies and other shares are percent.
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
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime.atomic import write as atomic_write
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone

Card = dict[str, object]
"""Plain values, ready for JSON."""
Setting = str | int | float
Unit = Literal["image", "query", "draw"]
"""What a figure is a mean over: validation images, queries of a search, draws of a few training images."""

FORMAT = 1
"""Of result files; it rises when a reader of the previous format would misunderstand."""
KNN_PROTOCOL = "weighted k-NN on the L2-normalised class token, exact search (DINO, arXiv 2104.14294)"
"""The name of the protocol of the published k-NN figures."""
SAMPLED = 64
"""Images of a source whose contents identify it: enough to notice images that were resized or encoded again."""
ALL = "all"
"""The setting ``draws`` of a few-shot figure whose only draw took every training image."""
PERCENT_TOLERANCE = 1e-4
"""Percentage points by which a stored mean may miss the mean of its values, which are stored as float32."""

Kind = TypeVar("Kind")


# ---- one figure


@dataclass(frozen=True)
class Figure:
    """A top-1 accuracy, or another mean of shares such as mAP, with what it is the mean of."""

    name: str
    """What it is called on the screen, such as ``trained k=20 T=0.07 top-1``."""
    settings: Mapping[str, Setting]
    """What distinguishes it within its file; figures of two files match where these are equal."""
    percent: float
    hits: NDArray[np.bool_] | None
    """[units]: right or wrong. Images are in the order of the validation images. None: unknown, or see ``values``."""
    baseline: bool = False
    """Whether it measures something else than the weights, such as raw pixels."""
    values: NDArray[np.float64] | None = None
    """[units], percent, where a unit is not right or wrong: a query's average precision, a draw's accuracy."""
    unit: Unit = "image"
    which: str = ""
    """SHA-256 of the rows that were queries, or were drawn: figures are paired where these are equal. Empty for images,
    all of which count."""

    @property
    def units(self) -> int | None:
        """How many images, queries or draws it is the mean of; None if unknown."""
        found = self.hits if self.values is None else self.values
        return None if found is None else len(found)

    def to_card(self) -> Card:
        """Plain values for JSON: hits eight to a byte, values as little-endian float32, both base64."""
        hits = None if self.hits is None else _base64(np.packbits(self.hits).tobytes())
        card: Card = {"name": self.name, "settings": dict(self.settings), "baseline": self.baseline}
        if self.unit == "image":
            return card | {"top1": self.percent, "images": self.units, "hits": hits}
        values = None if self.values is None else _base64(self.values.astype("<f4").tobytes())
        card |= {"percent": self.percent, "unit": self.unit, "which": self.which, "count": self.units}
        return card | {"hits": hits, "values": values}

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Figure:
        """The inverse of :meth:`to_card`.

        Raises:
            KeyError, TypeError, ValueError: something is missing, of another type, or contradicts the rest.
        """
        of_images = card.get("unit", "image") == "image"
        percent, count = (card["top1"], card["images"]) if of_images else (card["percent"], card["count"])
        hits = None if card["hits"] is None else unpack(card["hits"], count)
        packed = card.get("values")
        values = None if packed is None else np.frombuffer(base64.b64decode(packed), "<f4").astype(np.float64)
        found = from_dict(cls, {**card, "percent": percent, "hits": hits, "values": values})
        if not 0 <= percent <= 100:
            raise ValueError(f"{found.name} is {percent}, expected percent")
        units = 100.0 * hits if hits is not None else values
        if units is not None:
            if len(units) != count or not len(units):
                raise ValueError(f"{found.name} has {len(units)} values, expected {count}")
            if not abs(units.mean() - percent) <= PERCENT_TOLERANCE or not ((units >= 0) & (units <= 100)).all():
                raise ValueError(f"{found.name} is {percent:g}, but the mean of its values is {units.mean():g}")
        return found


def figure(name: str, settings: Mapping[str, Setting], hits: NDArray[np.bool_], baseline: bool = False) -> Figure:
    """A figure from its hits [images]; 0 for no images, as NaN is never written."""
    return Figure(name, dict(settings), 100.0 * _mean(hits), hits, baseline)


def query_figure(
    name: str, settings: Mapping[str, Setting], found: NDArray[np.bool_] | NDArray[np.floating], rows: NDArray[np.int64]
) -> Figure:
    """A figure of a search.

    Args:
        found: [queries], hits, or shares in percent.
        rows: [queries], which images were queries.
    """
    which = hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()
    if found.dtype == np.bool_:
        hits = found.astype(np.bool_)
        return Figure(name, dict(settings), 100.0 * _mean(hits), hits, unit="query", which=which)
    values = np.clip(np.asarray(found, dtype=np.float64), 0, 100)  # a sum of parts may end in 100.00000000000001
    return Figure(name, dict(settings), _mean(values), None, values=values, unit="query", which=which)


def few_shot_figure(model: str, record: Mapping[str, Any], draws: int, seed: int) -> Figure:
    """The mean top-1 over the draws of a few images a class; of all images there is one draw, whatever the seed.

    Args:
        model: ``trained``, or the name of a baseline.
        record: one of :func:`eval.knn.few_shot.few_shot`.
        draws, seed: as they were asked for.
    """
    shots, k, temperature = record["shots"], record["k"], record["temperature"]
    how: dict[str, Setting] = {"draws": ALL} if record["takes_all"] else {"draws": draws, "seed": seed}
    drawn = "all images" if record["takes_all"] else f"{draws} draws of seed {seed}"
    name = f"{model} {shots} a class, {drawn}, k={k} T={temperature:g} top-1"
    settings: dict[str, Setting] = {"model": model, "shots": shots, **how, "k": k, "T": temperature}
    values = np.array(record["top1_draws"], dtype=np.float64)
    return Figure(name, settings, _mean(values), None, model != "trained", values, "draw", record["drawn"])


def unpack(packed: str, count: int) -> NDArray[np.bool_]:
    """The hits [count] that :meth:`Figure.to_card` packed.

    Raises:
        ValueError: not base64, or not the bits of so many images.
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
    """Which images, whatever folder or archive they lie in: two results are paired where labels and contents agree."""

    images: int
    classes: int | None = None
    contents: str = ""
    """Hash of the bytes of :data:`SAMPLED` images, evenly spread; empty: unknown."""
    labels: str = ""
    """Hash of all labels in order."""
    names: str = ""
    """Hash of all names in order, without folder and ending; empty in files written before names were stored."""

    def pairs_with(self, other: Images | None) -> bool:
        """Whether image i of the one is image i of the other."""
        return other is not None and self.contents == other.contents != "" and self.labels == other.labels


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measurement with everything that is needed to repeat it."""

    format: int = FORMAT
    measure: str
    """``knn``, ``linear``, ``retrieval folder`` ..."""
    protocol: Card
    """The settings that decide the figures, by name."""
    results: object = None
    """The figures as they are printed."""
    weights: Card = field(default_factory=dict)
    data: dict[str, Card]
    """``train`` and ``val``, or the sets of a retrieval benchmark, see :func:`data_card` and :func:`images_card`."""
    transform: Card
    figures: tuple[Figure, ...] = ()
    """The figures that ``python -m eval.compare`` may compare."""
    device: str = ""
    processes: int = 1
    seconds: float = 0.0
    """Of the whole run, from its start to its figures."""
    date: str = ""
    versions: Card = field(default_factory=dict)
    """Of the libraries that a figure may depend on."""

    def __post_init__(self) -> None:
        names = [one.name for one in self.figures]
        if len(set(names)) < len(names):
            raise ValueError(f"two figures have the same name: {names}")

    def images(self) -> dict[str, Images]:
        """Which images each part of ``data`` holds."""
        return {name: from_dict(Images, part) for name, part in self.data.items()}

    def to_card(self) -> Card:
        """Plain values for JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"figures": [one.to_card() for one in self.figures]}


def read_result(path: str) -> Result:
    """Read a result file; nothing in it is executed.

    Raises:
        InputError: no such file, no result, of another format, without figures to compare, or damaged.
    """

    def refuse(why: str) -> NoReturn:
        raise InputError(f"{path} {why}; expected a file that run_knn.py, run_linear.py or run_retrieval.py wrote")

    try:
        content = json.loads(Path(path).expanduser().read_bytes(), parse_constant=_no_constant)
        if content["format"] != FORMAT:
            refuse(f"has format {content['format']!r:.20} instead of {FORMAT}: measure again")
        if not content["figures"]:
            refuse(f"has no figures image by image or query by query ({content['measure']!r:.40}): measure again")
        result = from_dict(Result, content | {"figures": tuple(map(Figure.from_card, content["figures"]))})
        images = result.images()
        for one in result.figures:
            if one.unit == "image" and one.units not in (None, images["val"].images):
                raise ValueError(f"{one.name} is of {one.units} images, expected {images['val'].images}")
    except OSError as error:
        refuse(f"cannot be read: {one_line(error)}")
    except InputError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        refuse(f"is damaged or no result ({type(error).__name__}: {one_line(error)})")
    return result


def from_dict(kind: type[Kind], content: Mapping[str, Any]) -> Kind:
    """A dataclass from values whose types are checked; keys without a field are left out.

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
    """Whether a value read from JSON is of the type; int passes for float, bool for neither."""
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
    """Write JSON beside ``path``, flush it, then rename; whatever happens, nothing is left beside it.

    Raises:
        InputError: it cannot be written there.
        ValueError: ``content`` has a number that JSON has no word for, such as NaN. Nothing has been written then.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:  # a full or read-only disk, or a name that is too long
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


# ---- its parts


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
    """A :class:`Result` of this process, here and now, as plain values.

    Args:
        figures: each as :meth:`Figure.to_card` gives it.
    """
    return Result(
        measure=measure,
        protocol=dict(protocol),
        results=results,
        weights=weights_card(loaded),
        data=dict(data),
        transform=transform_card(transform),
        figures=tuple(map(Figure.from_card, figures)),
        device=device_name(device),
        processes=distributed.world_size(),
        seconds=round(seconds, 2),
        date=now(),
        versions=versions(),
    ).to_card()


def weights_card(loaded: LoadedBackbone) -> Card:
    """Which network of which file, and which differences in its keys were allowed."""
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
        fingerprint: of ``source``; an argument because it looks at every file.
    """
    classes = None if source.classes is None else len(source.classes)
    return {"url": source.url, "images": len(source), "classes": classes, "fingerprint": fingerprint}


def images_card(source: Source) -> Card:
    """What identifies images wherever they lie: the hashes of :class:`Images`. Reads :data:`SAMPLED` of them."""
    labels, names, contents = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for index in range(len(source)):
        labels.update(f"{None if source.labels is None else int(source.labels[index])}\n".encode())
        names.update(f"{own_name(source.name(index))}\n".encode("utf-8", "surrogateescape"))
    for index in np.unique(np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(np.int64)):
        item, _ = source.read(int(index))
        contents.update(item if isinstance(item, bytes) else item.tobytes())
    return {"contents": contents.hexdigest(), "labels": labels.hexdigest(), "names": names.hexdigest()}


def own_name(name: str) -> str:
    """An image's name without folder and ending; of a packed image, its name before packing
    (:func:`dino_xcit.data.pack.key_of`)."""
    while True:
        base = name.rsplit("/", 1)[-1]
        stem = base.rpartition(".")[0] or base
        number, _, before = stem.partition("_")
        if not (number.isdecimal() and "%" in before):
            return stem
        name = unquote(before, errors="surrogateescape")


def transform_card(transform: EvalTransform) -> Card:
    """How images were prepared, as JSON stores it. Always antialiased, as Pillow's resize is."""
    plain: Card = json.loads(json.dumps(transform.to_dict()))
    return plain | {"antialias": True}


def versions() -> Card:
    """Of the libraries that a figure may depend on."""
    import faiss  # here, because a comparison needs none of it

    return {
        "dino_xcit": dino_xcit.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
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
