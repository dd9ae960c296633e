"""Nothing but one file of ours opens what may hold a program: no line of ours, and ruff says so."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lines_that_trust(source: str) -> list[int]:
    """Lines that let pickles be read: ``allow_pickle`` and ``weights_only`` with any other value than the safe one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            safe = node.arg == "weights_only"
            if not isinstance(node.value, ast.Constant) or node.value.value is not safe:
                found.add(node.value.lineno)
        if isinstance(node, ast.Constant) and node.value in ("allow_pickle", "weights_only"):  # as in **options
            found.add(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load") and len(node.args) > 2:
            found.add(node.lineno)
    return sorted(found)


@pytest.mark.parametrize(
    "planted",
    [
        "np.load(path, allow_pickle=True)",
        "np.load(path, 'r', True)",
        "np.savez(path, allow_pickle=flag)",
        "read(path, **{'allow_pickle': True})",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=not safe)",
    ],
)
def test_lines_that_trust_a_file_are_found(planted: str) -> None:
    assert lines_that_trust(f"import numpy as np\n\n{planted}\n") == [3]


def test_no_line_of_ours_trusts_a_file() -> None:
    files = [path for folder in ("dino_xcit", "eval", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    files += ROOT.glob("run_*.py")
    assert len(files) > 40
    trusting = {str(path): lines for path in files if (lines := lines_that_trust(path.read_text()))}
    assert trusting == {}
    assert lines_that_trust("np.load(path, mmap_mode='r', allow_pickle=False)") == []
    assert "weights_only=True" in (ROOT / "dino_xcit/safe_load.py").read_text()


def codes_found(source: str, name: str) -> set[str]:
    command = [sys.executable, "-m", "ruff", "check", "--output-format=json", "--stdin-filename", str(ROOT / name), "-"]
    run = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT, check=False)
    return {found["code"] for found in json.load(io.StringIO(run.stdout))}


def test_ruff_refuses_readers_that_trust_everywhere_but_in_one_file() -> None:
    for line in (
        "import torch\n\ntorch.load('a', weights_only=True)\n",
        "import torch as t\n\nt.jit.load('a')\n",
        "import torch\n\ntorch.hub.load_state_dict_from_url('a')\n",
        "import pickle\n\npickle.loads(b'')\n",
        "from pickle import Unpickler\n\nUnpickler\n",
        "import joblib\n\njoblib.load('a')\n",
        "import yaml\n\nyaml.load('a', yaml.Loader)\n",
    ):
        for name in ("dino_xcit/planted.py", "eval/planted.py", "benchmarks/planted.py", "run_planted.py"):
            if name != "dino_xcit/planted.py" and "pickle" not in line:
                continue  # one call to ruff takes a while, and the folders have one setting
            assert "TID251" in codes_found(line, name)
        assert "TID251" not in codes_found(line, "dino_xcit/safe_load.py")
    assert "TID251" not in codes_found("import yaml\n\nyaml.safe_load('a')\n", "dino_xcit/planted.py")
