"""Parquet files of images as the hub ships them, and reading all of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dino_xcit.data import UndecodableImage
from dino_xcit.data.parquet import ParquetSource, open_parquet
from dino_xcit.data.parquet.scan import BY_GROUP

Image = bytes | None


def noise(count: int, least: int = 200, most: int = 30_000, seed: int = 0) -> list[bytes]:
    """Bytes that compress as little as photographs do; some of which repeat, as headers do."""
    rng = np.random.default_rng(seed)
    header = rng.bytes(150)
    return [header + rng.bytes(int(rng.integers(least, most))) for _ in range(count)]


def hub_table(
    images: Sequence[Image], labels: Sequence[int] | None = None, names: Sequence[str] = ("a", "b")
) -> pa.Table:
    """As ``datasets`` makes it: a structure of bytes and path, and a number whose names are in the metadata."""
    structure = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": image, "path": f"n{number:03d}.JPEG"} for number, image in enumerate(images)]
    columns = {"image": pa.array(rows, structure)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def opened(path: Path | str, part: str | None = None) -> ParquetSource:
    return open_parquet(str(path), part)


def read_all(source: ParquetSource) -> list[Image]:
    """Every image, read in a shuffled order; None for those that cannot be read."""
    found: dict[int, Image] = {}
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            item, _ = source.read(index)
            assert isinstance(item, bytes)
            found[index] = item
        except UndecodableImage:
            found[index] = None
    return [found[index] for index in range(len(source))]


def read_one_by_one(source: ParquetSource) -> int:
    """How many images have a place of their own."""
    return int((source._columns["unpacked"] != BY_GROUP).sum())
