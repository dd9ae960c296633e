"""WebDataset's ``.cls`` members that hold a class's name rather than its number."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_archives import packed, png

from dino_xcit.data import open_source
from dino_xcit.errors import InputError


def shard(folder: Path, **labels: bytes) -> str:
    """An image for each name, with its label."""
    members = {
        f"{name}.{kind}": data for name, label in labels.items() for kind, data in (("png", png()), ("cls", label))
    }
    path = folder / "s.tar"
    path.write_bytes(packed(members))
    return f"tar:{path}"


def test_names_are_classes_in_sorted_order(tmp_path: Path) -> None:
    source = open_source(shard(tmp_path, a=b"tench\n", b=b"crane", c=b"tench", d="Käfer 2".encode()))
    assert source.classes == ("Käfer 2", "crane", "tench")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 1, 2, 0]
    again = open_source(source.url)
    assert again.fingerprint() == source.fingerprint()  # from the kept index


def test_numbers_among_names_are_refused_with_one_of_each(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"some images are numbers, of others names \(such as 3 and 'crane', in \.cls"):
        open_source(shard(tmp_path, a=b"crane", b=b"3"))
