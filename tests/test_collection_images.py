"""The images of a collection found again by their names, whatever was left out when they were extracted."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from eval_fixtures import image_tree
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.data import open_source
from eval.collection.images import changed_since, images_of, pictures_of

COUNT, LEFT_OUT = 6, (1, 4)


def png(number: int) -> bytes:
    """A picture of one colour, which tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * number, 0, 200)).save(file, "PNG")
    return file.getvalue()


def number_of(picture: Image.Image | None) -> int | None:
    if picture is None:
        return None
    pixels: NDArray[np.uint8] = np.asarray(picture)
    return int(pixels[0, 0, 0]) // 10


@pytest.fixture(params=["tar", "parquet", "folder"])
def source_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    pictures = {f"{number}.png": png(number) for number in range(COUNT)}
    if request.param == "tar":
        with tarfile.open(tmp_path / "photos.tar", "w") as archive:
            for name, data in pictures.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return f"tar:{tmp_path}/photos.tar"
    if request.param == "parquet":
        rows = [{"bytes": data, "path": name} for name, data in pictures.items()]
        pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "photos.parquet")
        return f"parquet:{tmp_path}/photos.parquet"
    for name, data in pictures.items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return str(tmp_path / "photos")


def collected(url: str, left_out: tuple[int, ...]) -> tuple[dict[str, Any], list[str]]:
    """A data card and the names of a source of which some images were left out."""
    source = open_source(url)
    names = [source.name(index) for index in range(len(source)) if index not in left_out]
    data: dict[str, Any] = {"url": url, "images": len(source), "fingerprint": source.fingerprint()}
    return data | {"unreadable": {"count": len(left_out), "first": []}}, names


def test_images_that_were_left_out_shift_no_picture(source_url: str) -> None:
    data, names = collected(source_url, LEFT_OUT)
    card = {"data": data}
    kept = [number for number in range(COUNT) if number not in LEFT_OUT]
    found = pictures_of(card, names, [3, 0, 2])
    assert {row: number_of(picture) for row, picture in found.items()} == {row: kept[row] for row in (0, 2, 3)}
    images = images_of(card, names)
    assert images is not None
    assert [images.read(row)[0] for row in range(len(images))] == [png(number) for number in kept]


def test_each_part_of_a_collection_is_looked_up_in_its_own_source(source_url: str, tmp_path: Path) -> None:
    sample = open_source("sample:fashion-mnist", "val")
    first, names = collected(source_url, LEFT_OUT)
    second = {"url": "sample:fashion-mnist/val", "images": len(sample), "fingerprint": "s"}
    card = {"data": first, "added": [second]}
    names = [*names, *(sample.name(index) for index in range(len(sample)))]
    found = pictures_of(card, names, [COUNT - len(LEFT_OUT) + 7, 1])
    assert number_of(found[1]) == 2
    assert (np.asarray(found[COUNT - len(LEFT_OUT) + 7])[..., 0] == sample.read(7)[0]).all()


def test_what_is_gone_or_damaged_is_an_empty_place_and_not_another_picture(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "data", train=2, val=1)
    data, names = collected(str(tree / "train"), ())
    Path(names[1]).unlink()
    Path(names[2]).write_bytes(b"damaged")
    found = pictures_of({"data": data}, names, range(4))
    assert [picture is None for picture in found.values()] == [False, True, True, False]
    assert images_of({"data": data}, names) is None
    gone = {"url": str(tmp_path / "none"), "images": 1, "fingerprint": "x"}
    assert pictures_of({"data": gone}, ["none/a.png"], [0]) == {0: None}
    assert images_of({"data": gone}, ["none/a.png"]) is None


def test_relative_names_start_from_where_their_own_part_was_extracted(tmp_path: Path) -> None:
    """Both places have a file of that name."""
    for number, place in enumerate("ab"):
        (tmp_path / place / "photos").mkdir(parents=True)
        (tmp_path / place / "photos" / "x.png").write_bytes(png(number))
        (tmp_path / place / "photos" / f"only {place}.png").write_bytes(png(9))
    parts = [
        {"url": "photos", "absolute_url": str(tmp_path / place / "photos"), "names_start_from": str(tmp_path / place)}
        | {"images": 1, "fingerprint": place}
        for place in "ab"
    ]
    card = {"data": parts[0], "added": parts[1:]}
    names = ["photos/only a.png", "photos/x.png"]
    assert {row: number_of(picture) for row, picture in pictures_of(card, names, [0, 1]).items()} == {0: 9, 1: 1}
    images = images_of(card, names)
    assert images is not None
    assert [images.read(row)[0] for row in range(2)] == [png(9), png(1)]


def test_a_source_whose_files_were_written_anew_under_their_names_is_told(source_url: str, tmp_path: Path) -> None:
    data, names = collected(source_url, LEFT_OUT)
    card = {"data": data}
    images = images_of(card, names)
    assert images is not None
    assert changed_since(card, images) == []
    file = Path(source_url.partition(":")[2] or tmp_path / "photos" / "3.png")
    if source_url.startswith("parquet:"):
        rows = [{"bytes": png(number + 1), "path": f"{number}.png"} for number in range(COUNT)]
        pyarrow.parquet.write_table(pyarrow.table({"image": rows}), file)
    else:
        os.utime(file, (1, 1))
    again = images_of(card, names)
    assert again is not None
    assert changed_since(card, again) == [source_url]


def test_of_a_source_with_a_relative_path_nothing_is_told_wrongly_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    data, names = collected("photos", ())
    card = {"data": data | {"absolute_url": str(tmp_path / "photos"), "names_start_from": str(tmp_path)}}
    for replaced, told_here in ((False, []), (True, ["photos"])):
        if replaced:
            (tmp_path / "photos" / "x.png").write_bytes(png(2) + b"more")
        for place, told in ((tmp_path, told_here), (tmp_path.parent, [])):
            monkeypatch.chdir(place)
            images = images_of(card, names)
            assert images is not None
            assert changed_since(card, images) == told
