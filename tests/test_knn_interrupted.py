"""run_knn.py killed at any moment: the same command then has the result of one that nobody killed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from dying_child import run_in_a_child
from eval_fixtures import image_tree, tiny_checkpoint

import run_knn


def result(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text())
    return {key: card[key] for key in ("results", "figures", "data", "protocol")}


def test_a_run_killed_before_any_of_its_file_operations_leaves_what_its_repetition_needs(tmp_path: Path) -> None:
    photos = image_tree(tmp_path / "photos", train=3, val=1)
    (photos / "train" / "dots" / "dots 01.png").write_bytes(b"not a picture")
    weights = tiny_checkpoint(tmp_path / "run", photos)
    out = tmp_path / "out"
    words: list[object] = ["--weights", weights, "--ks", 3, "--num-workers", 0, "--device", "cpu"]
    words += ["--cache-dir", out / "cache", "--json", out / "knn.json", "--unreadable", "skip"]

    def kept() -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in out.glob("cache/[!.]*/features.npy")}

    def ended(die_at: int) -> int:
        return run_in_a_child(run_knn, words, tmp_path / "log", out, die_at)[0]

    assert ended(0) == 0
    wanted, features = result(out / "knn.json"), kept()
    assert len(features) == 2
    killed = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)  # not there where it was killed before it made any
        code = ended(killed + 1)
        if code == 0:  # it has fewer operations than that
            break
        assert code == -signal.SIGKILL
        killed += 1
        assert kept().items() <= features.items(), f"half a file, killed before operation {killed}"
        assert not (out / "knn.json").exists() or result(out / "knn.json") == wanted
        if killed % 5 == 0:
            assert ended(0) == 0
            assert (result(out / "knn.json"), kept()) == (wanted, features), f"killed before operation {killed}"
    assert killed > 25
