"""Which column of a Parquet file is what; its index; files elsewhere."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_fixtures import hub_table, noise, opened, read_all

from dino_xcit.data.parquet import source as parquet
from dino_xcit.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- columns and labels


def test_cifar_s_names_are_understood(tmp_path: Path) -> None:
    images = noise(6)
    structure = pa.array([{"bytes": image, "path": None} for image in images])
    table = pa.table({"img": structure, "fine_label": [0, 1, 2, 0, 1, 2], "coarse_label": [0] * 6})
    pq.write_table(table, tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet")
    assert read_all(source) == images
    assert source.classes == ("0", "1", "2")
    assert source.name(2) == "x.parquet/000002"
    assert opened(f"{tmp_path}/x.parquet?label=coarse_label").classes == ("0",)
    assert opened(f"{tmp_path}/x.parquet?label=none").labels is None


def test_words_as_labels_are_numbered_in_sorted_order_across_files(tmp_path: Path) -> None:
    for number, words in enumerate((["dog", "ant", "dog"], ["cat", "ant"])):
        table = pa.table({"jpg": noise(len(words)), "species": words})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    source = opened(f"{tmp_path}/*.parquet?label=species")
    assert source.classes == ("ant", "cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 2, 1, 0]
    assert opened(f"{tmp_path}/*.parquet").labels is None


def test_labels_that_are_kept_secret_are_none(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(4), [-1] * 4), tmp_path / "test.parquet")
    source = opened(tmp_path / "test.parquet")
    assert (source.labels, source.classes) == (None, None)
    assert source.read(0)[1] is None


@pytest.mark.parametrize(
    ("columns", "query", "words"),
    [
        ({"x": [1, 2]}, "", r"no column .* holds encoded images: it has the columns x \(int64\)"),
        ({"a": [b"1"], "b": [b"2"]}, "", r"not clear which .* a \(binary\), b \(binary\).*\?image=a"),
        ({"image": [b"1"], "jpg": [b"2"]}, "", "not clear which"),
        ({"image": [b"1"], "x": [1]}, "?image=imagee", r"'imagee' .* is none; did you mean image"),
        ({"image": [b"1"], "x": [1]}, "?image=x", "'x' .* holds no bytes"),
        ({"image": [b"1"], "x": [1.5]}, "?label=x", "neither whole numbers nor words"),
        ({"image": [b"1"], "label": [1]}, "?label=lable", "did you mean label"),
        ({"image": [b"1"], "label": [1], "target": [1]}, "", "label or target: say which by adding"),
        ({"image": [b"1", b"2"], "label": [1, None]}, "", "1 of the 2 images .* have no label.*label=none"),
        ({"image": [b"1", b"2"], "label": [1, 99_999_999]}, "", "label 99999999"),
        ({"image": [b"1", b"2"], "label": [1, -7]}, "", "label -7"),
        ({"image": pa.array([], pa.binary())}, "", "no rows"),
        ({"image": ["text"]}, "", "holds encoded images"),
        ({"image": [[1, 2, 3]]}, "", "holds encoded images"),
    ],
)
def test_what_is_not_clear_is_asked(tmp_path: Path, columns: dict[str, Any], query: str, words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=words) as caught:
        opened(f"{tmp_path}/x.parquet{query}")
    assert "\n" not in str(caught.value)


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(2), [0, 1]), tmp_path / "a.parquet")
    for other, words in (
        (hub_table(noise(2)), "column of labels"),
        (hub_table(noise(2), [0, 1], ("a", "c")), "class names"),
        (pa.table({"img": noise(2), "label": [0, 1]}), "column of images"),
        (pa.table({"image": hub_table(noise(2)).column("image"), "label": ["a", "b"]}), "words or numbers"),
    ):
        pq.write_table(other, tmp_path / "b.parquet")
        with pytest.raises(InputError, match=rf"b\.parquet differs from .*a\.parquet in its .*{words}"):
            opened(tmp_path / "*.parquet")


def test_without_pyarrow_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        opened("x.parquet")


# ---- the index


def test_the_index_is_reused_and_labels_need_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(30)
    path = tmp_path / "x.parquet"
    pq.write_table(hub_table(images, [0] * 30), path)
    first = opened(path)
    monkeypatch.setattr(parquet, "scan", None)
    monkeypatch.setattr(parquet, "look", None)
    again = opened(path)
    assert read_all(again) == images
    assert again.fingerprint() == first.fingerprint()
    monkeypatch.undo()


def test_a_changed_file_is_indexed_anew_and_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    prints = set()
    for seed, labels in ((0, [0] * 9), (1, [0] * 9), (1, [1] * 9)):
        pq.write_table(hub_table(noise(9, seed=seed), labels), path)
        os.utime(path, ns=(seed, labels[0] + 10 * seed + 1))
        source = opened(path)
        assert read_all(source) == noise(9, seed=seed)
        prints.add(source.fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_a_file_replaced_under_a_running_process_is_an_error_not_other_images(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(hub_table(noise(9)), path, compression=compression)
    source = opened(path)
    pq.write_table(hub_table(noise(9, seed=1)), tmp_path / "new", compression=compression)
    os.replace(tmp_path / "new", path)
    with pytest.raises(InputError, match=r"x\.parquet was replaced or changed since it was opened; start the same"):
        source.read(3)
    assert read_all(opened(path)) == noise(9, seed=1)


def test_files_that_were_moved_are_the_same_data(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(9)), tmp_path / "x.parquet")
    before = opened(tmp_path / "x.parquet").fingerprint()
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "sub" / "x.parquet")
    assert opened(tmp_path / "sub" / "x.parquet").fingerprint() == before


def test_a_pickled_source_is_small_and_reads(tmp_path: Path) -> None:
    images = noise(5000, 20, 30)
    pq.write_table(hub_table(images, [0] * 5000), tmp_path / "x.parquet")
    data = pickle.dumps(opened(tmp_path / "x.parquet"))
    assert len(data) < 2000
    assert read_all(pickle.loads(data)) == images
