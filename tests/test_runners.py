"""run_knn.py, run_linear.py and run_extract.py as a user types them, right and wrong."""

from __future__ import annotations

import json
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


# ---- k-NN


def test_knn_with_nothing_but_weights_measures_on_what_they_were_trained_on(
    place: Place, here: Here, tmp_path: Path
) -> None:
    done = here(
        run_knn, "--weights", place.weights, "--ks", 1, 10, 100, "--temperatures", 0.07, 0.5, "--baselines", "--json",
        tmp_path / "out" / "knn.json",
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
    assert all(row["top5"] is None for row in rows.values()), "three classes: top-5 means nothing"
    assert card["weights"]["hash"] == load_backbone(place.weights).hash
    assert card["data"]["val"]["images"] == VAL
    assert card["transform"]["crop"] == 28


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


def test_linear_saves_a_classifier_that_gives_the_figure_again_and_replaces_it_only_if_told_to(
    place: Place, here: Here, tmp_path: Path
) -> None:
    words = (
        "--weights", place.weights, "--epochs", 2, "--batch-size-per-gpu", 4, "--num-workers", 0, "--lrs", 0.5, 2, 0.01,
        "--json", tmp_path / "linear.json",
    )  # fmt: skip
    done = here(run_linear, *words, "--holdout", 0.25)
    assert done.code == 0, done.err
    assert "chosen on the validation images" in done.out
    card = json.loads((tmp_path / "linear.json").read_text())
    grid = card["results"]["grid"]
    assert [lr for lr, _ in grid["held_out_top1_by_lr"]] == [0.01, 0.5, 2.0]
    assert grid["held_out_images"] == TRAIN // 4
    assert grid["held_out_top1"] == max(top1 for _, top1 in grid["held_out_top1_by_lr"])
    assert card["results"]["paper"]["best_epoch"]["top1"] == max(epoch["top1"] for epoch in card["history"])
    assert [epoch["epoch"] for epoch in card["history"]] == [1, 2]
    assert card["protocol"]["crop_scale"] == [1.0, 1.0], "small pictures stay whole"

    file = place.weights.parent / "linear" / "linear.pth"
    stored = torch.load(file, weights_only=True)
    loaded, fingerprint = load_backbone(place.weights), card["data"]["val"]["fingerprint"]
    features = find_kept(loaded.hash, fingerprint, (VAL, 64), loaded.transform, place.weights.parent / "features")
    assert features is not None
    classifier = stored["classifier"]
    guesses = (torch.from_numpy(np.array(features)) @ classifier["weight"].t() + classifier["bias"]).argmax(dim=1)
    labels = np.repeat(np.arange(3), 3)
    assert 100 * float((guesses.numpy() == labels).mean()) == pytest.approx(grid["top1"])
    assert stored["classes"] == list(CLASSES)

    other = (*words, "--holdout", 0, "--crop-scale", 0.08, 1)
    refused = here(run_linear, *other)
    assert refused.code == 2
    assert f"{file} holds another probe (" in refused.err
    assert here(run_linear, *other, "--resume", "never").code == 0
    card = json.loads((tmp_path / "linear.json").read_text())
    assert list(card["results"]) == ["paper"], "nothing is held out to choose of a grid"
    assert card["protocol"]["crop_scale"] == [0.08, 1.0]


# ---- extraction and look-up


def test_extract_then_query_as_a_user_types_it(
    place: Place, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.data.parent)
    vectors = tmp_path / "vectors"
    done = here(run_extract, "--weights", place.weights, "--data-path", "photos/", "--output-dir", vectors)
    assert done.code == 0, done.err
    rows, card = np.load(vectors / "vectors.npy"), json.loads((vectors / "card.json").read_text())
    assert rows.shape == (TRAIN + VAL, 64) == (card["count"], card["dimension"])
    assert len((vectors / "paths.txt").read_text().splitlines()) == TRAIN + VAL
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)

    monkeypatch.chdir(tmp_path)
    wanted = place.data / "train" / "dots" / "dots 05.png"
    found = here(run_extract, "--query", wanted, "--index", "vectors", "--top", 4)
    assert found.code == 0, found.err
    ranked = [line.split(maxsplit=2) for line in found.out.splitlines() if line.startswith("   ")]
    assert len(ranked) == 4
    assert ranked[0] == ["1", "1.0000", "photos/train/dots/dots 05.png"]
    assert [float(score) for _, score, _ in ranked] == sorted((float(score) for _, score, _ in ranked), reverse=True)
    with Image.open(vectors / "contact_sheet.png") as sheet:
        assert sheet.width > 300


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
    kept = (place.weights.parent / "features").glob("*/features.npy")
    assert here(run_extract, "--weights", place.weights, "--output-dir", tmp_path, "--no-normalise").code == 0
    taken = np.load(tmp_path / "vectors.npy")
    assert (taken == np.load(max(kept, key=lambda path: path.stat().st_size))).all()


# ---- what a user gets wrong


@pytest.fixture(scope="module")
def names(original: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words of a mistake stand for."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "bad.png").write_bytes(b"not a picture")
    shutil.copytree(original.data / "train", folder / "train")
    for name in CLASSES:
        (folder / "train" / name / "broken.jpg").write_bytes(b"\xff\xd8\xff cut short")
    backbone = original.weights.with_name("backbone.pth")
    state = torch.load(backbone, weights_only=True)
    del state["norm.weight"]
    torch.save(state, folder / "cut.pth")
    image = original.data / "val" / "dots" / "dots 01.png"
    return {"tmp": folder, "data": original.data, "weights": original.weights, "backbone": backbone, "image": image}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_ends_in_one_sentence_and_exit_code_two(mistake: str, names: dict[str, Path], here: Here) -> None:
    runner, *words = mistake.replace(" W", " --weights {weights}").split()
    module = {"knn": run_knn, "linear": run_linear, "extract": run_extract}[runner]
    done = here(module, *[word.format(**names) for word in words], "--device", "cpu")
    assert done.code == 2, done.out
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert WRONG[mistake] in done.err


def test_several_queries_share_a_sheet_and_one_that_cannot_be_answered_is_named(
    place: Place, here: Here, tmp_path: Path
) -> None:
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

    def ended(query: Path, *more: object) -> Outcome:
        return here(run_extract, "--query", query, "--index", index, *more)

    assert ended(queries[0], "--weights", place.weights.with_name("backbone.pth")).code == 0, "the very same weights"
    (tmp_path / "text.jpg").write_text("not a picture")
    other = tiny_checkpoint(tmp_path / "other", place.data, seed=1)
    for refused, said in (
        (ended(queries[0], "--weights", other), "did not make the vectors in"),
        (ended(tmp_path / "none.jpg"), f"cannot read the query image {tmp_path / 'none.jpg'}: No such file"),
        (ended(tmp_path / "text.jpg"), f"{tmp_path / 'text.jpg'} cannot be read"),
    ):
        assert (refused.code, said in refused.err) == (2, True), refused.err
    place.weights.unlink()
    assert f"there is no file {place.weights}" in ended(queries[0]).err


def test_a_mistake_has_exit_code_two_as_a_process_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_knn.py"), "--weights", "none.pth"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no file none.pth: expected weights such as ")
    assert done.stderr.count("\n") == 1
