"""Revisited Oxford and Paris (Radenović et al., arXiv 1803.11285): their ground truth, their images, their scores.

N database images, Q queries.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit import safe_load
from dino_xcit.data import decode
from dino_xcit.data.folder import FileSource
from dino_xcit.data.index import Index, Strings
from dino_xcit.data.source import Item, Source, hash_lines
from dino_xcit.errors import InputError, printable
from eval.retrieval.average_precision import precision_at, ranks_of, trapezoidal_ap

DATASETS = {"oxford": "roxford5k", "paris": "rparis6k"}
"""What is asked for to the name that its files have."""

SETUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Each setup's right images, and those that count neither as right nor as wrong."""

KS = (1, 5, 10)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Query:
    """One query and what it should find."""

    name: str
    box: Box
    """Left, top, right, bottom of the building in the query's picture, in pixels."""
    found: dict[str, NDArray[np.int64]]
    """``easy``, ``hard`` and ``junk`` to rows of the database."""


@dataclass(frozen=True)
class GroundTruth:
    """What a ``gnd_*.pkl`` says."""

    path: Path
    sha256: str
    database: tuple[str, ...]
    """[N] names of images, without ``.jpg``."""
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Score:
    """Figures of one setup, from 0 to 1, a value a query; NaN for queries that have no right image there."""

    ap: tuple[float, ...]
    precision: dict[int, tuple[float, ...]]
    """k to precision at k."""


# ---- ground truth


def find_ground_truth(folder: Path, dataset: str) -> Path:
    """``gnd_<dataset>.pkl`` as it is published, or ``.json`` of the same content, in ``folder``.

    Raises:
        InputError: neither is there.
    """
    for path in (folder / f"gnd_{dataset}.pkl", folder / f"gnd_{dataset}.json"):
        if path.is_file():
            return path
    raise InputError(
        f"{folder} holds no gnd_{dataset}.pkl (or .json): expected it there beside the folder jpg, as it is published; "
        "--data-path names the folder, --ground-truth another file"
    )


def read_ground_truth(path: Path) -> GroundTruth:
    """A published pickle, of which nothing is executed, or JSON: ``imlist``, ``qimlist``, and ``gnd`` with ``bbx``,
    ``easy``, ``hard`` and ``junk`` a query.

    Raises:
        InputError: no such file, not safe to read, or not of this content.
    """
    content = _json(path) if path.suffix.lower() == ".json" else safe_load.read_ground_truth(path)
    if not isinstance(content, dict):
        raise _unlike(path, f"it holds a {type(content).__name__}, expected a dictionary with imlist, qimlist and gnd")
    database, names = _names(path, content, "imlist"), _names(path, content, "qimlist")
    gnd = content.get("gnd")
    if not isinstance(gnd, (list, tuple)) or len(gnd) != len(names):
        count = len(gnd) if isinstance(gnd, (list, tuple)) else "no"
        raise _unlike(path, f"gnd has {count} entries, expected one for each of the {len(names)} names in qimlist")
    queries = tuple(_query(path, name, entry, len(database)) for name, entry in zip(names, gnd, strict=True))
    return GroundTruth(path, hashlib.sha256(path.read_bytes()).hexdigest(), database, queries)


def _json(path: Path) -> object:
    if not path.is_file():  # nor a pipe, which would be waited for
        raise InputError(f"there is no ground truth at {path}: give the published gnd_*.pkl with --ground-truth")
    try:
        with open(path, "rb") as file:
            data = file.read(safe_load.GROUND_TRUTH_LIMIT + 1)
        if len(data) > safe_load.GROUND_TRUTH_LIMIT:
            raise _unlike(path, f"it is longer than {safe_load.GROUND_TRUTH_LIMIT >> 20} MiB")
        return json.loads(data)
    except OSError as error:
        raise InputError(f"cannot read the ground truth {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _unlike(path, "it is no JSON") from error


def _names(path: Path, content: dict[Any, Any], key: str) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, (list, tuple)) or not names:
        raise _unlike(path, f"it has no list {key} of image names")
    for name in names:
        # They become paths below DIR/jpg, and must stay there.
        if not isinstance(name, str) or not 0 < len(name) <= 200 or name[0] == "." or set(name) & set("/\\\0:"):
            raise _unlike(path, f"{key} holds {_shown(name)}, which is no plain file name")
    return tuple(names)


def _query(path: Path, name: str, entry: object, count: int) -> Query:
    if not isinstance(entry, dict) or any(key not in entry for key in ("bbx", "easy", "hard", "junk")):
        raise _unlike(path, f"query {_shown(name)} lacks one of bbx, easy, hard and junk (Revisited Oxford and Paris)")
    box, found = _numbers(entry["bbx"]), {}
    if len(box) != 4 or not all(abs(edge) < 1e6 for edge in box):
        raise _unlike(path, f"query {_shown(name)} has no bbx of four numbers")
    for kind in ("easy", "hard", "junk"):
        rows = _numbers(entry[kind])
        if not all(0 <= row < count and row == int(row) for row in rows):
            raise _unlike(
                path, f"query {_shown(name)}: {kind} is no list of places among the {count:,} names in imlist"
            )
        found[kind] = np.asarray(rows, dtype=np.int64)
    left, top, right, bottom = box
    return Query(name, (left, top, right, bottom), found)


def _numbers(values: object) -> list[float]:
    """The numbers of a list or an array; NaN, which no check lets pass, stands for whatever is no number."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    return [_number(value) for value in values] if isinstance(values, (list, tuple)) else [math.nan]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def _shown(name: object) -> str:
    return printable(repr(name)[:80])


def _unlike(path: Path, clause: str) -> InputError:
    return InputError(
        f"{path} is no ground truth of Revisited Oxford or Paris: {clause}; give the published gnd_*.pkl, or JSON of "
        "the same content, with --ground-truth"
    )


# ---- images


def open_images(truth: GroundTruth, folder: Path, crop_queries: bool) -> tuple[Source, Source]:
    """The database and the queries, ``folder``/jpg/NAME.jpg each, in the order of the ground truth.

    Args:
        crop_queries: show of each query only its box, as the benchmark's authors do; DINO's script does not.

    Raises:
        InputError: an image is not there.
    """
    jpg = folder / "jpg"
    names = [query.name for query in truth.queries]
    missing = [name for name in [*truth.database, *names] if not (jpg / f"{name}.jpg").is_file()]
    if missing:
        total = len(truth.database) + len(names)
        raise InputError(
            f"{jpg} lacks {len(missing):,} of the {total:,} images that {truth.path.name} names, such as "
            f"{printable(missing[0])}.jpg: unpack the published images there, all in one folder"
        )
    queries: Source = _files(jpg, names)
    if crop_queries:
        queries = Boxes(queries, [query.box for query in truth.queries])
    return _files(jpg, truth.database), queries


def _files(folder: Path, names: Sequence[str]) -> FileSource:
    index = Index({}, {"name": Strings.pack(f"{name}.jpg" for name in names)}, keep=False)
    return FileSource(str(folder), os.path.abspath(folder), index)


class Boxes:
    """Another source's pictures, of each only its box."""

    def __init__(self, source: Source, boxes: Sequence[Box]) -> None:
        self._source, self._boxes = source, boxes
        self.url = f"{source.url} (boxes)"
        self.classes: tuple[str, ...] | None = None
        self.labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Item, int | None]:
        name = self.name(index)
        picture = decode(self._source.read(index)[0], name)
        # To whole pixels as Pillow's crop does it, within the picture.
        left, top, right, bottom = (round(edge) for edge in self._boxes[index])
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
        if left >= right or top >= bottom:
            raise InputError(
                f"the box {self._boxes[index]} of the query {name} lies outside of its {picture.width} x "
                f"{picture.height} pixels: this is not the image that the ground truth is about"
            )
        return np.asarray(picture.crop((left, top, right, bottom))), None

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return hash_lines([self._source.fingerprint(), *map(repr, self._boxes)])


def refuse_known(truth: GroundTruth, distractors: Source) -> None:
    """Refuse distractors that are images of the benchmark, by their names: right ones among them would count as wrong.

    Raises:
        InputError: naming one.
    """
    known = {*truth.database, *(query.name for query in truth.queries)}
    stems = (Path(distractors.name(index)).stem for index in range(len(distractors)))
    if twice := [stem for stem in stems if stem in known]:
        raise InputError(
            f"{len(twice):,} of the {len(distractors):,} distractors in {distractors.url} are images that "
            f"{truth.path.name} names, such as {printable(twice[0])}: give images that are not of the benchmark"
        )


# ---- scores


def score(truth: GroundTruth, similarities: Iterable[NDArray[np.float32]]) -> dict[str, Score]:
    """Average precision and precision at 1, 5 and 10 of every query, in every setup, as revisitop scores them.

    Args:
        similarities: for each query its similarity to every database image, [N], and to any number of distractors
            behind them, [N + distractors]: these are wrong for every query, in every setup, and never junk. Equal
            similarities rank in this order.
    """
    ap: dict[str, list[float]] = {setup: [] for setup in SETUPS}
    precision: dict[str, dict[int, list[float]]] = {setup: {k: [] for k in KS} for setup in SETUPS}
    for query, similarity in zip(truth.queries, similarities, strict=True):
        ranking = np.argsort(-similarity, kind="stable")
        for setup, (right, ignored) in SETUPS.items():
            wanted = np.concatenate([query.found[kind] for kind in right])
            junk = np.concatenate([query.found[kind] for kind in ignored])
            ranks = ranks_of(ranking, wanted, junk)
            ap[setup].append(trapezoidal_ap(ranks, len(wanted)) if len(wanted) else math.nan)
            for k in KS:
                precision[setup][k].append(precision_at(ranks, k) if len(wanted) else math.nan)
    return {
        setup: Score(tuple(ap[setup]), {k: tuple(values) for k, values in precision[setup].items()}) for setup in SETUPS
    }
