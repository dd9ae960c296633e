"""benchmarks/gpu.sh, on a CPU with tiny networks: every row runs, and missing packages are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
MISSING = ("tyro", "faiss", "simplejpeg")


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run([SCRIPT, *map(str, words)], capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), MISSING])
def test_quick_rows_pass_or_name_the_missing_package(tmp_path: Path, missing: tuple[str, ...]) -> None:
    for name in missing:
        text = f"raise ModuleNotFoundError({name!r}, name={name!r})\n"
        (tmp_path / f"{name}.py").write_text(text)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = run(tmp_path / "out", "quick", "--device", "cpu", PYTHONPATH=paths)
    assert ended.returncode == 0, ended.stderr
    last = json.loads(ended.stdout.splitlines()[-1])
    rows = last["rows"]
    assert last["seconds"] < 150
    assert not [name for name, row in rows.items() if "failed" in row or not row.get("passed", True)], rows
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    loaders = dict.fromkeys(("loader alone", "loader and step"), "package simplejpeg is not installed")
    assert skipped == {"S12/16 reference": "no REFERENCE given"} | (loaders if missing else {})
    assert len(rows) == 11
    lines = (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(rows)
    assert "Self CPU" in (tmp_path / "out" / "profile.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    ended = run(tmp_path / "out", "quick")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert "no GPU" in ended.stderr
