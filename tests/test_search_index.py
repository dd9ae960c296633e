"""Search indices of a collection: results against brute force, measured recall, untrusted index files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from eval_fixtures import unit
from numpy.typing import NDArray

import eval.search_index
from eval.search_index import DeviceIndex, Found, add_rows, build, describe, exact_search, read_index, recall


def vectors_of(count: int, width: int = 16, seed: int = 0) -> NDArray[np.float32]:
    """Return unit vectors in 100 clusters."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(100, width))
    return unit(centres[rng.integers(0, 100, count)] + 0.7 * rng.normal(size=(count, width))).astype(np.float32)


def truth(vectors: NDArray[Any], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


def check_exact(found: Found, vectors: NDArray[Any], queries: NDArray[np.float32], top: int) -> None:
    """Check that ``found`` has the ``top`` largest inner products with all vectors, largest first."""
    scores, rows = found
    products = truth(vectors, queries)
    assert (rows == np.argsort(-products, axis=1)[:, :top]).all()
    assert scores == pytest.approx(-np.sort(-products, axis=1)[:, :top], abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_flat_index_is_exact_in_stored_precision(dtype: type) -> None:
    vectors, queries = vectors_of(500).astype(dtype), vectors_of(20, seed=1)
    index = build("flat", vectors)
    check_exact(index.search(queries, 7), vectors, queries, 7)
    assert describe(index, "flat", vectors) == {"type": "flat", "exact": True}
    assert (index.reconstruct_n(0, 500) == vectors.astype(np.float32)).all()
    assert index.sa_code_size() == 16 * vectors.itemsize, "the index does not store vectors in their own precision"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hnsw_recall_equals_brute_force_recall(dtype: type) -> None:
    vectors = vectors_of(1500, 24).astype(dtype)
    index = build("hnsw", vectors)
    index.hnsw.efSearch = 12  # low enough to miss some neighbours
    metadata = describe(index, "hnsw", vectors)
    chosen = np.unique(np.linspace(0, 1499, 1000).astype(np.int64))
    products = truth(vectors, vectors[chosen].astype(np.float32))
    products[np.arange(len(chosen)), chosen] = -np.inf
    _, rows = index.search(vectors[chosen].astype(np.float32), 11)
    hits = []
    for own, found, product in zip(chosen, rows, products, strict=True):
        exact = set(np.argsort(-product)[:10].tolist())
        hits.append(len(exact & set([row for row in found if row != own][:10])) / 10)
    assert metadata["recall"]["percent"] == pytest.approx(100 * np.mean(hits), abs=0.02)
    assert 50 < metadata["recall"]["percent"] < 99.9
    assert (metadata["exact"], metadata["recall"]["at"], metadata["recall"]["queries"]) == (False, 10, 1000)


def test_recall_counts_ties_with_last_neighbour_as_found() -> None:
    vectors = np.repeat(vectors_of(10), 30, axis=0)
    assert recall(build("flat", vectors), vectors, np.arange(300), 5) == 100.0


def test_add_rows_appends_to_flat_and_hnsw_index() -> None:
    more = vectors_of(30, seed=2)
    for kind in ("flat", "hnsw"):
        first = vectors_of(300)
        index = build(kind, first)  # type: ignore[arg-type]
        add_rows(index, more)
        scores, rows = index.search(more, 1)
        assert (rows[:, 0] == 300 + np.arange(30)).all()
        assert scores == pytest.approx(np.ones((30, 1)), abs=1e-5)


def with_a_common_part(count: int, share: float) -> NDArray[np.float32]:
    """Return unit vectors that differ only by ``share``: like those of a network's features, all cosines are near 1."""
    rng = np.random.default_rng(4)
    return unit(rng.normal(size=32) / 32**0.5 + share * vectors_of(count, 32)).astype(np.float32)


def test_recall_counts_missed_neighbours_if_all_cosines_are_near_one() -> None:
    vectors = with_a_common_part(600, 0.002)
    wrong = build("flat", vectors[::-1].copy())  # in reversed order: returns wrong rows
    assert recall(wrong, vectors, np.arange(600), 10) < 10
    assert recall(build("flat", vectors), vectors, np.arange(600), 10) > 95


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("flat", [faiss.IndexLSH(32, 8), faiss.IndexFlatL2(32)]),
        ("hnsw", [faiss.IndexLSH(32, 8), faiss.IndexHNSWFlat(32, 8, faiss.METRIC_L2)]),
    ],
)
def test_read_index_refuses_other_kind_or_metric(kind: Any, others: list[faiss.Index], tmp_path: Path) -> None:
    path = tmp_path / "i.faiss"
    right = build(kind, vectors_of(500, 32))
    faiss.write_index(right, str(path))
    assert read_index(path, kind).ntotal == right.ntotal
    for other in others:
        faiss.write_index(other, str(path))
        with pytest.raises(ValueError, match="its index"):
            read_index(path, kind)


def test_read_index_opens_no_file_outside_its_folder(tmp_path: Path) -> None:
    many = vectors_of(3000, 32)
    victim = tmp_path / "elsewhere" / "victim.bin"
    victim.parent.mkdir()
    index: Any = faiss.index_factory(32, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(many)
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(victim))
    index.replace_invlists(lists)
    index.add(many)
    folder = tmp_path / "collection"
    folder.mkdir()
    faiss.write_index(index, str(folder / "i.faiss"))
    del index, lists
    victim.write_bytes(b"secret" * 100_000)
    with pytest.raises(RuntimeError, match=r"collection/victim\.bin"):  # searched only beside the index
        read_index(folder / "i.faiss", "flat")
    assert victim.read_bytes() == b"secret" * 100_000


def test_exact_search_matches_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = vectors_of(500).astype(np.float16), vectors_of(20, seed=1)
    monkeypatch.setattr(eval.search_index, "_ROWS_AT_ONCE", 64)
    check_exact(exact_search(vectors, queries, 9), vectors, queries, 9)
    assert exact_search(vectors, queries, 10_000)[1].shape == (20, 500)


def test_device_index_finds_what_faiss_finds() -> None:
    vectors, queries = vectors_of(500), vectors_of(20, seed=1)
    index = DeviceIndex(5 * vectors, torch.device("cpu"))
    check_exact(index.search(queries, 9), vectors, queries, 9)
    assert index.search(queries, 1000)[1].shape == (20, 500)
