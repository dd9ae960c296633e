"""run_knn.py with few shots, metrics by class, approximate search, two ranks and unreadable images.

The k-NN during training skips unreadable images, too.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import CLASSES, SMALL, MeanColours, image_tree, noise_source, tiny_checkpoint
from PIL import Image
from run_here import Command, Here, measured, on_two_ranks
from tiny_run import CPU, tiny_config

import run_knn
from dino_xcit.data import ArraySource, Source, open_source
from dino_xcit.errors import InputError
from dino_xcit.methods import Method
from dino_xcit.runtime import distributed
from eval.features import Features, cached, extract, find_kept
from eval.knn import online
from eval.knn.online import build_evaluators

QUICK = ("--num-workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its data set: three classes, 84 training and 15 validation images."""
    folder = tmp_path_factory.mktemp("knn")
    return tiny_checkpoint(folder / "run", image_tree(folder / "photos", train=28, val=5))


def test_all_options_together_write_consistent_results(
    weights: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output paths start with ``~``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("eval.knn.classify.MIN_TO_APPROXIMATE", 84)
    done = here(
        run_knn, "--weights", weights, "--ks", 20, 3, "--few-shot", 1, 5, 30, "--draws", 3, "--seed", 2,
        "--per-class=~/classes.csv", "--confusion=~/classes.png", "--approximate", "ivf", "--baselines",
        "--json=~/knn.json", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "knn.json").read_text())

    models = ["trained", "untrained", "pixels", "pixels_normalised"]
    assert [(row["model"], row["k"]) for row in result["results"]] == [(model, k) for model in models for k in (3, 20)]
    assert all(row["top5"] is None for row in result["results"]), "top-5 is undefined for three classes"
    assert result["approximate"]["trained"]["index"] == "IVF18,Flat"
    for row in result["results"]:
        measured = result["approximate"][row["model"]]
        assert row["recall"] == measured["recall_percent"][str(row["k"])] > 50
    assert result["protocol"]["search"] == {"approximate": "ivf", "probes": 16}, (
        "the default number of probes is missing"
    )

    few = result["few_shot"]
    trained = {(row["shots"], row["k"]): row for row in few["results"] if row["model"] == "trained"}
    assert list(trained) == [(1, 3), (5, 3), (5, 15), (30, 3), (30, 20)]
    assert [len(row["top1_draws"]) for row in trained.values()] == [3, 3, 3, 1, 1], "30 shots take all images"

    with open(tmp_path / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == list(CLASSES)
    first = result["results"][1]  # k = 20, the first of --ks on the command line
    assert sum(float(row["top1"]) for row in table) / 3 == pytest.approx(first["top1"], abs=0.01)
    with Image.open(tmp_path / "classes.png") as picture:
        assert min(picture.size) > 300


# ---- unreadable images


class Place:
    """A checkpoint and its data set, in which one image per part is unreadable."""

    def __init__(self, folder: Path) -> None:
        self.photos = image_tree(folder / "photos", train=6, val=5)
        self.broken = [self.photos / "train" / "dots" / "dots 01.png", self.photos / "val" / "bars" / "bars 03.png"]
        for path in self.broken:
            path.write_bytes(b"not a picture")
        self.weights = tiny_checkpoint(folder / "run", self.photos)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("unreadable"))


@pytest.fixture
def knn(here: Here, place: Place) -> Command:
    return functools.partial(here, run_knn, "--weights", place.weights, "--ks", 3, 18, *QUICK, "--no-cache")


def test_unreadable_image_ends_the_run_and_is_named(knn: Command) -> None:
    refused = knn()
    assert (refused.code, "dots 01.png cannot be read" in refused.err) == (2, True)
    assert "--unreadable skip" in refused.err


def test_skipped_images_give_the_results_of_removed_images(place: Place, knn: Command, tmp_path: Path) -> None:
    shutil.copytree(place.photos, tmp_path / "mended")
    for path in place.broken:
        (tmp_path / "mended" / path.relative_to(place.photos)).unlink()
    _, mended = measured(knn, tmp_path / "mended.json", "--baselines", "--data-path", tmp_path / "mended")
    out, skipped = measured(knn, tmp_path / "skip.json", "--baselines", "--unreadable", "skip")
    assert skipped["results"] == mended["results"]
    assert skipped["metrics"] == mended["metrics"]
    for key in ("images", "contents", "labels", "names"):
        assert skipped["data"]["val"][key] == mended["data"]["val"][key], key
    assert skipped["data"]["val"]["fingerprint"] != open_source(str(place.photos / "val")).fingerprint()

    told = f"listed in {tmp_path / 'skip.json'}"
    parts = {"train": (18, "training"), "val": (15, "validation")}
    for (part, (count, kind)), path in zip(parts.items(), place.broken, strict=True):
        assert f"1 of {count} {kind} images are unreadable and skipped: {path}; {told}" in out
        assert skipped["data"][part]["unreadable"] == {"count": 1, "first": [str(path)]}
        assert skipped["data"][part]["images"] == count - 1
    assert "using 17" in out


def test_two_ranks_report_once_and_match_one_process(place: Place, tmp_path: Path, here: Here) -> None:
    words = ("--weights", place.weights, "--unreadable", "skip", "--no-cache", "--few-shot", 2, *QUICK)
    said = on_two_ranks(run_knn, tmp_path, *words, "--json", tmp_path / "2.json")
    assert [text.count("top-1 % [95% interval]") for text in said] == [1, 0]
    _, one = measured(functools.partial(here, run_knn), tmp_path / "1.json", *words)
    two = json.loads((tmp_path / "2.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert (one["results"], one["few_shot"]) == (two["results"], two["few_shot"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_without_readable_images_is_refused(place: Place, here: Here, tmp_path: Path, split: str) -> None:
    words = ("--weights", place.weights, "--unreadable", "skip", "--data-path", tmp_path / "bad", *QUICK)
    shutil.copytree(place.photos, tmp_path / "bad")
    files = [path for path in (tmp_path / "bad" / split).rglob("*.*") if path.is_file()]
    for path in files:
        path.write_bytes(b"")
    for cache in ((), ("--no-cache",)):
        refused = here(run_knn, *words, *cache)
        assert (refused.code, f"all {len(files)} images of" in refused.err) == (2, True)


class Torn(ArraySource):
    """A source with unreadable images."""

    torn: tuple[int, ...] = (2, 7)

    def read(self, index: int) -> Any:
        return (b"torn", 0) if index in self.torn else super().read(index)


def torn() -> Source:
    return noise_source(10, kind=Torn)


def kept(source: Source, cache: Path | None, backbone: MeanColours, **more: Any) -> Features:
    return cached(backbone, "w", source, SMALL, CPU, cache, batch_size=4, num_workers=0, **more)


def test_feature_cache_with_skipped_images_is_reused_for_skip_only(tmp_path: Path) -> None:
    whole, backbone = extract(MeanColours(), noise_source(10), SMALL, CPU, progress=False), MeanColours()
    read = [number for number in range(10) if number not in Torn.torn]
    for cache, seen in ((None, 8), (tmp_path, 16), (tmp_path, 16)):
        found = kept(torn(), cache, backbone, unreadable="skip")
        assert backbone.seen == seen, "the second run with a cache extracts features again"
        assert (np.asarray(found.features) == whole.features[read]).all()
        assert found.unreadable.tolist() == [2, 7]
        assert found.labels is not None
        assert whole.labels is not None
        assert (found.labels == whole.labels[read]).all()
    assert find_kept("w", torn().fingerprint(), (10, 5), SMALL, tmp_path) is None
    with pytest.raises(InputError, match="cannot be read"):
        kept(torn(), tmp_path, MeanColours())
    # If all images are readable, both modes have the same rows and share the feature cache.
    complete = MeanColours()
    kept(noise_source(10, seed=1), tmp_path, complete, unreadable="skip")
    kept(noise_source(10, seed=1), tmp_path, complete)
    assert complete.seen == 10


def test_damaged_list_of_skipped_images_is_replaced(tmp_path: Path) -> None:
    kept(torn(), tmp_path, MeanColours(), unreadable="skip")
    (path,) = tmp_path.glob("*/unreadable.npy")
    path.write_bytes(path.read_bytes()[:-8])
    backbone = MeanColours()
    assert kept(torn(), tmp_path, backbone, unreadable="skip").unreadable.tolist() == [2, 7]
    assert backbone.seen == 8


class Diverged(MeanColours):
    """A backbone whose features are NaN."""

    def forward(self, images: Any) -> Any:
        found = super().forward(images)
        found.cls_token[:] = float("nan")
        return found


def test_non_finite_features_are_refused_with_the_first_image_named(tmp_path: Path) -> None:
    for source, unreadable in ((noise_source(10), "refuse"), (torn(), "skip")):
        with pytest.raises(InputError, match="0 are not finite"):
            kept(source, tmp_path, Diverged(), unreadable=unreadable)
    assert not list(tmp_path.iterdir())


class Frozen(Method):
    """A method with nothing but a backbone for evaluation."""

    def __init__(self, backbone: MeanColours) -> None:
        self.eval_backbone = backbone


def test_knn_during_training_names_skipped_images_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(data_path=str(place.photos), knn_every=1, output_dir="unused")
    ((name, every, measure),) = build_evaluators(config, open_source(str(place.photos / "train")), CPU)
    assert (name, every) == ("knn", 1)
    metrics = [measure(Frozen(MeanColours())) for _ in range(2)]
    assert metrics[0] == metrics[1]
    assert 0 <= metrics[0]["knn_top1"] <= 100
    said = capsys.readouterr().out
    for number, path in zip(("1 of 18 training", "1 of 15 validation"), place.broken, strict=True):
        line = f"warning: k-NN during training: {number} images are unreadable and skipped: {path}\n"
        assert said.count(line) == 1
    assert np.isnan(measure(Frozen(Diverged()))["knn_top1"])


def test_ranks_share_the_queries_of_knn_during_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data_path=str(place.photos), knn_every=1)
    ((_, _, measure),) = build_evaluators(config, open_source(str(place.photos / "train")), CPU)
    stored: dict[str, Features] = {}

    def extract_once(backbone: Any, part: Any, *words: Any, **settings: Any) -> Features:
        if part.url not in stored:
            stored[part.url] = extract(backbone, part, *words, **settings)
        return stored[part.url]

    monkeypatch.setattr(online, "extract", extract_once)
    whole, shares = measure(Frozen(MeanColours()))["knn_top1"], []
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensors: None)
    monkeypatch.setattr("faiss.omp_set_num_threads", lambda count: None)  # later tests fork this process
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        shares.append(measure(Frozen(MeanColours()))["knn_top1"])
    assert max(shares) < whole
    assert sum(shares) == pytest.approx(whole)
