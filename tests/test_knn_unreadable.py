"""run_knn.py --unreadable, and the k-NN while training: images that cannot be read are named, left out and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import SMALL, MeanColours, image_tree, noise_source, tiny_checkpoint
from run_here import Here, Outcome
from tiny_run import CPU, tiny_config

import run_knn
from dino_xcit.data import ArraySource, Source, open_source
from dino_xcit.errors import InputError
from dino_xcit.methods import Method
from eval.features import Features, cached, extract, find_kept
from eval.knn.online import build_evaluators


class Place:
    """A checkpoint, and the images that it was trained on: some of them are broken."""

    def __init__(self, folder: Path) -> None:
        self.photos = image_tree(folder / "photos", train=6, val=5)
        self.broken = [self.photos / "train" / "dots" / "dots 01.png", self.photos / "val" / "bars" / "bars 03.png"]
        for path in self.broken:
            path.write_bytes(b"not a picture")
        self.weights = tiny_checkpoint(folder / "run", self.photos)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("unreadable"))


def knn(here: Here, place: Place, *words: object) -> Outcome:
    return here(run_knn, "--weights", place.weights, "--ks", 3, 18, "--num-workers", 0, "--device", "cpu", *words)


def test_a_broken_image_ends_the_run_by_name_unless_such_are_left_out(place: Place, here: Here, tmp_path: Path) -> None:
    refused = knn(here, place, "--no-cache")
    assert refused.code == 2
    assert "dots 01.png cannot be read" in refused.err
    assert "--unreadable skip" in refused.err
    done = knn(here, place, "--unreadable", "skip", "--no-cache", "--json", tmp_path / "k.json", "--few-shot", 6)
    assert done.code == 0, done.err
    told = f"{tmp_path / 'k.json'} names them"
    train, val = (str(path) for path in place.broken)
    assert f"1 of 18 training images could not be read and are left out: {train}; {told}" in done.out
    assert f"1 of 15 validation images could not be read and are left out: {val}; {told}" in done.out
    assert "using 17" in done.out
    assert "fewer than 6 training images" in done.out
    card = json.loads((tmp_path / "k.json").read_text())
    assert card["data"]["train"]["unreadable"] == {"count": 1, "first": [train]}
    assert card["data"]["val"]["unreadable"] == {"count": 1, "first": [val]}
    assert [card["data"][part]["images"] for part in ("train", "val")] == [17, 14]
    assert card["data"]["val"]["fingerprint"] != open_source(str(place.photos / "val")).fingerprint()
    assert {one["images"] for one in card["figures"] if one["hits"]} == {14}


def test_the_figures_are_those_of_the_same_folder_without_them(place: Place, here: Here, tmp_path: Path) -> None:
    shutil.copytree(place.photos, tmp_path / "mended")
    for path in place.broken:
        (tmp_path / "mended" / path.relative_to(place.photos)).unlink()
    cards: list[dict[str, Any]] = []
    for name, words in (("skip", ("--unreadable", "skip")), ("mended", ("--data-path", tmp_path / "mended"))):
        done = knn(here, place, "--baselines", "--no-cache", "--json", tmp_path / f"{name}.json", *words)
        assert done.code == 0, done.err
        cards.append(json.loads((tmp_path / f"{name}.json").read_text()))
    skipped, mended = cards
    assert skipped["results"] == mended["results"]
    assert skipped["figures"] == mended["figures"]
    for key in ("images", "contents", "labels", "members"):
        assert skipped["data"]["val"][key] == mended["data"]["val"][key], key


def test_where_no_image_can_be_read_there_is_nothing_to_measure(place: Place, here: Here, tmp_path: Path) -> None:
    shutil.copytree(place.photos, tmp_path / "bad")
    for path in (tmp_path / "bad" / "val").rglob("*.*"):
        path.write_bytes(b"")
    for words in ((), ("--no-cache",)):
        refused = knn(here, place, "--unreadable", "skip", "--data-path", tmp_path / "bad", *words)
        assert (refused.code, "none of the 15 images of" in refused.err) == (2, True)


class Torn(ArraySource):
    """Some of its images are no images."""

    torn: tuple[int, ...] = (2, 7)

    def read(self, index: int) -> Any:
        return (b"torn", 0) if index in self.torn else super().read(index)


def torn() -> Source:
    return noise_source(10, kind=Torn)


def kept(source: Source, cache: Path | None, backbone: MeanColours, **more: Any) -> Features:
    return cached(backbone, "w", source, SMALL, CPU, cache, batch_size=4, num_workers=0, **more)


def test_rows_without_some_images_are_kept_and_never_served_where_such_are_refused(tmp_path: Path) -> None:
    whole, backbone = extract(MeanColours(), noise_source(10), SMALL, CPU, progress=False), MeanColours()
    read = [number for number in range(10) if number not in Torn.torn]
    for cache, seen in ((None, 8), (tmp_path, 16), (tmp_path, 16)):
        found = kept(torn(), cache, backbone, unreadable="skip")
        assert backbone.seen == seen, "the second time they are there"
        assert (np.asarray(found.features) == whole.features[read]).all()
        assert found.unreadable.tolist() == [2, 7]
        assert found.labels is not None
        assert whole.labels is not None
        assert (found.labels == whole.labels[read]).all()
    assert find_kept("w", torn().fingerprint(), (10, 5), SMALL, tmp_path) is None
    with pytest.raises(InputError, match="cannot be read"):
        kept(torn(), tmp_path, MeanColours())
    # Where all could be read, both ways have the same rows, and only one of them extracts.
    complete = MeanColours()
    kept(noise_source(10, seed=1), tmp_path, complete, unreadable="skip")
    kept(noise_source(10, seed=1), tmp_path, complete)
    assert complete.seen == 10


@pytest.mark.parametrize("card", [b"", b"[]", b'{"unreadable": [2, 99]}', b'{"unreadable": [2]}', b'{"unreadable": 3}'])
def test_a_card_that_names_other_images_is_not_believed(card: bytes, tmp_path: Path) -> None:
    kept(torn(), tmp_path, MeanColours(), unreadable="skip")
    (path,) = tmp_path.glob("*/card.json")
    path.write_bytes(card)
    backbone = MeanColours()
    assert kept(torn(), tmp_path, backbone, unreadable="skip").unreadable.tolist() == [2, 7]
    assert backbone.seen == 8


class Diverged(MeanColours):
    """Its features are not numbers."""

    def forward(self, images: Any) -> Any:
        found = super().forward(images)
        found.cls_token[:] = float("nan")
        return found


def test_a_network_that_diverged_is_refused_with_the_first_image_that_shows_it(tmp_path: Path) -> None:
    for source, unreadable in ((noise_source(10), "refuse"), (torn(), "skip")):
        with pytest.raises(InputError, match="0 are not finite"):
            kept(source, tmp_path, Diverged(), unreadable=unreadable)
    assert not list(tmp_path.iterdir())


class Frozen(Method):
    """A method of which only the backbone is asked for."""

    def __init__(self, backbone: MeanColours) -> None:
        self.eval_backbone = backbone


def test_the_k_nn_while_training_says_once_which_images_it_leaves_out(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data_path=str(place.photos), knn_every=1, output_dir="unused")
    ((name, every, measure),) = build_evaluators(config, open_source(str(place.photos / "train")), CPU)
    assert (name, every) == ("knn", 1)
    figures = [measure(Frozen(MeanColours())) for _ in range(2)]
    assert figures[0] == figures[1]
    assert 0 <= figures[0]["knn_top1"] <= 100
    said = capsys.readouterr().out
    for number, path in zip(("1 of 18 training", "1 of 15 validation"), place.broken, strict=True):
        line = f"warning: k-NN while training: {number} images could not be read and are left out: {path}\n"
        assert said.count(line) == 1
    assert np.isnan(measure(Frozen(Diverged()))["knn_top1"])
