"""The indices of a collection: what they find against the exact answer, and the recall that they state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from eval_fixtures import unit
from numpy.typing import NDArray

import eval.index
from eval.index import Found, add_rows, build, describe, exact_search, read_index, recall


def vectors_of(count: int, width: int = 16, seed: int = 0) -> NDArray[np.float32]:
    """In a hundred clouds, at length 1."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(100, width))
    return unit(centres[rng.integers(0, 100, count)] + 0.7 * rng.normal(size=(count, width))).astype(np.float32)


def truth(vectors: NDArray[Any], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


def check_exact(found: Found, vectors: NDArray[Any], queries: NDArray[np.float32], top: int) -> None:
    """The ``top`` largest products with all vectors, the largest first."""
    scores, rows = found
    products = truth(vectors, queries)
    assert (rows == np.argsort(-products, axis=1)[:, :top]).all()
    assert scores == pytest.approx(-np.sort(-products, axis=1)[:, :top], abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_flat_is_exact_for_the_vectors_as_they_are_kept(dtype: type) -> None:
    vectors, queries = vectors_of(500).astype(dtype), vectors_of(20, seed=1)
    index = build("flat", vectors)
    check_exact(index.search(queries, 7), vectors, queries, 7)
    assert describe(index, "flat", vectors) == {"type": "flat", "exact": True}
    assert (index.reconstruct_n(0, 500) == vectors.astype(np.float32)).all()
    assert index.sa_code_size() == 16 * vectors.itemsize, "half precision halves the index, too"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_graphs_recall_is_what_a_comparison_with_all_vectors_gives(dtype: type) -> None:
    vectors = vectors_of(1500, 24).astype(dtype)
    index = build("hnsw", vectors)
    index.hnsw.efSearch = 12  # so that it misses some
    card = describe(index, "hnsw", vectors)
    chosen = np.unique(np.linspace(0, 1499, 1000).astype(np.int64))
    products = truth(vectors, vectors[chosen].astype(np.float32))
    products[np.arange(len(chosen)), chosen] = -np.inf
    _, rows = index.search(vectors[chosen].astype(np.float32), 11)
    hits = []
    for own, found, product in zip(chosen, rows, products, strict=True):
        exact = set(np.argsort(-product)[:10].tolist())
        hits.append(len(exact & set([row for row in found if row != own][:10])) / 10)
    assert card["recall"]["percent"] == pytest.approx(100 * np.mean(hits), abs=0.02)
    assert 50 < card["recall"]["percent"] < 99.9
    assert (card["exact"], card["recall"]["at"], card["recall"]["queries"]) == (False, 10, 1000)


def test_vectors_as_near_as_the_last_one_wanted_count_as_found() -> None:
    vectors = np.repeat(vectors_of(10), 30, axis=0)
    assert recall(build("flat", vectors), vectors, np.arange(300), 5) == 100.0


def test_rows_are_added_behind_the_others_whatever_the_index() -> None:
    more = vectors_of(30, seed=2)
    for kind in ("flat", "hnsw"):
        first = vectors_of(300)
        index = build(kind, first)  # type: ignore[arg-type]
        add_rows(index, more)
        scores, rows = index.search(more, 1)
        assert (rows[:, 0] == 300 + np.arange(30)).all()
        assert scores == pytest.approx(np.ones((30, 1)), abs=1e-5)


def with_a_common_part(count: int, share: float) -> NDArray[np.float32]:
    """Vectors of length 1 that differ by ``share`` only, as a network's features do: their cosines are all near 1."""
    rng = np.random.default_rng(4)
    return unit(rng.normal(size=32) / 32**0.5 + share * vectors_of(count, 32)).astype(np.float32)


def test_neighbours_that_are_missed_count_as_missed_however_near_all_are() -> None:
    vectors = with_a_common_part(600, 0.002)
    wrong = build("flat", vectors[::-1].copy())  # finds the rows of other vectors
    assert recall(wrong, vectors, np.arange(600), 10) < 10
    assert recall(build("flat", vectors), vectors, np.arange(600), 10) > 95


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("flat", [faiss.IndexLSH(32, 8), faiss.IndexFlatL2(32)]),
        ("hnsw", [faiss.IndexLSH(32, 8), faiss.IndexHNSWFlat(32, 8, faiss.METRIC_L2)]),
    ],
)
def test_an_index_of_another_kind_or_metric_is_refused(kind: Any, others: list[faiss.Index], tmp_path: Path) -> None:
    path = tmp_path / "i.faiss"
    right = build(kind, vectors_of(500, 32))
    faiss.write_index(right, str(path))
    assert read_index(path, kind).ntotal == right.ntotal
    for other in others:
        faiss.write_index(other, str(path))
        with pytest.raises(ValueError, match="its index"):
            read_index(path, kind)


def test_an_index_reads_and_writes_no_other_file(tmp_path: Path) -> None:
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
    with pytest.raises(RuntimeError, match=r"collection/victim\.bin"):  # looked for beside the index, and nowhere else
        read_index(folder / "i.faiss", "flat")
    assert victim.read_bytes() == b"secret" * 100_000


def test_exact_search_without_an_index_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = vectors_of(500).astype(np.float16), vectors_of(20, seed=1)
    monkeypatch.setattr(eval.index, "_ROWS_AT_ONCE", 64)
    check_exact(exact_search(vectors, queries, 9), vectors, queries, 9)
    assert exact_search(vectors, queries, 10_000)[1].shape == (20, 500)
