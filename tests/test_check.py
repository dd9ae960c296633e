"""The look at a data set before training on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_images import write_corpus
from eval_fixtures import image_tree
from ranks import HERE
from tiny_run import tiny_source

from dino_xcit.data import open_source
from dino_xcit.data.check import check, main
from dino_xcit.errors import InputError


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_broken_files_are_reported_whoever_looks(tmp_path: Path, workers: int) -> None:
    _, bad = write_corpus(tmp_path, good=140, seed=3)
    report, seen = check(open_source(str(tmp_path)), workers)
    assert {Path(name) for name, _ in report.broken} == set(bad)
    assert all(cause for _, cause in report.broken)
    assert [one.index for one in seen] == list(range(140 + len(bad)))
    assert report.images == 140 + len(bad)


def test_duplicates_sizes_and_classes_are_counted(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "data") / "train"
    first, second = sorted(path for path in tree.iterdir() if path.is_dir())[:2]
    original = sorted(first.iterdir())[0]
    shutil.copy(original, first / "zz copy.png")
    shutil.copy(original, second / "zz elsewhere.png")
    source = open_source(str(tree))
    report, _ = check(source, 0)
    assert report.broken == []
    assert report.classes == {name: len(list((tree / name).iterdir())) for name in report.classes}
    (group,) = [group for group in report.duplicates if str(original) in group]
    assert set(group) == {str(original), str(first / "zz copy.png"), str(second / "zz elsewhere.png")}
    assert report.across_classes >= 1
    smallest, largest = report.sides["smallest"], report.sides["largest"]
    assert 0 < smallest[0] <= report.sides["median"][0] <= largest[0]
    assert any("are there already, byte for byte" in line for line in report.lines())


def test_sources_that_hold_pixels_are_checked_too() -> None:
    report, _ = check(tiny_source(10), 0)
    assert (report.broken, report.duplicates) == ([], [])
    assert report.sides["median"] == (28, 28)


def test_the_command_s_exit_code_says_whether_all_is_well(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", good=20, seed=1)
    listed = tmp_path / "seen.jsonl"
    ended = subprocess.run(
        [sys.executable, "-m", "dino_xcit.data", "check", str(tmp_path / "corpus"), "--report", str(listed)],
        cwd=HERE.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "cannot be read:" in ended.stdout
    assert "images/s" in ended.stdout
    assert "no labels" in ended.stdout
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(rows) == len(list((tmp_path / "corpus").iterdir()))
    assert {"name", "width", "height", "digest", "cause", "index"} <= rows[0].keys()
    assert main(["sample:fashion-mnist/val", "--workers", "0"]) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected: python -m dino_xcit.data check SRC"),
        (["absent"], "no data at 'absent'"),
        (["sample:fashion-mnist", "--par", "val"], "cannot place '--par'"),
        (["sample:fashion-mnist", "--part", "test"], "--part is 'test'"),
        (["sample:fashion-mnist", "--workers", "two"], "--workers is 'two'"),
        (["sample:fashion-mnist", "--report"], "cannot place '--report'"),
    ],
)
def test_mistakes_become_sentences(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        main(argv)
