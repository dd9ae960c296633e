"""Requirements, package data, documented commands, and the structure of the code."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import dino_xcit
from dino_xcit.bounds import annotations_of
from dino_xcit.cli import read_flags
from dino_xcit.config import PretrainConfig
from eval.config import KnnConfig, LinearConfig
from eval.retrieval_config import ExtractConfig, RetrievalConfig
from run_slurm import LaunchConfig

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = {
    "run_pretrain.py": PretrainConfig,
    "run_knn.py": KnnConfig,
    "run_linear.py": LinearConfig,
    "run_extract.py": ExtractConfig,
    "run_retrieval.py": RetrievalConfig,
}


def test_requirements_file_equals_package_dependencies() -> None:
    listed = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {line.strip() for line in listed if line.strip() and not line.startswith("#")}
    assert {line for line in needed if not line.startswith("pytest")} == set(PROJECT["project"]["dependencies"])
    assert any(line.startswith("pytest") for line in needed)


def test_package_list_equals_code_folders() -> None:
    modules = [path for top in ("dino_xcit", "supervised", "eval") for path in (ROOT / top).rglob("*.py")]
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


DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks/results.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document)})


def test_documents_show_commands_of_every_runner() -> None:
    assert CONFIGS.keys() <= {word for command in COMMANDS for word in command.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_use_flags_that_exist(command: str) -> None:
    words = shlex.split(command)
    script = next(word for word in words if word.startswith("run_"))
    flags = words[words.index(script) + 1 :]
    if script == "run_slurm.py":
        others = {name for config in CONFIGS.values() for name in annotations_of(config)}
        rest: list[str] = []
        launch = read_flags(LaunchConfig, flags, rest, others)
        script, flags = f"run_{launch.get('run', ['pretrain'])[0]}.py", rest
    read_flags(CONFIGS[script], flags)


def test_document_links_point_to_existing_files() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document} links to {link}"


def test_no_function_is_longer_than_80_lines() -> None:
    long = []
    for path in (
        path for name in ("*.py", "benchmarks/*.py", "dino_xcit/**/*.py", "eval/**/*.py") for path in ROOT.glob(name)
    ):
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        long += [(path.name, one.name) for one in functions if one.end_lineno - one.lineno >= 80]
    assert long == []


def test_package_does_not_import_evaluators_or_runners() -> None:
    above = "|".join(("supervised", "eval", *(path.stem for path in ROOT.glob("run_*.py"))))
    imports = re.compile(rf"^\s*(from|import) ({above})\b", re.M)
    assert imports.search("if x:\n    from eval.knn import y")
    assert [file for file in (ROOT / "dino_xcit").rglob("*.py") if imports.search(file.read_text())] == []
