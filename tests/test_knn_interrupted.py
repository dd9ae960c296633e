"""run_knn.py killed at any moment: the same command then has the result of one that nobody killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from eval_fixtures import image_tree, tiny_checkpoint

import run_knn

_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def in_a_child(words: list[object], folder: Path, die_at: int) -> int:
    """Fork a process that runs the command, SIGKILLed just before its ``die_at``-th operation on a file or folder below
    ``folder`` (those that Python reports to audit hooks, and fsync); its exit code, minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, seen, fsync = 1, [0], os.fsync

    def count(path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(str(folder)):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(descriptor: int) -> None:
        count(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.fsync = counted_fsync
        sys.addaudithook(lambda event, arguments: count(arguments[-1 if event == "os.rename" else 0])
                         if event in _WATCHED else None)  # fmt: skip
        sys.argv = ["run_knn.py", *map(str, words)]
        run_knn.command()
        code = 0
    except SystemExit as end:
        code = int(str(end.code or 0))
    finally:
        os._exit(code)


def result(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text())
    return {key: card[key] for key in ("results", "figures", "data", "protocol")}


def test_a_run_killed_before_any_of_its_file_operations_leaves_what_its_repetition_needs(tmp_path: Path) -> None:
    photos = image_tree(tmp_path / "photos", train=3, val=1)
    (photos / "train" / "dots" / "dots 01.png").write_bytes(b"not a picture")
    weights = tiny_checkpoint(tmp_path / "run", photos)
    out = tmp_path / "out"
    words = ["--weights", weights, "--ks", 3, "--num-workers", 0, "--device", "cpu"]
    words += ["--cache-dir", out / "cache", "--json", out / "knn.json", "--unreadable", "skip"]

    def kept() -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in out.glob("cache/[!.]*/features.npy")}

    assert in_a_child(words, out, 0) == 0
    wanted, features = result(out / "knn.json"), kept()
    assert len(features) == 2
    killed = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)  # not there where it was killed before it made any
        code = in_a_child(words, out, killed + 1)
        if code == 0:  # it has fewer operations than that
            break
        assert code == -signal.SIGKILL
        killed += 1
        assert kept().items() <= features.items(), f"half a file, killed before operation {killed}"
        assert not (out / "knn.json").exists() or result(out / "knn.json") == wanted
        if killed % 5 == 0:
            assert in_a_child(words, out, 0) == 0
            assert (result(out / "knn.json"), kept()) == (wanted, features), f"killed before operation {killed}"
    assert killed > 25
