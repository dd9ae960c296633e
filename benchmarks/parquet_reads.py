"""One image out of a Parquet file: by its own bytes, by pyarrow's row group, and from a tar shard.

    python benchmarks/parquet_reads.py [--images 24000] [--bytes 110000] [--read 2000]

Makes files in a temporary folder as the Hugging Face hub ships imagenet-1k (row groups of 100 images, pyarrow's
defaults), of noise, as JPEG files do not compress either: some 2.6 GB. Reads images in a random order, from the page
cache: what a disk adds is proportional to the bytes that are read, which are printed; growth is that of a process's own
memory (/proc) over 10,000 more reads. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from dino_xcit.data import Source, files, open_source  # noqa: E402

A_FILE, A_GROUP, CLASSES = 4000, 100, 1000


def make_files(folder: Path, images: int, size: int, compression: str) -> None:
    """Files of up to 4,000 images."""
    rng = np.random.default_rng(0)
    names = [f"n{label:08d}" for label in range(CLASSES)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for start in range(0, images, A_FILE):
        count = min(A_FILE, images - start)
        sizes = rng.integers(size // 2, size * 3 // 2, count)
        rows = [{"bytes": rng.bytes(int(sizes[row])), "path": f"{start + row}.JPEG"} for row in range(count)]
        table = pa.table({"image": rows, "label": rng.integers(0, CLASSES, count)}).replace_schema_metadata(metadata)
        path = folder / f"{compression}-{start // A_FILE:05d}.parquet"
        pq.write_table(table, path, row_group_size=A_GROUP, compression=compression)


def milliseconds(read: Callable[[int], object], order: list[int]) -> float:
    """Of one image."""
    began = time.perf_counter()
    for index in order:
        read(index)
    return 1e3 * (time.perf_counter() - began) / len(order)


def bytes_an_image(source: Source, order: list[int]) -> float:
    """What is asked of the file system for one image, in KB."""
    asked = 0
    real = files.read_range

    def counted(path: str, start: int, length: int, unchanged: files.Stamp | None = None) -> bytes:
        nonlocal asked
        asked += length
        return real(path, start, length, unchanged)

    files.read_range = counted
    try:
        for index in order:
            source.read(index)
    finally:
        files.read_range = real
    return asked / len(order) / 1e3


def private_mb() -> float:
    """What this process has written in memory and has alone."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == "Private_Dirty:") / 1e3


def by_row_group(folder: Path, index: int) -> None:
    """What pyarrow offers: the row group in which the image is, memory-mapped."""
    file, row = divmod(index, A_FILE)
    path = folder / f"snappy-{file:05d}.parquet"
    with pq.ParquetFile(path, memory_map=True) as parquet:
        group = parquet.read_row_group(row // A_GROUP, columns=["image.bytes"], use_threads=False)
        group.column("image")[row % A_GROUP]["bytes"].as_py()


def figures(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    result: dict[str, Any] = {"images": args.images, "mean_bytes": args.bytes}
    order = np.random.default_rng(1).permutation(args.images)[: args.read].tolist()
    for compression in ("snappy", "none"):
        make_files(folder, args.images, args.bytes, compression)
        url = f"parquet:{folder}/{compression}-*.parquet"
        size = sum(path.stat().st_size for path in folder.glob(f"{compression}-*"))
        began = time.perf_counter()
        source = open_source(url)
        result[f"{compression}_index_s"] = time.perf_counter() - began
        result[f"{compression}_index_gb_per_s"] = size / 1e9 / result[f"{compression}_index_s"]
        began = time.perf_counter()
        source = open_source(url)
        result[f"{compression}_open_s"] = time.perf_counter() - began
        result[f"{compression}_ms"] = milliseconds(source.read, order)
        result[f"{compression}_kb"] = bytes_an_image(source, order)
        before = private_mb()
        for index in order * (10_000 // len(order)):
            source.read(index)
        result[f"{compression}_growth_mb"] = private_mb() - before
    few = order[: max(20, args.read // 20)]
    result["row_group_ms"] = milliseconds(lambda index: by_row_group(folder, index), few)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for index in range(min(A_FILE, len(source))):
            item, _ = source.read(index)
            assert isinstance(item, bytes)
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = len(item)
            tar.addfile(member, io.BytesIO(item))
    shard = open_source(f"tar:{folder}/shard.tar")
    result["tar_ms"] = milliseconds(shard.read, [index % len(shard) for index in order])
    return result


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--bytes", type=int, default=110_000, help="of an image, on average")
    parser.add_argument("--read", type=int, default=2000, help="images that are read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DINO_XCIT_CACHE"] = str(Path(folder) / "cache")
        result = figures(Path(folder), args)
    for name, value in result.items():
        print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value:,}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
