"""Only dino_xcit/safe_load.py opens files that may contain programs: checked in the syntax trees and by ruff."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lines_that_trust(source: str) -> list[int]:
    """Return the lines that allow pickles: ``allow_pickle`` or ``weights_only`` without its safe literal value."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            safe = isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")
            found |= set() if safe else {node.value.lineno}
        if isinstance(node, ast.Constant) and node.value in ("allow_pickle", "weights_only"):  # as in **options
            found.add(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load") and len(node.args) > 2:
            found.add(node.lineno)
    return sorted(found)


@pytest.mark.parametrize(
    "planted",
    [
        "np.load(path, allow_pickle=True)", "np.load(path, 'r', True)", "np.savez(path, allow_pickle=flag)",
        "read(path, **{'allow_pickle': True})", "torch.load(path, weights_only=False)",
    ],
)  # fmt: skip
def test_lines_that_trust_detects_unsafe_load_arguments(planted: str) -> None:
    assert lines_that_trust(f"import numpy as np\n\n{planted}\n") == [3]


def test_source_code_has_no_unsafe_load_arguments() -> None:
    files = [
        path
        for folder in ("dino_xcit", "supervised", "eval", "benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
    ]
    files += ROOT.glob("run_*.py")
    assert len(files) > 40
    assert {str(path): lines for path in files if (lines := lines_that_trust(path.read_text()))} == {}
    assert "weights_only=True" in (ROOT / "dino_xcit/safe_load.py").read_text()


def test_ruff_bans_unsafe_loaders_outside_safe_load() -> None:
    calls = ("torch.load(1)", "torch.jit.load(1)", "joblib.load(1)", "yaml.load(1)")
    readers = "\n".join(["import joblib, pickle, torch, yaml", *calls, "yaml.safe_load(1)"])
    for name in ("eval/planted.py", "run_planted.py", "dino_xcit/safe_load.py"):
        command = [sys.executable, "-m", "ruff", "check", "--select=TID251", "--output-format=json"]
        command += ["--stdin-filename", str(ROOT / name), "-"]
        run = subprocess.run(command, input=readers, capture_output=True, text=True, cwd=ROOT, check=False)
        lines = {found["location"]["row"] for found in json.loads(run.stdout)}
        assert lines == (set() if name.endswith("safe_load.py") else {1, 2, 3, 4, 5})
