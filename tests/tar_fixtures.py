"""Shards of images, and what is in a source of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hostile_archives import packed

from dino_xcit.data import Source


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def labels(source: Source) -> list[int] | None:
    return None if source.labels is None else source.labels.tolist()


def three_shards(folder: Path) -> tuple[str, dict[str, bytes]]:
    """Three shards of ten images with labels; the pattern, and each image's bytes by its name."""
    rng = np.random.default_rng(0)
    contents: dict[str, bytes] = {}
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(10):
            data = rng.bytes(int(rng.integers(1, 3000)))
            members |= {f"{number:04d}.cls": str((shard + number) % 4).encode(), f"{number:04d}.jpg": data}
            contents[f"s-{shard}.tar/{number:04d}.jpg"] = data
        (folder / f"s-{shard}.tar").write_bytes(packed(members))
    return f"tar:{folder}/s-{{0..2}}.tar", contents
