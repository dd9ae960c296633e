"""run_knn.py, run_linear.py and run_extract.py as a user types them, right and wrong.

The main paths run as processes of their own; the many wrong ones call the same console entry in this process, where
it costs a twentieth of the time.
"""

from __future__ import annotations

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
from last_words import last_words
from PIL import Image
from run_here import Here, Outcome
from runner_mistakes import WRONG

import run_extract
import run_knn
import run_linear
from dino_xcit.weights import load_backbone
from eval.features import find_kept

ROOT = Path(run_knn.__file__).parent
VAL = 3 * len(CLASSES)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("runners"))


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    """The checkpoint anew, so that nothing is kept beside it; the data are shared and must not be changed."""
    weights = tmp_path / "run" / "checkpoint.pth"
    shutil.copytree(original.weights.parent, weights.parent, ignore=shutil.ignore_patterns("features", "linear"))
    return Place(original.data, weights)


def process(cwd: Path, *words: object) -> Outcome:
    """Runs ``python RUNNER ...`` from another folder, as a script."""
    runner, *arguments = map(str, words)
    done = subprocess.run(
        [sys.executable, str(ROOT / runner), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


# ---- k-NN


def test_knn_with_nothing_but_weights_measures_on_what_they_were_trained_on(place: Place, tmp_path: Path) -> None:
    done = process(
        tmp_path, "run_knn.py", "--weights", place.weights, "--ks", "1", "10", "100", "--temperatures", "0.07", "0.5",
        "--baselines", "--json", "out/knn.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"teacher xcit_pico_4_p4 from {place.weights}" in done.out
    assert f"k = 100 exceeds the {TRAIN} training images: using {TRAIN}" in done.out
    card = json.loads((tmp_path / "out" / "knn.json").read_text())
    rows = {(row["model"], row["k"], row["temperature"]): row for row in card["results"]}
    models = ("trained", "untrained", "pixels", "pixels_normalised")
    assert list(rows) == [(model, k, t) for model in models for k in (1, 10, TRAIN) for t in (0.07, 0.5)]
    # The weights are those a run starts from, of the seed that the untrained network has: a figure that must agree.
    assert rows["trained", 10, 0.07]["top1"] == rows["untrained", 10, 0.07]["top1"]
    assert rows["pixels", 10, 0.07]["top1_interval"][0] <= rows["pixels", 10, 0.07]["top1"] <= 100
    assert all(row["top5"] is None for row in rows.values()), "three classes: top-5 means nothing"
    assert card["weights"]["hash"] == load_backbone(place.weights).hash
    assert card["data"]["val"]["images"] == VAL
    assert card["transform"]["crop"] == 28
    assert card["versions"]["torch"] == torch.__version__


def test_knn_knows_dinos_flag_names_and_uses_what_was_extracted_before(
    place: Place, here: Here, tmp_path: Path
) -> None:
    first = here(
        run_knn, "--pretrained_weights", place.weights, "--checkpoint_key", "student", "--nb_knn", 5,
        "--temperature=0.1", "--batch_size_per_gpu", 7, "--data_path", place.data,
    )  # fmt: skip
    assert first.code == 0, first.err
    assert "student xcit_pico_4_p4" in first.out
    kept = sorted((place.weights.parent / "features").iterdir())
    assert len(kept) == 2
    again = here(run_knn, "--weights", place.weights, "--network", "student", "--ks", 5, "--temperatures", 0.1)
    assert again.out.splitlines()[-1] == first.out.splitlines()[-1]
    assert sorted((place.weights.parent / "features").iterdir()) == kept, "nothing was extracted anew"


def test_knn_takes_parts_given_one_by_one_and_keeps_nothing_if_asked(place: Place, here: Here, tmp_path: Path) -> None:
    backbone = place.weights.with_name("backbone.pth")
    done = here(
        run_knn, "--weights", backbone, "--train-data", place.data / "train", "--val-data", place.data / "val",
        "--no-cache", "--eval-crop", 28, "--eval-resize", 32, "--ks", 3, "--json", tmp_path / "knn.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "the only network xcit_pico_4_p4" in done.out
    assert not (place.weights.parent / "features").exists()
    card = json.loads((tmp_path / "knn.json").read_text())
    assert card["weights"]["hash"] == load_backbone(place.weights).hash
    assert (card["transform"]["resize"], card["transform"]["crop"]) == (32, 28)
    assert [card["data"][part]["images"] for part in ("train", "val")] == [TRAIN, VAL]


# ---- linear probe


def linear_words(place: Place, *more: object) -> tuple[object, ...]:
    return (
        "--weights", place.weights, "--epochs", 3, "--batch-size-per-gpu", 4, "--holdout", 0.25, "--num-workers", 0,
        "--lrs", 0.5, 2, 0.01, *more,
    )  # fmt: skip


def test_linear_probes_reports_and_saves_a_classifier_that_gives_the_figure_again(place: Place, tmp_path: Path) -> None:
    done = process(tmp_path, "run_linear.py", *linear_words(place, "--json", "linear.json"))
    assert done.code == 0, done.err
    assert "chosen on the validation images" in done.out
    card = json.loads((tmp_path / "linear.json").read_text())
    results = card["results"]
    assert [lr for lr, _ in results["grid"]["held_out_top1_by_lr"]] == [0.01, 0.5, 2.0]
    assert results["grid"]["held_out_images"] == TRAIN // 4
    assert results["grid"]["held_out_top1"] == max(top1 for _, top1 in results["grid"]["held_out_top1_by_lr"])
    assert results["paper"]["best_epoch"]["top1"] == max(epoch["top1"] for epoch in card["history"])
    assert [epoch["epoch"] for epoch in card["history"]] == [1, 2, 3]
    assert card["protocol"]["epochs"] == 3
    assert card["protocol"]["crop_scale"] == [1.0, 1.0], "small pictures stay whole"

    stored = torch.load(place.weights.parent / "linear" / "linear.pth", weights_only=True)
    loaded = load_backbone(place.weights)
    features = find_kept(
        loaded.hash, card["data"]["val"]["fingerprint"], (VAL, 64), loaded.transform, place.weights.parent / "features"
    )
    assert features is not None
    classifier = stored["classifier"]
    guesses = (torch.from_numpy(np.array(features)) @ classifier["weight"].t() + classifier["bias"]).argmax(dim=1)
    labels = np.repeat(np.arange(3), 3)
    assert 100 * float((guesses.numpy() == labels).mean()) == pytest.approx(results["grid"]["top1"])
    assert stored["classes"] == list(CLASSES)


def test_linear_takes_the_place_of_another_probe_only_if_told_to(place: Place, here: Here, tmp_path: Path) -> None:
    probe = linear_words(place, "--output-dir", tmp_path / "probe")
    assert here(run_linear, *probe).code == 0
    other = here(run_linear, *probe, "--lr", 0.1)
    assert other.code == 2
    assert f"{tmp_path / 'probe' / 'linear.pth'} holds another probe (lr 0.001 -> 0.1)" in other.err
    assert here(run_linear, *probe, "--lr", 0.1, "--resume", "never").code == 0


def test_linear_without_a_grid_reports_the_papers_learning_rate_alone(place: Place, here: Here, tmp_path: Path) -> None:
    done = here(
        run_linear,
        *last_words(linear_words(place, "--holdout", 0, "--json", tmp_path / "linear.json", "--crop-scale", 0.08, 1)),
    )
    assert done.code == 0, done.err
    card = json.loads((tmp_path / "linear.json").read_text())
    assert list(card["results"]) == ["paper"]
    assert card["protocol"]["crop_scale"] == [0.08, 1.0]


# ---- extraction and look-up


def test_extract_then_query_as_a_user_types_it(place: Place, tmp_path: Path) -> None:
    done = process(
        place.data.parent, "run_extract.py", "--weights", place.weights, "--data-path", "photos/", "--output-dir",
        tmp_path / "vectors",
    )  # fmt: skip
    assert done.code == 0, done.err
    names = (tmp_path / "vectors" / "paths.txt").read_text().splitlines()
    vectors = np.load(tmp_path / "vectors" / "vectors.npy")
    card = json.loads((tmp_path / "vectors" / "card.json").read_text())
    assert vectors.shape == (TRAIN + VAL, 64) == (card["count"], card["dimension"])
    assert len(names) == len(vectors)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert card["weights"]["network"] == "teacher"
    assert card["normalised"] is True

    wanted = place.data / "train" / "dots" / "dots 05.png"
    found = process(tmp_path, "run_extract.py", "--query", wanted, "--index", "vectors", "--top", 4)
    assert found.code == 0, found.err
    ranked = [line.split(maxsplit=2) for line in found.out.splitlines() if line.startswith("   ")]
    assert len(ranked) == 4
    assert ranked[0] == ["1", "1.0000", "photos/train/dots/dots 05.png"]
    assert [float(score) for _, score, _ in ranked] == sorted((float(score) for _, score, _ in ranked), reverse=True)
    with Image.open(tmp_path / "vectors" / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    with Image.open(wanted) as picture:
        brightest = np.asarray(picture).max(axis=(0, 1))
    assert (np.abs(pixels.astype(int) - brightest).max(axis=-1) <= 2).sum() > 500, "the query and its twin are drawn"


def test_extract_does_nothing_twice_and_nothing_over_another(place: Place, here: Here, tmp_path: Path) -> None:
    words = ("--weights", place.weights, "--data-path", place.data / "val", "--output-dir", tmp_path / "vectors")
    assert here(run_extract, *words).code == 0
    before = (tmp_path / "vectors" / "card.json").read_bytes()
    again = here(run_extract, *words)
    assert again.code == 0
    assert "nothing to do" in again.out
    refused = here(run_extract, *words, "--no-normalise")
    assert refused.code == 2
    assert "holds another extraction: choose another --output-dir, or --overwrite" in refused.err
    assert (tmp_path / "vectors" / "card.json").read_bytes() == before
    assert here(run_extract, *words, "--no-normalise", "--overwrite").code == 0
    raw = np.load(tmp_path / "vectors" / "vectors.npy")
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-2)


def test_extract_takes_over_features_that_knn_kept(place: Place, here: Here, tmp_path: Path) -> None:
    assert here(run_knn, "--weights", place.weights, "--ks", 3).code == 0
    kept = {path: path.stat().st_mtime_ns for path in (place.weights.parent / "features").glob("*/features.npy")}
    done = here(run_extract, "--weights", place.weights, "--output-dir", tmp_path / "a", "--no-normalise")
    anew = here(run_extract, "--weights", place.weights, "--output-dir", tmp_path / "b", "--no-normalise", "--no-cache")
    assert (done.code, anew.code) == (0, 0)
    taken, fresh = (np.load(tmp_path / name / "vectors.npy") for name in ("a", "b"))
    assert taken == pytest.approx(fresh, abs=1e-5)
    assert (taken == np.load(max(kept, key=lambda path: path.stat().st_size))).all()


def test_several_queries_share_a_sheet_and_other_weights_are_refused(place: Place, here: Here, tmp_path: Path) -> None:
    index = tmp_path / "vectors"
    assert here(run_extract, "--weights", place.weights, "--output-dir", index).code == 0
    queries = [place.data / "val" / name / f"{name} 00.jpg" for name in CLASSES]
    done = here(
        run_extract, "--query", queries[0], "--query", queries[1], queries[2], "--index", index, "--top", 99,
        "--sheet", tmp_path / "found" / "sheet.png", "--json", tmp_path / "found.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"top = 99 exceeds the {TRAIN} images" in done.out
    assert (tmp_path / "found" / "sheet.png").is_file()
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(results) == 3 * TRAIN
    assert [result["query"] for result in results[::TRAIN]] == [str(query) for query in queries]

    # backbone.pth holds the very same weights; another run's do not do.
    same = here(
        run_extract, "--query", queries[0], "--index", index, "--weights", place.weights.with_name("backbone.pth")
    )
    assert same.code == 0, same.err
    other = tiny_checkpoint(tmp_path / "other", place.data, seed=1)
    refused = here(run_extract, "--query", queries[0], "--index", index, "--weights", other)
    assert refused.code == 2
    assert "did not make the vectors in" in refused.err
    place.weights.unlink()
    gone = here(run_extract, "--query", queries[0], "--index", index)
    assert gone.code == 2
    assert f"there is no file {place.weights}" in gone.err


# ---- what a user gets wrong


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_ends_in_one_sentence_and_exit_code_two(
    mistake: str, place: Place, here: Here, tmp_path: Path
) -> None:
    runner, *words = mistake.replace(" W", " --weights {weights}").split()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"not a picture")
    shutil.copytree(place.data / "train", tmp_path / "train")
    for name in CLASSES:
        (tmp_path / "train" / name / "broken.jpg").write_bytes(b"\xff\xd8\xff cut short")
    (tmp_path / "a.json").write_text("{}")
    backbone = place.weights.with_name("backbone.pth")
    state = torch.load(backbone, weights_only=True)
    del state["norm.weight"]
    torch.save(state, tmp_path / "cut.pth")
    image = place.data / "val" / "dots" / "dots 01.png"
    names = {"tmp": tmp_path, "data": place.data, "weights": place.weights, "backbone": backbone, "image": image}
    module = {"knn": run_knn, "linear": run_linear, "extract": run_extract}[runner]
    done = here(module, *[word.format(**names) for word in words], "--device", "cpu")
    assert done.code == 2, done.out
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert WRONG[mistake] in done.err


def test_a_query_is_prepared_as_the_index_was_and_says_so(place: Place, here: Here, tmp_path: Path) -> None:
    index = tmp_path / "vectors"
    done = here(
        run_extract, "--weights", place.weights, "--data-path", place.data, "--output-dir", index, "--eval-crop", 24,
        "--eval-resize", 40,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = here(run_extract, "--query", place.data / "train" / "dots" / "dots 05.png", "--index", index, "--top", 1)
    assert "resize to 40, centre crop 24" in found.out
    assert "1  1.0000  " in found.out


def test_a_query_that_is_missing_or_no_image_is_named(place: Place, here: Here, tmp_path: Path) -> None:
    assert here(run_extract, "--weights", place.weights, "--output-dir", tmp_path / "vectors").code == 0
    missing = here(run_extract, "--query", tmp_path / "none.jpg", "--index", tmp_path / "vectors")
    assert (missing.code, missing.err) == (
        2, f"error: cannot read the query image {tmp_path / 'none.jpg'}: No such file or directory\n"
    )  # fmt: skip
    (tmp_path / "text.jpg").write_text("not a picture")
    damaged = here(run_extract, "--query", tmp_path / "text.jpg", "--index", tmp_path / "vectors")
    assert damaged.code == 2
    assert f"{tmp_path / 'text.jpg'} cannot be read" in damaged.err


def test_a_mistake_has_exit_code_two_as_a_process_too(tmp_path: Path) -> None:
    done = process(tmp_path, "run_knn.py", "--weights", "none.pth")
    assert (done.code, done.out) == (2, "")
    assert (
        done.err == "error: there is no file none.pth: expected weights such as runs/.../checkpoint.pth, "
        "hf-hub:ORG/NAME or timm:NAME\n"
    )
