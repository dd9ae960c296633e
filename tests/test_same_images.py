"""Which changes of an image set two results' cards can tell, and what is said where they cannot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from result_fixtures import compared, hits, knn_figure, refusal, write_result

from dino_xcit.data import Source, Subset, open_source, pack
from eval.protocol import LOOKED_AT, images_card

COUNT = 130
"""Of which every second is looked into at most."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """``photos``/{bars,dots}: 65 small PNG files each."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        folder = tmp_path / "photos" / ("bars", "dots")[number // 65]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return tmp_path / "photos"


def unseen() -> int:
    """The place of an image that is not looked into."""
    looked_at = set(np.linspace(0, COUNT - 1, LOOKED_AT).astype(int).tolist())
    return next(place for place in range(1, COUNT) if place not in looked_at)


def result(path: Path, val: Source) -> Path:
    return write_result(path, knn_figure(20, hits(90, images=COUNT)), val=val)


def test_an_image_that_is_not_looked_into_and_changes_its_size_is_told(photos: Path, tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", open_source(str(photos)))
    path = Path(open_source(str(photos)).name(unseen()))
    path.write_bytes(path.read_bytes() + b"\0")
    b = result(tmp_path / "b.json", open_source(str(photos)))
    contents = [json.loads(file.read_text())["data"]["val"]["contents"] for file in (a, b)]
    assert contents[0] == contents[1], "it was not looked into"
    assert "validation images of the same names, but other contents" in refusal(a, b)


def test_an_image_that_is_not_looked_into_and_changes_its_name_is_told_and_may_be_allowed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a.json", open_source(str(photos)))
    path = Path(open_source(str(photos)).name(unseen()))
    path.rename(path.with_stem(f"{path.stem}b"))
    b = result(tmp_path / "b.json", open_source(str(photos)))
    assert "validation images of other names; the same by 64 images, and by the labels and sizes" in refusal(a, b)
    assert "McNemar" in compared(tmp_path, capsys, a, b, "--allow", "names")[0]


def test_an_image_that_is_not_looked_into_and_changes_its_label_is_told(photos: Path, tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", open_source(str(photos)))
    other = Subset(open_source(str(photos)), np.arange(COUNT))
    assert other.labels is not None
    other.labels = other.labels.copy()
    other.labels[unseen()] ^= 1
    b = result(tmp_path / "b.json", other)
    assert "other validation images (other names or labels)" in refusal(a, b)


def test_a_folder_that_was_moved_needs_no_remark(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a.json", open_source(str(photos)))
    shutil.copytree(photos, tmp_path / "elsewhere")
    b = result(tmp_path / "b.json", open_source(str(tmp_path / "elsewhere")))
    assert "by 64 images" not in compared(tmp_path, capsys, a, b)[0]


def test_a_folder_that_was_packed_is_the_same_by_its_names_and_64_images_and_that_is_said(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a.json", open_source(str(photos)))
    pack.main([str(photos), str(tmp_path / "shards")])
    b = result(tmp_path / "b.json", open_source(f"tar:{tmp_path}/shards/*.tar"))
    text = compared(tmp_path, capsys, a, b)[0]
    assert f"warning: validation images of {b} are {a}'s by 64 images, and by the labels and names of all" in text
    assert "McNemar" in text


def test_results_of_before_there_were_names_and_sizes_are_compared_and_that_is_said(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a.json", open_source(str(photos)))
    shutil.copytree(photos, tmp_path / "elsewhere")
    b = result(tmp_path / "b.json", open_source(str(tmp_path / "elsewhere")))
    for path in (a, b):
        card = json.loads(path.read_text())
        for part, place in ((card["data"]["val"], path.stem), (card["data"]["train"], "same")):
            del part["names"], part["whole"]
            part["fingerprint"] = place
        path.write_text(json.dumps(card))
    text = compared(tmp_path, capsys, a, b)[0]
    assert f"warning: validation images of {b} are {a}'s by 64 images, and by the labels and names of all" in text
    assert "training" not in text, "whose fingerprint is the same"
    assert "McNemar" in text


def test_names_are_those_of_before_packing_and_once_more(photos: Path, tmp_path: Path) -> None:
    pack.main([str(photos), str(tmp_path / "once")])
    pack.main([f"tar:{tmp_path}/once/*.tar", str(tmp_path / "twice")])
    sources = [str(photos), f"tar:{tmp_path}/once/*.tar", f"tar:{tmp_path}/twice/*.tar"]
    assert len({str(images_card(open_source(source))["names"]) for source in sources}) == 1


def test_sizes_are_asked_of_the_disk_and_no_image_is_read_for_them(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(photos))
    read: list[int] = []
    monkeypatch.setattr(type(source), "read", lambda self, index: read.append(index) or (b"", 0))
    card = images_card(source)
    assert len(read) == LOOKED_AT
    assert card["whole"] is not None
    os.remove(source.name(5))
    assert images_card(source)["whole"] is None
