"""A million images: how long it takes to open them, and whether the processes that read them stay small.

    python benchmarks/open_source.py [--images 1280000] [--read 200000] [--workers 2]

Tar shards with that many images and labels (a few bytes each) are made in a temporary folder: some 2.6 GB. A folder of
so many images is not: its index is stored as a scan would have left it, with real sub-folders, whose times are what
opening looks at. Memory, from /proc, is what a process has alone because it wrote there (Private_Dirty: its parent's
pages that it copied by counting references are in it), and its share of all (Pss), which takes in the pages of the
index that were read, once for all processes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from torch.utils.data import DataLoader, Dataset, Sampler  # noqa: E402

from dino_xcit.data import Source, open_source  # noqa: E402
from dino_xcit.data.index import Index, Strings, cached  # noqa: E402

IMAGES_A_SHARD = 10_000
CLASSES = 1000
BATCH = 100


def member(name: bytes, content: bytes) -> bytes:
    """A header and a content of less than 512 bytes."""
    fields = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(content) + b"00000000000\0"
    header = (name.ljust(100, b"\0") + fields + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000").ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:] + content.ljust(512, b"\0")


def make_shards(folder: Path, images: int) -> str:
    """Shards like those of ImageNet in WebDataset's form; their URL."""
    rng = np.random.default_rng(0)
    shards = -(-images // IMAGES_A_SHARD)
    for shard in range(shards):
        with open(folder / f"train-{shard:06d}.tar", "wb") as file:
            for image in range(min(IMAGES_A_SHARD, images - shard * IMAGES_A_SHARD)):
                label = int(rng.integers(CLASSES))
                key = b"n%08d_%06d" % (label, image)
                file.write(member(key + b".JPEG", b"%d %d" % (shard, image)) + member(key + b".cls", b"%d" % label))
            file.write(bytes(1024))
    return f"tar:{folder}/train-{{000000..{shards - 1:06d}}}.tar"


def store_folder_index(folder: Path, images: int) -> str:
    """A folder of classes, and in the cache what listing it would have left had it held so many images."""
    classes = [f"n{number:08d}" for number in range(CLASSES)]
    past = time.time() - 3600
    for name in classes:
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (past, past))
    os.utime(folder, (past, past))
    labels = np.sort(np.arange(images, dtype=np.int64) % CLASSES)
    names = Strings.pack(f"{classes[label]}/{classes[label]}_{place}.JPEG" for place, label in enumerate(labels))
    folders = [".", *classes]
    times = np.array([os.stat(folder / name).st_mtime_ns for name in folders], dtype=np.int64)
    strings = {"class": Strings.pack(classes), "folder": Strings.pack(folders), "version": Strings.pack([""])}
    numbers = {"label": labels, "folder_time": times}
    cached(f"folder:{folder}", lambda: Index(numbers, {"name": names, **strings}), lambda _: True)
    return str(folder)


def opened_elsewhere(url: str) -> dict[str, float]:
    """Open a source in a new process: seconds, without Python's own start."""
    command = [sys.executable, __file__, "--only-open", url]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    result: dict[str, float] = json.loads(line)
    return result


class Lengths(Dataset[int]):
    """Reads an image and gives its length."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        item, _ = self.source.read(index)
        self.source.name(index)
        return len(item)


class Order(Sampler[list[int]]):
    """Batches of random images."""

    def __init__(self, length: int, count: int) -> None:
        self.length, self.count = length, count

    def __len__(self) -> int:
        return self.count // BATCH

    def __iter__(self) -> Any:
        rng = np.random.default_rng(1)
        return (rng.integers(self.length, size=BATCH).tolist() for _ in range(len(self)))


def memory_of(process: int) -> tuple[float, float]:
    """Private_Dirty and Pss of a process, in MB."""
    lines = (line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines())
    found = {line[0]: int(line[1]) / 1000 for line in lines if line[0] in ("Private_Dirty:", "Pss:")}
    return found["Private_Dirty:"], found["Pss:"]


def read_through_workers(source: Source, count: int, workers: int, method: str) -> dict[str, Any]:
    """Read random images in loader processes; their memory at the start, in the middle and at the end."""
    before = {process.pid for process in multiprocessing.active_children()}
    loader = DataLoader(
        Lengths(source),
        batch_sampler=Order(len(source), count),
        num_workers=workers,
        multiprocessing_context=method,
        collate_fn=sum,
    )
    batches = len(loader)
    moments = {batches // 100: "start", batches // 2: "middle", batches - 3 * workers: "end"}
    memory: dict[str, list[tuple[float, float]]] = {}
    began = time.perf_counter()
    for step, _ in enumerate(loader):
        if step in moments:
            own = [p.pid for p in multiprocessing.active_children() if p.pid not in before and p.pid is not None]
            memory[moments[step]] = [memory_of(process) for process in sorted(own)]
    seconds = time.perf_counter() - began
    growth = max(last[0] - first[0] for first, last in zip(memory["start"], memory["end"], strict=True))
    share = max(last[1] - first[1] for first, last in zip(memory["start"], memory["end"], strict=True))
    return {
        "images": batches * BATCH,
        "seconds": seconds,
        "memory": memory,
        "growth_mb": growth,
        "pss_growth_mb": share,
    }


def main() -> None:
    """The measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--read", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only-open", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_open:
        began = time.perf_counter()
        source = open_source(options.only_open)
        print(json.dumps({"seconds": time.perf_counter() - began, "images": len(source)}))
        return
    folder = Path(tempfile.mkdtemp(prefix="open_source-"))
    os.environ["DINO_XCIT_CACHE"] = str(folder / "cache")
    results: dict[str, Any] = {"images": options.images}
    try:
        (folder / "shards").mkdir()
        tar = make_shards(folder / "shards", options.images)
        directory = store_folder_index(folder / "images", options.images)
        began = time.perf_counter()
        source = open_source(tar)
        results["tar_index_seconds"] = time.perf_counter() - began
        print(f"{len(source):,} images with labels, of {options.images // IMAGES_A_SHARD} shards")
        print(f"{'indexing the shards':40}{results['tar_index_seconds']:10.2f} s")
        for name, url in (("tar", tar), ("folder", directory)):
            again = opened_elsewhere(url)
            assert again["images"] == options.images, again
            results[f"{name}_open_seconds"] = again["seconds"]
            print(f"{f'opening again, {name}':40}{again['seconds']:10.2f} s")
        size = sum(file.stat().st_size for file in folder.glob("cache/index/*/*"))
        results["index_bytes_per_image"] = size / 2 / options.images
        print(f"{'bytes of index an image':40}{results['index_bytes_per_image']:10.0f}")
        for method in ("fork", "forkserver"):
            found = read_through_workers(source, options.read, options.workers, method)
            results[method] = found
            print(
                f"{found['images']:,} images through {options.workers} processes ({method}): {found['seconds']:.1f} s"
            )
            for moment, values in found["memory"].items():
                row = "   ".join(f"{own:7.1f} alone, {share:7.1f} with its share" for own, share in values)
                print(f"  MB at the {moment:8}{row}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
