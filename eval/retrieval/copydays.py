"""INRIA Copydays: which pictures belong together, and mean average precision as DINO's script scores it.

Pictures are named by six digits of which the first four tell the block: 200000.jpg is an original, 200001.jpg and
200002.jpg in ``strong`` are copies of it. Layout: DIR/original, DIR/strong, and, where they are there,
DIR/jpegqual/QUALITY and DIR/crops/PERCENT.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.folder import IMAGE_SUFFIXES, FileSource
from dino_xcit.data.index import Index, Strings
from dino_xcit.data.source import Source
from dino_xcit.errors import InputError, printable
from eval.retrieval.average_precision import ranks_of, trapezoidal_ap
from eval.retrieval.similarity import rows_of_similarity

ORIGINAL, STRONG = "original", "strong"
WEAK = ("jpegqual", "crops")
"""Folders of folders, one a strength."""

DEPTH = 20
"""DINO's script looks at the first 20 pictures found for a copy; an original behind them counts as not found."""

_NAME = re.compile(r"([0-9]{1,12})\.[A-Za-z]+")
_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Block:
    """One folder of Copydays."""

    source: Source
    scenes: NDArray[np.int64]
    """[pictures], the same number for pictures that belong together."""


def scene_of(folder: Path, name: str) -> int:
    """The number of what a file shows: its name's digits without the last two.

    Raises:
        InputError: the name is no number.
    """
    digits = _NAME.fullmatch(name)
    if digits is None:
        raise InputError(
            f"{folder / printable(name)} has no name of Copydays: expected a number such as 200001.jpg, whose last two "
            "digits count the copies of one original"
        )
    return int(digits[1]) // 100


def open_blocks(folder: Path) -> dict[str, Block]:
    """``original``, ``strong``, and the weaker ones that are there, such as ``jpegqual/10``; by name.

    Raises:
        InputError: ``original`` or ``strong`` is missing or empty, a file has no name of Copydays, or a copy has no
            original.
    """
    names = [ORIGINAL, STRONG]
    for kind in WEAK:
        if (folder / kind).is_dir():
            names += [f"{kind}/{entry.name}" for entry in sorted((folder / kind).iterdir(), key=_strength)]
    blocks = {name: _block(folder / name) for name in names if (folder / name).is_dir()}
    for name in (ORIGINAL, STRONG):
        if name not in blocks:
            raise InputError(
                f"{folder} holds no folder {name}: expected Copydays as {folder / ORIGINAL}/200000.jpg and "
                f"{folder / STRONG}/200001.jpg; --data-path names the folder above both"
            )
    for name, block in blocks.items():
        if not len(block.source):
            raise InputError(f"no image in {folder / name}: expected files such as 200000.jpg")
        orphans = np.flatnonzero(~np.isin(block.scenes, blocks[ORIGINAL].scenes))
        if len(orphans):
            raise InputError(
                f"{len(orphans)} pictures in {folder / name} have no original, such as "
                f"{os.path.basename(block.source.name(int(orphans[0])))}: unpack all of {folder / ORIGINAL}"
            )
    return blocks


def _strength(entry: Path) -> tuple[int, str]:
    return (int(entry.name) if entry.name.isdecimal() else -1, entry.name)


def _block(folder: Path) -> Block:
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {error.strerror}") from error
    scenes = np.array([scene_of(folder, name) for name in names], dtype=np.int64)
    return Block(FileSource(str(folder), os.path.abspath(folder), Index({}, {"name": Strings.pack(names)})), scenes)


def average_precisions(
    queries: NDArray[np.float32],
    query_scenes: NDArray[np.int64],
    database: NDArray[np.float32],
    database_scenes: NDArray[np.int64],
    depth: int,
) -> NDArray[np.float64]:
    """For each query the average precision of finding the pictures of its scene, from 0 to 1.

    Args:
        queries, database: [pictures, D], not necessarily normalised; compared by cosine.
        query_scenes, database_scenes: [pictures]; a negative number is a distractor, which belongs to nothing. Every
            query's scene is in the database.
        depth: how many of the nearest are looked at; a right one behind them counts as not found.
            Equal similarities rank in the database's order.
    """
    out = []
    for scene, similarity in zip(query_scenes.tolist(), rows_of_similarity(queries, database), strict=True):
        ranking = np.argsort(-similarity, kind="stable")[:depth]
        right = np.flatnonzero(database_scenes == scene)
        out.append(trapezoidal_ap(ranks_of(ranking, right, _NOTHING), len(right)))
    return np.array(out)
