"""Data sets in COCO's format, and their scores."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_fixtures import CATEGORIES, COLOURS, Content, annotation_file, change, make_coco
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_xcit.data.source import identity
from dino_xcit.errors import InputError
from eval.results import images_metadata
from supervised.coco import CocoSource, decode_masks, find_split, mask_library, open_coco
from supervised.detection import average_precisions

Change = Callable[[list[Content]], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def opened(root: Path, part: str = "train", masks: bool = True, like: CocoSource | None = None) -> CocoSource:
    return open_coco(*find_split(str(root), part, "", ""), masks, like)


def test_annotations_and_masks_are_those_of_the_file_and_the_pixels(root: Path) -> None:
    source, content = opened(root), change(root)
    assert source.categories == CATEGORIES
    assert source.with_objects.tolist() == list(range(len(source) - 1))  # the last image has none
    truth = source.ground_truth()["annotations"]
    assert [one["id"] for one in truth] == list(range(1, len(truth) + 1))
    by_box = [sorted(rows, key=lambda one: (one["image_id"], one["bbox"])) for rows in (truth, content["annotations"])]
    assert [one | {"id": 0} for one in by_box[0]] == [one | {"id": 0} for one in by_box[1]]
    assert len(source.annotations(0)) == len(source.annotations(0, crowds=False)) + 1
    for index in range(len(source)):
        found, pixels = source.annotations(index, crowds=False), np.asarray(Image.open(source.name(index)))
        for one, mask in zip(found, decode_masks(found, 80, 64).astype(bool), strict=True):
            assert mask.sum() == one["area"]
            shown = (pixels == COLOURS[one["category_id"]]).all(axis=-1)
            assert (mask & shown).sum() >= 0.5 * mask.sum()  # another object may cover it


def moved(source: CocoSource) -> list[Content]:
    """Return the annotations three times, moved at random; many of the crowd stay in it."""
    rng, results = np.random.default_rng(1), []
    for index in range(len(source)):
        rows = [one for one in source.annotations(index) for _ in range(3)]
        for one, mask in zip(rows, decode_masks(rows, 80, 64), strict=True):
            shift = rng.integers(-6, 7, 2)
            runs = mask_library().encode(np.asfortranarray(np.roll(mask, shift, (1, 0))))
            results.append(
                {
                    "image_id": one["image_id"], "category_id": int(rng.choice(list(CATEGORIES))),
                    "bbox": [*(np.array(one["bbox"][:2]) + shift).tolist(), *one["bbox"][2:]],
                    "segmentation": {"size": [64, 80], "counts": runs["counts"].decode()}, "score": float(rng.random()),
                }
            )  # fmt: skip
    return results


def by_pycocotools(file: Path, results: list[Content], kind: str, dropped: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        kept = [{key: value for key, value in one.items() if key != dropped} for one in results]
        scorer = COCOeval(truth, truth.loadRes(kept), kind)
        for step in (scorer.evaluate, scorer.accumulate, scorer.summarize):
            step()
    return scorer


def test_scores_are_those_of_pycocotools(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", train=20)
    source = opened(root)
    results = moved(source)
    scores, classes = average_precisions(source.ground_truth(), results)
    assert 5 < scores["box_ap"] < 95
    for kind, prefix, dropped in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox")):
        scorer = by_pycocotools(annotation_file(root), results, kind, dropped)
        for place, name in enumerate(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")):
            assert scores.get(f"{prefix}_{name}", -100.0) == pytest.approx(100 * scorer.stats[place])
        for number, one in enumerate(classes):
            expected = scorer.eval["precision"][:, :, number, 0, -1].mean()
            assert one[f"{prefix}_ap"] == pytest.approx(100 * expected)


def test_no_detections_score_zero(root: Path) -> None:
    scores, classes = average_precisions(opened(root).ground_truth(), [])
    assert scores["box_ap"] == scores["mask_ap50"] == 0
    assert [one["name"] for one in classes] == list(CATEGORIES.values())
    assert "box_ap_large" not in scores  # there is no large object


def without(key: str) -> Change:
    return lambda rows: [{name: value for name, value in row.items() if name != key} for row in rows]


def first_with(**values: Any) -> Change:
    return lambda rows: [rows[0] | values, *rows[1:]]


@pytest.mark.parametrize(
    ("key", "make", "words"),
    [
        ("images", lambda rows: [], ["has no images"]),
        ("annotations", lambda rows: None, ["has no annotations"]),
        ("categories", without("name"), ["name of categories[0]"]),
        ("annotations", without("bbox"), ["bbox of annotations[0]"]),
        ("annotations", first_with(category_id=4), ["unknown category_id 4"]),
        ("annotations", first_with(image_id=1), ["unknown image_id 1"]),
        ("images", lambda rows: [*rows, rows[0]], ["two images with id 100"]),
        ("images", first_with(file_name="gone.png"), ["1 of 6 images are missing", "gone.png"]),
        ("annotations", lambda rows: [row | {"iscrowd": 1} for row in rows], ["has no object"]),
        ("annotations", without("segmentation"), ["--model faster-rcnn"]),
    ],
)
def test_wrong_annotations_are_refused(root: Path, key: str, make: Change, words: list[str]) -> None:
    change(root, **{key: make})
    with pytest.raises(InputError) as refusal:
        opened(root)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": 3}', "[" * 100_000])
def test_a_file_that_is_not_coco_is_refused(root: Path, text: str) -> None:
    annotation_file(root).write_text(text)
    with pytest.raises(InputError, match="COCO's format"):
        opened(root)


BOXES = ([5, 5, 0, 10], [5, 5, float("nan"), 10], [200, 5, 10, 10], [-20, 5, 10, 10], [1, 2, 3], [1, 2, "3", 4])
MASKS = (
    [], [[1, 2, 3, 4]], [[1, 1, 9, 1, 9, 9], [1, 2, 3, 4]], [[1, 1, 9, 1, 9, 9, 4]], [[1, 1, 9, 1, 9, "9"]],
    {"counts": [1, 2], "size": [64, 80]}, {"counts": [64 * 80], "size": [80, 64]},
    {"counts": "abc", "size": [64, 80]}, {"size": [64, 80]}, None,
)  # fmt: skip


@pytest.mark.parametrize("values", [*({"bbox": box} for box in BOXES), *({"segmentation": mask} for mask in MASKS)])
def test_unusable_objects_are_left_out_with_a_warning(
    root: Path, values: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(opened(root).ground_truth()["annotations"])
    change(root, annotations=first_with(**values))
    assert len(opened(root).ground_truth()["annotations"]) == count - 1
    assert "left out 1 annotation: 10 of 000.png" in capsys.readouterr().out
    assert len(opened(root, masks=False).ground_truth()["annotations"]) == count - ("bbox" in values)


def test_boxes_beyond_their_images_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def as_corners(rows: list[Content]) -> list[Content]:
        return [row | {"bbox": [*row["bbox"][:2], 60, 63]} for row in rows]

    opened(root)
    assert "beyond" not in capsys.readouterr().out
    count = len(change(root, annotations=as_corners)["annotations"])
    opened(root)
    assert f"of {count} annotations reach beyond their images" in capsys.readouterr().out


def test_other_annotations_are_another_data_set(root: Path) -> None:
    before = opened(root)
    change(root, annotations=lambda rows: [*rows[1:], rows[0] | {"bbox": [1, 1, 9, 9]}])
    after = opened(root)
    assert identity(before) != identity(after)
    assert images_metadata(before)["labels"] != images_metadata(after)["labels"]
    assert images_metadata(before)["contents"] == images_metadata(after)["contents"]


def test_images_of_another_size_are_refused_before_training(root: Path) -> None:
    change(root, images=lambda rows: [row | {"width": row["height"], "height": row["width"]} for row in rows])
    with pytest.raises(InputError, match="80 x 64 pixels, but the annotations say 64 x 80"):
        opened(root)


def test_validation_has_the_categories_of_training(root: Path) -> None:
    train = opened(root)
    change(root, "val", categories=lambda rows: rows[::-1])
    assert opened(root, "val", like=train).categories == train.categories
    change(root, "val", categories=lambda rows: [*rows, {"id": 9, "name": "star"}])
    with pytest.raises(InputError, match="9 \\(star\\)"):
        opened(root, "val", like=train)


def test_layouts_of_folders(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train.json"
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        find_split(str(tmp_path / "nowhere"), "train", "", "")
    with pytest.raises(InputError, match=r"dino_xcit\.data scenes DIR"):
        find_split("sample:scenes", "train", "", "")
    for part, given, word in (("train", "", "--train-annotations"), ("val", str(file), "--val-images")):
        with pytest.raises(InputError, match=word):
            find_split(str(tmp_path), part, given, "")
    file.write_text("{}")
    assert find_split(str(tmp_path), "train", "", "") == (file, tmp_path / "images" / "train")
    file.with_name("instances_train_b.json").write_text("{}")
    with pytest.raises(InputError, match=r"instances_train\.json, instances_train_b\.json"):
        find_split(str(tmp_path), "train", "", "")
