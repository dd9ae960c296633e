"""sample:scenes: composition, masks, separation of the parts, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from dino_xcit.data import open_source
from dino_xcit.data.__main__ import main
from dino_xcit.data.sample import CLASSES, open_sample
from dino_xcit.data.scenes import MAX_OBJECTS, SIZE, Scenes, silhouette, write_scenes
from dino_xcit.errors import InputError


def test_scene_has_visible_objects_whose_masks_do_not_overlap() -> None:
    scenes = Scenes("train", single=False)
    counts = set()
    for index in range(30):
        pixels, objects = scenes.scene(index)
        assert pixels.shape == (SIZE, SIZE, 3)
        counts.add(len(objects))
        covered = np.sum([one.mask for one in objects], axis=0)
        assert covered.max() == 1
        assert all(one.mask.sum() > 30 for one in objects)
        assert all(0 <= one.label < len(CLASSES) for one in objects)
    assert counts == set(range(1, MAX_OBJECTS + 1))
    again, _ = Scenes("train", single=False).scene(29)
    assert np.array_equal(again, pixels)
    assert not np.array_equal(scenes.scene(28)[0], pixels)


def test_labels_of_single_objects_are_known_without_composing() -> None:
    source = open_source("sample:scene-objects", "val")
    assert isinstance(source, Scenes)
    assert len(source) == 500
    assert source.labels is not None
    for index in range(20):
        pixels, label = source.read(index)
        (one,) = source.scene(index)[1]
        assert label == one.label == source.labels[index]
        assert isinstance(pixels, np.ndarray)
        assert pixels[one.mask].std() > 0
    assert len(np.unique(source.labels)) == 10
    assert open_source("sample:scenes", "train").labels is None
    with pytest.raises(InputError, match="sample:scenes"):
        open_source("sample:scenery", "train")


def test_parts_share_neither_objects_nor_backgrounds() -> None:
    train, val = (open_sample("fashion-mnist", part).images for part in ("train", "val"))
    assert {image.tobytes() for image in train}.isdisjoint(image.tobytes() for image in val)
    scenes = [Scenes(part, single=False) for part in ("train", "val")]
    assert not np.array_equal(*(part.scene(0)[0] for part in scenes))
    assert scenes[0].fingerprint() != scenes[1].fingerprint()


def test_silhouette_is_one_filled_component() -> None:
    grey = np.zeros((28, 28), dtype=np.uint8)
    grey[5:15, 5:15] = 200
    grey[8:10, 8:10] = 0  # a hole
    grey[20:22, 20:22] = 255  # dust
    expected = np.zeros((28, 28), dtype=bool)
    expected[5:15, 5:15] = True
    assert np.array_equal(silhouette(grey), expected)


def test_files_agree_with_the_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path / "set"), "--train", "3", "--val", "2"]) == 0
    assert "written" in capsys.readouterr().out
    scenes = Scenes("val", single=False)
    content = json.loads((tmp_path / "set/annotations/instances_val.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["00000.png", "00001.png"]
    assert len(content["categories"]) == 10
    for index in range(2):
        pixels, objects = scenes.scene(index)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"set/images/val/{index:05d}.png")), pixels)
        found = [one for one in content["annotations"] if one["image_id"] == index + 1]
        assert len(found) == len(objects)
        semantic = np.zeros((SIZE, SIZE), dtype=np.uint8)
        for annotation, one in zip(found, objects, strict=True):
            encoded = coco_masks.frPyObjects(annotation["segmentation"], SIZE, SIZE)
            assert np.array_equal(coco_masks.decode(encoded), one.mask)
            assert coco_masks.toBbox(encoded).tolist() == annotation["bbox"]
            assert annotation["area"] == coco_masks.area(encoded)
            semantic[one.mask] = annotation["category_id"]
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"set/masks/val/{index:05d}.png")), semantic)
    names = (tmp_path / "set/classes.txt").read_text().splitlines()
    assert names == ["background", *(category["name"] for category in content["categories"])]
    assert len(list((tmp_path / "set/images/train").iterdir())) == 3
    with pytest.raises(InputError, match="4000"):
        main(["scenes", str(tmp_path / "set"), "--train", "9999"])
    with pytest.raises(InputError, match="not empty"):
        main(["scenes", str(tmp_path / "set"), "--train", "1", "--val", "1"])


def test_set_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, cause in (("file", "not empty"), ("file/set", "another folder")):
        with pytest.raises(InputError, match=cause):
            main(["scenes", str(tmp_path / name)])
    with pytest.raises(OSError, match="file"):
        write_scenes(tmp_path / "file", 1, 1)
