"""PCA whitening: agreement with scikit-learn, its file, and refusal of invalid files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_arrays import NO_ARRAYS
from numpy.typing import NDArray
from sklearn.decomposition import PCA

import eval.retrieval.whitening
from dino_xcit.errors import InputError
from eval.retrieval.whitening import FORMAT, Whitening, learn, load, save

KIND = {"weights": "w", "pooling": "gem"}
SET = {"data": [{"url": "photos"}]}


def correlated(count: int = 500, width: int = 8) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 5).astype(np.float32)


def learned(vectors: Any, dim: int = 0) -> Whitening:
    return learn(vectors, dim, KIND, SET)


def test_whitening_equals_scikit_learn_up_to_signs() -> None:
    vectors, others = correlated(), correlated(20)
    peer = PCA(3, whiten=True).fit(vectors.astype(np.float64)).transform(others.astype(np.float64))
    found = learned(vectors, 3)(others)
    assert found == pytest.approx(peer * np.sign(peer[0] * found[0]), abs=1e-4)


def test_learn_in_chunks_from_mapped_float16_equals_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = correlated().astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    whole = learned(vectors)
    monkeypatch.setattr(eval.retrieval.whitening, "_ROWS_AT_ONCE", 64)
    pieces = learned(np.load(tmp_path / "v.npy", mmap_mode="r"))
    assert pieces.projection == pytest.approx(whole.projection, abs=1e-6)
    assert pieces.mean == pytest.approx(whole.mean, abs=1e-6)


def test_directions_without_variance_are_left_out() -> None:
    vectors = correlated(6, 8)
    assert learned(vectors).projection.shape == (8, 5), "six vectors vary in five directions"
    with pytest.raises(InputError, match="vary in 5 directions"):
        learned(vectors, 6)
    with pytest.raises(InputError, match="vary in 0 directions"):
        learned(np.ones((4, 3), dtype=np.float32))
    with pytest.raises(InputError, match="found 1"):
        learned(vectors[:1])


def test_saved_whitening_reloads_equal_and_file_is_deterministic(tmp_path: Path) -> None:
    whitening = learned(correlated(), 5)
    save(whitening, tmp_path / "new" / "w.npz")
    back = load(tmp_path / "new" / "w.npz")
    assert back.hash == whitening.hash
    assert (back.projection == whitening.projection).all()
    assert (back.made_for, back.learned_on) == (KIND, SET)
    save(whitening, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "new" / "w.npz").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.npz"]


def arrays_of(**changes: Any) -> dict[str, Any]:
    metadata = json.dumps({"format": FORMAT, "made_for": KIND, "learned_on": SET})
    text = np.frombuffer(metadata.encode(), dtype=np.uint8)
    return {"mean": np.zeros(4, np.float32), "projection": np.ones((4, 2), np.float32), "metadata": text} | changes


WRONG: dict[str, Any] = {
    "pickled": {"mean": np.array([{}, {}, {}, {}], dtype=object)},
    "other types": {"mean": np.zeros(4)},
    "shapes that do not fit": {"mean": np.zeros(5, np.float32)},
    "not finite": {"projection": np.full((4, 2), np.nan, np.float32)},
    "another format": {"metadata": np.frombuffer(b'{"format": "x", "made_for": {}, "learned_on": {}}', np.uint8)},
    "no metadata": {"metadata": np.frombuffer(b"[", np.uint8)},
    "metadata without kind": {"metadata": np.frombuffer(json.dumps({"format": FORMAT}).encode(), np.uint8)},
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_whitening_file_is_refused(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **arrays_of())
    assert load(tmp_path / "w.npz").projection.shape == (4, 2)
    np.savez(tmp_path / "w.npz", **arrays_of(**WRONG[name]))
    with pytest.raises(InputError, match="is no valid whitening"):
        load(tmp_path / "w.npz")


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_whitening_with_invalid_array_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for member in ("mean", "projection", "metadata"):
            archive.writestr(f"{member}.npy", NO_ARRAYS[name])
    with pytest.raises(InputError, match="is no valid whitening"):
        load(tmp_path / "w.npz")


def test_empty_truncated_or_missing_whitening_is_refused(tmp_path: Path) -> None:
    save(learned(correlated()), tmp_path / "w.npz")
    whole = (tmp_path / "w.npz").read_bytes()
    for content in (b"", whole[:-30]):
        (tmp_path / "w.npz").write_bytes(content)
        with pytest.raises(InputError, match="is no valid whitening"):
            load(tmp_path / "w.npz")
    with pytest.raises(InputError, match=r"found no whitening .*--learn-whitening"):
        load(tmp_path / "none.npz")
