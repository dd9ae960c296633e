"""python -m dino_xcit.verify_resume: the user's own proof."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks import SMALL, Server

from dino_xcit import verify_resume
from dino_xcit.errors import InputError


def without(words: list[str], *names: str) -> list[str]:
    return [word for place, word in enumerate(words) if word not in names and words[place - 1] not in names]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_prints_two_hashes_that_are_the_same_and_leaves_nothing_behind(
    server: Server, tmp_path: Path, processes: int
) -> None:
    flags = without(SMALL, "--knn-every", "--log-every")
    ended = server.python(
        "-m", "dino_xcit.verify_resume", "--processes", processes, "--data-path", "sample:fashion-mnist", *flags,
        "--batch-size-per-gpu", 32, "--output-dir", tmp_path / "run", timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    hashes = re.findall(r"SHA-256 ([0-9a-f]{64})", ended.stdout)
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
    assert "resuming is exact" in ended.stdout
    after = [int(step) for step in re.findall(r"SIGKILL after step (\d+)", ended.stdout)]
    assert len(after) == 2
    assert 6 <= after[0] <= after[1] <= 11  # both were killed on the way
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_an_error() -> None:
    assert "resuming is exact" in verify_resume.compare("a" * 64, "a" * 64)
    with pytest.raises(InputError, match="DIFFERS"):
        verify_resume.compare("a" * 64, "b" * 64)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--processes", "two"], "processes is two, expected a whole number"),
        (["--processes", "0"], "processes is 0"),
        (["--max-steps", "3"], "--max_steps is set"),
        (["--no-deterministic"], "--deterministic is set"),
        (["--arch", "xcit_smal_12_p16"], "xcit_small_12_p16"),
    ],
)
def test_mistakes_become_sentences(argv: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        verify_resume.main([*argv, "--output-dir", str(tmp_path / "run")])
    assert list(tmp_path.iterdir()) == []
