"""Data sets in COCO's format, and their scores."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_fixtures import CATEGORIES, COLOURS, annotations_of, make_coco, write_annotations
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_xcit.data import UndecodableImage
from dino_xcit.errors import InputError
from downstream.coco import CocoSource, find_part, mask_library, open_coco
from downstream.detection import average_precisions

Content = dict[str, Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def opened(root: Path, part: str = "train", masks: bool = True, like: CocoSource | None = None) -> CocoSource:
    return open_coco(*find_part(str(root), part, "", ""), masks, like)


def test_labels_boxes_and_masks_are_those_of_the_file(root: Path) -> None:
    source, content = opened(root), annotations_of(root, "train")
    assert source.categories == CATEGORIES
    for index, image in enumerate(content["images"]):
        expected = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        found = source.objects(index)
        assert [source.category_ids[label - 1] for label in found.labels] == [one["category_id"] for one in expected]
        assert found.boxes.tolist() == [one["bbox"] for one in expected]
        pixels = np.asarray(Image.open(source.name(index)))
        runs = source.runs(index)
        assert len(runs) == sum(not one["iscrowd"] for one in expected)
        for run, one in zip(runs, expected, strict=False):
            mask = mask_library().decode(run).astype(bool)
            assert mask.sum() == one["area"]
            shown = (pixels == COLOURS[one["category_id"]]).all(axis=-1)
            assert (mask & shown).sum() >= 0.5 * mask.sum()  # another object may cover it
    assert source.with_objects().tolist() == list(range(len(source) - 1))  # the last image has none
    truth = source.ground_truth()["annotations"]
    assert [one["id"] for one in truth] == list(range(1, len(truth) + 1))
    by_box = [sorted(rows, key=lambda one: (one["image_id"], one["bbox"])) for rows in (truth, content["annotations"])]
    for one, expected in zip(*by_box, strict=True):
        assert one | {"id": 0} == expected | {"id": 0}


def some_results(source: CocoSource, seed: int) -> list[Content]:
    """Return the annotations moved at random, some with another class, and detections inside of the crowd."""
    rng = np.random.default_rng(seed)
    results = []
    for index in range(len(source)):
        (width, height), masks = source.sizes[index], mask_library()
        for one in source.annotations(index):
            for _ in range(3):
                shift = rng.integers(-6, 7, 2)
                mask = masks.decode(masks.segmToRle(one["segmentation"], width, height))
                runs = masks.encode(np.asfortranarray(np.roll(mask, shift, (1, 0))))
                box = [*(np.array(one["bbox"][:2]) + shift).tolist(), *one["bbox"][2:]]
                results.append(
                    {
                        "image_id": one["image_id"], "category_id": int(rng.choice(source.category_ids)), "bbox": box,
                        "score": round(float(rng.random()), 3),
                        "segmentation": {"size": [int(height), int(width)], "counts": runs["counts"].decode()},
                    }
                )  # fmt: skip
    return results


def by_pycocotools(root: Path, part: str, results: list[Content], kind: str) -> Any:
    """Score against the annotation file itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        content = annotations_of(root, part)
        for number, one in enumerate(content["annotations"], start=1):
            one["id"] = number
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        dropped = "bbox" if kind == "segm" else "segmentation"
        kept = [{key: value for key, value in one.items() if key != dropped} for one in copy.deepcopy(results)]
        scorer = COCOeval(truth, truth.loadRes(kept), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def test_scores_are_those_of_pycocotools(tmp_path: Path) -> None:
    root = make_coco(tmp_path, train=20, val=2)
    source = opened(root)
    results = some_results(source, seed=1)
    scores, classes = average_precisions(source.ground_truth(), results)
    assert 5 < scores["box_ap"] < 95
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        scorer = by_pycocotools(root, "train", results, kind)
        for name, expected in zip(names, scorer.stats, strict=False):
            assert scores.get(f"{prefix}_{name}", -100.0) == pytest.approx(100 * expected)
        for number, one in enumerate(classes):
            expected = scorer.eval["precision"][:, :, number, 0, -1].mean()
            assert one[f"{prefix}_ap"] == pytest.approx(100 * expected)


def test_detections_in_a_crowd_are_not_wrong(root: Path) -> None:
    source = opened(root)
    perfect = [one | {"score": 0.9} for one in source.annotations(0) if not one["iscrowd"]]
    for index in range(1, len(source)):
        perfect += [one | {"score": 0.9} for one in source.annotations(index)]
    (crowd,) = [one for one in source.annotations(0) if one["iscrowd"]]
    in_crowd = [{**crowd, "score": 0.99, "bbox": [5, 5, 10, 10]}]
    truth = source.ground_truth()
    for one in truth["annotations"]:
        one.pop("segmentation")
    assert average_precisions(truth, perfect + in_crowd)[0]["box_ap"] == pytest.approx(100)
    elsewhere = [{**in_crowd[0], "image_id": int(source.image_ids[-1])}]
    assert average_precisions(truth, perfect + elsewhere)[0]["box_ap"] < 100


def test_no_detections_score_zero(root: Path) -> None:
    scores, classes = average_precisions(opened(root).ground_truth(), [])
    assert scores["box_ap"] == scores["mask_ap50"] == 0
    assert [one["name"] for one in classes] == list(CATEGORIES.values())
    assert "box_ap_large" not in scores  # there is no large object


def change(root: Path, **changes: Any) -> None:
    """Change the training annotations: a new value of a key, or a function of the old one."""
    content = annotations_of(root, "train")
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    write_annotations(root, "train", content)


def without(key: str) -> Any:
    return lambda rows: [{name: value for name, value in row.items() if name != key} for row in rows]


def with_value(**values: Any) -> Any:
    """Set values of the first row."""
    return lambda rows: [rows[0] | values, *rows[1:]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": []}, ["has no images"]),
        ({"annotations": []}, ["has no annotations"]),
        ({"categories": without("name")}, ["name of categories[0]"]),
        ({"images": without("width")}, ["width of images[0]"]),
        ({"annotations": without("bbox")}, ["bbox of annotations[0]"]),
        ({"annotations": with_value(category_id=4)}, ["unknown category_id 4"]),
        ({"annotations": with_value(image_id=1)}, ["unknown image_id 1"]),
        ({"images": lambda rows: [*rows, rows[0]]}, ["two images with id 100"]),
        ({"categories": lambda rows: [*rows, rows[0]]}, ["two categories with id 3"]),
        ({"images": with_value(file_name="gone.png")}, ["1 of 6 images are missing", "gone.png"]),
        ({"annotations": lambda rows: [row | {"iscrowd": 1} for row in rows]}, ["has no object"]),
        ({"annotations": without("segmentation")}, ["--model faster-rcnn"]),
    ],
)  # fmt: skip
def test_wrong_annotations_are_refused(root: Path, changes: Content, words: list[str]) -> None:
    change(root, **changes)
    with pytest.raises(InputError) as refusal:
        opened(root)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": 3}', "[" * 100_000])
def test_a_file_that_is_not_coco_is_refused(root: Path, text: str) -> None:
    (root / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(InputError):
        opened(root)


@pytest.mark.parametrize(
    "values",
    [
        {"bbox": [5, 5, 0, 10]},
        {"bbox": [5, 5, float("nan"), 10]},
        {"bbox": [200, 5, 10, 10]},
        {"bbox": [-20, 5, 10, 10]},
        {"bbox": [1, 2, 3]},
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": {"counts": [1, 2], "size": [64, 80]}},
        {"segmentation": {"counts": [64 * 80], "size": [80, 64]}},
        {"segmentation": {"counts": "abc", "size": [64, 80]}},
    ],
)
def test_unusable_objects_are_left_out_with_a_warning(
    root: Path, values: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(opened(root).ground_truth()["annotations"])
    change(root, annotations=with_value(**values))
    assert len(opened(root).ground_truth()["annotations"]) == count - 1
    assert "left out 1 annotation: 0 of 000.png" in capsys.readouterr().out
    if "segmentation" in values:
        assert len(opened(root, masks=False).ground_truth()["annotations"]) == count


def test_validation_has_the_categories_of_training(root: Path) -> None:
    train = opened(root)
    content = annotations_of(root, "val")
    write_annotations(root, "val", content | {"categories": content["categories"][::-1]})
    assert opened(root, "val", like=train).categories == train.categories
    write_annotations(root, "val", content | {"categories": [*content["categories"], {"id": 9, "name": "star"}]})
    with pytest.raises(InputError, match="9 \\(star\\)"):
        opened(root, "val", like=train)


def test_an_image_of_another_size_is_unreadable(root: Path) -> None:
    source = opened(root)
    source.check_size(0, 80, 64)
    with pytest.raises(UndecodableImage, match="64 x 80"):
        source.check_size(0, 64, 80)


def test_layouts_of_folders(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(InputError, match="--train-annotations"):
        find_part(str(tmp_path), "train", "", "")
    file = tmp_path / "annotations" / "instances_train.json"
    file.write_text("{}")
    assert find_part(str(tmp_path), "train", "", "") == (file, tmp_path / "images" / "train")
    file.with_name("instances_train_b.json").write_text("{}")
    with pytest.raises(InputError, match=r"instances_train\.json, instances_train_b\.json"):
        find_part(str(tmp_path), "train", "", "")
    with pytest.raises(InputError, match="--val-images"):
        find_part(str(tmp_path), "val", str(file), "")
    with pytest.raises(InputError, match="--data-path"):
        find_part("", "val", str(file), "")
