"""What is promised outside the code: requirements, package data, the README's commands."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import dino_xcit
from dino_xcit.cli import read_flags
from dino_xcit.config import PretrainConfig
from eval.config import KnnConfig, LinearConfig
from eval.retrieval_config import ExtractConfig, RetrievalConfig

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = {
    "run_pretrain.py": PretrainConfig,
    "run_knn.py": KnnConfig,
    "run_linear.py": LinearConfig,
    "run_extract.py": ExtractConfig,
    "run_retrieval.py": RetrievalConfig,
}


def test_requirements_file_is_the_package_s_dependencies_plus_pytest() -> None:
    listed = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {line.strip() for line in listed if line.strip() and not line.startswith(("#", "pytest"))}
    assert needed == set(PROJECT["project"]["dependencies"])


def test_every_folder_with_code_is_in_the_package() -> None:
    modules = [*(ROOT / "dino_xcit").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in modules}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_sample_and_its_licence_are_shipped() -> None:
    folder = Path(dino_xcit.__file__).parent / "data"
    for name in PROJECT["tool"]["setuptools"]["package-data"]["dino_xcit.data"]:
        assert (folder / name).is_file(), name
    assert "MIT License" in (folder / "SAMPLE_LICENSE.txt").read_text()


def commands(file: Path) -> list[str]:
    text = file.read_text().replace("\\\n", " ")
    return [line.split("#")[0] for line in text.splitlines() if re.match(r"\s*(python|torchrun)\b.*run_\w+\.py", line)]


@pytest.mark.parametrize("command", sorted({*commands(ROOT / "README.md"), *commands(ROOT / "benchmarks/results.md")}))
def test_documented_commands_use_flags_that_exist(command: str) -> None:
    words = shlex.split(command)
    script = next(word for word in words if word.startswith("run_"))
    read_flags(CONFIGS[script], words[words.index(script) + 1 :])


def test_documents_name_no_file_that_does_not_exist() -> None:
    for document in (ROOT / "README.md", ROOT / "docs/architecture.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document} links to {link}"


def test_no_function_is_longer_than_80_lines() -> None:
    long = []
    for path in (path for name in ("run_*.py", "dino_xcit/**/*.py", "eval/**/*.py") for path in ROOT.glob(name)):
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        long += [(path.name, one.name) for one in functions if one.end_lineno - one.lineno >= 80]
    assert long == []


def test_the_package_never_imports_the_evaluators() -> None:
    above = "|".join(("eval", *(path.stem for path in ROOT.glob("run_*.py"))))
    imports = re.compile(rf"^\s*(from|import) ({above})\b", re.M)
    assert imports.search("if x:\n    from eval.knn import y")
    assert [file for file in (ROOT / "dino_xcit").rglob("*.py") if imports.search(file.read_text())] == []
