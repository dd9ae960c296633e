"""Whitening against its definition and scikit-learn, and its file: never executed, never trusted."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_arrays import NO_ARRAYS
from numpy.typing import NDArray
from sklearn.decomposition import PCA

import eval.collection.whitening
from dino_xcit.errors import InputError
from eval.collection.whitening import FORMAT, Whitening, learn, load, save

KIND = {"weights": "w", "pooling": "gem"}
SET = {"data": [{"url": "photos"}]}


def correlated(count: int = 500, width: int = 8) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 5).astype(np.float32)


def learned(vectors: Any, dim: int = 0) -> Whitening:
    return learn(vectors, dim, KIND, SET)


def test_whitened_vectors_have_mean_zero_and_unit_covariance() -> None:
    vectors = correlated()
    found = learned(vectors)(vectors).astype(np.float64)
    assert found.mean(axis=0) == pytest.approx(np.zeros(8), abs=1e-4)
    assert np.cov(found.T) == pytest.approx(np.eye(8), abs=1e-4)


def test_it_is_scikit_learns_whitening_up_to_the_signs() -> None:
    vectors, others = correlated(), correlated(20)
    peer = PCA(3, whiten=True).fit(vectors.astype(np.float64)).transform(others.astype(np.float64))
    found = learned(vectors, 3)(others)
    assert found.shape == (20, 3)
    assert np.abs(found) == pytest.approx(np.abs(peer), abs=1e-4)
    assert (np.sign(found) == np.sign(peer)).all(axis=0).sum() + (np.sign(found) == -np.sign(peer)).all(
        axis=0
    ).sum() == 3


def test_vectors_may_be_mapped_and_in_half_precision_and_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = correlated().astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    whole = learned(vectors)
    monkeypatch.setattr(eval.collection.whitening, "_ROWS_AT_ONCE", 64)
    pieces = learned(np.load(tmp_path / "v.npy", mmap_mode="r"))
    assert pieces.projection == pytest.approx(whole.projection, abs=1e-6)
    assert pieces.mean == pytest.approx(whole.mean, abs=1e-6)


def test_directions_in_which_nothing_varies_are_left_out() -> None:
    vectors = correlated(6, 8)
    assert learned(vectors).projection.shape == (8, 5), "six points vary in five directions"
    with pytest.raises(InputError, match="whiten_dim is 6, but these 6 vectors of 8 numbers vary in 5 directions"):
        learned(vectors, 6)
    with pytest.raises(InputError, match="vary in 0 directions"):
        learned(np.ones((4, 3), dtype=np.float32))
    with pytest.raises(InputError, match="found 1"):
        learned(vectors[:1])


def test_a_file_gives_back_the_same_whitening_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    whitening = learned(correlated(), 5)
    save(whitening, tmp_path / "new" / "w.npz")
    back = load(tmp_path / "new" / "w.npz")
    assert back.hash == whitening.hash
    assert (back.projection == whitening.projection).all()
    assert (back.made_for, back.learned_on) == (KIND, SET)
    save(whitening, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "new" / "w.npz").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.npz"]
    with np.load(tmp_path / "again.npz") as arrays:  # anybody's NumPy reads it
        assert arrays["projection"].shape == (8, 5)


def test_the_hash_tells_other_numbers() -> None:
    whitening = learned(correlated(), 5)
    other = Whitening(whitening.mean + 1, whitening.projection, KIND, SET)
    turned = Whitening(whitening.mean, whitening.projection[:, ::-1], KIND, SET)
    assert len({whitening.hash, other.hash, turned.hash, learned(correlated(), 4).hash}) == 4


def arrays_of(**changes: Any) -> dict[str, Any]:
    card = json.dumps({"format": FORMAT, "made_for": KIND, "learned_on": SET})
    text = np.frombuffer(card.encode(), dtype=np.uint8)
    return {"mean": np.zeros(4, np.float32), "projection": np.ones((4, 2), np.float32), "card": text} | changes


def card_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def text(path: Path) -> None:
    path.write_text("no archive")


def longer_than_it_is(path: Path) -> None:
    """An array that claims a terabyte."""
    with zipfile.ZipFile(path, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (250000000000,), }"
        for name in ("mean.npy", "projection.npy", "card.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


WRONG: dict[str, tuple[dict[str, Any] | Callable[[Path], None], str]] = {
    "pickled": ({"mean": np.array([{}, {}, {}, {}], dtype=object)}, "allow_pickle"),
    "another member": ({"more": np.zeros(1)}, "does not hold"),
    "other types": ({"mean": np.zeros(4)}, "other types or shapes"),
    "shapes that do not fit": ({"mean": np.zeros(5, np.float32)}, "a mean of 5 numbers and a projection from 4 to 2"),
    "not finite": ({"projection": np.full((4, 2), np.nan, np.float32)}, "not finite"),
    "another format": ({"card": card_bytes('{"format": "x"}')}, "its format is 'x'"),
    "no card": ({"card": card_bytes("[")}, "Expecting value"),
    "card of numbers": ({"card": np.zeros(3)}, "its card is no text"),
    "card without kind": ({"card": card_bytes(json.dumps({"format": FORMAT}))}, "made_for"),
    "cut short": (cut, "not a zip file"),
    "text": (text, "not a zip file"),
    "claims a terabyte": (longer_than_it_is, "no whitening"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_whitening_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    change, sentence = WRONG[name]
    path = tmp_path / "w.npz"
    np.savez(path, **arrays_of(**(change if isinstance(change, dict) else {})))
    if not isinstance(change, dict):
        change(path)
    with pytest.raises(InputError, match=sentence):
        load(path)


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_a_member_that_is_no_array_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for member in ("mean", "projection", "card"):
            archive.writestr(f"{member}.npy", NO_ARRAYS[name])
    with pytest.raises(InputError, match="is no whitening"):
        load(tmp_path / "w.npz")


def test_a_good_file_is_not_among_those_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **arrays_of())
    assert load(tmp_path / "w.npz").projection.shape == (4, 2)
    np.savez_compressed(tmp_path / "small.npz", **arrays_of())
    with pytest.raises(InputError, match="compressed"):
        load(tmp_path / "small.npz")
    with pytest.raises(InputError, match=r"there is no whitening .*: learn one with run_extract\.py"):
        load(tmp_path / "none.npz")
    with pytest.raises(InputError, match="no whitening"):
        load(tmp_path)
    with pytest.raises(InputError, match="cannot write the whitening"):
        save(learned(correlated()), tmp_path / "w.npz" / "below.npz")
