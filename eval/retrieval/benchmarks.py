"""What vectors find: landmarks (Revisited Oxford and Paris), copies (Copydays), images of the same class, duplicates.

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
from dino_xcit.transform import EvalTransform, to_tensor
from dino_xcit.weights import LoadedBackbone
from eval.features import cached
from eval.index import build_index, unit_rows, without_self
from eval.results import Card, Figure, data_card, images_card, result_card, write_json
from eval.retrieval.collection import prepared
from eval.retrieval.contact_sheet import draw_sheet, tile_of
from eval.retrieval.whitening import kind_of, load
from eval.retrieval_config import RetrievalConfig
from eval.setup import cache_folder, open_backbone, open_weights
from eval.stats import query_interval

Vectors = NDArray[np.float32]
"""[N, D], not necessarily of length 1; may be memory-mapped, also in float16."""


# ---- whole images, where cutting the centre out would lose what is looked for


@dataclass(frozen=True)
class LongerSide(EvalTransform):
    """The whole picture in its own proportions, its longer side reduced to ``crop`` pixels and never enlarged.

    As revisitop and DINO prepare Revisited Oxford and Paris: Pillow's ``thumbnail`` with Lanczos. Pictures come out in
    many sizes, so that they go through the network one by one.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, height, width] uint8, the longer of both at most ``crop``."""
        small = image.copy()  # thumbnail changes the picture itself
        small.thumbnail((self.crop, self.crop), Image.Resampling.LANCZOS)
        return to_tensor(small)

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"shape": "whole picture, longer side reduced to crop"}


@dataclass(frozen=True)
class Square(EvalTransform):
    """The whole picture squeezed into a square of ``crop`` pixels, bicubic, as DINO prepares Copydays."""

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, crop, crop] uint8."""
        return to_tensor(image.resize((self.crop, self.crop), Image.Resampling.BICUBIC))

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"shape": "whole picture squeezed into a square of crop"}


def open_fitted(config: RetrievalConfig) -> tuple[LoadedBackbone, torch.device]:
    """The backbone, whose transform prepares images as the settings say: ``centre`` as the weights have it; the sizes
    of ``whole`` and ``square`` are those of DINO's scripts."""
    fit = config.fitted()
    if fit == "centre":
        return open_backbone(config)
    loaded, device = open_weights(config)
    kind, interpolation, pixels = (LongerSide, "lanczos", 224) if fit == "whole" else (Square, "bicubic", 320)
    pixels = config.image_size or pixels
    transform = kind(pixels, pixels, interpolation, loaded.transform.mean, loaded.transform.std)
    log.info(f"images: {transform.to_dict()['shape']}, {pixels} pixels (--fit, --image-size)")
    return dataclasses.replace(loaded, transform=transform), device


# ---- sets of vectors


@dataclass(frozen=True)
class VectorSet:
    """A source's images as vectors [N, D], not necessarily of length 1; perhaps memory-mapped."""

    source: Source
    vectors: Vectors
    data: dict[str, object]
    """Which images, for a result file."""
    whitening: dict[str, Any] | None
    """Which one was applied, for a result file."""
    loaded: LoadedBackbone
    device: torch.device


def extracted(config: RetrievalConfig, loaded: LoadedBackbone, device: torch.device, source: Source) -> VectorSet:
    """The vectors of a source's images, on every process; kept beside the weights, or used from there.

    Raises:
        InputError: an image cannot be read, or the whitening was learned from other vectors.
    """
    descriptor = config.descriptor()
    whitening = load(Path(config.whiten), kind_of(loaded.hash, descriptor)) if config.whiten else None
    # Pictures of many sizes cannot be in one batch.
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
    return VectorSet(source, vectors, data_card(source, found.fingerprint), applied, loaded, device)


# ---- results

Answer = tuple[Card, list[Card], dict[str, VectorSet], list[Figure]]
"""A protocol's settings, rows of figures, what was measured, and the figures by query."""


def means(values: Mapping[str, NDArray[np.float64]]) -> Card:
    """Each figure's mean over the queries, and its interval; None without a query."""
    out: Card = {}
    for name, one in values.items():
        out |= {name: float(one.mean()) if len(one) else None, f"{name}_interval": query_interval(one)}
    return out


def write_result(config: RetrievalConfig, answer: Answer, seconds: float) -> None:
    """Write the figures with everything that is needed to repeat them, and to compare them query by query."""
    protocol, results, sets, figures = answer
    cards = [figure.to_card() for figure in figures if figure.units]
    data = {name: one.data | (images_card(one.source) if cards else {}) for name, one in sets.items()}
    first = next(iter(sets.values()))
    protocol |= {"descriptor": config.descriptor().to_dict(), "whitening": first.whitening}
    if figures:
        protocol["interval"] = "95% percentile bootstrap over the queries"
    loaded, measure = first.loaded, f"retrieval {config.protocol}"
    card = result_card(measure, protocol, results, loaded, data, loaded.transform, first.device, seconds, cards)
    write_json(Path(config.json), card)


# ---- similarity and average precision


def rows_of_similarity(queries: Vectors, *database: Vectors, queries_at_once: int = 64) -> Iterator[Vectors]:
    """For each query its cosine with every vector of the database, [N].

    Args:
        database: perhaps several sets, whose rows follow each other. Takes one copy of them, and ``queries_at_once`` x
            N numbers.
    """
    others = [unit_rows(rows).T for rows in database]
    for start in range(0, len(queries), queries_at_once):
        some = unit_rows(queries[start : start + queries_at_once])
        yield from np.concatenate([some @ rows for rows in others], axis=1)


def ranks_of(ranking: NDArray[np.int64], wanted: NDArray[np.int64], junk: Sequence[int] = ()) -> NDArray[np.int64]:
    """Where the wanted images are in a ranking from which junk was taken out: 0-based, ascending.

    Args:
        ranking: [images], rows of the database, best first; each at most once.
        wanted: rows that are right. One that the ranking does not hold has no rank.
        junk: rows that count neither as right nor as wrong.
    """
    places = np.flatnonzero(np.isin(ranking, wanted))
    return places - np.searchsorted(np.flatnonzero(np.isin(ranking, junk)), places)


def trapezoidal_ap(ranks: NDArray[np.int64], positives: int) -> float:
    """Area below the precision-recall curve, from 0 to 1, by trapezoids, as the Holidays, Oxford, Revisited Oxford and
    Paris and Copydays scripts have it.

    The right image number j (from 0) at rank r raises recall by one step of 1 / positives. Precision is j / r before
    it (1 if r is 0) and (j + 1) / (r + 1) with it; the step adds their mean times its width. It differs from the
    average precision of text retrieval (and of scikit-learn), which takes the second of them alone.

    Args:
        ranks: of the right images that were found, 0-based, ascending.
        positives: how many right images there are, found or not; at least 1.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * positives))


def precision_at(ranks: NDArray[np.int64], k: int) -> float:
    """Share of right images among the first k, as revisitop has it: k is no more than the rank of the last right one.

    So a query with two right images, both first, has precision 1 at 10, and not 0.2.

    Args:
        ranks: of the right images, 0-based, ascending; at least one.
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
"""Each setup's right images, and those that count neither as right nor as wrong."""
PRECISION_KS = (1, 5, 10)


@dataclass(frozen=True)
class Query:
    """One query and what it should find."""

    name: str
    box: tuple[float, ...]
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


def read_ground_truth(path: Path) -> GroundTruth:
    """A published pickle, of which nothing is executed, or JSON: ``imlist``, ``qimlist``, and ``gnd`` with ``bbx``,
    ``easy``, ``hard`` and ``junk`` a query.

    Raises:
        InputError: no such file, not safe to read, or not of this content.
    """
    if not path.is_file() and path.with_suffix(".json").is_file():
        path = path.with_suffix(".json")
    if not path.is_file():
        raise InputError(f"there is no ground truth {path}: --data-path names its folder, --ground-truth another file")
    try:
        data = path.read_bytes()
        content: dict[str, list] = json.loads(data) if path.suffix == ".json" else safe_load.read_ground_truth(path)  # type: ignore[assignment]
        database, names = tuple(content["imlist"]), tuple(content["qimlist"])
        for name in (*database, *names):
            if not re.fullmatch(
                r"[^./\\:\0][^/\\:\0]{0,199}", name
            ):  # names become paths below DIR/jpg, and stay there
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
            raise ValueError(f"{kind} of query {name} is no list of places among the {count} names in imlist")
        found[kind] = rows.astype(np.int64)
    return Query(name, tuple(box.tolist()), found)


def open_landmarks(truth: GroundTruth, folder: Path, crop_queries: bool) -> tuple[Source, Source]:
    """The database and the queries, ``folder``/jpg/NAME.jpg each, in the order of the ground truth.

    Args:
        crop_queries: show of each query only its box, as the benchmark's authors do; DINO's script does not.

    Raises:
        InputError: an image is not there.
    """
    jpg, names = folder / "jpg", [query.name for query in truth.queries]
    if missing := [name for name in [*truth.database, *names] if not (jpg / f"{name}.jpg").is_file()]:
        named = f"{len(missing):,} of the images that {truth.path.name} names, such as {printable(missing[0])}.jpg"
        raise InputError(f"{jpg} lacks {named}: unpack the published images there, all in one folder")
    queries: Source = _files(jpg, [f"{name}.jpg" for name in names])
    if crop_queries:
        queries = Boxes(queries, [query.box for query in truth.queries])
    return _files(jpg, [f"{name}.jpg" for name in truth.database]), queries


def _files(folder: Path, names: Sequence[str]) -> FileSource:
    return FileSource(str(folder), os.path.abspath(folder), Index({}, {"name": Strings.pack(names)}, keep=False))


class Boxes:
    """Another source's pictures, of each only its box."""

    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, source: Source, boxes: Sequence[tuple[float, ...]]) -> None:
        self._source, self._boxes, self.name = source, boxes, source.name
        self.url = f"{source.url} (boxes)"

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Item, int | None]:
        picture = decode(self._source.read(index)[0], self.name(index))
        left, top, right, bottom = map(round, self._boxes[index])  # to whole pixels as Pillow's crop does it
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
        if left >= right or top >= bottom:
            raise InputError(f"the ground truth's box {self._boxes[index]} lies outside of {self.name(index)}")
        return np.asarray(picture.crop((left, top, right, bottom))), None

    def fingerprint(self) -> str:
        return hash_lines([self._source.fingerprint(), *map(repr, self._boxes)])


def refuse_known(truth: GroundTruth, distractors: Source) -> None:
    """Refuse distractors that are images of the benchmark, by their names: right ones among them would count as wrong.

    Raises:
        InputError: naming one.
    """
    known = {*truth.database, *(query.name for query in truth.queries)}
    for index in range(len(distractors)):
        if Path(distractors.name(index)).stem in known:
            name = printable(distractors.name(index))
            raise InputError(f"distractors has {name}, which {truth.path.name} names: give other images")


def score_landmarks(truth: GroundTruth, similarities: Iterable[Vectors]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """For each setup ``map``, ``mp@1``, ``mp@5`` and ``mp@10`` of every query, [Q] percent, as revisitop scores them;
    NaN for a query that has no right image there.

    Args:
        similarities: for each query its similarity to every database image, [N], and to any number of distractors
            behind them, [N + distractors]: these are wrong for every query, in every setup, and never junk. Equal
            similarities rank in this order.
    """
    figures = ("map", *(f"mp@{k}" for k in PRECISION_KS))
    scores = {setup: {figure: np.full(len(truth.queries), np.nan) for figure in figures} for setup in SETUPS}
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
"""DINO's script looks at the first 20 pictures found for a copy; an original behind them counts as not found."""


def open_copydays(folder: Path) -> dict[str, tuple[Source, NDArray[np.int64]]]:
    """``original``, ``strong``, and the weaker blocks that are there, such as ``jpegqual/10``: by name the pictures,
    and for each picture the number of its scene, which is its name's digits without the last two.

    Layout: DIR/original/200000.jpg, DIR/strong/200001.jpg, and DIR/jpegqual/QUALITY and DIR/crops/PERCENT.

    Raises:
        InputError: ``original`` or ``strong`` is missing or empty, or a file has another name.
    """
    weak = [path for kind in ("jpegqual", "crops") for path in sorted(folder.glob(f"{kind}/*"), key=_strength)]
    blocks: dict[str, tuple[Source, NDArray[np.int64]]] = {}
    for path in (folder / ORIGINAL, folder / STRONG, *weak):
        names = sorted(entry.name for entry in path.glob("[!.]*") if entry.name.lower().endswith(IMAGE_SUFFIXES))
        digits = [re.fullmatch(r"([0-9]{1,12})\.[A-Za-z]+", name) for name in names]
        if not names or None in digits:
            wanted = f"{ORIGINAL}/200000.jpg, {STRONG}/200001.jpg and so on, names that are numbers"
            raise InputError(f"{path} is no part of Copydays: --data-path names the folder with {wanted}")
        scenes = np.array([int(found[1]) // 100 for found in filter(None, digits)], dtype=np.int64)
        blocks[path.relative_to(folder).as_posix()] = _files(path, names), scenes
        if not np.isin(scenes, blocks[ORIGINAL][1]).all():
            raise InputError(f"{path} has pictures without an original: unpack all of {folder / ORIGINAL}")
    return blocks


def _strength(block: Path) -> tuple[int, str]:
    return (int(block.name) if block.name.isdecimal() else -1, block.name)


def score_copydays(
    blocks: Mapping[str, tuple[Source, NDArray[np.int64]]], sets: Mapping[str, VectorSet]
) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.int64], Card]]:
    """For each search, such as ``strong -> original``, the average precisions [Q], the rows that asked, and counts.

    Args:
        sets: of each block, and perhaps ``distractors``, which are searched too.
    """
    others = [sets["distractors"].vectors] if "distractors" in sets else []
    scene_of_none = np.full(sum(map(len, others)), -1, dtype=np.int64)
    for name, database in [*((name, ORIGINAL) for name in blocks if name != ORIGINAL), (ORIGINAL, STRONG)]:
        vectors = np.concatenate([sets[database].vectors, *others])
        scenes = np.concatenate([blocks[database][1], scene_of_none])
        depth = min(COPYDAYS_DEPTH, len(scenes)) if database == ORIGINAL else len(scenes)
        asked = np.flatnonzero(np.isin(blocks[name][1], scenes))  # an original without a strong copy is no query
        aps = score_copies(sets[name].vectors[asked], blocks[name][1][asked], vectors, scenes, depth)
        yield f"{name} -> {database}", aps, asked, {"queries": len(aps), "database": len(scenes), "depth": depth}


def score_copies(
    queries: Vectors, query_scenes: NDArray[np.int64], database: Vectors, scenes: NDArray[np.int64], depth: int
) -> NDArray[np.float64]:
    """For each query the average precision of finding the pictures of its scene, [Q] percent.

    Args:
        query_scenes, scenes: [Q] and [N]; a negative number is a distractor, which belongs to nothing. Every query's
            scene is in the database.
        depth: how many of the nearest are looked at; a right one behind them counts as not found. Equal similarities
            rank in the database's order.
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
"""Neighbours held at a time: each takes some 40 bytes (similarity, row, and what is counted with them)."""


@dataclass(frozen=True)
class Recall:
    """Recall@k, R-precision and mean average precision at R as Musgrave et al. define them (arXiv 2003.08505, section
    3.2): R is the number of other images of the query's class."""

    queries: NDArray[np.int64]
    """Rows that were queries, ascending: all but those that are alone in their class."""
    alone: int
    """Images that are the only one of their class: no query, but among what the others may find."""
    hits: dict[int, NDArray[np.bool_]]
    """k to [Q]: is one of the k nearest others of the query's class?"""
    r_precision: NDArray[np.float64]
    """[Q] percent: share of the query's class among its R nearest."""
    map_at_r: NDArray[np.float64]
    """[Q] percent: mean over the first R places of the precision so far where that place is right, and 0 where it is
    wrong."""


def leave_one_out(
    features: Vectors, labels: NDArray[np.int64], ks: Sequence[int] = RECALL_KS, progress: bool = False
) -> Recall:
    """Search every image among all others.

    Besides the features there is one copy of them, and some 160 MB for what is found.

    Args:
        labels: [N].
        ks: each at least 1.

    Raises:
        InputError: features that are not finite, or no class with two images.
    """
    _, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    others = counts[position] - 1
    queries = np.flatnonzero(others > 0)
    if not len(queries):
        raise InputError(f"each of the {len(counts):,} classes has one image: there is nothing that a query could find")
    index = build_index(features)
    hits = {k: np.zeros(len(queries), dtype=np.bool_) for k in ks}
    r_precision, map_at_r = np.zeros(len(queries)), np.zeros(len(queries))
    # Queries of small classes first, as all of a chunk are searched as deep as its largest class demands.
    left = np.argsort(others[queries], kind="stable")
    with progress_bar(len(queries), "search", shown=progress) as bar:
        while len(left):
            depths = np.minimum(np.maximum(others[queries[left[:1024]]], max(ks)), len(labels) - 1)
            fitting = int((depths * np.arange(1, len(depths) + 1) <= _CELLS_AT_ONCE).sum())
            places, left = np.split(left, [max(1, fitting)])
            depth, rows, wanted = int(depths[len(places) - 1]), queries[places], others[queries[places]]
            _, found = index.search(unit_rows(features[rows]), depth + 1)
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
"""In the picture of pairs: images of the second set, and images of the first beside each."""
_QUERIES_AT_ONCE, _ROWS_AT_ONCE = 1024, 16_384
_ROUNDING = 1e-6
"""Of the products of two unit vectors in float32: an image and its copy may come to a little less than 1."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, the most similar first; equal ones in the order of the sets."""

    first: NDArray[np.int64]
    """[pairs] rows of the first set."""
    second: NDArray[np.int64]
    """[pairs] rows of the second."""
    similarity: NDArray[np.float32]
    """[pairs] cosine."""

    def __len__(self) -> int:
        return len(self.similarity)


def find_pairs(first: Vectors, second: Vectors | None, threshold: float, most: int) -> Pairs:
    """All pairs whose cosine similarity is at least ``threshold``, exactly.

    Takes 64 MB for a block of cosines, and as much again for its rows and columns at D = 384, however long the sets.

    Args:
        second: None: pairs within the first set, each once and none of an image with itself.
        threshold: between -1 and 1.
        most: pairs that are kept in memory (20 bytes each).

    Raises:
        InputError: there are more pairs than ``most``.
    """
    others = first if second is None else second
    found, count = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))], 0
    with progress_bar(len(first), "compare", shown=True) as bar:
        for row in range(0, len(first), _QUERIES_AT_ONCE):
            left = unit_rows(first[row : row + _QUERIES_AT_ONCE])
            for column in range(row if second is None else 0, len(others), _ROWS_AT_ONCE):
                block = left @ unit_rows(others[column : column + _ROWS_AT_ONCE]).T
                rows, columns = np.nonzero(block >= threshold - _ROUNDING)
                if second is None:
                    above = columns + column > rows + row
                    rows, columns = rows[above], columns[above]
                found.append((rows + row, columns + column, block[rows, columns]))
                count += len(rows)
                if count > most:
                    raise InputError(f"more than {most:,} pairs are at least {threshold:g} alike: raise --threshold")
            bar.update(len(left))
    lefts, rights, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((rights, lefts, -similarity))
    return Pairs(lefts[order], rights[order], similarity[order])


def kinds_of(pairs: Pairs, first: Source, second: Source) -> list[str]:
    """[pairs]: ``identical file`` where both have the same bytes (of an image that is no file: the same pixels), else
    ``near``."""
    left = {row: _digest(first.read(row)[0]) for row in np.unique(pairs.first).tolist()}
    right = {row: _digest(second.read(row)[0]) for row in np.unique(pairs.second).tolist()}
    rows = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    return [IDENTICAL if left[one] == right[other] else NEAR for one, other in rows]


def _digest(item: Item) -> bytes:
    data = item if isinstance(item, bytes) else repr(item.shape).encode() + item.tobytes()
    return hashlib.sha256(data).digest()


def write_pairs(path: Path, pairs: Pairs, kinds: Sequence[str], first: Source, second: Source) -> None:
    """A CSV file, a pair a line: both names, the similarity and the kind. UTF-8; names' other bytes as they are."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(("first", "second", "similarity", "kind"))
    for number, kind in enumerate(kinds):
        names = first.name(int(pairs.first[number])), second.name(int(pairs.second[number]))
        table.writerow((*names, f"{pairs.similarity[number]:.6f}", kind))
    atomic.write(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))


def draw_pairs(path: Path, pairs: Pairs, kinds: Sequence[str], first: Source, second: Source) -> None:
    """The images of the second set that are most alike to one of the first, each beside those that it resembles."""
    blocks = []
    _, firsts = np.unique(pairs.second, return_index=True)  # of each image its most similar pair, which comes first
    for row in pairs.second[np.sort(firsts)[:SHEET_ROWS]].tolist():
        beside = np.flatnonzero(pairs.second == row)[:SHEET_COLUMNS].tolist()
        titles = [f"{pairs.similarity[pair]:.4f}  {kinds[pair]}" for pair in beside]
        tiles = [tile_of(first, int(pairs.first[pair]), title) for pair, title in zip(beside, titles, strict=True)]
        blocks.append((tile_of(second, row, f"image {row}"), tiles))
    draw_sheet(blocks, path)
