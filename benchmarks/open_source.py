"""Time to open a data set of a million images, and memory of the loader workers that read it.

    python benchmarks/open_source.py [--images 1280000] [--read 200000] [--workers 2]

Creates tar shards with that many images and labels of a few bytes each in a temporary folder (about 2.6 GB). The memory
of a worker is its Private_Dirty in /proc, which includes pages copied from its parent by reference counting. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from dino_xcit.data import Source, open_source  # noqa: E402
from eval.table import table  # noqa: E402

IMAGES_A_SHARD = 10_000


def member(name: bytes, content: bytes) -> bytes:
    """Return a tar header and content of less than 512 bytes; tarfile takes minutes for a million members."""
    fields = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(content) + b"00000000000\0"
    header = (name.ljust(100, b"\0") + fields + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000").ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:] + content.ljust(512, b"\0")


def make_shards(folder: Path, images: int) -> str:
    """Write shards like ImageNet's in WebDataset format, and return their URL."""
    rng = np.random.default_rng(0)
    for start in range(0, images, IMAGES_A_SHARD):
        with open(folder / f"train-{start:08d}.tar", "wb") as file:
            for image in range(start, min(start + IMAGES_A_SHARD, images)):
                label = int(rng.integers(1000))
                key = b"n%08d_%08d" % (label, image)
                file.write(member(key + b".JPEG", b"%d" % image) + member(key + b".cls", b"%d" % label))
            file.write(bytes(1024))
    return f"tar:{folder}/*.tar"


def opening(url: str) -> float:
    """Return the seconds to open a source in a new process, without the start of Python."""
    command = [sys.executable, __file__, "--only-open", url]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Lengths(Dataset[int]):
    """Reads an image and returns its length in bytes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> int:
        item, _ = self.source.read(index)
        self.source.name(index)
        return len(item)


def private_mb(process: int) -> float:
    """Return the Private_Dirty memory of a process in MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Private_Dirty:"))


def read_through_workers(source: Source, count: int, workers: int, method: str) -> dict[str, Any]:
    """Read random images in loader workers; return the time, and their memory at the start, middle and end."""
    before = {process.pid for process in multiprocessing.active_children()}
    loader = DataLoader(
        Lengths(source), 100, sampler=np.random.default_rng(1).integers(len(source), size=count).tolist(),
        num_workers=workers, multiprocessing_context=method, collate_fn=sum,
    )  # fmt: skip
    moments = {len(loader) // 100: "start", len(loader) // 2: "middle", len(loader) - 3 * workers: "end"}
    memory: dict[str, list[float]] = {}
    began = time.perf_counter()
    for step, _ in enumerate(loader):
        if step in moments:
            own = [p.pid for p in multiprocessing.active_children() if p.pid not in before and p.pid is not None]
            memory[moments[step]] = [private_mb(process) for process in sorted(own)]
    return {"read_seconds": time.perf_counter() - began, **{f"private_MB_{name}": mb for name, mb in memory.items()}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--read", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only-open", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    began = time.perf_counter()
    if given.only_open:
        open_source(given.only_open)
        print(time.perf_counter() - began)
        return
    with tempfile.TemporaryDirectory(prefix="open_source-") as folder:
        os.environ["DINO_XCIT_CACHE"] = f"{folder}/cache"
        url = make_shards(Path(folder), given.images)
        began = time.perf_counter()
        source = open_source(url)
        indexing, again = time.perf_counter() - began, opening(url)
        size = sum(file.stat().st_size for file in Path(folder).glob("cache/index/**/*") if file.is_file())
        results: dict[str, Any] = {"images": given.images, "tar_index_seconds": indexing, "tar_open_seconds": again}
        results["index_bytes_per_image"] = size / given.images
        for method in ("fork", "forkserver"):
            found = read_through_workers(source, given.read, given.workers, method)
            results |= {f"{method}_{name}": value for name, value in found.items()}
    print(table(["", "seconds, bytes, MB"], [[name, str(value)] for name, value in results.items()]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
