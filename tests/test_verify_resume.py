"""python -m dino_xcit.verify_resume: equal hashes after two kills, and refused flags."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import SMALL, Server

from dino_xcit import verify_resume
from dino_xcit.errors import InputError

DECIDED = " --knn-every 0 --log-every 1"
"""Flags that verify_resume sets itself."""
FLAGS = " ".join(SMALL).replace(DECIDED, "").split()
FLAGS += ["--data-path", "sample:fashion-mnist", "--batch-size-per-gpu", "32"]


class Forked:
    """Replacement of ``subprocess.Popen`` that forks the server, which has imported PyTorch already."""

    def __init__(self, server: Server, command: list[str], env: dict[str, str]) -> None:
        self._run = server.launch(*command[1:], env=env)
        self.pid = self._run.pids[0]

    def poll(self) -> int | None:
        return self._run.codes()[0]

    def wait(self) -> int:
        return self._run.wait()[0]


def assert_proven(said: str, folder: Path) -> None:
    """Check that both hashes are equal, both kills interrupted the run, and no files are left."""
    first, second = re.findall(r"SHA-256 ([0-9a-f]{64})", said)
    assert first == second
    assert "resuming is exact" in said
    kills = [int(step) for step in re.findall(r"SIGKILL after step (\d+)", said)]
    assert len(kills) == 2
    assert 6 <= kills[0] <= kills[1] <= 11
    assert list(folder.iterdir()) == []


def test_verify_resume_prints_equal_hashes_and_removes_its_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    popen = SimpleNamespace(Popen=lambda command, env, **_: Forked(server, command, env))
    monkeypatch.setattr(verify_resume, "subprocess", popen)
    verify_resume.main([*FLAGS, "--output-dir", str(tmp_path / "run")])
    assert_proven(capsys.readouterr().out, tmp_path)


@pytest.mark.slow
def test_verify_resume_command_succeeds_with_two_processes(server: Server, tmp_path: Path) -> None:
    words = ["-m", "dino_xcit.verify_resume", "--processes", 2, *FLAGS, "--output-dir", tmp_path / "run"]
    ended = server.python(*words, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert_proven(ended.stdout, tmp_path)


def test_compare_raises_if_hashes_differ() -> None:
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
def test_verify_resume_refuses_invalid_flags(argv: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        verify_resume.main([*argv, "--output-dir", str(tmp_path / "run")])
    assert list(tmp_path.iterdir()) == []
