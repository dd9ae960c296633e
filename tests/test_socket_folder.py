"""What loader processes leave in the temporary folder: nothing, or what the next run removes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, HERE

from dino_xcit.data import socket_folder


def read_a_batch(temporary: Path, end: str) -> list[Path]:
    """Run socket_folder_process.py; what is in its temporary folder afterwards."""
    script = [sys.executable, str(HERE / "socket_folder_process.py"), end]
    ended = subprocess.run(
        script,
        env=os.environ | ENVIRONMENT | {"TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert ended.returncode == (0 if end == "well" else -9), ended.stderr
    return sorted(temporary.glob("pymp-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="what is killed with its parent, Linux ends")
def test_a_run_leaves_one_folder_if_it_is_killed_and_the_next_one_removes_it(tmp_path: Path) -> None:
    left = read_a_batch(tmp_path, "killed")
    assert len(left) == 1
    (foreign := tmp_path / "pymp-foreign").mkdir()  # without our mark
    assert read_a_batch(tmp_path, "well") == sorted([*left, foreign])  # too young to be sure
    hour_ago = time.time() - 3600
    os.utime(left[0] / socket_folder.MARK, (hour_ago, hour_ago))
    assert read_a_batch(tmp_path, "well") == [foreign]


def test_a_folder_that_is_held_is_not_left(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    mark = tmp_path / socket_folder.MARK
    mark.touch()
    os.utime(mark, (0, 0))
    with open(mark) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not socket_folder._is_left(mark)
    assert socket_folder._is_left(mark)
    os.utime(mark)
    assert not socket_folder._is_left(mark)
