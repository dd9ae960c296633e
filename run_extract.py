"""Vectors for retrieval: write them with an index, add to them, then look images up.

    python run_extract.py --weights ckpt.pth --data-path photos/ --output-dir vectors/
    python run_extract.py --query holiday.jpg --index vectors/ --top 10
    torchrun --nproc-per-node 8 run_extract.py --weights ckpt.pth --data-path /data/photos --output-dir vectors/
    python run_extract.py --learn-whitening whitening.npz --index vectors-of-other-photos/

Leaves vectors.npy (a row an image), paths.txt (the images' names in that order), index.faiss (inner product) and
card.json (weights, preparation, pooling, data, date). The same command goes on where one was stopped.

Read top to bottom: learn a whitening, extract, look up.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.cli import parse
from dino_xcit.data import Source, decode, open_source
from dino_xcit.data.storage import is_remote
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.transform import normalise
from dino_xcit.weights import LoadedBackbone
from eval.collection import shards
from eval.collection import whitening as whitening_file
from eval.collection.card import FORMAT, data_of, differences, kind_of, url_of
from eval.collection.contact_sheet import Tile, draw_sheet
from eval.collection.folder import claim, identity, lies_among, refuse_among_images
from eval.collection.images import pictures_of
from eval.collection.index import LEAST_IVFPQ, too_few_for_ivfpq
from eval.collection.made_with import check_width, open_backbone_of
from eval.collection.store import Collection, add_to_collection, open_collection, write_collection
from eval.collection.whitening import Whitening
from eval.features import find_kept, unreadable_card, width_of
from eval.results import data_card, now, versions, weights_card, write_json
from eval.retrieval_config import ExtractConfig
from eval.setup import beside_weights, demand_writable, open_backbone

CHUNK = 8192
"""Rows of kept features that are handed on at a time."""
_MOST_DRAWN = 100
"""Of the images that a query found: 12,000 would be a picture of gigabytes."""

T = TypeVar("T")


def main() -> None:
    """Learn a whitening, look up, or extract."""
    config = parse(ExtractConfig, sys.argv[1:], "run_extract.py")
    # To learn a whitening, too, several processes have to know that one of them writes.
    distributed.start(distributed.choose_device(config.device))
    demand_writable(config.written())
    if config.learn_whitening:
        learn_whitening(config)
    elif config.query:
        look_up(config)
    else:
        extract(config)


def learn_whitening(config: ExtractConfig) -> None:
    """Write the PCA whitening of a collection's vectors."""
    collection = open_collection(Path(config.index).expanduser())
    if collection.whitening is not None:
        raise InputError(f"the vectors in {collection.folder} are whitened already: learn from some that are not")
    if not distributed.is_main():
        return
    data = [{name: part.get(name) for name in ("url", "images", "fingerprint")} for part in data_of(collection.card)]
    found = whitening_file.learn(
        collection.vectors, config.whiten_dim, kind_of(collection.card), {"data": data, "date": now()}
    )
    path = Path(config.learn_whitening).expanduser()
    whitening_file.save(found, path)
    before, after = found.projection.shape
    log.info(
        f"whitening of {before} numbers to {after}, learned from {len(collection.names):,} vectors, in {path}; use it "
        f"with: python run_extract.py --whiten {path} ..."
    )


def extract(config: ExtractConfig) -> None:
    """Write a collection of all images of a data source, or add them to one."""
    # ---- backbone, images, how vectors are made of them, where to
    started = time.perf_counter()
    folder = Path(config.output_dir).expanduser()
    loaded, device = open_backbone(config)
    source = _images(config, loaded)
    refuse_among_images(folder, source)
    fingerprint = distributed.on_main(source.fingerprint)
    descriptor = config.descriptor()
    width = descriptor.width(width_of(loaded.backbone))
    whitening = whitening_file.load(Path(config.whiten).expanduser()) if config.whiten else None
    card = _card(config, loaded, source, fingerprint, whitening)
    log.info(f"vectors: {card['feature']}")

    with contextlib.ExitStack() as locks:
        # ---- never over another extraction
        nothing_to_do = distributed.on_main(
            lambda: claim(folder, card, source, config.add, config.overwrite, locks, config.unreadable)
        )
        if nothing_to_do:
            log.info(nothing_to_do)
            return

        # ---- rows: those that k-NN or probe kept; others are made part by part, each by one process
        kept_in = beside_weights(config, config.cache_dir, "features") if config.cache else None
        kept = find_kept(loaded.hash, fingerprint, (len(source), width), loaded.transform, kept_in, descriptor)
        rows, unreadable = _pieces_of(kept), set[int]()
        if distributed.broadcast_from_main(kept is None):
            batch = config.batch_size_per_gpu
            # Batches begin at the same images whatever --shard-images says.
            part_images = max(1, round(config.shard_images / batch)) * batch
            plan = shards.Plan(identity(card), len(source), width, part_images)
            parts, missing = distributed.on_main(lambda: _begin(folder / shards.FOLDER, plan, config))
            shards.extract_parts(
                parts, missing, loaded.backbone, source, loaded.transform, descriptor, device, batch,
                config.num_workers, config.unreadable,
            )  # fmt: skip
            distributed.barrier()
            rows, unreadable = parts.rows(), set(parts.unreadable())
        if not distributed.is_main():
            return

        # ---- the collection
        count = len(source) - len(unreadable)
        if not count:
            raise InputError(f"none of the {len(source):,} images of {source.url} can be read: check --data-path")
        names = (source.name(index) for index in range(len(source)) if index not in unreadable)
        left_out = {"unreadable": unreadable_card([source.name(index) for index in sorted(unreadable)])}
        data = card["data"] | (left_out if unreadable else {})
        if config.add:
            collection = open_collection(folder)
            check_width(collection, loaded)
            written = add_to_collection(collection, rows, names, count, data)
        else:
            shape = (count, whitening.projection.shape[1] if whitening else width)
            written = write_collection(folder, rows, names, shape, card | {"count": count, "data": data}, whitening)
        shards.remove(folder / shards.FOLDER)

    # ---- report
    seconds = time.perf_counter() - started
    total, dim = written["count"], written["dimension"]
    kind = "of length 1" if config.normalise else "as they are"
    log.info(f"{counted(total, 'vector')} of {dim} numbers, {kind}, in {folder} ({seconds:.1f} s)")
    if unreadable:
        log.warning(f"left out {counted(len(unreadable), 'image')} that could not be read; card.json has the names")
    if recall := written["index"].get("recall"):
        log.info(
            f"index {config.index_type}: recall@{recall['at']} {recall['percent']:.1f} % of exact search "
            f"({recall['queries']:,} vectors of the collection)"
        )
    log.info(f"look images up with: python run_extract.py --query IMAGE --index {folder} --top 10")
    if config.json:
        write_json(Path(config.json).expanduser(), {"measure": "extract", **written, "seconds": round(seconds, 2)})


def look_up(config: ExtractConfig) -> None:
    """Print the nearest images of each query, and draw them."""
    # ---- the collection, and the very weights that made it
    collection = open_collection(Path(config.index or config.output_dir).expanduser())
    pictures = [decode(_read(query), query) for query in config.query]
    loaded, device = open_backbone_of(collection, config)
    transform, descriptor = loaded.transform, collection.descriptor

    # ---- vectors, made as the collection's were, and search
    queries = []
    for picture in pictures:
        pixels = normalise(transform(picture)[None].to(device), transform.mean, transform.std)
        with torch.inference_mode():
            queries.append(descriptor(loaded.backbone, pixels).cpu().numpy())
    if config.top > len(collection.names):
        log.warning(f"top = {config.top} exceeds the {len(collection.names)} images: using all of them")
    scores, rows = collection.search(np.concatenate(queries), config.top)

    # ---- ranked paths, and the picture
    found = [
        # An approximate index may find fewer: row -1.
        [(score, row) for score, row in zip(near, places, strict=True) if row >= 0]
        for near, places in zip(scores.tolist(), rows.tolist(), strict=True)
    ]
    results: list[dict[str, Any]] = []
    for query, ranked in zip(config.query, found, strict=True):
        log.info(f"query {query}")
        for place, (score, row) in enumerate(ranked, start=1):
            log.info(f"{place:4d}  {score:.4f}  {collection.names[row]}")
            results.append({"query": query, "rank": place, "score": score, "row": row, "path": collection.names[row]})
    if not distributed.is_main():
        return
    if config.json:
        answer = {"measure": "query", "results": results, "index": collection.card}
        write_json(Path(config.json).expanduser(), answer)
    sheet = Path(config.sheet).expanduser() if config.sheet else collection.folder / "contact_sheet.png"
    if not config.sheet and any(lies_among(sheet.parent, url_of(data)) for data in data_of(collection.card)):
        log.warning(
            f"{collection.folder} lies within the folder of its images, of which a contact sheet would become "
            "one: name a file elsewhere with --sheet to see it"
        )
        return
    if max(map(len, found)) > _MOST_DRAWN:
        log.info(f"the contact sheet shows the first {_MOST_DRAWN} images of each query")
    try:
        _draw(collection, list(zip(config.query, pictures, strict=True)), found, sheet)
    except InputError as error:
        if config.sheet:
            raise
        # Nobody asked for it there: a collection may well lie where nothing can be written.
        log.warning(f"{error} with --sheet")
        return
    log.info(f"contact sheet: {sheet}")


def _images(config: ExtractConfig, loaded: LoadedBackbone) -> Source:
    if config.data_path:
        source = open_source(config.data_path)
    elif loaded.data:
        source = open_source(loaded.data, "train")
        log.info(f"data: {source.url}, on which it was trained (--data-path names other)")
    else:
        raise InputError(f"{loaded.path} does not say what it was trained on: give --data-path, such as photos/")
    if config.index_type == "ivfpq" and len(source) < LEAST_IVFPQ and not config.add:
        raise too_few_for_ivfpq(len(source))  # now, not when all is extracted
    return source


def _card(
    config: ExtractConfig, loaded: LoadedBackbone, source: Source, fingerprint: str, whitening: Whitening | None
) -> dict[str, Any]:
    """What is to be extracted; refuses a whitening that was learned from other vectors."""
    descriptor = config.descriptor()
    feature, dim = descriptor.describe(), descriptor.width(width_of(loaded.backbone))
    data = {**data_card(source, fingerprint), "absolute_url": _absolute(source), "names_start_from": os.getcwd()}
    card = {
        "format": FORMAT,
        "count": len(source),
        "dimension": dim,
        "normalised": config.normalise,
        "dtype": config.dtype,
        "feature": feature,
        "descriptor": descriptor.to_dict(),
        "whitening": None,
        "index": {"type": config.index_type},
        "weights": weights_card(loaded),
        "data": data,
        "added": [],
        "transform": loaded.transform.to_dict(),
        "date": now(),
        "versions": versions(),
    }
    if whitening is None:
        return card
    if changed := differences(whitening.made_for, kind_of(card)):
        raise InputError(
            f"the whitening {config.whiten} was learned from other vectors: {'; '.join(changed)}; learn one from "
            "vectors like these with --learn-whitening"
        )
    dim = whitening.projection.shape[1]
    facts = {"hash": whitening.hash, "dimension": dim, "learned_on": whitening.learned_on}
    return card | {"dimension": dim, "feature": f"{feature}; PCA-whitened to {dim} numbers", "whitening": facts}


def _begin(work: Path, plan: shards.Plan, config: ExtractConfig) -> tuple[shards.Parts, list[int]]:
    parts = shards.begin(work, plan, config.overwrite)
    missing = parts.missing(config.unreadable)
    if len(missing) < len(parts.plan):
        print(f"going on: {len(parts.plan) - len(missing):,} of {len(parts.plan):,} parts are there", flush=True)
    return parts, missing


def _draw(
    collection: Collection, queries: list[tuple[str, Any]], found: list[list[tuple[float, int]]], path: Path
) -> None:
    drawn = [ranked[:_MOST_DRAWN] for ranked in found]
    pictures = pictures_of(collection.card, collection.names, (row for ranked in drawn for _, row in ranked))
    blocks = []
    for (name, picture), ranked in zip(queries, drawn, strict=True):
        tiles = [
            Tile(pictures[row], f"{place}    {score:.4f}", os.path.basename(collection.names[row]))
            for place, (score, row) in enumerate(ranked, start=1)
        ]
        blocks.append((Tile(picture, "query", os.path.basename(name)), tiles))
    draw_sheet(blocks, path)


def _pieces_of(rows: NDArray[np.float32] | None) -> Iterator[NDArray[np.float32]]:
    if rows is not None:
        yield from (np.asarray(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK))


def _absolute(source: Source) -> str:
    """The source's URL, so that it can be found from another folder."""
    scheme, colon, rest = source.url.partition(":")
    if scheme == "hf" and os.path.isdir(os.path.expanduser(rest)):
        return f"hf:{os.path.abspath(os.path.expanduser(rest))}"
    if colon and scheme in ("tar", "parquet", "imagenet") and not is_remote(rest):
        return f"{scheme}:{os.path.abspath(os.path.expanduser(rest))}"
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
