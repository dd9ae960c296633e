"""Release artifacts: the wheel, installed and run in a fresh environment, and the citation file."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import dino_xcit

pytestmark = pytest.mark.process
ROOT = Path(__file__).parent.parent


def test_wheel_installs_and_runs_in_fresh_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compilation takes 25 s
    source = tmp_path / "source"
    source.mkdir()
    for path in (*ROOT.glob("run_*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        shutil.copy(path, source)
    for package in ("dino_xcit", "supervised", "eval"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob(f"dino_xcit-{dino_xcit.__version__}-py3-none-any.whl")

    environment = tmp_path / "environment"
    venv.create(environment)
    packages = environment / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    subprocess.run([*pip, "--python", environment / "bin" / "python", "install", "--no-deps", wheel], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # searched after the files of the wheel
    flags = "--device cpu --batch-size-per-gpu 2 --max-steps 1 --num-workers 0 --out-dim 64 --output-dir run"
    run = [environment / "bin" / "dino-xcit-pretrain", *shlex.split(flags)]
    subprocess.run(run, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "run" / "checkpoint.pth").is_file()
    assert (packages / "dino_xcit" / "py.typed").is_file()


def test_citation_version_equals_package_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dino_xcit.__version__
