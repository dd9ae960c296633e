"""Retrieval benchmarks: Revisited Oxford and Paris, Copydays, leave-one-out among classes, and near duplicates.

N images, D features of a vector, Q queries. Similarity is cosine, and search is exact.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_xcit import safe_load
from dino_xcit.data import decode
from dino_xcit.data.folder import IMAGE_SUFFIXES, FileSource
from dino_xcit.data.index import Index, Strings
from dino_xcit.data.source import Item, Source, hash_lines
from dino_xcit.errors import InputError, one_line, printable
from dino_xcit.runtime import atomic
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import RGB, Channels, EvalTransform, PixelFormat, to_tensor
from dino_xcit.weights import LoadedBackbone
from eval.features import cached
from eval.results import JsonObject, Metric, data_metadata, images_metadata, result_content, write_json
from eval.retrieval.collection import prepared
from eval.retrieval.whitening import kind_of, load
from eval.retrieval_config import RetrievalConfig
from eval.search_index import build_index, l2_normalised, without_self
from eval.setup import cache_folder, open_backbone, open_weights
from eval.sheet import tile_of, write_contact_sheet
from eval.stats import query_interval

Vectors = NDArray[np.float32]
"""[N, D], normalised or not; may be memory-mapped, also in float16."""


# ---- transforms without a centre crop, which may lose the object


@dataclass(frozen=True)
class LongerSide(EvalTransform):
    """Reduce the longer side to ``crop`` pixels, keeping the aspect ratio; smaller images are not enlarged.

    This is the transform of revisitop and DINO for Revisited Oxford and Paris: Pillow's ``thumbnail`` with Lanczos. As
    the output sizes differ, the batch size is 1.
    """

    def __call__(self, image: Image.Image | Channels) -> Tensor:
        """Return [3, height, width] uint8, the longer side at most ``crop``."""
        assert isinstance(image, Image.Image)
        small = image.copy()  # thumbnail works in place
        small.thumbnail((self.crop, self.crop), Image.Resampling.LANCZOS)
        return to_tensor(small)

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"shape": "whole picture, longer side reduced to crop"}


@dataclass(frozen=True)
class Square(EvalTransform):
    """Resize the whole image to a square of ``crop`` pixels, bicubic, as DINO does for Copydays."""

    def __call__(self, image: Image.Image | Channels) -> Tensor:
        """Return [3, crop, crop] uint8."""
        assert isinstance(image, Image.Image)
        return to_tensor(image.resize((self.crop, self.crop), Image.Resampling.BICUBIC))

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"shape": "whole picture squeezed into a square of crop"}


def open_fitted(config: RetrievalConfig) -> tuple[LoadedBackbone, torch.device]:
    """Open the backbone with the transform of ``fit``; default sizes of ``whole`` and ``square`` are DINO's."""
    fit = config.fitted()
    if fit == "centre":
        return open_backbone(config)
    loaded, device = open_weights(config)
    kind, interpolation, pixels = (LongerSide, "lanczos", 224) if fit == "whole" else (Square, "bicubic", 320)
    pixels = config.image_size or pixels
    stored = loaded.transform
    white_level = config.white_level or stored.white_level
    transform = kind(pixels, pixels, interpolation, stored.mean, stored.std, white_level)
    log.info(f"images: {transform.to_dict()['shape']}, {pixels} pixels (--fit, --image-size)")
    return dataclasses.replace(loaded, transform=transform), device


# ---- sets of vectors


@dataclass(frozen=True)
class VectorSet:
    """Vectors of a source's images."""

    source: Source
    vectors: Vectors
    data: dict[str, object]
    """JsonObject of the images for the result file."""
    whitening: dict[str, Any] | None
    """JsonObject of the applied whitening for the result file."""
    loaded: LoadedBackbone
    device: torch.device


def extracted(config: RetrievalConfig, loaded: LoadedBackbone, device: torch.device, source: Source) -> VectorSet:
    """Extract the vectors of a source's images, or read them from the feature cache, on every rank.

    Raises:
        InputError: an image is unreadable, or the whitening was learned from other vectors.
    """
    descriptor = config.descriptor()
    whitening = load(Path(config.whiten), kind_of(loaded.hash, descriptor)) if config.whiten else None
    batch = 1 if isinstance(loaded.transform, LongerSide) else config.batch_size_per_gpu
    found = cached(
        loaded.backbone, loaded.hash, source, loaded.transform, device, cache_folder(config), batch,
        config.num_workers, descriptor,
    )  # fmt: skip
    vectors = found.features
    applied: dict[str, Any] | None = None
    if whitening is not None:
        vectors = prepared(vectors, True, whitening)
        applied = {"hash": whitening.hash, "learned_on": whitening.learned_on}
    return VectorSet(source, vectors, data_metadata(source, found.fingerprint), applied, loaded, device)


# ---- results

Answer = tuple[JsonObject, list[JsonObject], dict[str, VectorSet], list[Metric]]
"""Protocol, rows of results, vector sets by name, and metrics by query."""


def means(values: Mapping[str, NDArray[np.float64]]) -> JsonObject:
    """Compute each measure's mean over the queries and its interval; None without queries."""
    out: JsonObject = {}
    for name, one in values.items():
        out |= {name: float(one.mean()) if len(one) else None, f"{name}_interval": query_interval(one)}
    return out


def write_result(config: RetrievalConfig, answer: Answer, seconds: float) -> None:
    """Write the result file, with the values of single queries for paired comparisons."""
    protocol, results, sets, metrics = answer
    plain = [metric.to_dict() for metric in metrics if metric.units]
    data = {name: one.data | (images_metadata(one.source) if plain else {}) for name, one in sets.items()}
    first = next(iter(sets.values()))
    protocol |= {"descriptor": config.descriptor().to_dict(), "whitening": first.whitening}
    if metrics:
        protocol["interval"] = "95% percentile bootstrap over the queries"
    loaded, measure = first.loaded, f"retrieval {config.protocol}"
    content = result_content(measure, protocol, results, loaded, data, loaded.transform, first.device, seconds, plain)
    write_json(Path(config.json), content)


# ---- similarity and average precision


def rows_of_similarity(queries: Vectors, *database: Vectors, queries_at_once: int = 64) -> Iterator[Vectors]:
    """Yield for each query its cosine similarities [N] to the database.

    Memory: one copy of the database and ``queries_at_once`` x N similarities.

    Args:
        database: one or more sets, concatenated.
    """
    others = [l2_normalised(rows).T for rows in database]
    for start in range(0, len(queries), queries_at_once):
        some = l2_normalised(queries[start : start + queries_at_once])
        yield from np.concatenate([some @ rows for rows in others], axis=1)


def ranks_of(ranking: NDArray[np.int64], wanted: NDArray[np.int64], junk: Sequence[int] = ()) -> NDArray[np.int64]:
    """Return the 0-based ranks of the positive images in a ranking without junk, ascending.

    Args:
        ranking: [images], distinct rows of the database, best first.
        wanted: positive rows; those missing in the ranking have no rank.
        junk: rows to ignore.
    """
    places = np.flatnonzero(np.isin(ranking, wanted))
    return places - np.searchsorted(np.flatnonzero(np.isin(ranking, junk)), places)


def trapezoidal_ap(ranks: NDArray[np.int64], positives: int) -> float:
    """Compute average precision by the trapezoidal rule, from 0 to 1, as in the scripts of Holidays, Oxford, Revisited
    Oxford and Paris, and Copydays.

    The positive number j (from 0) at rank r raises recall by 1 / positives. Precision is j / r before it (1 if r is 0)
    and (j + 1) / (r + 1) with it; their mean is the height of the step. The average precision of text retrieval and
    scikit-learn uses the second value only.

    Args:
        ranks: 0-based ranks of the positives found, ascending.
        positives: number of positives, found or not; at least 1.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * positives))


def precision_at(ranks: NDArray[np.int64], k: int) -> float:
    """Compute precision at k as in revisitop, with k limited to the position of the last positive.

    For example, a query with two positives at the first two ranks has a precision at 10 of 1, not 0.2.

    Args:
        ranks: 0-based ranks of the positives, ascending; at least one.
    """
    among = min(k, int(ranks[-1]) + 1)
    return float((ranks < among).sum() / among)


# ---- Revisited Oxford and Paris (Radenović et al., arXiv 1803.11285)

DATASETS = {"oxford": "roxford5k", "paris": "rparis6k"}
SETUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Positives and junk of each setup."""
PRECISION_KS = (1, 5, 10)


@dataclass(frozen=True)
class Query:
    """A query and its positives."""

    name: str
    box: tuple[float, ...]
    """Left, top, right, bottom of the building in the query image, in pixels."""
    found: dict[str, NDArray[np.int64]]
    """Rows of the database by ``easy``, ``hard`` and ``junk``."""


@dataclass(frozen=True)
class GroundTruth:
    """Content of a ``gnd_*.pkl``."""

    path: Path
    sha256: str
    database: tuple[str, ...]
    """[N] image names without ``.jpg``."""
    queries: tuple[Query, ...]


def read_ground_truth(path: Path) -> GroundTruth:
    """Read a published pickle, without executing it, or JSON with the same content: ``imlist``, ``qimlist``, and
    ``gnd`` with ``bbx``, ``easy``, ``hard`` and ``junk`` for each query.

    Raises:
        InputError: the file is missing, unsafe or invalid.
    """
    if not path.is_file() and path.with_suffix(".json").is_file():
        path = path.with_suffix(".json")
    if not path.is_file():
        raise InputError(f"found no ground truth {path}: give its folder with --data-path or the file --ground-truth")
    try:
        data = path.read_bytes()
        content: dict[str, list] = json.loads(data) if path.suffix == ".json" else safe_load.read_ground_truth(path)  # type: ignore[assignment]
        database, names = tuple(content["imlist"]), tuple(content["qimlist"])
        for name in (*database, *names):
            if not re.fullmatch(r"[^./\\:\0][^/\\:\0]{0,199}", name):  # names must not lead out of DIR/jpg
                raise ValueError(f"{name!r:.80} is no plain file name")
        queries = [_query(name, len(database), entry) for name, entry in zip(names, content["gnd"], strict=True)]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is no ground truth ({one_line(error)}): give the published gnd_*.pkl") from error
    return GroundTruth(path, hashlib.sha256(data).hexdigest(), database, tuple(queries))


def _query(name: str, count: int, entry: dict[str, list[float]]) -> Query:
    box, found = np.asarray(entry["bbx"], dtype=np.float64), {}
    if box.shape != (4,) or not (np.abs(box) < 1e6).all():
        raise ValueError(f"query {name} has no bbx of four numbers")
    for kind in ("easy", "hard", "junk"):
        rows = np.asarray(entry[kind], dtype=np.float64)
        if rows.ndim != 1 or not ((rows >= 0) & (rows < count) & (rows == np.floor(rows))).all():
            raise ValueError(f"{kind} of query {name} is no list of indices of the {count} names in imlist")
        found[kind] = rows.astype(np.int64)
    return Query(name, tuple(box.tolist()), found)


def open_landmarks(truth: GroundTruth, folder: Path, crop_queries: bool) -> tuple[Source, Source]:
    """Open the database and the queries, ``folder``/jpg/NAME.jpg, in the order of the ground truth.

    Args:
        crop_queries: crop queries to their box, as the authors of the benchmark do, unlike DINO's script.

    Raises:
        InputError: an image is missing.
    """
    jpg, names = folder / "jpg", [query.name for query in truth.queries]
    if missing := [name for name in [*truth.database, *names] if not (jpg / f"{name}.jpg").is_file()]:
        named = f"{len(missing):,} of the images of {truth.path.name}, such as {printable(missing[0])}.jpg"
        raise InputError(f"{jpg} lacks {named}: unpack all published images into this folder")
    queries: Source = _files(jpg, [f"{name}.jpg" for name in names])
    if crop_queries:
        queries = Boxes(queries, [query.box for query in truth.queries])
    return _files(jpg, [f"{name}.jpg" for name in truth.database]), queries


def _files(folder: Path, names: Sequence[str]) -> FileSource:
    return FileSource(str(folder), os.path.abspath(folder), Index({}, {"name": Strings.pack(names)}, keep=False))


class Boxes:
    """Images of another source, cropped to boxes."""

    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, source: Source, boxes: Sequence[tuple[float, ...]]) -> None:
        self._source, self._boxes, self.name = source, boxes, source.name
        self.url = f"{source.url} (boxes)"

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Item, int | None]:
        image = decode(self._source.read(index)[0], self.name(index))
        left, top, right, bottom = map(round, self._boxes[index])  # rounded like in Pillow's crop
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        if left >= right or top >= bottom:
            raise InputError(f"the ground truth's box {self._boxes[index]} lies outside of {self.name(index)}")
        return np.asarray(image.crop((left, top, right, bottom))), None

    def fingerprint(self) -> str:
        return hash_lines([self._source.fingerprint(), *map(repr, self._boxes)])


def refuse_known(truth: GroundTruth, distractors: Source) -> None:
    """Refuse distractors with the name of a benchmark image, which could be a positive.

    Raises:
        InputError: there is such an image; the message names it.
    """
    known = {*truth.database, *(query.name for query in truth.queries)}
    for index in range(len(distractors)):
        if Path(distractors.name(index)).stem in known:
            name = printable(distractors.name(index))
            raise InputError(f"distractors has {name}, which is also in {truth.path.name}: give other images")


def score_landmarks(truth: GroundTruth, similarities: Iterable[Vectors]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Score each setup like revisitop: ``map``, ``mp@1``, ``mp@5`` and ``mp@10`` [Q] in percent; NaN for queries
    without positives in the setup.

    Args:
        similarities: for each query its similarities [N + distractors] to the database and any number of distractors,
            which are negatives of all queries. Ties rank in this order.
    """
    metrics = ("map", *(f"mp@{k}" for k in PRECISION_KS))
    scores = {setup: {metric: np.full(len(truth.queries), np.nan) for metric in metrics} for setup in SETUPS}
    for row, (query, similarity) in enumerate(zip(truth.queries, similarities, strict=True)):
        ranking = np.argsort(-similarity, kind="stable")
        for setup, (right, ignored) in SETUPS.items():
            wanted, junk = (np.concatenate([query.found[kind] for kind in kinds]) for kinds in (right, ignored))
            if len(wanted):
                ranks = ranks_of(ranking, wanted, junk)  # type: ignore[arg-type]
                scores[setup]["map"][row] = 100.0 * trapezoidal_ap(ranks, len(wanted))
                for k in PRECISION_KS:
                    scores[setup][f"mp@{k}"][row] = 100.0 * precision_at(ranks, k)
    return scores


# ---- INRIA Copydays

ORIGINAL, STRONG = "original", "strong"
COPYDAYS_DEPTH = 20
"""Number of results per copy in DINO's script; an original beyond them counts as not found."""


def open_copydays(folder: Path) -> dict[str, tuple[Source, NDArray[np.int64]]]:
    """Open the blocks ``original``, ``strong``, and any weaker ones such as ``jpegqual/10``.

    Layout: DIR/original/200000.jpg, DIR/strong/200001.jpg, DIR/jpegqual/QUALITY and DIR/crops/PERCENT.

    Returns:
        Images and their scene numbers by block. The scene number is the file name without its last two digits.

    Raises:
        InputError: ``original`` or ``strong`` is missing or empty, or a file name is not a number.
    """
    weak = [path for kind in ("jpegqual", "crops") for path in sorted(folder.glob(f"{kind}/*"), key=_strength)]
    blocks: dict[str, tuple[Source, NDArray[np.int64]]] = {}
    for path in (folder / ORIGINAL, folder / STRONG, *weak):
        names = sorted(entry.name for entry in path.glob("[!.]*") if entry.name.lower().endswith(IMAGE_SUFFIXES))
        digits = [re.fullmatch(r"([0-9]{1,12})\.[A-Za-z]+", name) for name in names]
        if not names or None in digits:
            wanted = f"{ORIGINAL}/200000.jpg, {STRONG}/200001.jpg and other names that are numbers"
            raise InputError(f"{path} is no part of Copydays: expected in --data-path {wanted}")
        scenes = np.array([int(found[1]) // 100 for found in filter(None, digits)], dtype=np.int64)
        blocks[path.relative_to(folder).as_posix()] = _files(path, names), scenes
        if not np.isin(scenes, blocks[ORIGINAL][1]).all():
            raise InputError(f"{path} has images without an original: unpack all of {folder / ORIGINAL}")
    return blocks


def _strength(block: Path) -> tuple[int, str]:
    return (int(block.name) if block.name.isdecimal() else -1, block.name)


def score_copydays(
    blocks: Mapping[str, tuple[Source, NDArray[np.int64]]], sets: Mapping[str, VectorSet]
) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.int64], JsonObject]]:
    """Yield for each search, such as ``strong -> original``, average precisions [Q], rows of the queries, and counts.

    Args:
        sets: vectors of each block, and optionally of ``distractors``, which are added to the database.
    """
    others = [sets["distractors"].vectors] if "distractors" in sets else []
    scene_of_none = np.full(sum(map(len, others)), -1, dtype=np.int64)
    for name, database in [*((name, ORIGINAL) for name in blocks if name != ORIGINAL), (ORIGINAL, STRONG)]:
        vectors = np.concatenate([sets[database].vectors, *others])
        scenes = np.concatenate([blocks[database][1], scene_of_none])
        depth = min(COPYDAYS_DEPTH, len(scenes)) if database == ORIGINAL else len(scenes)
        queries = np.flatnonzero(np.isin(blocks[name][1], scenes))  # originals without a strong copy are no queries
        aps = score_copies(sets[name].vectors[queries], blocks[name][1][queries], vectors, scenes, depth)
        yield f"{name} -> {database}", aps, queries, {"queries": len(aps), "database": len(scenes), "depth": depth}


def score_copies(
    queries: Vectors, query_scenes: NDArray[np.int64], database: Vectors, scenes: NDArray[np.int64], depth: int
) -> NDArray[np.float64]:
    """Compute average precisions [Q] in percent; the positives of a query are the images of its scene.

    Args:
        query_scenes, scenes: [Q] and [N]; negative numbers are distractors. The database has each query's scene.
        depth: number of ranked results; positives beyond them count as not found. Ties rank in the database's order.
    """
    out = []
    for scene, similarity in zip(query_scenes.tolist(), rows_of_similarity(queries, database), strict=True):
        right = np.flatnonzero(scenes == scene)
        ranking = np.argsort(-similarity, kind="stable")[:depth]
        out.append(100.0 * trapezoidal_ap(ranks_of(ranking, right), len(right)))
    return np.array(out)


# ---- leave-one-out among classes

RECALL_KS = (1, 2, 4, 8)
_CELLS_AT_ONCE = 4_000_000
"""Maximum number of neighbours in memory, at about 40 bytes each."""


@dataclass(frozen=True)
class Recall:
    """Recall@k, R-precision and MAP@R (Musgrave et al., arXiv 2003.08505, section 3.2). R is the number of other images
    of the query's class."""

    queries: NDArray[np.int64]
    """Rows of the queries, ascending: all images of classes with at least two images."""
    alone: int
    """Number of images that are alone in their class; they are in the database, but no queries."""
    hits: dict[int, NDArray[np.bool_]]
    """[Q] by k: whether one of the k nearest other images is of the query's class."""
    r_precision: NDArray[np.float64]
    """[Q] in percent: share of the query's class among the R nearest."""
    map_at_r: NDArray[np.float64]
    """[Q] in percent: mean over the first R ranks of the precision at that rank, or 0 at ranks of another class."""


def leave_one_out(
    features: Vectors, labels: NDArray[np.int64], ks: Sequence[int] = RECALL_KS, progress: bool = False
) -> Recall:
    """Search each image among all others.

    Memory: one copy of the features and about 160 MB.

    Args:
        labels: [N].
        ks: values of k, each at least 1.

    Raises:
        InputError: features are not finite, or no class has two images.
    """
    _, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    others = counts[position] - 1
    queries = np.flatnonzero(others > 0)
    if not len(queries):
        raise InputError(f"each of the {len(counts):,} classes has one image: expected a class with two or more")
    index = build_index(features)
    hits = {k: np.zeros(len(queries), dtype=np.bool_) for k in ks}
    r_precision, map_at_r = np.zeros(len(queries)), np.zeros(len(queries))
    # Sort queries by class size, as the largest class determines the search depth of a chunk.
    left = np.argsort(others[queries], kind="stable")
    with progress_bar(len(queries), "search", shown=progress) as bar:
        while len(left):
            depths = np.minimum(np.maximum(others[queries[left[:1024]]], max(ks)), len(labels) - 1)
            fitting = int((depths * np.arange(1, len(depths) + 1) <= _CELLS_AT_ONCE).sum())
            places, left = np.split(left, [max(1, fitting)])
            depth, rows, wanted = int(depths[len(places) - 1]), queries[places], others[queries[places]]
            _, found = index.search(l2_normalised(features[rows]), depth + 1)
            right = position[without_self(found, rows)] == position[rows][:, None]
            for k in ks:
                hits[k][places] = right[:, :k].any(axis=1)
            right &= np.arange(depth) < wanted[:, None]
            so_far = right.cumsum(axis=1, dtype=np.float32) / np.arange(1, depth + 1, dtype=np.float32)
            r_precision[places] = 100.0 * (right.sum(axis=1) / wanted)
            map_at_r[places] = 100.0 * ((so_far * right).sum(axis=1, dtype=np.float64) / wanted)
            bar.update(len(rows))
    return Recall(queries, int((others == 0).sum()), hits, r_precision, map_at_r)


# ---- near duplicates

IDENTICAL, NEAR = "identical file", "near"
SHEET_ROWS, SHEET_COLUMNS = 20, 5
"""Contact sheet of pairs: maximum number of images of the second set, and of their matches in the first."""
_QUERIES_AT_ONCE, _ROWS_AT_ONCE = 1024, 16_384
_ROUNDING = 1e-6
"""Tolerance for float32 inner products: the similarity of an image and its copy may be slightly less than 1."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, most similar first; ties in the order of the sets."""

    first: NDArray[np.int64]
    """[pairs] rows of the first set."""
    second: NDArray[np.int64]
    """[pairs] rows of the second set."""
    similarity: NDArray[np.float32]
    """[pairs] cosine similarities."""

    def __len__(self) -> int:
        return len(self.similarity)


def find_pairs(first: Vectors, second: Vectors | None, threshold: float, most: int) -> Pairs:
    """Find all pairs with a cosine similarity of at least ``threshold`` by exact search.

    Memory: 128 MB at D = 384, independent of the size of the sets, and 20 bytes per pair.

    Args:
        second: None: find pairs within the first set, without duplicates or self-pairs.
        threshold: between -1 and 1.
        most: maximum number of pairs.

    Raises:
        InputError: there are more than ``most`` pairs.
    """
    others = first if second is None else second
    found, count = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))], 0
    with progress_bar(len(first), "compare", shown=True) as bar:
        for row in range(0, len(first), _QUERIES_AT_ONCE):
            left = l2_normalised(first[row : row + _QUERIES_AT_ONCE])
            for column in range(row if second is None else 0, len(others), _ROWS_AT_ONCE):
                block = left @ l2_normalised(others[column : column + _ROWS_AT_ONCE]).T
                rows, columns = np.nonzero(block >= threshold - _ROUNDING)
                if second is None:
                    above = columns + column > rows + row
                    rows, columns = rows[above], columns[above]
                found.append((rows + row, columns + column, block[rows, columns]))
                count += len(rows)
                if count > most:
                    raise InputError(f"more than {most:,} pairs have a similarity >= {threshold:g}: raise --threshold")
            bar.update(len(left))
    lefts, rights, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((rights, lefts, -similarity))
    return Pairs(lefts[order], rights[order], similarity[order])


def kinds_of(pairs: Pairs, first: Source, second: Source) -> list[str]:
    """Return for each pair ``identical file`` if both have the same bytes (or pixels, if not from files), else
    ``near``."""
    left = {row: _digest(first.read(row)[0]) for row in np.unique(pairs.first).tolist()}
    right = {row: _digest(second.read(row)[0]) for row in np.unique(pairs.second).tolist()}
    rows = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    return [IDENTICAL if left[one] == right[other] else NEAR for one, other in rows]


def _digest(item: Item) -> bytes:
    data = item if isinstance(item, bytes) else repr(item.shape).encode() + item.tobytes()
    return hashlib.sha256(data).digest()


def write_pairs(path: Path, pairs: Pairs, kinds: Sequence[str], first: Source, second: Source) -> None:
    """Write a CSV file with one pair per line: names, similarity, kind. Names that are not UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(("first", "second", "similarity", "kind"))
    for number, kind in enumerate(kinds):
        names = first.name(int(pairs.first[number])), second.name(int(pairs.second[number]))
        table.writerow((*names, f"{pairs.similarity[number]:.6f}", kind))
    atomic.write(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))


def draw_pairs(
    path: Path, pairs: Pairs, kinds: Sequence[str], first: Source, second: Source, format: PixelFormat = RGB
) -> None:
    """Draw the images of the second set with the most similar pairs, each beside its matches in the first set."""
    blocks = []
    _, firsts = np.unique(pairs.second, return_index=True)  # the most similar pair of each image
    for row in pairs.second[np.sort(firsts)[:SHEET_ROWS]].tolist():
        beside = np.flatnonzero(pairs.second == row)[:SHEET_COLUMNS].tolist()
        titles = [f"{pairs.similarity[pair]:.4f}  {kinds[pair]}" for pair in beside]
        tiles = [
            tile_of(first, int(pairs.first[pair]), title, format) for pair, title in zip(beside, titles, strict=True)
        ]
        blocks.append((tile_of(second, row, f"image {row}", format), tiles))
    write_contact_sheet(path, blocks)
