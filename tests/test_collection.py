"""Collections: writing and search, atomic writes, refusal of damaged files, lookup of images."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from eval_fixtures import unit
from hostile_arrays import NO_ARRAYS
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.data import open_source
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from eval.pooling import CLASS_TOKEN
from eval.retrieval.collection import (
    FILES,
    CollectedImages,
    Collection,
    escape,
    finish_renaming,
    open_collection,
    unescape,
    write_collection,
)
from eval.retrieval.whitening import Whitening, learn, save

NAMES = ["a.jpg", "with space.jpg", "line\nfeed.png", "back\\slash\\n.png", "ümlaut\u2028.png", "raw\udcff.png", "\r"]


def metadata_of(count: int, normalised: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "format": "dino-xcit-vectors-2",
        "count": count,
        "dimension": 5,
        "normalised": normalised,
        "dtype": "fp32",
        "descriptor": CLASS_TOKEN.to_dict(),
        "whitening": None,
        "index": {"type": "flat"},
        "weights": {"hash": "w", "path": "/weights.pth", "network": "teacher", "arch": "xcit_pico_4_p4"},
        "data": {"fingerprint": "d", "url": "photos", "names_start_from": ".", "images": count},
        "added": [],
        "transform": EvalTransform().to_dict(),
    } | changes


def rows_of(count: int, seed: int = 0, dim: int = 5) -> NDArray[np.float32]:
    return (3 * np.random.default_rng(seed).normal(size=(count, dim))).astype(np.float32)


def write(folder: Path, rows: NDArray[np.float32], normalised: bool = True, **changes: Any) -> Collection:
    metadata = metadata_of(len(rows), normalised, dimension=rows.shape[1], **changes)
    write_collection(folder, iter([rows[:4], rows[4:]]), NAMES[: len(rows)], metadata)
    return open_collection(folder)


# ---- writing and search


def test_vectors_names_and_index_have_same_row_order(tmp_path: Path) -> None:
    collection = write(tmp_path / "new" / "vectors", rows_of(7))
    vectors = np.load(tmp_path / "new" / "vectors" / "vectors.npy")
    assert vectors.dtype == np.float32
    assert vectors == pytest.approx(unit(rows_of(7)), abs=1e-6)
    assert collection.names == NAMES
    assert isinstance(collection.vectors, np.memmap)
    assert collection.index.reconstruct_n(0, 7) == pytest.approx(vectors)
    assert sorted(path.name for path in (tmp_path / "new" / "vectors").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("normalised", [True, False])
def test_search_is_exact_for_raw_backbone_outputs(tmp_path: Path, normalised: bool) -> None:
    rows, queries = rows_of(7), rows_of(3, seed=1)
    collection = write(tmp_path, rows, normalised)
    products = unit(queries) @ unit(rows).T if normalised else queries @ rows.T
    scores, found = collection.search(queries, 4)
    assert (found == np.argsort(-products, axis=1)[:, :4]).all()
    assert scores == pytest.approx(-np.sort(-products, axis=1)[:, :4], rel=1e-5)
    assert collection.search(queries, 100)[1].shape == (3, 7)
    with pytest.raises(InputError, match="is damaged"):
        collection.search(rows_of(3, dim=6), 4)


@pytest.mark.parametrize("name", [*NAMES, "\\", "\\\\n", "\\\n", "a\\\\\r\nb"])
def test_escaped_name_is_one_line_and_unescapes_to_original(name: str) -> None:
    assert "\n" not in escape(name)
    assert unescape(escape(name)) == name


def test_self_similarity_is_at_most_one_in_half_precision(tmp_path: Path) -> None:
    # Rounding to half precision makes some rows longer than 1: their product with themselves was 1.00002.
    rows = rows_of(7, seed=3)
    collection = write(tmp_path, rows, dtype="fp16")
    assert collection.vectors.dtype == np.float16
    assert np.linalg.norm(collection.vectors.astype(np.float64), axis=1).max() > 1 + 1e-5
    scores, found = collection.search(rows, 1)
    assert found[:, 0].tolist() == list(range(7))
    assert scores.max() == 1


def test_values_beyond_half_precision_and_nan_are_refused(tmp_path: Path) -> None:
    rows = 1e5 * rows_of(7)
    with pytest.raises(InputError, match="float16"):
        write(tmp_path, rows, normalised=False, dtype="fp16")
    assert write(tmp_path, rows, dtype="fp16").vectors.dtype == np.float16
    rows[3, 2] = np.nan
    for normalised in (True, False):
        with pytest.raises(InputError, match=r"(vectors|features) are not finite"):
            write(tmp_path / "nan", rows, normalised)


def whitened(folder: Path, normalised: bool = True) -> tuple[Collection, Whitening]:
    whitening = learn(unit(rows_of(40, seed=2)).astype(np.float32), 3, {}, {})
    metadata = metadata_of(7, normalised, dimension=3, whitening={"hash": whitening.hash})
    write_collection(folder, iter([rows_of(7)]), NAMES, metadata, whitening)
    return open_collection(folder), whitening


def test_vectors_and_queries_are_normalised_before_and_after_whitening(tmp_path: Path) -> None:
    collection, whitening = whitened(tmp_path / "unit")
    rows = unit(rows_of(7)).astype(np.float32)
    assert collection.vectors == pytest.approx(unit((rows - whitening.mean) @ whitening.projection), abs=1e-5)
    scores, found = collection.search(rows_of(7), 1)
    assert (found[:, 0] == np.arange(7)).all()
    assert scores == pytest.approx(np.ones((7, 1)), abs=1e-5)
    plain, whitening = whitened(tmp_path / "plain", False)
    assert plain.vectors == pytest.approx((rows_of(7) - whitening.mean) @ whitening.projection, rel=1e-4)


# ---- atomic writes


def test_interrupted_write_keeps_previous_collection(tmp_path: Path) -> None:
    write(tmp_path, rows_of(7))
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def breaking() -> Iterator[NDArray[np.float32]]:
        yield rows_of(7)[:4]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_collection(tmp_path, breaking(), NAMES, metadata_of(7))
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


def test_finish_renaming_completes_interrupted_renaming(tmp_path: Path) -> None:
    write(tmp_path / "old", rows_of(5, seed=4))
    write(tmp_path / "old" / ".new", rows_of(7))
    (tmp_path / "old" / "metadata.json").unlink()
    (tmp_path / "old" / ".new" / "vectors.npy").rename(tmp_path / "old" / "vectors.npy")
    with pytest.raises(InputError, match=r"repeat the run_extract\.py command that wrote it"):
        open_collection(tmp_path / "old")
    finish_renaming(tmp_path / "old")
    assert open_collection(tmp_path / "old").names == NAMES
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == sorted(FILES)


def test_mismatched_or_missing_whitening_is_refused_and_stale_one_removed(tmp_path: Path) -> None:
    whitened(tmp_path)
    save(learn(rows_of(40, seed=3), 3, {}, {}), tmp_path / "whitening.npz")
    with pytest.raises(InputError, match=r"whitening\.npz"):
        open_collection(tmp_path)
    (tmp_path / "whitening.npz").unlink()
    with pytest.raises(InputError, match="is damaged"):
        open_collection(tmp_path)
    whitened(tmp_path)
    assert write(tmp_path, rows_of(7)).whitening is None
    assert not (tmp_path / "whitening.npz").exists(), "the whitening of the previous collection remains"


# ---- damage


def test_truncated_file_or_file_of_another_collection_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", rows_of(7))
    write(tmp_path / "b", rows_of(6, dim=6), dtype="fp16")
    for name in FILES:
        whole = (tmp_path / "a" / name).read_bytes()
        for content in ((tmp_path / "b" / name).read_bytes(), whole[: len(whole) // 2], b""):
            (tmp_path / "a" / name).write_bytes(content)
            with pytest.raises(InputError, match="is damaged"):
                open_collection(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(whole)
    assert open_collection(tmp_path / "a").names == NAMES


DAMAGE: list[tuple[str, Any]] = [
    ("format", "dino-xcit-vectors-9"), ("count", "7"), ("count", 10**30), ("count", 8), ("normalised", 1),
    ("dtype", {}), ("descriptor", None), ("descriptor.scales", [10**400]), ("whitening", "w"), ("index.type", "lsh"),
    ("weights", 3), ("weights.hash", None), ("weights.path", 7), ("weights.allowed", "norm"), ("data", None),
    ("data.url", 4), ("data.images", None), ("data.names_start_from", {}), ("data.unreadable", 3), ("added", ["more"]),
    ("transform", "none"), ("transform.crop", 10**9), ("transform.mean", [1.0, float("nan"), 1.0]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), DAMAGE)
def test_metadata_of_wrong_type_or_out_of_bounds_is_refused(tmp_path: Path, path: str, value: Any) -> None:
    write(tmp_path, rows_of(7))
    metadata = copy.deepcopy(metadata_of(7))
    *above, last = path.split(".")
    (metadata[above[0]] if above else metadata)[last] = value
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="is damaged"):
        open_collection(tmp_path)


@pytest.mark.parametrize("text", ["{", "null", "[]", '{"a": ' * 100_000, "9" * 10_000, "\udcff"])
def test_invalid_metadata_file_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, rows_of(7))
    (tmp_path / "metadata.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="is damaged"):
        open_collection(tmp_path)


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_invalid_vectors_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, rows_of(7))
    (tmp_path / "vectors.npy").write_bytes(NO_ARRAYS[name])
    with pytest.raises(InputError, match="is damaged"):
        open_collection(tmp_path)


# ---- lookup of images

COUNT, LEFT_OUT = 6, (1, 4)


def png(number: int) -> bytes:
    """Return a PNG of one colour that depends on ``number``."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * number, 0, 200)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=["tar", "parquet", "folder"])
def source_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "photos").mkdir()
    for number in range(COUNT):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
    if request.param == "tar":
        with tarfile.open(tmp_path / "photos.tar", "w") as archive:
            archive.add(tmp_path / "photos", "")
        return f"tar:{tmp_path}/photos.tar"
    if request.param == "parquet":
        rows = [{"bytes": png(number), "path": f"{number}.png"} for number in range(COUNT)]
        pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "photos.parquet")
        return f"parquet:{tmp_path}/photos.parquet"
    return str(tmp_path / "photos")


def part_of(url: str, left_out: tuple[int, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata and names of a source whose images ``left_out`` are unreadable."""
    source = open_source(url)
    names = [source.name(index) for index in range(len(source)) if index not in left_out]
    part = {"url": url, "names_start_from": ".", "images": len(source), "unreadable": {"count": len(left_out)}}
    return part, names


def test_images_are_read_from_their_sources_despite_unreadable_images(source_url: str) -> None:
    sample = open_source("sample:fashion-mnist", "val")
    first, names = part_of(source_url, LEFT_OUT)
    second = {"url": "sample:fashion-mnist/val", "names_start_from": ".", "images": len(sample)}
    names += [sample.name(index) for index in range(len(sample))]
    images = CollectedImages({"data": first, "added": [second]}, names)
    kept = [number for number in range(COUNT) if number not in LEFT_OUT]
    assert [images.read(row)[0] for row in range(len(kept))] == [png(number) for number in kept]
    assert (np.asarray(images.read(len(kept) + 7)[0]) == sample.read(7)[0]).all()


def test_missing_image_raises_instead_of_reading_another(source_url: str) -> None:
    part, names = part_of(source_url)
    images = CollectedImages({"data": part, "added": []}, [*names[:2], "gone.png", *names[3:]])
    with pytest.raises(InputError, match=r"gone\.png"):
        images.read(2)


def test_missing_source_is_refused(tmp_path: Path) -> None:
    gone = {"url": str(tmp_path / "none"), "names_start_from": ".", "images": 1}
    with pytest.raises(InputError, match="no data at"):
        CollectedImages({"data": gone, "added": []}, ["none/a.png"]).read(0)


def test_relative_names_start_from_working_directory_of_their_extraction(tmp_path: Path) -> None:
    """Both directories have a file of the same relative name."""
    for number, place in enumerate("ab"):
        (tmp_path / place / "photos").mkdir(parents=True)
        (tmp_path / place / "photos" / "x.png").write_bytes(png(number))
    parts = [{"url": "photos", "names_start_from": str(tmp_path / place), "images": 1} for place in "ab"]
    images = CollectedImages({"data": parts[0], "added": parts[1:]}, ["photos/x.png", "photos/x.png"])
    assert [images.read(row)[0] for row in range(2)] == [png(0), png(1)]
