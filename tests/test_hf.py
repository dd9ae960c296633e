"""Hugging Face datasets: Parquet files and saved data sets, their columns, labels and parts."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import labels as labels_of

from dino_xcit.data import UndecodableImage, open_parts, open_source
from dino_xcit.errors import InputError

IMAGES = [bytes([number]) * (number + 1) for number in range(6)]
CLASSES = ("tench", "goldfish", "shark")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "cache"))


def hub_table(images: Sequence[bytes | None] = IMAGES, labels: Sequence[int] | None = (0, 1, 2, 0, 1, 2)) -> pa.Table:
    """Build a table like the hub's files: images as structs of bytes and path, class names in the metadata."""
    rows = [{"bytes": image, "path": f"folder/n{number}.JPEG"} for number, image in enumerate(images)]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    columns = {"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"_type": "ClassLabel", "names": CLASSES}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def write(folder: Path, table: pa.Table) -> str:
    """Write the table to a Parquet file and return its URL."""
    pq.write_table(table, folder / "x.parquet")
    return f"parquet:{folder}/x.parquet"


def loaded(folder: Path) -> datasets.DatasetDict:
    """Load :func:`hub_table` with the datasets library."""
    write(folder, hub_table())
    return datasets.load_dataset("parquet", data_files=str(folder / "x.parquet"), cache_dir=str(folder / "hf"))


def test_hub_parquet_files_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        pq.write_table(hub_table(), tmp_path / f"train-{number}.parquet")
    source = open_source(f"parquet:{tmp_path}/train-*.parquet")
    copied = f"copying 2 files of {sum(p.stat().st_size for p in tmp_path.glob('*.parquet')) / 1e9:.2g} GB to Arrow in "
    assert copied + str(tmp_path / "cache") in capsys.readouterr().out
    assert [source.read(index) for index in (7, 0, -1)] == [(IMAGES[1], 1), (IMAGES[0], 0), (IMAGES[5], 2)]
    assert source.classes == CLASSES
    assert labels_of(source) == [0, 1, 2] * 4
    assert [source.name(index) for index in (7, -1)] == ["00000007/n1.JPEG", "00000011/n5.JPEG"]
    with pytest.raises(IndexError):
        source.read(12)
    again = pickle.loads(pickle.dumps(source))  # loader workers unpickle the source
    assert again.read(3) == source.read(3)
    assert again.fingerprint() == source.fingerprint() == open_source(source.url).fingerprint()
    assert "copying" not in capsys.readouterr().out


@pytest.mark.parametrize("changed", [
    {"images": IMAGES[::-1]}, {"labels": (1, 1, 2, 0, 1, 2)},
])  # fmt: skip
def test_fingerprint_depends_on_image_order_and_labels(tmp_path: Path, changed: dict[str, Any]) -> None:
    first, second = (open_source(write(tmp_path, hub_table(**o))).fingerprint() for o in ({}, changed))
    assert first != second


def test_parts_are_selected_by_file_name_prefix(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part, labels in (("train", (0,) * 6), ("validation", (1,) * 6), ("test", (-1,) * 6)):
        pq.write_table(hub_table(labels=labels), tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    train, val = open_parts(f"parquet:{tmp_path}", None, None)
    assert (train.read(0)[1], val.read(0)[1]) == (0, 1)
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="begins with train"):
        open_source(f"parquet:{tmp_path}")


@pytest.mark.parametrize("url", ["hf:{}", "hf:{}/val"])
def test_save_to_disk_folder_is_read(tmp_path: Path, url: str) -> None:
    whole = loaded(tmp_path)["train"]
    datasets.DatasetDict({"train": whole, "test": whole.select([4, 2])}).save_to_disk(tmp_path / "d")
    source = open_source(url.format(tmp_path / "d"))
    expected = [0, 1, 2, 3, 4, 5] if url == "hf:{}" else [4, 2]
    assert [source.read(index)[0] for index in range(len(source))] == [IMAGES[index] for index in expected]
    assert [len(part) for part in open_parts(f"hf:{tmp_path / 'd'}", None, None)] == [6, 2]
    shutil.rmtree(tmp_path / "d" / "test")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match="has the parts train, expected val or validation or test"):
        open_source(f"hf:{tmp_path / 'd'}", "val")


@pytest.mark.parametrize(("url", "asked"), [
    ("hf:org/name", ("org/name",)), ("hf:org/name/config", ("org/name", "config")),
    ("hf:org/name/train?label=none", ("org/name",)),
])  # fmt: skip
def test_hub_name_is_passed_to_load_dataset(
    url: str, asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Mock(return_value=loaded(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source(url)
    load.assert_called_once_with(*asked)
    assert source.url == f"hf:{'/'.join(asked)}/train"
    assert (source.labels is None) == url.endswith("none")


def test_images_stay_encoded_for_every_column_type(tmp_path: Path) -> None:
    for column in (IMAGES, [{"bytes": image} for image in IMAGES]):
        table = pa.table({"photo": column, "species": list("bacbac")})
        source = open_source(write(tmp_path, table) + "?label=species")
        assert (source.read(2), source.classes, source.name(2)) == ((IMAGES[2], 2), ("a", "b", "c"), "00000002")


def test_only_row_without_image_is_unreadable(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, hub_table([IMAGES[0], None, IMAGES[2]], None)))
    assert (source.read(0), source.read(2)) == ((IMAGES[0], None), (IMAGES[2], None))
    with pytest.raises(UndecodableImage, match="the row has no image"):
        source.read(1)
    assert source.fingerprint()


TWO = {"jpg": IMAGES, "png": IMAGES}


@pytest.mark.parametrize(("columns", "query", "words"), [
    (TWO, "", "several image columns: jpg and png"),
    ({"a": IMAGES, "b": IMAGES}, "", "has no image column"),
    ({"label": [0] * 6}, "", "has no image column"),
    (TWO, "?image=jgp", "column 'jgp' .* has no images; did you mean jpg"),
    ({"jpg": IMAGES, "label": [0] * 6, "target": [0] * 6}, "", "several label columns: label and target.*label=none"),
    ({"jpg": IMAGES, "label": [0.5] * 6}, "?label=label", "column 'label' .* has no labels"),
    ({"jpg": IMAGES, "label": [0, 1, None, 1, 0, 1]}, "", "1 of the 6 rows .* have no label in column 'label'"),
    ({"jpg": IMAGES, "label": ["a", None, "b"] * 2}, "", "2 of the 6 rows .* have no label"),
    ({"jpg": IMAGES, "label": [0, 10**9] * 3}, "", "has the label 1000000000, expected at most 999,999"),
])  # fmt: skip
def test_ambiguous_or_invalid_column_is_refused(
    tmp_path: Path, columns: dict[str, Any], query: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        open_source(write(tmp_path, pa.table(columns)) + query)


@pytest.mark.parametrize("labels", [None, (-1,) * 6])
def test_labels_are_optional(tmp_path: Path, labels: tuple[int, ...] | None) -> None:
    source = open_source(write(tmp_path, hub_table(labels=labels)))
    assert source.labels is source.classes is source.read(0)[1] is None


@pytest.mark.parametrize("labels", [[True, False], [[1], [0]], [-1, -1]])
def test_error_explains_why_labels_are_missing(tmp_path: Path, labels: list[Any]) -> None:
    url = write(tmp_path, pa.table({"image": IMAGES[:2], "label": labels}))
    with pytest.raises(InputError, match=r"no labels.*its column label .*has no class numbers or names"):
        open_parts(None, url, url)


def test_unreadable_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(hub_table(), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    pq.write_table(pa.table({"other": [1]}), tmp_path / "c.parquet")
    for pattern in ("b.parquet", "{a,c}.parquet"):
        with pytest.raises(InputError, match=r"cannot read parquet:.*; expected Parquet files of one data set"):
            open_source(f"parquet:{tmp_path}/{pattern}")
    with pytest.raises(InputError, match="there is no file"):
        open_source(f"parquet:{tmp_path}/d.parquet")
    unreachable = Mock(side_effect=ConnectionError("Couldn't reach 'nobody/nothing' on the Hub"))
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"cannot read hf:nobody/nothing: Couldn't reach .*; check the name"):
        open_source("hf:nobody/nothing")


def test_arrow_copy_is_refused_before_writing_if_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(tmp_path, hub_table())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"0\.0 GB free: set DINO_XCIT_CACHE to a folder on a larger disk"):
        open_source(url)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_changed_remote_file_is_downloaded_again(tmp_path: Path) -> None:
    far = fsspec.filesystem("memory")
    for images in (IMAGES, IMAGES[::-1]):
        write(tmp_path, hub_table(images))
        far.put(f"{tmp_path}/x.parquet", "/hf/x.parquet")
        assert open_source("parquet:memory://hf/x.parquet").read(0)[0] == images[0]


def test_missing_datasets_package_error_gives_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'dino-xcit\[hf\]'"):
        open_source(f"parquet:{tmp_path}/x.parquet")


def test_arrow_copy_is_written_without_local_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(hub_table(), tmp_path / "x.parquet")
    monkeypatch.setenv("LOCAL_RANK", "1")  # rank 0 never opens the files
    assert len(open_source(f"parquet:{tmp_path}/x.parquet")) == len(IMAGES)
    assert "copying" not in capsys.readouterr().out


@pytest.mark.parametrize(("path", "words"), [
    ("{}/there.png", ""), ("memory://hf/there.png", ""), ("{}/gone.png", "there is no file"),
    ("zip://x.png::memory://hf/x.zip", "has no image"), ("there.png", "has no image"), (None, "has no image"),
])  # fmt: skip
def test_row_may_reference_an_image_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(IMAGES[1])
    fsspec.filesystem("memory").pipe_file("/hf/there.png", IMAGES[1])
    rows = [{"bytes": IMAGES[0], "path": "a.png"}, {"bytes": None, "path": path and path.format(tmp_path)}]
    source = open_source(write(tmp_path, pa.table({"image": rows})))
    with pytest.raises(InputError, match=words) if words else nullcontext():
        assert source.read(1)[0] == IMAGES[1]
    before = source.fingerprint()
    (tmp_path / "there.png").write_bytes(IMAGES[2])
    assert (source.fingerprint() != before) == (path == "{}/there.png")


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint64(), pa.int16()])
def test_labels_of_any_integer_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    source = open_source(write(tmp_path, pa.table({"image": IMAGES, "label": pa.array([0, 1, 2] * 2, kind)})))
    assert [source.read(index)[1] for index in range(6)] == [0, 1, 2] * 2


def test_label_without_class_name_is_refused(tmp_path: Path) -> None:
    pq.write_table(hub_table(labels=(0, 1, 2, 3, 0, 1)), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="has the label 3, expected at most 2"):
        open_source(f"parquet:{tmp_path}/x.parquet")
