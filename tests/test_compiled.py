"""Compiled code is kept where it can be, and does without where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_xcit.augment.compiled import call_first, compiled

VIEWS = """
import hashlib
from PIL import Image
from dino_xcit.augment import MultiCropAugmentation
augmentation = MultiCropAugmentation(global_crops_size=16, local_crops_size=8)
augmentation.compile()
views = augmentation(Image.radial_gradient("L"))
print(hashlib.sha256(b"".join(view.numpy().tobytes() for view in views)).hexdigest())
"""


def test_a_function_is_compiled_where_no_folder_can_be_written() -> None:
    """Of a function that is in no file, Numba says what it says of folders that cannot be written."""
    names: dict[str, object] = {}
    exec("def add(a, b):\n    return a + b", names)
    function = names["add"]
    assert callable(function)
    assert compiled(function)(2, 3) == 5


def views_with_cache(folder: Path) -> str:
    env = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", VIEWS], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_damaged_code_is_compiled_anew(tmp_path: Path) -> None:
    expected = views_with_cache(tmp_path)
    files = sorted(tmp_path.rglob("*.nb*"))
    assert len(files) > 6
    for number, file in enumerate(files):
        whole = file.read_bytes()
        file.write_bytes((b"", whole[: len(whole) // 2], whole[:3])[number % 3])
    assert views_with_cache(tmp_path) == expected
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")}
    assert views_with_cache(tmp_path) == expected
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")}  # kept again


def test_what_fails_for_another_reason_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_xcit.augment.compiled._functions", [])  # what is kept for others stays
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("a fault of its own")

    with pytest.raises(ValueError, match="a fault of its own"):
        call_first(fail)
    assert len(calls) == 3
