"""card.json of a collection that somebody else wrote, or that was damaged: one sentence, never a traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_arrays import NO_ARRAYS

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from eval.collection.card_file import read_card
from eval.collection.store import existing, is_half_renamed, open_collection, write_collection
from eval.pooling import Descriptor

CARD: dict[str, Any] = {
    "format": "dino-xcit-vectors-2",
    "count": 5,
    "dimension": 3,
    "normalised": True,
    "dtype": "fp32",
    "descriptor": Descriptor("gem").to_dict(),
    "whitening": None,
    "index": {"type": "flat"},
    "weights": {"hash": "w", "path": "/weights.pth", "network": "teacher", "arch": "xcit_pico_4_p4"},
    "data": {
        "url": "photos",
        "absolute_url": "/photos",
        "names_start_from": "/",
        "images": 4,
        "fingerprint": "d",
        "unreadable": {"count": 1, "first": ["/photos/0.jpg"]},
    },
    "added": [{"url": "more", "images": 2, "fingerprint": "e"}],
    "transform": EvalTransform().to_dict(),
}
MISSING = object()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    write_collection(tmp_path / "v", iter([rows]), list("abcde"), rows.shape, CARD)
    return tmp_path / "v"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The card with one field another, or without it; ``path`` such as ``added.0.url``."""
    card = copy.deepcopy(CARD)
    *above, last = path.split(".")
    holder: Any = card
    for name in above:
        holder = holder[int(name) if isinstance(holder, list) else name]
    key: Any = int(last) if isinstance(holder, list) else last
    if value is MISSING:
        del holder[key]
    else:
        holder[key] = value
    return card


DAMAGE = [
    ("format", MISSING, "its format is None"),
    ("format", ["x"], "its format is"),
    ("count", MISSING, "its card lacks count"),
    ("count", "5", "its count is a text, expected a whole number"),
    ("count", True, "its count is true or false, expected a whole number"),
    ("count", 5.0, "its count is a number, expected a whole number"),
    ("count", -1, "its count is not from 0 to"),
    ("count", 10**30, "its count is not from 0 to"),
    ("count", 6, "its count is 6, and its sources have 5 images"),
    ("dimension", 1 << 40, "its dimension is not from 0 to"),
    ("normalised", MISSING, "lacks normalised"),
    ("normalised", 1, "its normalised is a whole number, expected true or false"),
    ("dtype", "fp8", "its dtype is 'fp8', expected fp32 or fp16"),
    ("dtype", {}, "its dtype is an object"),
    ("descriptor", None, "its descriptor is nothing"),
    ("descriptor", {"pooling": "gem"}, "stored descriptor"),
    ("descriptor.scales", [10**400], "beyond all bounds"),
    ("descriptor.scales", [1.0] * 99, "scales is 1 1 1 1"),
    ("whitening", {}, "lacks whitening.hash"),
    ("whitening", "w", "its whitening is a text"),
    ("index", [], "its index is a list"),
    ("index", {}, "lacks index.type"),
    ("index.type", "lsh", "its index.type is 'lsh', expected one of flat"),
    ("index.type", ["flat"], "its index.type is a list"),
    ("weights", MISSING, "lacks weights"),
    ("weights.hash", MISSING, "lacks weights.hash"),
    ("weights.path", 7, "its weights.path is a whole number"),
    ("weights.network", [], "its weights.network is a list"),
    ("weights.arch", 3.5, "its weights.arch is a number"),
    ("weights.allowed", "missing norm.bias", "its weights.allowed is a text, expected a list"),
    ("weights.allowed", [7], "its weights.allowed holds something other than texts"),
    ("data", None, "its data is nothing, expected an object"),
    ("data.url", MISSING, "lacks data.url"),
    ("data.fingerprint", None, "its data.fingerprint is nothing"),
    ("data.images", MISSING, "lacks data.images"),
    ("data.images", 1 << 50, "its data.images is not from 0 to"),
    ("data.absolute_url", 1, "its data.absolute_url is"),
    ("data.names_start_from", {}, "its data.names_start_from is"),
    ("data.unreadable", 3, "its data.unreadable is"),
    ("data.unreadable", {}, "lacks data.unreadable.count"),
    ("data.unreadable.count", 5, "its data.unreadable.count is not from 0 to 4"),
    ("added", {}, "its added is an object, expected a list"),
    ("added.0", "more", r"its added\[0\] is a text"),
    ("added.0.url", None, r"its added\[0\].url is nothing"),
    ("transform", "none", "its transform is a text"),
    ("transform.mean", MISSING, "stored evaluation transform"),
    ("transform.crop", 10**9, "crop is not from 1 to"),
    ("transform.resize", 0, "resize is not from 1 to"),
    ("transform.std", [1.0, 0.0, 1.0], "std is 1, 0, 1"),
    ("transform.mean", [1.0, float("nan"), 1.0], "mean is 1, nan, 1"),
    ("transform.mean", [1.0, 10**400, 1.0], "stored evaluation transform: int too large"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), DAMAGE)
def test_a_field_that_is_missing_of_another_type_or_out_of_bounds_is_named(
    folder: Path, path: str, value: Any, sentence: str
) -> None:
    (folder / "card.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(InputError, match=rf"is damaged \(.*{sentence}"):
        open_collection(folder)
    assert existing(folder, CARD) == "other"


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '{"a": ' * 100_000, "9" * 10_000, "\udcff"])
def test_what_is_no_card_is_said(folder: Path, text: str) -> None:
    (folder / "card.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="is damaged"):
        open_collection(folder)
    (folder / ".new").mkdir()
    (folder / "card.json").rename(folder / ".new" / "card.json")
    assert not is_half_renamed(folder), "a damaged card is no collection that is whole"


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_vectors_that_are_no_table_of_numbers_are_said(folder: Path, name: str) -> None:
    (folder / "vectors.npy").write_bytes(NO_ARRAYS[name])
    with pytest.raises(InputError, match="is damaged"):
        open_collection(folder)


def test_a_card_of_gigabytes_is_not_read(folder: Path) -> None:
    with open(folder / "card.json", "r+b") as file:
        file.truncate(1 << 32)  # sparse
    with pytest.raises(InputError, match="longer than 64 MiB"):
        open_collection(folder)


def test_what_earlier_versions_did_not_write_may_be_missing(folder: Path) -> None:
    card = changed("data.unreadable", {"count": 0}) | {"added": [], "count": 4}
    for name in ("descriptor", "index", "dtype", "whitening", "added", "dimension"):
        del card[name]
    for name in ("network", "arch"):
        del card["weights"][name]
    (folder / "card.json").write_text(json.dumps(card))
    assert read_card(folder / "card.json") == json.loads(json.dumps(card))
