"""Real runs on a corpus with 4% undecodable files: the list of unreadable images, resuming, and the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_images import write_corpus
from ranks import Server, state_in
from tiny_run import differing_bits

from dino_xcit.health import read_unreadable

FLAGS = ["--batch-size-per-gpu", "4", "--epochs", "1", "--save-every", "5", "--hang-timeout", "60"]
Corpus = tuple[Path, set[Path]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """200 files, 8 of them undecodable; the decodable ones include unusual formats."""
    folder = tmp_path_factory.mktemp("corpus")
    good, bad = write_corpus(folder, good=192, seed=1)
    assert (len(good), len(bad)) == (192, 8)
    return folder, set(bad)


@pytest.fixture(scope="module")
def whole(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted epoch on two ranks."""
    folder = tmp_path_factory.mktemp("corpus-run") / "run"
    run = server.start(folder, "--data-path", corpus[0], *FLAGS)
    assert run.wait() == [0, 0], run.err()
    assert run.out().count("replaced by another image") == 1
    return folder


def listed(folder: Path) -> set[str]:
    return {Path(row["name"]).name for row in read_unreadable(folder / "unreadable_images.jsonl")}


def test_unreadable_images_lists_exactly_the_bad_files_with_causes(corpus: Corpus, whole: Path) -> None:
    """25 steps of 8 images read all 200 files."""
    assert int(state_in(whole)["/step"]) == 25
    assert listed(whole) == {path.name for path in corpus[1]}
    rows = read_unreadable(whole / "unreadable_images.jsonl")
    assert len(rows) == len(corpus[1])
    assert all(row["cause"] for row in rows)
    assert len({row["cause"] for row in rows}) >= 4  # empty, truncated, a web page, too large ...


def test_resume_after_kill_matches_uninterrupted_run(
    server: Server, corpus: Corpus, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = server.start(folder, "--data-path", corpus[0], *FLAGS, "--num-workers", "2")
    run.until_step(13)
    run.kill()
    assert run.wait() == [-9, -9]
    again = server.start(folder, "--data-path", corpus[0], *FLAGS, "--num-workers", "0")
    assert again.wait() == [0, 0], again.err()
    assert "resuming after step " in again.out()
    assert differing_bits(state_in(folder), state_in(whole)) == []
    assert listed(folder) == listed(whole)


def test_run_ends_when_max_unreadable_is_exceeded(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    run = server.start(tmp_path / "run", "--data-path", corpus[0], *FLAGS, "--max-unreadable", "0.01")
    assert run.wait() == [2, 2], run.err()
    (sentence,) = [line for line in run.err().splitlines() if line.startswith("error: ")]
    assert "images cannot be read, expected at most 1% (--max-unreadable 0.01)" in sentence
    assert str(tmp_path / "run" / "unreadable_images.jsonl") in sentence
    assert len(listed(tmp_path / "run")) == 3  # one more than 1% of 200
    assert listed(tmp_path / "run") <= {path.name for path in corpus[1]}
