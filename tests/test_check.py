"""The check of a data set before training."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
from bad_images import HEIGHT, WIDTH, encoded, photograph, write_corpus
from data_fixtures import write_image
from ranks import Server
from tiny_run import tiny_source

from dino_xcit.data import open_source
from dino_xcit.data.check import check, main
from dino_xcit.errors import InputError


@pytest.mark.parametrize("workers", [0, 2])
def test_check_reports_exactly_the_broken_files(tmp_path: Path, workers: int) -> None:
    _, bad = write_corpus(tmp_path, good=13, seed=3)
    report = check(open_source(str(tmp_path)), workers)
    assert {Path(name) for name, _ in report.broken} == set(bad)
    assert all(cause for _, cause in report.broken)
    assert report.images == 13 + len(bad)


def test_check_counts_duplicates_and_classes(tmp_path: Path) -> None:
    images = {"ant/a.png": 1, "ant/b.png": 2, "ant/copy.png": 1, "bee/c.png": 3, "bee/elsewhere.png": 1}
    for name, seed in images.items():
        write_image(tmp_path / name, shade=50 * seed)
    report = check(open_source(str(tmp_path)), 0)
    assert report.broken == []
    assert report.classes == {"ant": 3, "bee": 2}
    (group,) = report.duplicates
    assert set(group) == {str(tmp_path / name) for name in ("ant/a.png", "ant/copy.png", "bee/elsewhere.png")}
    assert report.across_classes == 1
    lines = "\n".join(report.lines())
    assert "2 copies of other images, byte for byte, " in lines
    assert "2 classes of " in lines


def test_excessive_worker_count_is_refused() -> None:
    with pytest.raises(InputError, match=r"workers is 100000 \(1 rank, .* such as --workers \d"):
        check(tiny_source(10), 100_000)


def test_check_accepts_source_of_decoded_pixels() -> None:
    report = check(tiny_source(10), 0)
    assert (report.broken, report.duplicates) == ([], [])
    assert report.sides["median"] == (28, 28)


def test_check_command_writes_report_and_fails_on_broken_images(server: Server, tmp_path: Path) -> None:
    good, bad = write_corpus(tmp_path / "corpus", good=13, seed=1)
    listed = tmp_path / "seen.jsonl"
    ended = server.python("-m", "dino_xcit.data", "check", tmp_path / "corpus", "--report", listed)
    assert ended.returncode == 1, ended.stderr
    assert all(words in ended.stdout for words in ("cannot be read", "images/s", "no labels"))
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    for row, file in zip(rows, sorted(good + bad), strict=True):
        assert row["name"] == str(file)
        if file in bad:
            assert row["cause"]
            assert (row["width"], row["digest"], row["format"]) == (0, "", "")
        else:
            assert row["bytes"] == file.stat().st_size
            assert row["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert (row["width"], row["height"]) == (WIDTH, HEIGHT)
            assert row["format"][:3].lower() == file.suffix[1:].replace("jpg", "jpeg")[:3]
    assert main(["sample:fashion-mnist/val", "--workers", "0"]) == 0


def test_check_command_escapes_unprintable_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", shown := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    (tmp_path / "no\udcffutf8\x1b[2J.jpg").write_bytes(b"")
    assert main([str(tmp_path), "--workers", "0"]) == 1
    shown.seek(0)
    assert r"/no\udcffutf8\x1b[2J.jpg: empty file" in shown.read()


def test_check_reports_formats_sizes_bytes_and_times(tmp_path: Path) -> None:
    files = {
        "a.jpg": encoded(photograph(1), "JPEG"),
        "b.jpg": encoded(photograph(2).resize((50, 200)), "JPEG"),
        "called.jpg": encoded(photograph(3), "PNG"),
        "empty.jpg": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    report = check(open_source(str(tmp_path)), 0)
    assert report.formats == {"JPEG": 2, "PNG": 1}
    assert report.bytes == sum(map(len, files.values()))
    assert report.sides == {"smallest": (50, 200), "median": (72, 96), "largest": (72, 96)}
    assert 0 < report.read_seconds < report.seconds
    assert 0 < report.decode_seconds < report.seconds
    assert [Path(name).name for name, _ in report.broken] == ["empty.jpg"]
    assert "2 JPEG, 1 PNG; 0.000 GB; per image: " in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "source is empty"),
        (["absent"], "no data at 'absent'"),
        (["sample:fashion-mnist", "--part", "test"], "part is test, expected one of train, val"),
        (["sample:fashion-mnist", "--report", "/absent/x.jsonl"], "cannot write /absent/x.jsonl: .*give another"),
    ],
)
def test_check_command_refuses_invalid_arguments(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        main(argv)


@pytest.mark.parametrize("part", ["", "train", "val"])
def test_check_command_checks_each_part_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"):
        write_image(tmp_path / name)
    (tmp_path / "train" / "cat" / "a.png").write_bytes(b"broken")
    assert main([str(tmp_path), "--workers", "0", "--part", part]) == (part != "val")
    assert re.findall(r"2 images of .*/(\w+) in", found := capsys.readouterr().out) == (
        [part] if part else ["train", "val"]
    )
    assert "2 classes of" in found
