"""Approximate search: what it finds, and that it says how much."""

from __future__ import annotations

from typing import get_args

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.knn import knn_predict
from eval.knn.approximate import Kind, approximate_index
from eval.retrieval.index import UnitRows, WithVectors, build, build_index, search, unit_rows

KINDS = get_args(Kind)
ROWS, DIM = 3000, 20


def clouds(rows: int, seed: int) -> NDArray[np.float32]:
    """Points around 30 centres, of any length; together far from zero, as features are."""
    centres = 4 + np.random.default_rng(99).normal(size=(30, DIM))
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(30, size=rows)] + 0.5 * rng.normal(size=(rows, DIM))
    return (points * rng.uniform(0.1, 10, (rows, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def train() -> NDArray[np.float32]:
    return clouds(ROWS, 1)


@pytest.fixture(scope="module")
def queries() -> NDArray[np.float32]:
    return clouds(200, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_the_share_of_the_exact_neighbours_found(
    kind: Kind, train: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    found = approximate_index(train, queries, kind, [5, 20])
    similarity = unit_rows(queries).astype(np.float64) @ unit_rows(train).astype(np.float64).T
    ours = np.concatenate([rows for _, rows in search(found.index, queries, 20)])
    for k in (5, 20):
        exact = np.argsort(-similarity, axis=1)[:, :k]
        shares = [len(set(one) & set(other)) / k for one, other in zip(exact, ours[:, :k], strict=True)]
        assert found.recall[k] == pytest.approx(100 * np.mean(shares), abs=0.05)
        assert found.recall[k] > 90
    assert found.queries == 200
    assert found.describe("trained").startswith("approximate search (trained): ")
    assert found.to_card()["recall_percent"] == {"5": found.recall[5], "20": found.recall[20]}


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_have_their_exact_similarities(
    kind: Kind, train: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    """Also those that codes found: they are scored by the vectors themselves, however long those are."""
    found = approximate_index(train, queries, kind, [10], ROWS)
    ((similarities, rows),) = search(found.index, queries, 10)
    ((exact, _),) = search(build_index(train), queries, 10)
    own = (unit_rows(queries)[:, None] * unit_rows(train)[rows]).sum(axis=2)
    assert similarities == pytest.approx(own, abs=1e-5)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert kind == "pq" or similarities == pytest.approx(exact, abs=1e-5)


def test_looking_into_all_lists_is_the_exact_classifier(
    train: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    labels = np.random.default_rng(0).integers(0, 7, ROWS)
    found = approximate_index(train, queries, "ivf", [5, 20], 10**6)
    assert found.settings["probes"] == 110, "no more than there are lists"
    assert found.notices(10**6) == ["probes is 1,000,000, but there are 110 lists: all are looked into"]
    exact = knn_predict(train, labels, queries, [5, 20], [0.07])
    approximate = knn_predict(train, labels, queries, [5, 20], [0.07], index=found.index)
    assert all((approximate[key] == exact[key]).all() for key in exact)


def test_more_probes_find_more(train: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
    recalls = [approximate_index(train, queries, "ivf", [50], probes).recall[50] for probes in (1, 4, 16, 110)]
    assert recalls == sorted(recalls)
    assert recalls[0] < 90
    assert recalls[-1] > 99.9


def two_lists(train: NDArray[np.float32]) -> faiss.Index:
    """Lists around the first two axes, of which a query sees one."""
    centres = faiss.IndexFlatL2(2)
    centres.add(np.eye(2, dtype=np.float32))
    index = faiss.IndexIVFFlat(centres, 2, 2, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.add(train)
    return index


def test_neighbours_that_were_not_found_have_no_vote() -> None:
    train = np.array([[1, 0], [1, 0.1], [0.1, 1]], dtype=np.float32)
    queries = np.array([[1, 0], [0, 1]], dtype=np.float32)
    labels = np.array([3, 3, 8])
    index = two_lists(unit_rows(train))
    assert [rows.tolist() for _, rows in search(index, queries, 3)] == [[[0, 1, -1], [2, -1, -1]]]
    guesses = knn_predict(train, labels, queries, [3], [1e30], index=index)[3, 1e30]
    assert guesses.tolist() == [[3, 8], [8, 3]]

    # Nothing at all is found for the second query: no class has a vote, the lowest number comes first.
    index = two_lists(unit_rows(train[[0, 1, 1]]))
    assert knn_predict(train, labels, queries, [3], [0.07], index=index)[3, 0.07].tolist() == [[3, 8], [3, 8]]


def test_features_that_hardly_differ_are_still_told_apart() -> None:
    """Cosines of 0.999 between any two: codes scored by inner product find next to nothing there."""
    rng = np.random.default_rng(0)
    features = (1 + 0.03 * clouds(4000, 3) / 10).astype(np.float32) + 0.001 * rng.normal(size=(4000, DIM)).astype(
        np.float32
    )
    assert float(np.mean(unit_rows(features[:50]) @ unit_rows(features[50:100]).T)) > 0.99
    for kind in KINDS:
        assert approximate_index(features[200:], features[:200], kind, [20]).recall[20] > 90, kind


def test_the_graph_looks_at_no_fewer_candidates_than_neighbours_wanted(
    train: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    found = approximate_index(train, queries, "hnsw", [20, 200], probes=3)
    assert found.settings["probes"] == 200
    assert found.notices(3) == [
        "probes is 3, fewer candidates than the 200 neighbours that are looked for: 200 are looked at"
    ]
    assert found.recall[200] > 80
    assert found.short == 0
    assert approximate_index(train, queries, "hnsw", [20], probes=300).notices(300) == []
    few = WithVectors(build("hnsw", UnitRows(train), nprobe=3, k=1), UnitRows(train))
    assert (few.search(unit_rows(queries), 50)[1] >= 0).all(), "whatever it was built for"


def test_queries_that_find_fewer_neighbours_than_vote_are_counted_and_said(
    train: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    found = approximate_index(train, queries, "ivf", [5, 200], probes=1)
    ((_, rows),) = search(found.index, queries, 200)
    assert found.short == (rows < 0).any(axis=1).sum() > 100
    assert found.to_card()["queries_with_fewer_than_k"] == found.short
    (notice,) = found.notices(1)
    assert notice.startswith(f"for {found.short} of 200 queries fewer than 200 neighbours were found")


def test_a_vector_of_zeros_is_like_nothing(train: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
    """By distance it would be as near as a cosine of 0.5."""
    opposite = np.concatenate([train, np.zeros((1, DIM), dtype=np.float32)])
    for kind in KINDS:
        found = approximate_index(opposite, queries, kind, [ROWS + 1], probes=ROWS + 1)
        ((similarities, rows),) = search(found.index, -queries, ROWS + 1)
        assert similarities[rows == ROWS] == pytest.approx(np.zeros((rows == ROWS).sum()), abs=1e-6), kind


def test_few_images_are_refused_with_a_sentence(train: NDArray[np.float32]) -> None:
    with pytest.raises(InputError, match="approximate is hnsw, but 999 training images are searched exactly"):
        approximate_index(train[:999], train, "hnsw", [5])
