"""Vectors for retrieval: write them with an exact index, then look images up.

    python run_extract.py --weights ckpt.pth --data-path photos/ --output-dir vectors/
    python run_extract.py --query holiday.jpg --index vectors/ --top 10
    torchrun --nproc-per-node 8 run_extract.py --weights ckpt.pth --data-path /data/photos --output-dir vectors/

Leaves vectors.npy (float32, a row an image), paths.txt (the images' names in that order), index.faiss (exact inner
product) and card.json (weights, preprocessing, data, date).
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit import distributed
from dino_xcit.data import Source, decode, open_source
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise
from eval.config import ExtractConfig, settings
from eval.contact_sheet import ImagesOf, Tile, draw_sheet
from eval.features import feature_rows, find_kept, width_of
from eval.protocol import Card, data_card, now, versions, weights_card, write_json
from eval.retrieval import FORMAT, Collection, existing, open_collection, write_collection
from eval.setup import beside_weights, open_backbone

CHUNK = 8192
"""Rows of kept features that are handed on at a time."""


def main() -> None:
    """Extract, or look up."""
    config = settings(ExtractConfig, sys.argv[1:], "run_extract.py")
    if config.query:
        look_up(config)
    else:
        extract(config)


def extract(config: ExtractConfig) -> None:
    """Write a collection of all images of a data source."""
    # ---- backbone, images, where to
    started = time.perf_counter()
    if not config.output_dir:
        raise InputError(
            "no output_dir given: use --output-dir FOLDER for the vectors, or --query IMAGE --index FOLDER"
        )
    folder = Path(config.output_dir).expanduser()
    loaded, device = open_backbone(config)
    if config.data_path:
        source = open_source(config.data_path)
    elif loaded.data:
        source = open_source(loaded.data, "train")
        distributed.say(f"data: {source.url}, on which it was trained (--data-path names other)")
    else:
        raise InputError(f"{loaded.path} does not say what it was trained on: give --data-path, such as photos/")
    fingerprint = distributed.main_decides(source.fingerprint() if distributed.is_main() else None) or ""
    dim = width_of(loaded.backbone)
    card: Card = {
        "format": FORMAT,
        "count": len(source),
        "dimension": dim,
        "normalised": config.normalise,
        "feature": "class token after the final norm",
        "weights": weights_card(loaded),
        "data": {**data_card(source, fingerprint), "absolute_url": _absolute(source), "names_start_from": os.getcwd()},
        "transform": loaded.transform.to_dict(),
        "date": now(),
        "versions": versions(),
    }

    # ---- never over another extraction
    found, refusal = None, None
    if distributed.is_main():
        try:
            found = existing(folder, card)
        except InputError as error:
            refusal = str(error)
    found, refusal = distributed.main_decides(found), distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)
    if found == "same" and not config.overwrite:
        distributed.say(f"already complete: {folder} holds these {len(source):,} vectors; nothing to do")
        return
    if found and not config.overwrite:
        raise InputError(
            f"{folder} holds another extraction: choose another --output-dir, or --overwrite to replace it"
        )

    # ---- features that k-NN or probe kept are used; the vectors are themselves what is kept of new ones
    kept_in = beside_weights(config, config.cache_dir, "features") if config.cache else None
    kept = find_kept(loaded.hash, fingerprint, (len(source), dim), loaded.transform, kept_in)
    rows: Iterator[NDArray[np.float32]] = iter(()) if kept is None else _in_pieces(kept)
    if distributed.main_decides("no" if kept is None else None):
        rows = feature_rows(
            loaded.backbone, source, loaded.transform, device, config.batch_size_per_gpu, config.num_workers
        )
    if not distributed.is_main():
        for _ in rows:
            pass
        return
    write_collection(folder, rows, (source.name(index) for index in range(len(source))), (len(source), dim), card)
    seconds = time.perf_counter() - started
    kind = "of length 1" if config.normalise else "as they are"
    distributed.say(f"{len(source):,} vectors of {dim} numbers, {kind}, in {folder} ({seconds:.1f} s)")
    distributed.say(f"look images up with: python run_extract.py --query IMAGE --index {folder} --top 10")
    if config.json:
        write_json(Path(config.json), {"measure": "extract", **card, "seconds": round(seconds, 2)})


def look_up(config: ExtractConfig) -> None:
    """Print the nearest images of each query, and draw them."""
    # ---- the collection, and the very weights that made it
    if not (config.index or config.output_dir):
        raise InputError("no index given: use --index FOLDER, one that run_extract.py --output-dir wrote")
    collection = open_collection(Path(config.index or config.output_dir).expanduser())
    pictures = [decode(_read(query), query) for query in config.query]
    made_by = collection.card["weights"]
    network = config.network if made_by["network"] not in ("teacher", "student") else made_by["network"]
    arch = config.arch or str(made_by["arch"])
    loaded, device = open_backbone(
        dataclasses.replace(config, weights=config.weights or str(made_by["path"]), network=network, arch=arch),
        EvalTransform.from_dict(collection.card["transform"]),
    )
    if loaded.hash != made_by["hash"]:
        raise InputError(
            f"{loaded.path} (weights {loaded.hash[:12]}) did not make the vectors in {collection.folder} (weights "
            f"{str(made_by['hash'])[:12]}): give the file that did with --weights, or extract anew"
        )
    transform = loaded.transform

    # ---- features and search
    queries = []
    for picture in pictures:
        pixels = normalise(transform(picture)[None].to(device), transform.mean, transform.std)
        queries.append(loaded.backbone(pixels).cls_token.float().cpu().numpy())
    if config.top > len(collection.names):
        distributed.say(f"notice: top = {config.top} exceeds the {len(collection.names)} images: using all of them")
    scores, rows = collection.search(np.concatenate(queries), config.top)

    # ---- ranked paths, and the picture
    results: list[dict[str, Any]] = []
    for query, near, row in zip(config.query, scores.tolist(), rows.tolist(), strict=True):
        distributed.say(f"query {query}")
        for place, (score, index) in enumerate(zip(near, row, strict=True), start=1):
            distributed.say(f"{place:4d}  {score:.4f}  {collection.names[index]}")
            results.append(
                {"query": query, "rank": place, "score": score, "row": index, "path": collection.names[index]}
            )
    if not distributed.is_main():
        return
    sheet = Path(config.sheet).expanduser() if config.sheet else collection.folder / "contact_sheet.png"
    _draw(collection, list(zip(config.query, pictures, strict=True)), scores, rows, sheet)
    distributed.say(f"contact sheet: {sheet}")
    if config.json:
        write_json(Path(config.json), {"measure": "query", "results": results, "index": collection.card})


def _draw(
    collection: Collection,
    queries: list[tuple[str, Any]],
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    path: Path,
) -> None:
    data = collection.card["data"]
    url, base = str(data.get("absolute_url", data["url"])), str(data.get("names_start_from", "."))
    images = ImagesOf(url, base, len(collection.names))
    blocks = []
    for (name, picture), near, row in zip(queries, scores.tolist(), rows.tolist(), strict=True):
        tiles = []
        for place, (score, index) in enumerate(zip(near, row, strict=True), start=1):
            found = collection.names[index]
            tiles.append(Tile(images.read(index, found), f"{place}    {score:.4f}", os.path.basename(found)))
        blocks.append((Tile(picture, "query", os.path.basename(name)), tiles))
    draw_sheet(blocks, path)


def _in_pieces(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    return (np.asarray(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK))


def _absolute(source: Source) -> str:
    """The source's URL, so that it can be found from another folder."""
    return os.path.abspath(source.url) if os.path.exists(source.url) else source.url


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the query image {path}: {error.strerror}") from error


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
