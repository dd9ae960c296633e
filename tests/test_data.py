"""Data sets by URL: both parts of them, subsets, and fingerprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_fixtures import names, odd_tree, write_image

from dino_xcit.data import ArraySource, Source, Subset, open_parts, open_source
from dino_xcit.data.source import split_part
from dino_xcit.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return odd_tree(tmp_path)


# ---- both parts


def parts_tree(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> Path:
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            write_image(root / part / name / "0.png")
    return root


def test_both_parts_come_from_a_folder_or_from_its_train_folder(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("a", "b"), ("a", "b"))
    for given in (str(tmp_path), str(tmp_path / "train"), str(tmp_path / "val"), f"{tmp_path}/train/"):
        train, val = open_parts(given, None, None)
        assert Path(train.name(0)).is_relative_to(tmp_path / "train")
        assert Path(val.name(0)).is_relative_to(tmp_path / "val")


def test_classes_are_numbered_as_in_the_training_part(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("ape", "bee", "cow"), ("bee", "cow"))
    train, val = open_parts(str(tmp_path), None, None)
    assert train.classes == val.classes == ("ape", "bee", "cow")
    assert val.labels is not None
    assert val.labels.tolist() == [1, 2]
    assert [val.read(i)[1] for i in range(2)] == [1, 2]


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("ape",), ("ape", "yak"))
    with pytest.raises(InputError, match="yak"):
        open_parts(str(tmp_path), None, None)


def test_each_part_can_be_given_on_its_own(tmp_path: Path) -> None:
    parts_tree(tmp_path / "one", ("a",), ("a",))
    parts_tree(tmp_path / "two", ("a",), ("a",))
    train, val = open_parts(str(tmp_path / "one"), None, str(tmp_path / "two" / "val"))
    assert Path(train.name(0)).is_relative_to(tmp_path / "one" / "train")
    assert Path(val.name(0)).is_relative_to(tmp_path / "two" / "val")
    train, val = open_parts(None, str(tmp_path / "two" / "train"), str(tmp_path / "one" / "val"))
    assert Path(train.name(0)).is_relative_to(tmp_path / "two" / "train")


def test_a_named_set_given_as_validation_data_means_its_validation_part() -> None:
    train, val = open_parts(None, "sample:fashion-mnist", "sample:fashion-mnist")
    assert (len(train), len(val)) == (12_000, 3_000)
    for part in ("sample:fashion-mnist/train", "sample:fashion-mnist/train/", "sample:fashion-mnist/val"):
        train, val = open_parts(part, None, None)
        assert (len(train), len(val)) == (12_000, 3_000)


def test_missing_parts_and_missing_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no train data"):
        open_parts(None, None, None)
    write_image(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(InputError, match="holds no folder 'val'"):
        open_parts(str(tmp_path), None, None)
    write_image(tmp_path / "val" / "loose.png")
    with pytest.raises(InputError, match="no labels"):
        open_parts(str(tmp_path), None, None)


# ---- subsets and fingerprints


def test_a_subset_renumbers_items_and_labels(tree: Path) -> None:
    source = open_source(str(tree))
    subset = Subset(source, np.array([4, 1]))
    assert len(subset) == 2
    assert names(subset) == [source.name(4), source.name(1)]
    assert subset.labels is not None
    assert subset.labels.tolist() == [2, 1]
    assert subset.read(0) == source.read(4)
    assert subset.classes == source.classes
    assert isinstance(subset, Source)


def test_fingerprints_change_with_items_order_labels_and_content(tree: Path) -> None:
    source = open_source(str(tree))
    original = source.fingerprint()
    assert open_source(str(tree)).fingerprint() == original
    prints = {original}

    def changed(what: Source) -> None:
        value = what.fingerprint()
        assert value not in prints
        prints.add(value)

    changed(Subset(source, np.array([0, 1])))
    changed(Subset(source, np.array([1, 0])))
    changed(Subset(source, np.arange(5), np.array([1, 0, 2]), ("cat", "ant", "dog")))
    write_image(tree / "dog" / "a.jpg", shade=30, size=(9, 9))
    changed(open_source(str(tree)))
    write_image(tree / "dog" / "z.jpg")
    changed(open_source(str(tree)))
    (tree / "dog" / "b.png").unlink()
    changed(open_source(str(tree)))
    (tree / "ant").rename(tree / "bat")
    changed(open_source(str(tree)))


def test_the_sample_s_fingerprint_follows_its_pixels_and_labels() -> None:
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 1, 0])
    first = ArraySource("x", images, labels, ("a", "b"))
    other_images = images.copy()
    other_images[1, 0, 0] = 1
    prints = {
        first.fingerprint(),
        ArraySource("x", other_images, labels, ("a", "b")).fingerprint(),
        ArraySource("x", images, np.array([0, 1, 1]), ("a", "b")).fingerprint(),
        ArraySource("x", images[:2], labels[:2], ("a", "b")).fingerprint(),
    }
    assert len(prints) == 4
    assert ArraySource("x", images.copy(), labels.copy(), ("a", "b")).fingerprint() in prints


@pytest.mark.parametrize(("url", "name", "part"), [
    ("hf:DIR", "hf:DIR", None), ("hf:DIR/train", "hf:DIR", "train"), ("hf:DIR/val//", "hf:DIR", "val"),
    ("hf:DIR/train/?label=none", "hf:DIR?label=none", "train"),
    ("hf:train/val", "hf:train", "val"), ("imagenet:/a?/train", "imagenet:/a?", "train"), ("/train", "/train", None),
    ("sample:trains", "sample:trains", None),
])  # fmt: skip
def test_a_part_is_split_off_a_url(url: str, name: str, part: str | None) -> None:
    assert split_part(url) == (name, part)


@pytest.mark.parametrize("data", ["absent", "absent/train", "absent.txt"])
def test_data_that_are_not_there_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        open_parts(data, None, None)
