"""Command lines of run_knn.py, run_linear.py and run_extract.py; test_golden.py checks their numbers."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import CLASSES, tiny_checkpoint
from extract_fixtures import COUNT as TRAIN
from extract_fixtures import Place, new_place
from run_here import Here, Outcome, measured

import run_extract
import run_knn
import run_linear
from dino_xcit.errors import InputError
from dino_xcit.weights import load_backbone
from eval.compare import main as compare_main
from eval.features import find_kept

ROOT = Path(run_knn.__file__).parent
VAL = 3 * len(CLASSES)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("runners"))


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    """A fresh copy of the checkpoint without a feature cache. Tests share the data and must not modify it."""
    weights = tmp_path / "run" / "checkpoint.pth"
    shutil.copytree(original.weights.parent, weights.parent, ignore=shutil.ignore_patterns("features", "linear"))
    return Place(original.data, weights)


# ---- k-NN


def test_knn_accepts_dino_flag_names_and_separate_data_parts(place: Place, here: Here, tmp_path: Path) -> None:
    first = here(
        run_knn, "--pretrained_weights", place.weights, "--checkpoint_key", "student", "--nb_knn", 5,
        "--temperature=0.1", "--batch_size_per_gpu", 7, "--data_path", place.data,
    )  # fmt: skip
    assert first.code == 0, first.err
    assert "student xcit_pico_4_p4" in first.out
    kept = sorted((place.weights.parent / "features").iterdir())
    assert len(kept) == 2
    out, result = measured(
        functools.partial(here, run_knn), tmp_path / "knn.json", "--weights", place.weights, "--network", "student",
        "--train-data", place.data / "train", "--val-data", place.data / "val", "--ks", 5, "--temperatures", 0.1,
    )  # fmt: skip
    assert first.out.splitlines()[-1] in out.splitlines(), "the two commands print different results"
    assert [result["data"][part]["images"] for part in ("train", "val")] == [TRAIN, VAL]
    assert sorted((place.weights.parent / "features").iterdir()) == kept, "the second command adds to the feature cache"


# ---- linear probe


def test_linear_saves_probe_and_replaces_it_only_with_resume_never(place: Place, here: Here, tmp_path: Path) -> None:
    words = (
        "--weights", place.weights, "--epochs", 2, "--batch-size-per-gpu", 4, "--num-workers", 0, "--lrs", 0.5, 2, 0.01,
    )  # fmt: skip
    linear, written = functools.partial(here, run_linear), tmp_path / "linear.json"
    out, result = measured(linear, written, *words, "--holdout", 0.25)
    assert "chosen on the validation images" in out
    grid = result["results"]["grid"]
    assert [lr for lr, _ in grid["held_out_top1_by_lr"]] == [0.01, 0.5, 2.0]
    assert grid["held_out_images"] == TRAIN // 4
    assert grid["held_out_top1"] == max(top1 for _, top1 in grid["held_out_top1_by_lr"])
    assert result["results"]["paper"]["best_epoch"]["top1"] == max(epoch["top1"] for epoch in result["history"])
    assert [epoch["epoch"] for epoch in result["history"]] == [1, 2]
    assert result["protocol"]["crop_scale"] == [1.0, 1.0], "the default crops small images"

    file = place.weights.parent / "linear" / "linear.pth"
    stored = torch.load(file, weights_only=True)
    loaded, fingerprint = load_backbone(place.weights), result["data"]["val"]["fingerprint"]
    features = find_kept(loaded.hash, fingerprint, (VAL, 64), loaded.transform, place.weights.parent / "features")
    assert features is not None
    classifier = stored["classifier"]
    guesses = (torch.from_numpy(np.array(features)) @ classifier["weight"].t() + classifier["bias"]).argmax(dim=1)
    labels = np.repeat(np.arange(3), 3)
    assert 100 * float((guesses.numpy() == labels).mean()) == pytest.approx(grid["top1"])
    assert stored["classes"] == list(CLASSES)

    other = (*words, "--holdout", 0, "--crop-scale", 0.08, 1)
    refused = linear(*other)
    assert refused.code == 2
    assert f"{file} holds another probe (" in refused.err
    _, result = measured(linear, written, *other, "--resume", "never")
    assert list(result["results"]) == ["paper"], "results include a grid without held-out images"
    assert result["protocol"]["crop_scale"] == [0.08, 1.0]


# ---- precision


def test_precision_is_part_of_cache_key_and_protocol(place: Place, here: Here, tmp_path: Path) -> None:
    knn = functools.partial(here, run_knn, "--weights", place.weights, "--ks", 5)
    results = [measured(knn, tmp_path / f"{one}.json", "--precision", one)[1] for one in ("fp32", "bf16")]
    assert [result["protocol"].get("precision") for result in results] == [None, "bf16"]
    assert len(list((place.weights.parent / "features").iterdir())) == 4, "bf16 features have entries of their own"
    with pytest.raises(InputError, match="precision"):
        compare_main([str(tmp_path / "fp32.json"), str(tmp_path / "bf16.json")])
    linear = functools.partial(here, run_linear, "--weights", place.weights, "--no-sgd", "--logreg", "--holdout", 0.3)
    _, result = measured(linear, tmp_path / "linear.json", "--precision", "bf16")
    assert result["protocol"]["precision"] == "bf16"
    refused = linear("--precision", "fp16")
    assert (refused.code, "precision bf16 -> fp16" in refused.err) == (2, True)


def test_query_uses_the_precision_of_the_collection(place: Place, here: Here, tmp_path: Path) -> None:
    words = ("--weights", place.weights, "--data-path", place.data / "val", "--precision", "bf16")
    assert here(run_extract, *words, "--output-dir", tmp_path / "v").code == 0
    assert json.loads((tmp_path / "v" / "metadata.json").read_text())["descriptor"]["precision"] == "bf16"
    image = next((place.data / "val").rglob("*.png"))
    found = here(run_extract, "--query", image, "--index", tmp_path / "v", "--top", 1)
    assert "   1  1.0000  " in found.out
    refused = here(run_extract, "--query", image, "--index", tmp_path / "v", "--precision", "bf16")
    assert (refused.code, "precision is bf16" in refused.err) == (2, True)


# ---- extraction and queries


def test_extract_skips_finished_output_and_refuses_other_output(place: Place, here: Here, tmp_path: Path) -> None:
    words = ("--weights", place.weights, "--data-path", place.data / "val", "--output-dir", tmp_path / "vectors")
    assert here(run_extract, *words).code == 0
    before = (tmp_path / "vectors" / "metadata.json").read_bytes()
    again = here(run_extract, *words)
    assert again.code == 0
    assert "nothing to do" in again.out
    refused = here(run_extract, *words, "--no-normalise")
    assert refused.code == 2
    assert "holds another extraction: choose another --output-dir, or --overwrite" in refused.err
    assert (tmp_path / "vectors" / "metadata.json").read_bytes() == before
    assert here(run_extract, *words, "--no-normalise", "--overwrite").code == 0
    raw = np.load(tmp_path / "vectors" / "vectors.npy")
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-2)


def test_extract_output_equals_features_cached_by_knn(place: Place, here: Here, tmp_path: Path) -> None:
    assert here(run_knn, "--weights", place.weights, "--ks", 3).code == 0
    kept = (place.weights.parent / "features").glob("*/features.npy")
    assert here(run_extract, "--weights", place.weights, "--output-dir", tmp_path, "--no-normalise").code == 0
    taken = np.load(tmp_path / "vectors.npy")
    assert (taken == np.load(max(kept, key=lambda path: path.stat().st_size))).all()


# ---- user errors


@pytest.fixture(scope="module")
def names(original: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths for the placeholders in WRONG."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "bad.png").write_bytes(b"not a picture")
    shutil.copytree(original.data / "train", folder / "train")
    for name in CLASSES:
        (folder / "train" / name / "broken.jpg").write_bytes(b"\xff\xd8\xff cut short")
    (folder / "a.json").write_text("{}")
    backbone = original.weights.with_name("backbone.pth")
    state = torch.load(backbone, weights_only=True)
    del state["norm.weight"]
    torch.save(state, folder / "cut.pth")
    image = original.data / "val" / "dots" / "dots 01.png"
    return {"tmp": folder, "data": original.data, "weights": original.weights, "backbone": backbone, "image": image}


WRONG = {
    "knn": "no weights given: add --weights FILE",
    "linear --weights {tmp}/none.pth": "there is no file",
    "extract --weights {tmp} --output-dir {tmp}/v": "is a folder",
    "knn --weights {image}": "is not a checkpoint that can be read safely",
    "knn --weights {tmp}/a.json": "a.json is a JSON file: expected weights such as",
    "knn --weights {tmp}/cut.pth": "not fit xcit_pico_4_p4: it lacks norm.weight",
    "knn W --arch xcit_smal_12_p16": "did you mean xcit_small_12_p16",
    "knn W --ks 0 10": "ks is 0 10",
    "knn W --temperatures 0.07 0.0700000001": "temperatures is 0.07 0.07",
    "knn W --seed 3": "seed is 3",
    "knn W --per-class classes.png": "per_class is classes.png",
    "knn W --approximate ivf": "training images, expected 1,000 or more: omit --approximate",
    "knn W --per-class {image}/classes.csv": "which cannot be written",
    "extract W --data-path {tmp}/none --output-dir {tmp}/v": "no data at",
    "knn W --data-path {tmp}/empty": "has no folder 'train'",
    "knn W --train-data {data}/train/dots --val-data {data}/val": "evaluation expects one sub-folder per class",
    "extract W --data-path {tmp}/bad --output-dir {tmp}/v": "bad.png cannot be read: not an image",
    "linear W --train-data {tmp}/train --val-data {data}/val --epochs 1 --batch-size 2 --holdout 0":
        "broken.jpg cannot be read",
    "knn --weights {backbone}": "does not name its training data",
    "linear W": "less than one global batch of 128",
    "linear W --no-sgd --logreg --holdout 0.01": "less than one image of any",
    "linear W --batch-size 4 --holdout 0.01": "less than one image of any",
    "extract W --output-dir {image}": "which is not a folder",
    "extract W --output-dir /proc/none/vectors": "cannot create /proc/none",
    "extract --query {image} --index {tmp}/empty": "is no collection: expected a folder written by",
    "knn W --cache-dir {image}": "which cannot be written to",
    "knn W --json {tmp}": "which cannot be written: it is a folder; give another path",
    "linear W --json /dev/null": "cannot be written: it is no regular file; give",
}  # fmt: skip
"""Command lines and their error messages. :func:`names` fills in the placeholders; W is ``--weights {weights}``."""


@pytest.mark.parametrize("mistake", WRONG)
def test_user_error_prints_one_line_and_exits_with_code_two(mistake: str, names: dict[str, Path], here: Here) -> None:
    runner, *words = mistake.replace(" W", " --weights {weights}").split()
    module = {"knn": run_knn, "linear": run_linear, "extract": run_extract}[runner]
    done = here(module, *[word.format(**names) for word in words], "--device", "cpu")
    assert done.code == 2, done.out
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert WRONG[mistake] in done.err


def test_queries_share_one_sheet_and_invalid_queries_are_refused(place: Place, here: Here, tmp_path: Path) -> None:
    index = tmp_path / "vectors"
    assert here(run_extract, "--weights", place.weights, "--output-dir", index).code == 0
    queries = [place.data / "val" / name / f"{name} 00.jpg" for name in CLASSES]
    done = here(
        run_extract, "--query", queries[0], "--query", queries[1], queries[2], "--index", index, "--top", 99,
        "--sheet", tmp_path / "found" / "sheet.png", "--json", tmp_path / "found.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "found" / "sheet.png").is_file()
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(results) == 3 * TRAIN
    assert [result["query"] for result in results[::TRAIN]] == [str(query) for query in queries]

    def ended(query: Path, *more: object) -> Outcome:
        return here(run_extract, "--query", query, "--index", index, *more)

    # backbone.pth has the same weights as the indexed checkpoint.pth.
    assert ended(queries[0], "--weights", place.weights.with_name("backbone.pth")).code == 0
    (tmp_path / "text.jpg").write_text("not a picture")
    other = tiny_checkpoint(tmp_path / "other", place.data, seed=1)
    for refused, said in (
        (ended(queries[0], "--weights", other), "is not the backbone of"),
        (ended(tmp_path / "none.jpg"), f"cannot read the query image {tmp_path / 'none.jpg'}: No such file"),
        (ended(tmp_path / "text.jpg"), f"{tmp_path / 'text.jpg'} cannot be read"),
    ):
        assert (refused.code, said in refused.err) == (2, True), refused.err
    place.weights.unlink()
    assert f"there is no file {place.weights}" in ended(queries[0]).err


def test_user_error_exits_with_code_two_in_a_subprocess(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_knn.py"), "--weights", "none.pth"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no file none.pth: expected weights such as ")
    assert done.stderr.count("\n") == 1


COMMANDS = [
    *sorted(path.name for path in ROOT.glob("run_*.py")), "-m dino_xcit.data check", "-m dino_xcit.data pack",
    "-m dino_xcit.augment preview", "-m dino_xcit.export", "-m dino_xcit.verify_resume", "-m dino_xcit.nonfinite",
    "-m eval.compare", "-m eval.viz", "-m eval.reproduce",
]  # fmt: skip


def processor_time(*words: str) -> float:
    """Run Python with ``words`` and return its user and system time in seconds."""
    before = os.times()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--help", "--mistyped"])
def test_help_and_mistyped_flag_take_at_most_1_5_torch_imports(flag: str) -> None:
    limit = 1.5 * min(processor_time("-c", "import torch") for _ in range(3))
    for command in COMMANDS:
        assert any(processor_time(*command.split(), flag) <= limit for _ in range(3)), command


def test_settings_modules_do_not_import_heavy_packages() -> None:
    settings = "dino_xcit.recipes, eval.config, eval.retrieval_config, run_slurm"
    program = f"import sys, {settings}; sys.exit(bool({{'torch', 'numba', 'scipy', 'faiss'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["pretrain", "knn", "linear", "extract", "retrieval", "slurm"])
def test_console_script_rejects_unknown_flag_before_importing_torch(name: str) -> None:
    program = f"""
import sys
from dino_xcit import console
sys.argv = ["dino-xcit-{name}", "--unknown", "1"]
try:
    console.{name}()
except SystemExit as end:
    sys.exit(10 * int(end.code) + ("torch" in sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, "unknown flag --unknown" in ended.stderr) == (20, True), ended.stderr
