"""ImageNet's variants, on small stand-ins of the layouts that their authors ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow.parquet import write_table
from tiny_run import CPU

from dino_xcit.data import Source, open_source
from dino_xcit.data.__main__ import main as data_command
from dino_xcit.errors import InputError
from eval.linear.imagenet_variants import Variant, measure, open_variant
from eval.linear.pooled import Rows

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041")


def folders(root: Path, names: dict[str, list[str]]) -> Path:
    """``root``/class/file for each; what is drawn does not matter here."""
    for folder, files in names.items():
        (root / folder).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (4, 4)).save(root / folder / file)
    return root


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Source, Source]:
    """Training and validation images of seven classes, the latter named as ImageNet's, not in the order of classes."""
    train = folders(tmp_path / "train", {wnid: ["a.png"] for wnid in WNIDS})
    val = folders(
        tmp_path / "val",
        {wnid: [f"ILSVRC2012_val_{8 - number:08d}.png"] for number, wnid in enumerate(WNIDS, start=1)},
    )
    return open_source(str(train)), open_source(str(val))


def one_hot(guesses: list[int]) -> Rows:
    """Features whose argmax is the guess, under the classifier that is the identity; then the labels in order."""
    rows = np.tile(-0.01 * np.arange(7, dtype=np.float32), (len(guesses), 1))
    rows[np.arange(len(guesses)), guesses] = 1
    return Rows(rows, 7)


def measured(variant: Variant, guesses: list[int]) -> dict[str, Any]:
    return measure(variant, one_hot(guesses), torch.eye(7), torch.zeros(7), CPU)


def test_imagenet_v2s_folders_are_numbers_of_the_sorted_wnids(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    v2 = folders(tmp_path / "v2", {str(number): [f"{number}.png"] for number in range(7)})
    variant = open_variant(f"imagenet-v2:{v2}", *parts)
    assert variant.source is not None
    assert [WNIDS[label] for label in variant.labels[:, 0]] == list(WNIDS)
    found = measured(variant, [0, 1, 2, 3, 4, 5, 5])
    assert found["top1"] == pytest.approx(600 / 7)
    assert found["top1_interval"][0] < found["top1"] < found["top1_interval"][1]
    assert (found["images"], found["classes"]) == (7, 7)
    assert "has 7 classes and 7 images here, as published 1,000 and 10,000" in str(variant.notice())


def test_numbers_are_sorted_as_numbers_and_others_are_refused(tmp_path: Path) -> None:
    """With more than ten classes "10" comes before "2"."""
    wnids = [f"n{number:08d}" for number in range(12)]
    train = open_source(str(folders(tmp_path / "train", {wnid: ["a.png"] for wnid in wnids})))
    v2 = folders(tmp_path / "v2", {str(number): ["a.png"] for number in range(12)})
    variant = open_variant(f"imagenet-v2:{v2}", train, train)
    assert variant.source is not None
    assert variant.source.classes is not None
    for index in range(12):
        folder = Path(variant.source.name(index)).parent.name
        assert wnids[variant.labels[index, 0]] == f"n{int(folder):08d}"
    (v2 / "11").rename(v2 / "12")
    with pytest.raises(InputError, match="expected a folder for each of its 12 classes, named 0 to 11"):
        open_variant(f"imagenet-v2:{v2}", train, train)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_a_and_r_let_the_classifier_choose_among_their_own_classes_alone(
    tmp_path: Path, parts: tuple[Source, Source], name: str
) -> None:
    own = folders(tmp_path / "own", {WNIDS[1]: ["a.png"], WNIDS[4]: ["a.png", "b.png"]})
    variant = open_variant(f"{name}:{own}", *parts)
    # 0 and 6 are no classes here: the next best is, by the features' order, 1.
    assert measured(variant, [0, 4, 6])["top1"] == pytest.approx(200 / 3)
    assert measured(variant, [0, 4, 6])["classes"] == 2
    assert measured(variant, [0, 4, 6])["top5"] is None, "of two classes each is among the first five"
    sketch = open_variant(f"sketch:{own}", *parts)
    assert measured(sketch, [0, 4, 6])["top1"] == pytest.approx(100 / 3), "sketch's choose among all"
    assert measured(sketch, [0, 4, 6])["top5"] == pytest.approx(200 / 3)


def test_real_counts_any_of_an_images_labels_in_the_order_of_the_file_names(
    tmp_path: Path, parts: tuple[Source, Source]
) -> None:
    # The images lie in the order of the classes, which is that of falling numbers: image 7, 6, ... 1.
    lists: list[list[int]] = [[6], [5, 0], [], [3], [2], [1], [4]]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    variant = open_variant(f"real:{tmp_path / 'real.json'}", *parts)
    assert variant.source is None
    # Guesses in the order of the validation images: classes 0 to 6, which are the files 7 to 1.
    assert measured(variant, [0, 1, 2, 3, 4, 0, 6]) == {
        "images": 6,
        "classes": 7,
        "top1": pytest.approx(500 / 6),  # file 7, class 0, should be 4; file 5 has no label; file 2 may be 0
        "top1_interval": pytest.approx([43.649718, 96.994663]),
        "top5": pytest.approx(100.0),
        "top5_interval": pytest.approx([60.966571, 100.0]),
    }


def test_reals_labels_reach_the_right_images_of_packed_shards(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    """Packing puts a number before each name: the order of the names before it counts."""
    train, val = parts
    assert data_command(["pack", val.url, str(tmp_path / "packed")]) == 0
    packed = open_source(f"tar:{tmp_path / 'packed'}/*.tar")
    (tmp_path / "real.json").write_text(json.dumps([[6 - number] for number in range(7)]))
    for source in (val, packed):
        variant = open_variant(f"real:{tmp_path / 'real.json'}", train, source)
        assert source.labels is not None
        assert variant.labels[:, 0].tolist() == source.labels.tolist()


def test_real_is_refused_where_the_order_of_the_images_is_unknown(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    train, val = parts
    rows = [{"image": val.read(number)[0], "label": number} for number in range(7)]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val.parquet")
    nameless = open_source(f"parquet:{tmp_path}/val.parquet")
    (tmp_path / "real.json").write_text(json.dumps([[6 - number] for number in range(7)]))
    with pytest.raises(
        InputError, match=r"own label for 1 of 7 images of parquet:.*, expected most: its labels are in"
    ):
        open_variant(f"real:{tmp_path / 'real.json'}", train, nameless)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[0]", "is no JSON"),
        ('{"a": 1}', "is not ReaL's"),
        ("[0, 1, 2, 3, 4, 5, 6]", "is not ReaL's"),
        ("[[0], [1]]", "has labels of 2 images"),
        ("[[0], [1], [2], [3], [4], [5], [7]]", "has the label 7: expected numbers of classes from 0 to 6"),
        ("[[0], [1], [2], [3], [4], [5], [true]]", "has the label True"),
        ("[[0], [1], [2], [3], [4], [5], [-1]]", "has the label -1"),
        ("[[], [], [], [], [], [], []]", "has no label at all"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_file_that_is_not_reals_is_a_sentence(
    tmp_path: Path, parts: tuple[Source, Source], content: str, said: str
) -> None:
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(InputError, match=said):
        open_variant(f"real:{tmp_path / 'real.json'}", *parts)


def test_other_classes_are_refused(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    train, val = parts
    with pytest.raises(InputError, match=r"expected imagenet-v2:DIR, imagenet-a:DIR"):
        open_variant("imagenet-c:somewhere", train, val)
    other = folders(tmp_path / "other", {"n99999999": ["a.png"]})
    with pytest.raises(InputError, match="it has a class 'n99999999', which is none of the 7 training classes"):
        open_variant(f"sketch:{other}", train, val)
    named = open_source(str(folders(tmp_path / "named", {"cats": ["a.png"], "dogs": ["a.png"]})))
    with pytest.raises(InputError, match=r"needs training classes named by wnids .* are cats, dogs"):
        open_variant(f"imagenet-a:{other}", named, val)
    heap = tmp_path / "heap"
    heap.mkdir()
    Image.new("RGB", (4, 4)).save(heap / "a.png")
    with pytest.raises(InputError, match="is not laid out as imagenet-r: expected one folder a class"):
        open_variant(f"imagenet-r:{heap}", train, val)
    with pytest.raises(InputError, match="no data at"):
        open_variant(f"imagenet-r:{tmp_path / 'none'}", train, val)
