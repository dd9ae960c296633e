"""Variants of ImageNet, on small data in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dino_xcit.data import Source, open_source
from dino_xcit.data.__main__ import main as data_command
from dino_xcit.errors import InputError
from eval.linear.imagenet_variants import open_variant

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041")


def folders(root: Path, names: dict[str, list[str]]) -> Path:
    """Write a blank image ``root``/class/file for each file; return ``root``."""
    for folder, files in names.items():
        (root / folder).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (4, 4)).save(root / folder / file)
    return root


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Source, Source]:
    """Training and validation images of seven classes. Validation files have ImageNet's names in reverse order."""
    train = folders(tmp_path / "train", {wnid: ["a.png"] for wnid in WNIDS})
    val = {wnid: [f"ILSVRC2012_val_{8 - number:08d}.png"] for number, wnid in enumerate(WNIDS, start=1)}
    return open_source(str(train)), open_source(str(folders(tmp_path / "val", val)))


def real(folder: Path, lists: object) -> str:
    file = folder / f"real-{len(list(folder.iterdir()))}.json"
    file.write_text(lists if isinstance(lists, str) else json.dumps(lists))
    return f"real:{file}"


def test_imagenet_v2_folders_are_indices_of_sorted_wnids(tmp_path: Path) -> None:
    """There are more than ten classes, because "10" sorts before "2" as text."""
    wnids = [f"n{number:08d}" for number in range(12)]
    train = open_source(str(folders(tmp_path / "train", {wnid: ["a.png"] for wnid in wnids})))
    v2 = folders(tmp_path / "v2", {str(number): ["a.png"] for number in range(12)})
    variant = open_variant(f"imagenet-v2:{v2}", train, train)
    assert variant.source is not None
    for index in range(12):
        folder = Path(variant.source.name(index)).parent.name
        assert wnids[variant.labels[index, 0]] == f"n{int(folder):08d}"
    (v2 / "11").rename(v2 / "12")
    with pytest.raises(InputError, match="named 0 to 11"):
        open_variant(f"imagenet-v2:{v2}", train, train)


def test_imagenet_a_and_r_restrict_predictions_to_their_classes(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    own = folders(tmp_path / "own", {WNIDS[1]: ["a.png"], WNIDS[4]: ["a.png", "b.png"]})
    for name, among in (("imagenet-a", [1, 4]), ("imagenet-r", [1, 4]), ("sketch", None)):
        variant = open_variant(f"{name}:{own}", *parts)
        assert variant.labels.tolist() == [[1], [4], [4]]
        assert (None if variant.among is None else variant.among.tolist()) == among


def test_real_labels_follow_order_of_file_names(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    # The images are in class order, so the numbers in their file names descend: 7, 6, ... 1.
    variant = open_variant(real(tmp_path, [[6], [5, 0], [], [3], [2], [1], [4]]), *parts)
    assert variant.source is None
    assert variant.rows is not None
    assert variant.rows.tolist() == [0, 1, 2, 3, 5, 6]
    assert variant.labels.tolist() == [[4, -1], [1, -1], [2, -1], [3, -1], [5, 0], [6, -1]]


def test_real_labels_match_images_of_packed_shards(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    """Packing prefixes each name with a number, but ReaL's order is that of the original names."""
    train, val = parts
    assert data_command(["pack", val.url, str(tmp_path / "packed")]) == 0
    packed = open_source(f"tar:{tmp_path / 'packed'}/*.tar")
    for source in (val, packed):
        variant = open_variant(real(tmp_path, [[6 - number] for number in range(7)]), train, source)
        assert source.labels is not None
        assert variant.labels[:, 0].tolist() == source.labels.tolist()


@pytest.mark.parametrize(
    "content",
    ["[[0]", '{"a": 1}', "[0, 1, 2, 3, 4, 5, 6]", "[[0], [1]]", f"[{'[0], ' * 6}[7]]", f"[{'[0], ' * 6}[true]]",
     f"[{'[0], ' * 6}[-1]]", "[" * 100_000],
)  # fmt: skip
def test_invalid_real_file_is_refused(tmp_path: Path, parts: tuple[Source, Source], content: str) -> None:
    with pytest.raises(InputError, match="is not ReaL's"):
        open_variant(real(tmp_path, content), *parts)


def test_variants_with_mismatched_classes_or_labels_are_refused(tmp_path: Path, parts: tuple[Source, Source]) -> None:
    other = folders(tmp_path / "other", {"n99999999": ["a.png"]})
    flat = folders(tmp_path, {"flat": ["a.png"]}) / "flat"
    cases = [
        ("imagenet-c:somewhere", "expected imagenet-v2:DIR"),
        (f"sketch:{other}", "n99999999"),
        (f"imagenet-r:{flat}", "one folder per class"),
        (f"imagenet-r:{tmp_path / 'none'}", "no data at"),
        (real(tmp_path, [[]] * 7), "has no label"),
        (real(tmp_path, [[number] for number in range(7)]), "correct label for only 1 of 7"),  # labels in another order
    ]
    for word, said in cases:
        with pytest.raises(InputError, match=said):
            open_variant(word, *parts)
    named = open_source(str(folders(tmp_path / "named", {"cats": ["a.png"], "dogs": ["a.png"]})))
    with pytest.raises(InputError, match="wnids"):
        open_variant(f"imagenet-a:{other}", named, parts[1])
