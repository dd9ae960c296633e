"""Numba compilation with a usable, an unwritable and a damaged cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_xcit.augment.compiled import call_first, compiled


def test_function_is_compiled_without_writable_cache_folder() -> None:
    """For a function without a source file, Numba raises the same error as for an unwritable cache folder."""
    names: dict[str, object] = {}
    exec("def add(a, b):\n    return a + b", names)
    function = names["add"]
    assert callable(function)
    assert compiled(function)(2, 3) == 5


LOOPS = """
from dino_xcit.augment.compiled import call_first, compiled
def add(a, b): return a + b
def subtract(a, b): return a - b
def multiply(a, b): return a * b
loops = [compiled(function) for function in (add, subtract, multiply)]
call_first(lambda: [loop(2, 3) for loop in loops])
print([loop(2, 3) for loop in loops])
"""


def test_damaged_cache_is_recompiled(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOOPS)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}

    def printed() -> str:
        return subprocess.check_output([sys.executable, script], env=environment, text=True, timeout=200)

    expected = printed()
    files = sorted(tmp_path.rglob("*.nb*"))
    assert len(files) >= 6
    for number, file in enumerate(files):
        whole = file.read_bytes()
        file.write_bytes((b"", whole[: len(whole) // 2], whole[:3])[number % 3])
    assert printed() == expected


def test_call_first_raises_error_that_persists_after_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_xcit.augment.compiled._functions", [])  # other compiled functions keep their caches
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("a fault of its own")

    with pytest.raises(ValueError, match="a fault of its own"):
        call_first(fail)
    assert len(calls) == 3
