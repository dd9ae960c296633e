"""Images with masks: layouts, pairing by name, labels, and data that is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_fixtures import NAMES, save_mask, scene, shapes
from PIL import Image

from dino_xcit.data import Source
from dino_xcit.data.masks import open_masks
from dino_xcit.data.source import identity
from dino_xcit.errors import InputError
from eval.results import images_metadata
from supervised.segment_config import SegmentConfig


def config_of(data: Path, **changes: Any) -> SegmentConfig:
    return SegmentConfig(data_path=str(data), num_workers=0, **changes)


@pytest.mark.parametrize("layout", ["folder", "parts", "voc", "ade20k"])
def test_all_layouts_give_the_same_masks(tmp_path: Path, layout: str) -> None:
    train, val = open_masks(config_of(shapes(tmp_path, layout, train=3, val=2)))
    assert isinstance(train, Source)
    assert (len(train), len(val)) == (3, 2)
    rng = np.random.default_rng(7)
    for source, count in ((train, 3), (val, 2)):
        for index in range(count):
            _, expected = scene(rng, 64 + int(rng.integers(0, 9)), 64 + int(rng.integers(0, 9)))
            np.testing.assert_array_equal(source.mask(index, expected.shape), expected)
            assert Path(source.name(index)).stem == Path(source.masks[index]).stem == source.names[index]
    known = {"voc": 21, "ade20k": 150}.get(layout, 4)
    assert train.classes is not None
    assert train.classes == val.classes
    assert len(train.classes) == known
    assert train.classes[:2] == {"voc": ("background", "aeroplane"), "ade20k": ("1", "2")}.get(layout, NAMES[:2])
    assert identity(train) != identity(val)


def test_classes_are_counted_in_all_training_masks_or_given(tmp_path: Path) -> None:
    root = shapes(tmp_path, names=False)
    assert open_masks(config_of(root))[0].classes == ("0", "1", "2", "3")
    assert open_masks(config_of(root, classes=9))[0].classes == tuple(map(str, range(9)))
    labelled("masks/train/train_011.png", 7)(root)
    assert open_masks(config_of(root))[0].classes == tuple(map(str, range(8)))
    labelled("masks/train/*", 0, slice(None))(root)
    with pytest.raises(InputError, match="1 class besides the ignored label 255"):
        open_masks(config_of(root))


def ignoring(folder: Path, label: int) -> Path:
    """Write shapes whose ignored pixels have this label instead of 255."""
    root = shapes(folder, train=2, val=1)
    for path in root.glob("masks/*/*.png"):
        stored = np.array(Image.open(path))
        save_mask(path, np.where(stored == 255, label, stored).astype(np.uint8))
    return root


def test_an_ignored_label_may_be_any(tmp_path: Path) -> None:
    root = ignoring(tmp_path, 200)
    train, _ = open_masks(config_of(root, ignore_label=200))
    found = train.mask(0, np.array(Image.open(train.masks[0])).shape)
    assert set(np.unique(found)) == {0, 1, 2, 3, 255}


def test_ignored_label_0_is_no_class(tmp_path: Path) -> None:
    root = ignoring(tmp_path, 0)
    train, val = open_masks(config_of(root, ignore_label=0))
    assert train.classes == val.classes == NAMES[1:]
    assert set(np.unique(train.mask(0, np.array(Image.open(train.masks[0])).shape))) == {0, 1, 2, 255}
    with pytest.raises(InputError, match="ignore_label is 2, a class"):
        open_masks(config_of(root, ignore_label=2))


def test_other_masks_are_another_data_set(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=2, val=1)
    before, _ = open_masks(config_of(root))
    stored, labels = identity(before), images_metadata(before)["labels"]
    labelled("masks/train/train_000.png", 2)(root)
    assert identity(before) != stored
    assert images_metadata(before)["labels"] != labels


def test_the_size_of_a_turned_photo_is_the_upright_one(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=2, val=1)
    image, mask = scene(np.random.default_rng(0), 40, 70)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(root / "images/train/train_000.jpg", exif=exif)
    save_mask(root / "masks/train/train_000.png", mask)
    train, _ = open_masks(config_of(root))
    np.testing.assert_array_equal(train.mask(0, (40, 70)), mask)


Damage = Callable[[Path], object]
FIRST = "masks/train/train_000.png"


def saved(mode: str, file: str = FIRST) -> Damage:
    return lambda root: Image.new(mode, (64, 64)).save(root / file)


def labelled(pattern: str, label: int, rows: slice = slice(9)) -> Damage:
    """Set some rows of masks to a label."""

    def change(root: Path) -> None:
        for path in root.glob(pattern):
            stored = np.array(Image.open(path))
            stored[rows] = label
            save_mask(path, stored)

    return change


def removed(*files: str) -> Damage:
    return lambda root: [(root / file).unlink() for file in files]


BAD: dict[str, tuple[Damage, str]] = {
    "another size": (lambda root: save_mask(root / FIRST, np.zeros((30, 40), dtype=np.uint8)), "000.png has 40 x 30"),
    "unknown label": (labelled(FIRST, 9), r"000.png has the label 9, expected 0 to 3, or 255"),
    "unknown label in all": (labelled("masks/train/*.png", 9), r"\(3 invalid masks of 3\)"),
    "unknown label in val": (labelled("masks/val/val_001.png", 4), "val_001.png has the label 4"),
    "colours": (saved("RGB"), "000.png cannot be read: its format is RGB"),
    "16 bits": (saved("I;16"), "000.png cannot be read: its format is I;16"),
    "truncated": (lambda root: (root / FIRST).write_bytes((root / FIRST).read_bytes()[:150]), "000.png cannot"),
    "no mask": (removed(FIRST), r"no mask for 1 image of .* such as train_000"),
    "no image": (
        removed("images/val/val_001.jpg", "images/val/val_002.jpg"),
        "no image for 2 masks .* val_001",
    ),
    "two images of a name": (saved("RGB", "images/train/train_001.png"), "same name"),
    "no val part": (lambda root: (root / "images/val").rename(root / "images/test"), "has no images/val"),
    "no training part": (lambda root: (root / "images").rename(root / "photos"), "the folders images/training"),
    "damaged image": (lambda root: (root / "images/train/train_000.jpg").write_bytes(b"?"), "000.jpg cannot be read"),
    "names of other classes": (lambda root: (root / "classes.txt").write_text("a\nb\n"), "label [23], expected 0 to 1"),
    "nothing to score": (labelled("masks/val/*", 255, slice(None)), r"all pixels of the masks of .*val are ignored"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_by_name(tmp_path: Path, case: str) -> None:
    damage, words = BAD[case]
    damage(shapes(tmp_path, train=3, val=3))
    with pytest.raises(InputError, match=words):
        open_masks(config_of(tmp_path))


def test_settings_that_contradict_the_data(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=2, val=1)
    with pytest.raises(InputError, match=r"classes is 7, but .* names 4 classes"):
        open_masks(config_of(root, classes=7))
    with pytest.raises(InputError, match="expected the folders JPEGImages"):
        open_masks(config_of(root, layout="voc"))
    with pytest.raises(InputError, match="no data given"):
        open_masks(SegmentConfig())
