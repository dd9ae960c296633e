"""Extract vectors for retrieval with an index, add to a collection, and search it.

    python run_extract.py --weights ckpt.pth --data-path photos/ --output-dir vectors/
    python run_extract.py --query holiday.jpg --index vectors/ --top 10
    torchrun --nproc-per-node 8 run_extract.py --weights ckpt.pth --data-path /data/photos --output-dir vectors/
    python run_extract.py --learn-whitening whitening.npz --index vectors-of-other-photos/

Writes vectors.npy (one row per image), paths.txt (image names in the same order), index.faiss (inner product) and
metadata.json (weights, transform, pooling, data, date). The same command resumes an interrupted extraction.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags, parse  # before torch: dino_xcit sets how OpenMP threads wait
from eval.retrieval_config import ExtractConfig

if __name__ == "__main__":
    check_flags(ExtractConfig, "run_extract.py")

import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_xcit.data import Source, open_source
from dino_xcit.data.decode import decode_image, picture_of
from dino_xcit.data.measure import choose_white_level
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.transform import EvalTransform, normalise
from dino_xcit.weights import LoadedBackbone
from eval.features import unreadable_metadata
from eval.results import now, write_json
from eval.retrieval import collection as store
from eval.retrieval import whitening as whitening_file
from eval.setup import demand_writable, open_backbone
from eval.sheet import Cell, tile, tile_of, write_contact_sheet

MAX_DRAWN = 100
"""Results per query in the contact sheet: 12,000 would take gigabytes."""


def main() -> None:
    """Learn a whitening, search, or extract."""
    config = parse(ExtractConfig, sys.argv[1:], "run_extract.py")
    distributed.start(distributed.choose_device(config.device))
    demand_writable(config.written())
    if config.learn_whitening:
        learn_whitening(config)
    elif config.query:
        run_query(config)
    else:
        extract(config)


def learn_whitening(config: ExtractConfig) -> None:
    """Learn PCA whitening from a collection and write it to a file."""
    collection = store.open_collection(Path(config.index))
    if collection.whitening is not None:
        raise InputError(f"the vectors in {collection.folder} are already whitened: give another --index")
    if not distributed.is_main():
        return
    names, parts = ("url", "images", "fingerprint"), store.parts_of(collection.metadata)
    learned_on = {"data": [{name: part[name] for name in names} for part in parts], "date": now()}
    kind = whitening_file.kind_of(collection.metadata["weights"]["hash"], collection.descriptor, collection.normalised)
    found = whitening_file.learn(collection.vectors, config.whiten_dim, kind, learned_on)
    path = Path(config.learn_whitening)
    whitening_file.save(found, path)
    before, after = found.projection.shape
    log.info(
        f"written: {path}, whitening from {before} to {after} dimensions, learned from {len(collection.names):,} "
        f"vectors; apply it with: python run_extract.py --whiten {path} ..."
    )


def extract(config: ExtractConfig) -> None:
    """Write all images of a source to a new collection or add them to an existing one."""
    # ---- backbone, images, descriptor
    started = time.perf_counter()
    folder = Path(config.output_dir)
    loaded, device = open_backbone(config, rgb=False)
    source = _images(config, loaded)
    fingerprint = distributed.on_main(source.fingerprint)
    kind = whitening_file.kind_of(loaded.hash, config.descriptor(), config.normalise)
    whitening = whitening_file.load(Path(config.whiten), kind) if config.whiten else None
    metadata = store.new_metadata(config, loaded, source, fingerprint, whitening)
    log.info(f"vectors: {metadata['feature']}")

    with contextlib.ExitStack() as locks:
        # ---- never overwrite another extraction
        if reason := distributed.on_main(lambda: store.claim(folder, metadata, source, config, locks)):
            log.info(reason)
            return

        # ---- vectors, including those of an interrupted run
        rows, unreadable = store.extract_rows(folder / store.PARTS, loaded, source, fingerprint, device, config)
        if not distributed.is_main():
            return

        # ---- the collection
        left_out = set(unreadable)
        names = [source.name(index) for index in range(len(source)) if index not in left_out]
        if unreadable:
            metadata["data"]["unreadable"] = unreadable_metadata([source.name(index) for index in unreadable])
        if config.add:
            written = store.add_to_collection(store.open_collection(folder), rows, names, metadata["data"])
        else:
            written = store.write_collection(folder, rows, names, metadata | {"count": len(names)}, whitening)
        shutil.rmtree(folder / store.PARTS, ignore_errors=True)

    # ---- report
    seconds = time.perf_counter() - started
    log.info(f"{counted(written['count'], 'vector')} of size {written['dimension']} in {folder} ({seconds:.1f} s)")
    if unreadable:
        log.warning(f"skipped {counted(len(unreadable), 'unreadable image')}, listed in metadata.json")
    if recall := written["index"].get("recall"):
        log.info(f"index {config.index_type}: recall@{recall['at']} {recall['percent']:.1f} % of exact search")
    log.info(f"search it with: python run_extract.py --query IMAGE --index {folder} --top 10")
    if config.json:
        write_json(Path(config.json), {"measure": "extract", **written, "seconds": round(seconds, 2)})


def _images(config: ExtractConfig, loaded: LoadedBackbone) -> Source:
    if config.data_path:
        source = open_source(config.data_path)
    elif loaded.data:
        source = open_source(loaded.data, "train")
        log.info(f"data: {source.url}, the training data of the checkpoint (--data-path overrides it)")
    else:
        raise InputError(f"{loaded.path} does not name its training data: give --data-path, such as photos/")
    if loaded.transform.channels == 3:
        choose_white_level(source, loaded.transform.white_level)  # for its warning
    return source


def run_query(config: ExtractConfig) -> None:
    """Log the nearest images of each query and draw a contact sheet."""
    # ---- the collection and its backbone
    collection = store.open_collection(Path(config.index or config.output_dir))
    format = EvalTransform.from_dict(collection.metadata["transform"]).pixel_format
    images = [decode_image(_read(query), query, format) for query in config.query]
    loaded, device = store.open_backbone_of(collection, config)

    # ---- vectors and search
    vectors = []
    for image in images:
        transform = loaded.transform
        pixels = normalise(transform(image)[None].to(device), transform.mean, transform.std)
        with torch.inference_mode():
            vectors.append(collection.descriptor(loaded.backbone, pixels).cpu().numpy())
    if config.top > len(collection.names):
        log.warning(f"top = {config.top} exceeds the {len(collection.names)} images: using all of them")
    scores, rows = collection.search(np.concatenate(vectors), config.top)

    # ---- ranked paths and contact sheet
    collected = store.CollectedImages(collection.metadata, collection.names)
    results: list[dict[str, Any]] = []
    blocks: list[tuple[Cell, list[Cell]]] = []
    for query, image, near, places in zip(config.query, images, scores.tolist(), rows.tolist(), strict=True):
        log.info(f"query {query}")
        blocks.append((tile(picture_of(image, format), "query", query), []))
        for rank, (score, row) in enumerate(zip(near, places, strict=True), start=1):
            if row < 0:  # an approximate index may find fewer than top
                break
            log.info(f"{rank:4d}  {score:.4f}  {collection.names[row]}")
            results.append({"query": query, "rank": rank, "score": score, "row": row, "path": collection.names[row]})
            if rank <= MAX_DRAWN:
                blocks[-1][1].append(tile_of(collected, row, f"{rank}    {score:.4f}", format))
    if not distributed.is_main():
        return
    if config.json:
        write_json(Path(config.json), {"measure": "query", "results": results, "index": collection.metadata})
    sheet = Path(config.sheet) if config.sheet else collection.folder / "contact_sheet.png"
    try:
        write_contact_sheet(sheet, blocks)
        log.info(f"contact sheet: {sheet}")
    except OSError as error:
        log.warning(f"cannot write the contact sheet {sheet}: {error.strerror}; choose another file with --sheet")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the query image {path}: {error.strerror}") from error


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
