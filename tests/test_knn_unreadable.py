"""run_knn.py --unreadable, and the k-NN while training: images that cannot be read are named, left out and counted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import SMALL, MeanColours, image_tree, noise_source, tiny_checkpoint
from run_here import Here
from tiny_run import CPU, tiny_config

import run_knn
from dino_xcit.data import ArraySource, open_source
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


def skipping(here: Here, place: Place, json_file: Path, *words: object) -> tuple[dict[str, Any], str]:
    """The result file of run_knn.py --unreadable skip, and what it printed."""
    common = ["--weights", place.weights, "--ks", 3, 18, "--num-workers", 0, "--device", "cpu", "--no-cache"]
    done = here(run_knn, *common, "--unreadable", "skip", "--json", json_file, *words)
    assert done.code == 0, done.err
    return json.loads(json_file.read_text()), done.out


def test_a_broken_image_ends_the_run_by_name(place: Place, here: Here) -> None:
    refused = here(run_knn, "--weights", place.weights, "--num-workers", 0, "--device", "cpu", "--no-cache")
    assert refused.code == 2
    assert "dots 01.png" in refused.err
    assert "--unreadable skip" in refused.err


def test_broken_images_are_left_out_as_if_they_were_not_there(place: Place, here: Here, tmp_path: Path) -> None:
    shutil.copytree(place.photos, tmp_path / "mended")
    for path in place.broken:
        (tmp_path / "mended" / path.relative_to(place.photos)).unlink()
    skipped, printed = skipping(here, place, tmp_path / "skipped.json", "--baselines", "--few-shot", 6)
    words = ("--baselines", "--few-shot", 6, "--data-path", tmp_path / "mended")
    mended, _ = skipping(here, place, tmp_path / "mended.json", *words)
    assert skipped["results"] == mended["results"]
    assert skipped["figures"] == mended["figures"]
    for key in ("images", "contents", "labels", "names"):
        assert skipped["data"]["val"][key] == mended["data"]["val"][key], key
    for part, path, images in zip(("train", "val"), map(str, place.broken), (17, 14), strict=True):
        assert skipped["data"][part]["images"] == images
        assert skipped["data"][part]["unreadable"] == {"count": 1, "first": [path]}
        assert path in printed


def test_the_fingerprint_is_of_the_images_that_were_measured(place: Place, here: Here, tmp_path: Path) -> None:
    photos = image_tree(tmp_path / "photos", train=6, val=5)
    prints = []
    for name in ("", "bars 01.png", "bars 03.png"):
        tree = tmp_path / f"without {name}"
        shutil.copytree(photos, tree)
        if name:  # the same name, size and time, as an image has that the disk fails to read
            path = tree / "val" / "bars" / name
            times = path.stat()
            path.write_bytes(bytes(times.st_size))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        data = skipping(here, place, tmp_path / "k.json", "--data-path", tree)[0]["data"]
        assert data["train"]["fingerprint"] == open_source(str(tree / "train")).fingerprint()
        assert (data["val"]["fingerprint"] == open_source(str(tree / "val")).fingerprint()) == (not name)
        prints.append(data["val"]["fingerprint"])
    assert len(set(prints)) == 3


class Torn(ArraySource):
    """Some of its images are no images."""

    torn: tuple[int, ...] = (2, 7)

    def read(self, index: int) -> Any:
        return (b"torn", 0) if index in self.torn else super().read(index)


def kept(cache: Path | None, backbone: MeanColours, unreadable: Any = "skip", kind: Any = Torn) -> Features:
    source = noise_source(10, kind=kind)
    return cached(
        backbone, "w", source, SMALL, CPU, cache, batch_size=4, num_workers=0, unreadable=unreadable
    )  # fmt: skip


class AllTorn(Torn):
    """Nothing of it can be read."""

    torn = tuple(range(10))


@pytest.mark.parametrize("folder", ["cache", None])
def test_where_no_image_can_be_read_there_is_nothing_to_measure(tmp_path: Path, folder: str | None) -> None:
    with pytest.raises(InputError, match="none of the 10 images"):
        kept(tmp_path / folder if folder else None, MeanColours(), kind=AllTorn)
    assert not list(tmp_path.glob("cache/*"))


def test_rows_without_some_images_are_kept_and_never_served_where_such_are_refused(tmp_path: Path) -> None:
    whole, backbone = extract(MeanColours(), noise_source(10), SMALL, CPU, progress=False), MeanColours()
    assert whole.labels is not None
    for cache, seen in ((None, 8), (tmp_path, 16), (tmp_path, 16)):
        found = kept(cache, backbone)
        assert backbone.seen == seen, "the second time they are there"
        assert found.unreadable.tolist() == [2, 7]
        np.testing.assert_array_equal(found.features, np.delete(whole.features, [2, 7], axis=0))
        np.testing.assert_array_equal(found.labels, np.delete(whole.labels, [2, 7]))
    assert find_kept("w", found.fingerprint, (10, 5), SMALL, tmp_path) is None
    with pytest.raises(InputError, match="cannot be read"):
        kept(tmp_path, backbone, "refuse")
    # Images that can be read again replace those rows, and serve both.
    complete = MeanColours()
    for unreadable in ("refuse", "skip"):
        assert len(kept(tmp_path, complete, unreadable, ArraySource).features) == complete.seen == 10


@pytest.mark.parametrize("file", ["unreadable.npy", "features.npy"])
def test_a_damaged_file_of_rows_that_lack_images_is_replaced(file: str, tmp_path: Path) -> None:
    kept(tmp_path, MeanColours())
    (path,) = tmp_path.glob(f"*/{file}")
    path.write_bytes(path.read_bytes()[:-8])
    backbone = MeanColours()
    assert kept(tmp_path, backbone).unreadable.tolist() == [2, 7]
    assert backbone.seen == 8


class Diverged(MeanColours):
    """Its features are not numbers."""

    def forward(self, images: Any) -> Any:
        found = super().forward(images)
        found.cls_token[:] = float("nan")
        return found


def test_a_network_that_diverged_is_no_unreadable_image(tmp_path: Path) -> None:
    found = kept(tmp_path, Diverged())
    assert found.unreadable.tolist() == [2, 7]
    assert np.isnan(found.features).all()


class Frozen(Method):
    """A method of which only the backbone is asked for."""

    def __init__(self, backbone: MeanColours) -> None:
        self.eval_backbone = backbone


def test_the_k_nn_while_training_says_once_which_images_it_leaves_out(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data_path=str(place.photos), knn_every=1, output_dir="unused")
    ((_, _, measure),) = build_evaluators(config, open_source(str(place.photos / "train")), CPU)
    first, second = (measure(Frozen(MeanColours())) for _ in range(2))
    assert first == second
    assert 0 <= first["knn_top1"] <= 100
    printed = capsys.readouterr().out
    assert [printed.count(str(path)) for path in place.broken] == [1, 1]
    assert np.isnan(measure(Frozen(Diverged()))["knn_top1"])
