"""The same images in every format of data set: all formats give equal items, batches and evaluation parts.

The training part has 24 labelled images of three classes, one of them truncated. The validation part has six images.
Every format has the images in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_images import encoded, photograph
from data_fixtures import labels, names
from hostile_archives import packed
from tiny_run import CPU, tiny_config

from dino_xcit.data import Source, open_parts, open_source
from dino_xcit.data.loader import Batch, StepSampler, build_loader
from dino_xcit.errors import InputError
from dino_xcit.health import UnreadableLog, read_unreadable

CLASSES = ("n01440764", "n01443537", "n01484850")
BROKEN = 17
"""Index of the truncated training image in every format."""


class Picture(NamedTuple):
    label: int
    name: str
    data: bytes


Parts = dict[str, list[Picture]]
Writer = Callable[[Path, Parts], dict[str, str]]
"""Writes both parts to a folder and returns the URL of each."""

FORMATS: dict[str, Writer] = {}


def data_format(writer: Writer) -> Writer:
    FORMATS[writer.__name__.replace("_", " ")] = writer
    return writer


def make_parts() -> Parts:
    """Make the images of both parts, sorted by name and class."""
    parts: Parts = {"train": [], "val": []}
    for part, count in (("train", 8), ("val", 2)):
        for place in range(3 * count):
            label, number = divmod(place, count)
            data = encoded(photograph(100 * label + number), "PNG" if number % 5 == 4 else "JPEG")
            # ImageNet also has a PNG file with the suffix JPEG.
            name = f"{CLASSES[label]}_{number}.JPEG" if part == "train" else f"ILSVRC2012_val_{place:08d}.JPEG"
            parts[part].append(Picture(label, name, data))
    return parts


@data_format
def class_folders(folder: Path, parts: Parts) -> dict[str, str]:
    for part, pictures in parts.items():
        for picture in pictures:
            path = folder / part / CLASSES[picture.label] / picture.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.data)
    return {part: str(folder / part) for part in parts}


@data_format
def heap(folder: Path, parts: Parts) -> dict[str, str]:
    for part, pictures in parts.items():
        (folder / part).mkdir()
        for picture in pictures:
            (folder / part / picture.name).write_bytes(picture.data)
    return {part: str(folder / part) for part in parts}


@data_format
def file_list(folder: Path, parts: Parts) -> dict[str, str]:
    heap(folder, parts)
    for part, pictures in parts.items():
        (folder / f"{part}.txt").write_text("".join(f"{part}/{picture.name}\n" for picture in pictures))
    return {part: str(folder / f"{part}.txt") for part in parts}


def write_shards(folder: Path, parts: Parts, members: Callable[[Picture], dict[str, bytes]]) -> dict[str, str]:
    """Write three shards per part."""
    for part, pictures in parts.items():
        for number in range(3):
            third = pictures[number * len(pictures) // 3 : (number + 1) * len(pictures) // 3]
            contents = {name: data for picture in third for name, data in members(picture).items()}
            (folder / f"{part}-{number:03d}.tar").write_bytes(packed(contents))
    return {part: f"tar:{folder}/{part}-{{000..002}}.tar" for part in parts}


@data_format
def webdataset_shards(folder: Path, parts: Parts) -> dict[str, str]:
    (folder / "classes.json").write_text(json.dumps(CLASSES))

    def members(picture: Picture) -> dict[str, bytes]:
        return {picture.name: picture.data, Path(picture.name).stem + ".cls": str(picture.label).encode()}

    return write_shards(folder, parts, members)


@data_format
def archives_of_class_folders(folder: Path, parts: Parts) -> dict[str, str]:
    return write_shards(folder, parts, lambda picture: {f"{CLASSES[picture.label]}/{picture.name}": picture.data})


@data_format
def parquet_of_the_hub(folder: Path, parts: Parts) -> dict[str, str]:
    """Write two files per part with row groups of five, as ``datasets`` does."""
    (folder / "data").mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for part, pictures in parts.items():
        for number in range(2):
            half = pictures[number * len(pictures) // 2 : (number + 1) * len(pictures) // 2]
            rows = [{"bytes": picture.data, "path": picture.name} for picture in half]
            table = pa.table({"image": rows, "label": [picture.label for picture in half]})
            path = folder / "data" / f"{'validation' if part == 'val' else part}-{number:05d}-of-00002.parquet"
            pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=5)
    return dict.fromkeys(parts, f"parquet:{folder}")


@data_format
def saved_by_datasets(folder: Path, parts: Parts) -> dict[str, str]:
    parquet_of_the_hub(folder, parts)
    files = {part: f"{folder}/data/{'validation' if part == 'val' else part}-*.parquet" for part in parts}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache")).save_to_disk(folder / "saved")
    return dict.fromkeys(parts, f"hf:{folder / 'saved'}")


@data_format
def imagenet_as_downloaded(folder: Path, parts: Parts) -> dict[str, str]:
    """Write the official training archive, with one archive per class, and Kaggle's validation folder and tables."""
    archives = {
        f"{wnid}.tar": packed({picture.name: picture.data for picture in parts["train"] if picture.label == label})
        for label, wnid in enumerate(CLASSES)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(packed(archives))
    flat = folder / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    flat.mkdir(parents=True)
    rows = ["ImageId,PredictionString"]
    for picture in parts["val"]:
        (flat / picture.name).write_bytes(picture.data)
        rows.append(f"{Path(picture.name).stem},{CLASSES[picture.label]} 85 1 499 272 ")
    (folder / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} words, more words\n" for wnid in CLASSES))
    return dict.fromkeys(parts, f"imagenet:{folder}")


def remote(writer: Writer, folder: Path, parts: Parts) -> dict[str, str]:
    """Copy the files of ``writer`` to fsspec's in-memory file system."""
    urls = writer(folder, parts)
    far = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            far.pipe_file(str(path), path.read_bytes())
    return {part: url.replace(str(folder), f"memory:/{folder}") for part, url in urls.items()}


for local in (class_folders, webdataset_shards, parquet_of_the_hub):
    FORMATS[f"remote {local.__name__.replace('_', ' ')}"] = partial(remote, local)

WITHOUT_LABELS = ("heap", "file list")
LABELLED = [name for name in FORMATS if name not in WITHOUT_LABELS]

Urls = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Both parts, with training image ``BROKEN`` truncated."""
    made = make_parts()
    one = made["train"][BROKEN]
    made["train"][BROKEN] = one._replace(data=one.data[: len(one.data) // 2])
    return made


@pytest.fixture(scope="module")
def urls(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {name: writer(tmp_path_factory.mktemp("format"), parts) for name, writer in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_every_form_gives_equal_bytes_labels_and_classes(name: str, part: str, urls: Urls, parts: Parts) -> None:
    source = open_source(urls[name][part], part)
    labelled = name not in WITHOUT_LABELS
    assert [source.read(index) for index in range(len(source))] == [
        (picture.data, picture.label if labelled else None) for picture in parts[part]
    ]
    assert source.classes == (CLASSES if labelled else None)
    assert labels(source) == ([picture.label for picture in parts[part]] if labelled else None)
    shown = names(source)
    assert len(set(shown)) == len(shown)
    assert [name.rpartition("/")[2] for name in shown] == [picture.name for picture in parts[part]]
    # The URL that a source reports must open the same data again.
    assert open_source(source.url, part).fingerprint() == source.fingerprint()


def batches_of(source: Source, workers: int) -> list[Batch]:
    """Load two epochs."""
    sampler = StepSampler(len(source), 8, seed=3, start_step=0, stop_step=6)
    return list(build_loader(source, tiny_config().augmentation(), sampler, 3, workers, CPU))


@pytest.fixture(scope="module")
def expected(urls: Urls) -> list[Batch]:
    return batches_of(open_source(urls["class folders"]["train"]), 0)


@pytest.mark.parametrize(
    ("name", "workers"),
    [*((name, 0) for name in FORMATS if name != "class folders"), ("remote webdataset shards", 2),
     ("parquet of the hub", 2), ("imagenet as downloaded", 2)],
)  # fmt: skip
def test_unreadable_image_is_replaced_and_logged_equally_in_every_form(
    name: str, workers: int, urls: Urls, expected: list[Batch], tmp_path: Path
) -> None:
    source = open_source(urls[name]["train"], "train")
    found = batches_of(source, workers)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert all(torch.equal(a, b) for a, b in zip(ours.crops, theirs.crops, strict=True))
    bad = [one for batch in found for one in batch.unreadable]
    assert {(one.index, one.epoch) for one in bad} == {(BROKEN, 0), (BROKEN, 1)}
    log = UnreadableLog(tmp_path, len(source), 1.0, start_anew=True)
    log.note(found)
    log.write()
    (row,) = read_unreadable(log.path)
    assert row["name"] == source.name(BROKEN)
    assert row["cause"] == next(one for batch in expected for one in batch.unreadable).cause


@pytest.mark.parametrize("name", LABELLED)
def test_open_parts_accepts_every_labelled_form(name: str, urls: Urls, parts: Parts) -> None:
    both = open_parts(None, urls[name]["train"], urls[name]["val"])
    for source, pictures in zip(both, parts.values(), strict=True):
        assert source.classes == CLASSES
        assert labels(source) == [picture.label for picture in pictures]


@pytest.mark.parametrize("name", [
    "class folders", "parquet of the hub", "imagenet as downloaded", "saved by datasets", "remote class folders",
    "remote parquet of the hub",
])  # fmt: skip
def test_open_parts_finds_both_parts_from_one_url(name: str, urls: Urls) -> None:
    train, val = open_parts(urls[name]["train"].removesuffix("/train"), None, None)
    assert (len(train), len(val)) == (24, 6)
    assert train.classes == val.classes == CLASSES


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_open_parts_refuses_forms_without_labels(name: str, urls: Urls) -> None:
    with pytest.raises(InputError, match="has no labels"):
        open_parts(None, urls[name]["train"], urls[name]["val"])


@pytest.mark.parametrize("name", ["webdataset shards", "parquet of the hub"])
def test_open_parts_refuses_pattern_of_a_single_part(name: str, urls: Urls) -> None:
    pattern = open_source(urls[name]["train"], "train").url
    with pytest.raises(InputError, match="is one part: give --train-data and --val-data"):
        open_parts(pattern, None, None)
