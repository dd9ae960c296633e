"""benchmarks/evaluate.py, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_weights_that_are_none_are_named_as_they_were_typed(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"no weights")
    words = [sys.executable, str(ROOT / "benchmarks" / "evaluate.py"), "--weights", str(tmp_path / "photo.png")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'photo.png'} is no checkpoint")
