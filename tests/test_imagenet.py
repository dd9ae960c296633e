"""ImageNet as downloaded: stand-ins with three classes in every layout, and damaged ones."""

from __future__ import annotations

import gzip
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_images import encoded, photograph
from data_fixtures import labels, names
from hostile_archives import packed
from scipy.io import savemat

from dino_xcit.data import Source, open_parts, open_source
from dino_xcit.data.imagenet import GROUND_TRUTH, KIT, META
from dino_xcit.errors import InputError

WNIDS = ("n01440764", "n02085620", "n03995372")
NUMBERS = {"n02085620": 1, "n03995372": 2, "n01440764": 3}
"""ILSVRC2012_ID by wnid. The order differs from that of the wnids, as in the real kit."""
VAL = ("n03995372", "n01440764", "n02085620", "n02085620", "n01440764", "n03995372")
"""Class of each validation image, in order."""


TRAIN_IMAGES = {
    f"{wnid}/{wnid}_{number}.JPEG": encoded(photograph(100 * place + number), "JPEG")
    for place, wnid in enumerate(WNIDS)
    for number in (9, 10, 2)
}
VAL_IMAGES = {f"ILSVRC2012_val_{number:08d}.JPEG": encoded(photograph(1000 + number), "JPEG") for number in range(1, 7)}


ARCHIVES = {
    f"{wnid}.tar": packed({name[10:]: data for name, data in TRAIN_IMAGES.items() if name.startswith(wnid)})
    for wnid in reversed(WNIDS)
}
"""In descending order, as archives need not be sorted."""
TRAIN, VALIDATION, KIT_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", f"{KIT}.tar.gz"


def meta_mat(numbers: dict[str, int] = NUMBERS) -> bytes:
    rows = [(number, wnid, "some words", 0) for wnid, number in numbers.items()]
    rows.append((99, "n00001740", "entity", 3))  # parent of the other classes
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)}, do_compression=True)
    return buffer.getvalue()


def kit() -> dict[str, bytes]:
    lines = "".join(f"{NUMBERS[wnid]}\n" for wnid in VAL)
    return {f"{KIT}/data/{GROUND_TRUTH}": lines.encode(), f"{KIT}/data/{META}": meta_mat(), f"{KIT}/readme.txt": b"x"}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def as_shipped(root: Path) -> None:
    kit_archive = gzip.compress(packed(kit()))
    write(root, {TRAIN: packed(ARCHIVES), VALIDATION: packed(VAL_IMAGES), KIT_ARCHIVE: kit_archive})


def partly_unpacked(root: Path) -> None:
    write(root, {TRAIN: packed(ARCHIVES)})
    write(root / "val", VAL_IMAGES)
    write(root, kit())


def kaggle(root: Path) -> None:
    base = root / "ILSVRC/Data/CLS-LOC"
    write(base / "train", TRAIN_IMAGES)
    write(base / "val", VAL_IMAGES)
    rows = [f"ILSVRC2012_val_{number:08d},{wnid} 85 1 499 272 {wnid} 1 2 3 4 " for number, wnid in enumerate(VAL, 1)]
    write(root, {"LOC_val_solution.csv": "\n".join(["ImageId,PredictionString", *reversed(rows)]).encode()})
    write(root, {"LOC_synset_mapping.txt": "".join(f"{wnid} a word, another\n" for wnid in WNIDS).encode()})


def folders(root: Path) -> None:
    write(root / "train", TRAIN_IMAGES)
    for (name, data), wnid in zip(VAL_IMAGES.items(), VAL, strict=True):
        write(root / "val" / wnid, {name: data})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    as_shipped(tmp_path / "in")
    return tmp_path / "in"


def read_all(source: Source) -> dict[str, tuple[object, int | None]]:
    """Return (bytes, label) of each image by file name."""
    return {source.name(index).rpartition("/")[2]: source.read(index) for index in range(len(source))}


@pytest.mark.parametrize("lay_out", [as_shipped, partly_unpacked, kaggle, folders])
def test_every_layout_gives_the_same_images_labels_and_classes(tmp_path: Path, lay_out: Callable[[Path], None]) -> None:
    lay_out(tmp_path / "in")
    train, val = open_parts(f"imagenet:{tmp_path}/in", None, None)
    assert train.classes == val.classes == WNIDS
    in_order = sorted(TRAIN_IMAGES)  # order of a sorted folder
    assert [name.rpartition("/")[2] for name in names(train)] == [name[10:] for name in in_order]
    assert labels(train) == [0] * 3 + [1] * 3 + [2] * 3
    assert read_all(train) == {name[10:]: (TRAIN_IMAGES[name], WNIDS.index(name[:9])) for name in in_order}
    expected = zip(VAL_IMAGES.items(), VAL, strict=True)
    assert read_all(val) == {name: (data, WNIDS.index(wnid)) for (name, data), wnid in expected}


def test_fingerprint_is_independent_of_archive_location(shipped: Path) -> None:
    def fingerprints(root: Path) -> list[str]:
        return [open_source(f"imagenet:{root}", part).fingerprint() for part in ("train", "val")]

    before = fingerprints(shipped)
    assert fingerprints(shipped.rename(shipped.with_name("elsewhere"))) == before


def test_archives_are_scanned_once(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        first = open_source(f"imagenet:{shipped}", part)
        with monkeypatch.context() as patch:
            patch.setattr("dino_xcit.data.imagenet.scan", None)  # a second scan raises TypeError
            again = open_source(f"imagenet:{shipped}", part)
        assert read_all(again) == read_all(first)
        assert again.fingerprint() == first.fingerprint()


def test_changed_ground_truth_changes_labels_and_fingerprint(shipped: Path) -> None:
    before = open_source(f"imagenet:{shipped}", "val")
    truth(3, 3, 2, 1, 1, 2)(shipped)
    after = open_source(f"imagenet:{shipped}", "val")
    assert labels(after) == [0, 0, 2, 1, 1, 2]
    assert after.fingerprint() != before.fingerprint()


# ---- damaged and missing data

Damage = Callable[[Path], None]


def in_kit(name: str, data: bytes) -> Damage:
    return lambda root: write(root, {KIT_ARCHIVE: gzip.compress(packed(kit() | {f"{KIT}/data/{name}": data}))})


def truth(*lines: object) -> Damage:
    return in_kit(GROUND_TRUTH, "".join(f"{line}\n" for line in lines).encode())


def meta(data: bytes) -> Damage:
    return in_kit(META, data)


def cut(name: str) -> Damage:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size * 2 // 3)


def replaced(name: str, data: bytes) -> Damage:
    return lambda root: write(root, {name: data})


def gone(name: str) -> Damage:
    return lambda root: (root / name).unlink()


@pytest.mark.parametrize(("part", "damage", "words"), [
    ("train", gone(TRAIN), "no training images in .*expected ILSVRC2012_img_train.tar"),
    ("val", gone(VALIDATION), "no validation images in .*expected ILSVRC2012_img_val.tar"),
    ("val", gone(KIT_ARCHIVE), "no ground truth .*ILSVRC2012_devkit_t12.tar.gz .from https://image-net"),
    ("train", cut(TRAIN), "train.tar is truncated.*image-net.org/download"),
    ("val", cut(VALIDATION), "val.tar is truncated.*image-net.org/download"),
    ("train", replaced(TRAIN, gzip.compress(b"x" * 9999)), "train.tar is compressed"),
    ("train", replaced(TRAIN, packed(dict.fromkeys(ARCHIVES, gzip.compress(b"x" * 9999)))),
     "train.tar/n03995372.tar is compressed"),
    ("train", replaced(TRAIN, packed(TRAIN_IMAGES)), "contains n01440764/.*expected n01440764.tar"),
    ("train", replaced(TRAIN, b""), "train.tar is empty"),
    ("train", replaced(TRAIN, packed({})), "train.tar is empty"),
    ("train", replaced(TRAIN, packed(dict(list(ARCHIVES.items())[:2]))),
     "has 2 classes, .*devkit_t12.tar.gz names 3, and only one of them has n01440764"),
    ("val", truth(1, 2, 3, 3, 2), "has 6 images, .*ground_truth.txt. lists 5, .* has ILSVRC2012_val_00000006"),
    ("val", truth(1, 2, 3, 3, 2, 1, 1), "has 6 images, .* lists 7, and only one of them has ILSVRC2012_val_00000007"),
    ("val", truth(1, 2, 3, 3, 2, 99), "has the class '99', which is unknown"),
    ("val", truth("cat", 2, 3), "has the class 'cat'"),
    ("val", truth(), "ground_truth.txt.*download it again"),
    ("val", meta(meta_mat()[:-40]), "meta.mat is damaged"),
    ("val", meta(meta_mat({**NUMBERS, "tench": 4})), "meta.mat is damaged: expected wnids"),
    ("val", cut(KIT_ARCHIVE), "devkit_t12.tar.gz is damaged"),
    ("val", replaced(KIT_ARCHIVE, b"<html>"), "devkit_t12.tar.gz is damaged"),
    ("val", replaced(KIT_ARCHIVE, gzip.compress(packed({"a": b""}))), "devkit_t12.tar.gz is damaged"),
])  # fmt: skip
def test_damaged_or_inconsistent_data_is_refused(shipped: Path, part: str, damage: Damage, words: str) -> None:
    damage(shipped)
    with pytest.raises(InputError, match=words):
        open_source(f"imagenet:{shipped}", part)


@pytest.mark.parametrize(("name", "data"), [
    ("LOC_val_solution.csv", b""), ("LOC_val_solution.csv", b"a,b\n1,2\n"),
    ("LOC_val_solution.csv", b"ImageId,PredictionString\nx,\n"),
    ("LOC_val_solution.csv", b"ImageId,PredictionString\nx,n00000000 1 2 3 4\n"),
    ("LOC_synset_mapping.txt", b"tench\n"), ("LOC_synset_mapping.txt", b"n01440764 a\nn01440764 a\n"),
])  # fmt: skip
def test_damaged_kaggle_table_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    kaggle(tmp_path / "in")
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        open_source(f"imagenet:{tmp_path}/in", "val")


def test_missing_class_of_kaggle_table_is_refused(tmp_path: Path) -> None:
    kaggle(tmp_path / "in")
    shutil.rmtree(tmp_path / "in/ILSVRC/Data/CLS-LOC/train/n02085620")
    with pytest.raises(InputError, match=r"has 2 classes, .*LOC_synset_mapping.txt names 3, .* has n02085620"):
        open_source(f"imagenet:{tmp_path}/in")


def test_missing_or_remote_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*absent: expected one with ILSVRC2012_img_train.tar"):
        open_source(f"imagenet:{tmp_path}/absent")
    with pytest.raises(InputError, match="expected a folder on this machine"):
        open_source("imagenet:s3://bucket/imagenet")


@pytest.mark.parametrize("lay_out", [partly_unpacked, kaggle])
@pytest.mark.parametrize("hidden", ["._ILSVRC2012_val_00000001.JPEG", ".ILSVRC2012_val_00000001.JPEG"])
def test_hidden_files_beside_validation_images_are_ignored(
    tmp_path: Path, lay_out: Callable[[Path], None], hidden: str
) -> None:
    lay_out(tmp_path / "in")
    (folder,) = {path.parent for path in tmp_path.rglob("ILSVRC2012_val_*.JPEG")}
    (folder / hidden).write_bytes(b"a resource of macOS")
    assert read_all(open_source(f"imagenet:{tmp_path}/in", "val")).keys() == VAL_IMAGES.keys()
