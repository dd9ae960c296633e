"""Files in a folder that are no images to us, and might have been meant as such."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile_archives import png

from dino_xcit.data import open_source
from dino_xcit.errors import InputError


@pytest.fixture
def telephone(tmp_path: Path) -> Path:
    """Photographs of a telephone in two folders, with what else is found there."""
    for place in ("a/1.png", "b/2.png", "a/3.HEIC", "b/4.heic", "b/deeper/5.avif", "b/scan", "a/IMG 2.10"):
        (tmp_path / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / place).write_bytes(png())
    for place in ("readme.txt", "a/labels.json", "a/.DS_Store", "a/.hidden.heic", "b/3.aae"):
        (tmp_path / "photos" / place).write_bytes(b"x")
    return tmp_path / "photos"


def test_one_line_says_how_many_of_which_endings(telephone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(open_source(str(telephone))) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{telephone}: 5 files passed over (2 .heic, 2 without an ending, 1 .avif): images end in .jpg .jpeg" in said


def test_nothing_is_said_of_what_is_obviously_no_image(telephone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*telephone.rglob("*.heic"), *telephone.rglob("*.HEIC"), *telephone.rglob("*.avif")]:
        if not path.name.startswith("."):
            path.unlink()
    (telephone / "b" / "scan").unlink()
    (telephone / "a" / "IMG 2.10").unlink()
    open_source(str(telephone))
    assert capsys.readouterr().out == ""


def test_a_folder_without_images_says_what_there_is(telephone: Path) -> None:
    for path in telephone.rglob("*.png"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"no image in .* \(there are 2 \.heic, 2 without an ending, 1 \.avif\): expected"
    ):
        open_source(str(telephone))


def test_the_same_holds_for_a_remote_folder(telephone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(telephone / "b" / "deeper")
    open_source(f"file://{telephone}")
    assert "4 files passed over (2 .heic, 2 without an ending)" in capsys.readouterr().out
