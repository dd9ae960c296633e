"""Result files: content, identity of images, atomic write, and refusal of damaged files."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import image_tree, noise_source
from PIL import Image
from result_fixtures import change, hits, knn_metric, write_result

from dino_xcit.data import open_source, pack
from dino_xcit.errors import InputError
from eval.results import Metric, few_shot_metric, images_metadata, metric, query_metric, read_result, unpack, write_json

QUERIES = query_metric("mAP", {"setup": "hard"}, np.random.default_rng(0).uniform(0, 100, 60), np.arange(60))
DRAWS = {"shots": 5, "k": 20, "temperature": 0.07, "top1_draws": [50.0, 54.5], "drawn": "d", "takes_all": False}


@pytest.mark.parametrize("images", [0, 1, 8, 9, 50_000])
def test_packed_hits_round_trip(images: int) -> None:
    found = np.random.default_rng(images).random(images) < 0.7
    packed = str(metric("any", {}, found).to_dict()["hits"])
    assert (unpack(packed, images) == found).all()
    assert len(packed) <= -(-images // 6) + 4, "packed hits are too long: 50,000 images of ImageNet should take 8 KB"


def test_result_reads_back_as_written(tmp_path: Path) -> None:
    few = few_shot_metric("pixels", DRAWS, 2, 0)
    path = write_result(tmp_path / "a.json", knn_metric(20, hits(300)), QUERIES, few)
    result = read_result(str(path))
    assert (result.measure, result.weights["hash"], result.images()["val"].images) == ("knn", "a", 400)
    assert [one.percent for one in result.metrics] == [75.0, QUERIES.percent, 52.25]
    assert [one.name for one in result.metrics][2] == "pixels 5 a class, 2 draws of seed 0, k=20 T=0.07 top-1"
    assert [(one.unit, one.units, one.baseline) for one in result.metrics] == [
        ("image", 400, False), ("query", 60, False), ("draw", 2, True),
    ]  # fmt: skip
    assert (result.metrics[0].hits == hits(300)).all()
    np.testing.assert_allclose(result.metrics[1].values, QUERIES.values, rtol=1e-6)
    assert result.transform["antialias"] is True
    assert result.transform["mean"] == [0.485, 0.456, 0.406], "the mean is not a list, as in JSON"


# ---- identity of images


def test_image_hashes_do_not_depend_on_location_or_packing(tmp_path: Path) -> None:
    folder = image_tree(tmp_path / "photos", train=1, val=2) / "val"
    shutil.copytree(folder, tmp_path / "moved")
    pack.main([str(folder), str(tmp_path / "once")])
    pack.main([f"tar:{tmp_path}/once/*.tar", str(tmp_path / "twice")])
    wanted = images_metadata(open_source(str(folder)))
    for place in (f"{tmp_path}/moved", f"tar:{tmp_path}/once/*.tar", f"tar:{tmp_path}/twice/*.tar"):
        assert images_metadata(open_source(place)) == wanted


def test_image_hashes_change_if_images_are_rewritten_or_relabelled(tmp_path: Path) -> None:
    folder = image_tree(tmp_path / "photos", train=1, val=2) / "val"
    before = images_metadata(open_source(str(folder)))
    for path in folder.rglob("*.*"):
        with Image.open(path) as image:
            image.resize((20, 16)).save(path)
    after = images_metadata(open_source(str(folder)))
    assert {name for name in after if after[name] != before[name]} == {"contents"}
    source = noise_source(50)
    before = images_metadata(source)
    source.labels = (np.asarray(source.labels) + 1) % 3
    assert {name for name in before if images_metadata(source)[name] != before[name]} == {"labels"}


# ---- reading


WRONG: list[tuple[object, tuple[Any, ...]]] = [
    (0, ("format",)), (3, ("measure",)), ([], ("metrics",)), ([3], ("metrics",)),
    ("AAAA", ("metrics", 0, "hits")), ("?" * 68, ("metrics", 0, "hits")), (3, ("metrics", 0, "hits")),
    (399, ("metrics", 0, "images")), ("400", ("metrics", 0, "images")),
    (75.5, ("metrics", 0, "top1")), (101, ("metrics", 0, "top1")), (True, ("metrics", 0, "top1")),
    (3, ("metrics", 0, "name")), ([1], ("metrics", 0, "settings")), ({"a": 1}, ("metrics", 0, "settings", "k")),
    (QUERIES.name, ("metrics", 0, "name")), ("pixel", ("metrics", 1, "unit")), (0, ("metrics", 1, "count")),
    (59, ("metrics", 1, "count")), ("AAAA" * 80, ("metrics", 1, "values")), ("é", ("metrics", 1, "values")),
    (math.nan, ("metrics", 1, "percent")), (3, ("metrics", 1, "which")),
    (3, ("data",)), ({"val": 3}, ("data",)), (1e9, ("data", "val", "images")), ("ten", ("data", "val", "classes")),
    (7, ("data", "val", "labels")), ("hash", ("weights",)), (None, ("transform",)), (3, ("protocol",)),
]  # fmt: skip


@pytest.mark.parametrize(("value", "keys"), WRONG)
def test_damaged_result_is_refused(tmp_path: Path, value: object, keys: tuple[Any, ...]) -> None:
    path = write_result(tmp_path / "a.json", knn_metric(20, hits(300)), QUERIES)
    with pytest.raises(InputError, match=r"a\.json .*expected a result file"):
        read_result(str(change(path, value, *keys)))


def test_surplus_hit_bits_and_values_outside_0_to_100_are_refused() -> None:
    assert unpack("/g==", 7).all()
    with pytest.raises(ValueError, match="expected 7"):
        unpack("/w==", 7)
    values = np.array([-50.0, 150.0])
    with pytest.raises(ValueError, match="mean"):
        Metric.from_dict(Metric("any", {}, 50.0, None, values=values, unit="query").to_dict())


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"measure": NaN}', "[1, 2]", "\x00", '"knn"', '{"format": ' + "9" * 5000 + "}"]
)
def test_file_that_is_not_a_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    for path in (tmp_path / "a.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=r"expected a result file"):
            read_result(str(path))


# ---- writing


def test_write_json_of_infinity_raises_and_keeps_previous_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("of before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"long": list(range(100_000)), "T": math.inf})
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "of before"


def test_write_json_over_a_folder_is_refused_without_leftovers(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*a\.json: Is a directory"):
        write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_metrics_with_the_same_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same name"):
        write_result(tmp_path / "a.json", knn_metric(20, hits(5)), knn_metric(20, hits(6)))
