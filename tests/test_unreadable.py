"""UnreadableLog: the list of unreadable images of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dino_xcit.data.loader import Batch, Unreadable
from dino_xcit.health import UnreadableLog, read_unreadable


def batch(*bad: int, epoch: int = 0, name: str = "/photos/{}.jpg") -> Batch:
    unreadable = [Unreadable(index, name.format(index), "empty file", epoch) for index in bad]
    return Batch([], [], epoch=epoch, indices=torch.zeros(0, dtype=torch.int64), unreadable=unreadable)


def log_in(folder: Path, images: int = 1000, anew: bool = False) -> UnreadableLog:
    return UnreadableLog(folder, images, 0.05, anew)


def test_unreadable_image_is_listed_once_with_its_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in(tmp_path)
    assert log.note([batch(5), batch()]) == 1
    assert log.note([batch(2, 9)]) == 2
    log.write()
    assert log.note([batch(5, 11, epoch=1)]) == 2
    log.write()
    rows = read_unreadable(tmp_path / "unreadable_images.jsonl")
    assert [(row["index"], row["epoch"]) for row in rows] == [(2, 0), (5, 0), (9, 0), (11, 1)]
    assert rows[0] == {"index": 2, "name": "/photos/2.jpg", "cause": "empty file", "epoch": 0}
    assert len(log) == 4
    (said,) = capsys.readouterr().out.splitlines()  # one warning for all images
    assert said.startswith("warning: cannot read /photos/2.jpg (empty file)")


def test_resume_appends_to_list_and_new_run_clears_it(tmp_path: Path) -> None:
    first = log_in(tmp_path)
    first.note([batch(1, 2)])
    first.write()
    path = tmp_path / "unreadable_images.jsonl"
    with open(path, "a") as file:
        file.write('{"index": 3, "na')  # line truncated by a kill
    second = log_in(tmp_path)
    second.note([batch(2, 4)])
    second.write()
    assert [row["index"] for row in read_unreadable(path)] == [1, 2, 4]
    assert len(log_in(tmp_path, anew=True)) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("images", "bad", "seen", "too_many"),
    [
        (1000, 50, 1000, False),
        (1000, 51, 1000, True),
        (1000, 51, 60, True),  # small data set: the denominator is its size
        (1_000_000, 400, 500, False),  # 80% of the images seen, but within 5% of the minimum count of 10,000
        (1_000_000, 501, 600, True),  # above 5% of the minimum count
        (1_000_000, 2000, 100_000, False),
        (1_000_000, 5001, 100_000, True),
        (1000, 51, 90_000, True),  # several epochs: the denominator is the size of the data set
    ],
)
def test_too_many_compares_share_with_limit(tmp_path: Path, images: int, bad: int, seen: int, too_many: bool) -> None:
    log = log_in(tmp_path, images=images)
    log.note([batch(*range(bad))])
    log.write()
    assert log.too_many(seen) is too_many
    assert f"{bad:,} of the first {min(seen, images):,} images cannot be read" in str(log.refusal(seen))


def test_failed_write_gives_warning_and_keeps_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in(tmp_path)
    (tmp_path / "unreadable_images.jsonl").mkdir()
    log.note([batch(1)])
    log.write()
    assert "cannot be written" in capsys.readouterr().out.splitlines()[-1]
    assert len(log) == 1


def test_name_with_undecodable_bytes_round_trips(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    name = b"caf\xe9 \n.jpg".decode("utf-8", "surrogateescape")
    log.note([batch(0, name=name)])
    log.write()
    (row,) = read_unreadable(tmp_path / "unreadable_images.jsonl")
    assert row["name"] == name
