"""What the tests of packing pack, and what they find in the shards."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from bad_images import encoded, photograph

from dino_xcit.data import Source, Subset, open_source
from dino_xcit.data.packing.folder import Options

FIVE = Options(shard_images=5)


def pixels(count: int) -> Source:
    """So many pictures of 28 x 28 pixels with labels."""
    return Subset(open_source("sample:fashion-mnist", "train"), np.arange(count))


def class_tree(root: Path, images: int = 6) -> Path:
    """Two classes of JPEGs and PNGs of 96 x 72."""
    for label, name in enumerate(("n01", "n02")):
        (root / name).mkdir(parents=True)
        for number in range(images):
            kind, suffix = ("PNG", "png") if number % 3 == 2 else ("JPEG", "JPEG")
            data = encoded(photograph(label * 100 + number), kind)
            (root / name / f"{name}_{number}.v1.{suffix}").write_bytes(data)
    return root


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every shard, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def items(folder: Path) -> list[tuple[str, bytes, int | None]]:
    """(original name, image bytes, label) of what was packed, in order, as WebDataset would group it."""
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in members(folder).items():
        key, _, suffix = name.partition(".")
        samples.setdefault(key, {})[suffix] = data
    found = []
    for key, sample in samples.items():
        label = sample.pop("cls", None)
        (data,) = sample.values()
        original = unquote(key.partition("_")[2], errors="surrogateescape")
        found.append((original, data, None if label is None else int(label)))
    return found


def originals(source: Source, root: Path) -> list[tuple[str, Any, int | None]]:
    return [(str(Path(source.name(i)).relative_to(root)), *source.read(i)) for i in range(len(source))]
