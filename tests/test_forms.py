"""The same pictures in every form a data set may have: what reads them, trains on them and measures sees no difference.

40 labelled pictures of three classes for training, one of which is cut short, and twelve for validation; once in
folders, and once in each other form, in the same order.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_images import encoded, photograph
from tiny_run import CPU, differing_bits, learnt, tiny_config

from dino_xcit.data import Source, decode, open_parts, open_source
from dino_xcit.data.check import main as check
from dino_xcit.data.loader import Batch, StepSampler, build_loader
from dino_xcit.errors import InputError
from dino_xcit.optim import Schedules
from dino_xcit.runtime.health import UnreadableLog, read_unreadable
from dino_xcit.train import build_state, train_step

CLASSES = ("n01440764", "n01443537", "n01484850")
BROKEN = 17
"""Of the training part, in the order of all forms."""


class Picture:
    """One file: its class's number, its name and its bytes."""

    def __init__(self, label: int, name: str, data: bytes) -> None:
        self.label, self.name, self.data = label, name, data


Parts = dict[str, list[Picture]]
Writer = Callable[[Path, Parts], dict[str, str]]
"""Write both parts into a folder; the URL of each."""

FORMS: dict[str, Writer] = {}


def form(writer: Writer) -> Writer:
    FORMS[writer.__name__.replace("_", " ")] = writer
    return writer


def make_parts() -> Parts:
    """Pictures in the order of their names, which is that of their classes."""
    parts: Parts = {}
    for part, counts in (("train", (14, 13, 13)), ("val", (4, 4, 4))):
        pictures = []
        for label, count in enumerate(counts):
            for number in range(10, 10 + count):
                photo = photograph(1000 * (part == "val") + 100 * label + number)
                # ImageNet too has a PNG that is called a JPEG.
                name = (
                    f"{CLASSES[label]}_{number}.JPEG" if part == "train" else f"ILSVRC2012_val_{len(pictures):08d}.JPEG"
                )
                pictures.append(Picture(label, name, encoded(photo, "PNG" if number % 5 == 4 else "JPEG")))
        parts[part] = pictures
    return parts


@form
def class_folders(folder: Path, parts: Parts) -> dict[str, str]:
    for part, pictures in parts.items():
        for picture in pictures:
            path = folder / part / CLASSES[picture.label] / picture.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.data)
    return {part: str(folder / part) for part in parts}


@form
def heap(folder: Path, parts: Parts) -> dict[str, str]:
    for part, pictures in parts.items():
        (folder / part).mkdir()
        for picture in pictures:
            (folder / part / picture.name).write_bytes(picture.data)
    return {part: str(folder / part) for part in parts}


@form
def file_list(folder: Path, parts: Parts) -> dict[str, str]:
    heap(folder, parts)
    for part, pictures in parts.items():
        (folder / f"{part}.txt").write_text("".join(f"{part}/{picture.name}\n" for picture in pictures))
    return {part: str(folder / f"{part}.txt") for part in parts}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, parts: Parts, members: Callable[[Picture], dict[str, bytes]]) -> dict[str, str]:
    """Three shards a part."""
    for part, pictures in parts.items():
        for number in range(3):
            with tarfile.open(folder / f"{part}-{number:03d}.tar", "w") as tar:
                for picture in pictures[number * len(pictures) // 3 : (number + 1) * len(pictures) // 3]:
                    for name, data in members(picture).items():
                        add(tar, name, data)
    return {part: f"tar:{folder}/{part}-{{000..002}}.tar" for part in parts}


@form
def webdataset_shards(folder: Path, parts: Parts) -> dict[str, str]:
    (folder / "classes.json").write_text(json.dumps(CLASSES))

    def members(picture: Picture) -> dict[str, bytes]:
        return {picture.name: picture.data, Path(picture.name).stem + ".cls": str(picture.label).encode()}

    return write_shards(folder, parts, members)


@form
def archives_of_class_folders(folder: Path, parts: Parts) -> dict[str, str]:
    return write_shards(folder, parts, lambda picture: {f"{CLASSES[picture.label]}/{picture.name}": picture.data})


def write_parquet(folder: Path, parts: Parts, **options: Any) -> dict[str, str]:
    """Two files a part, of row groups of ten, as ``datasets`` writes them."""
    (folder / "data").mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for part, pictures in parts.items():
        for number in range(2):
            half = pictures[number * len(pictures) // 2 : (number + 1) * len(pictures) // 2]
            rows = [{"bytes": picture.data, "path": picture.name} for picture in half]
            table = pa.table({"image": rows, "label": [picture.label for picture in half]})
            path = folder / "data" / f"{'validation' if part == 'val' else part}-{number:05d}-of-00002.parquet"
            pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=10, **options)
    return dict.fromkeys(parts, f"parquet:{folder}")


@form
def parquet_of_the_hub(folder: Path, parts: Parts) -> dict[str, str]:
    return write_parquet(folder, parts)


@form
def saved_by_datasets(folder: Path, parts: Parts) -> dict[str, str]:
    write_parquet(folder, parts)
    files = {part: f"{folder}/data/{'validation' if part == 'val' else part}-*.parquet" for part in parts}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache")).save_to_disk(folder / "saved")
    return dict.fromkeys(parts, f"hf:{folder / 'saved'}")


@form
def imagenet_as_downloaded(folder: Path, parts: Parts) -> dict[str, str]:
    """The organisers' archive of an archive a class for training, Kaggle's folders and tables for validation."""
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for label, wnid in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for picture in parts["train"]:
                    if picture.label == label:
                        add(archive, picture.name, picture.data)
            add(tar, f"{wnid}.tar", inner.getvalue())
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
    """The same files, in fsspec's memory."""
    urls = writer(folder, parts)
    far = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            far.pipe_file(str(path), path.read_bytes())
    return {part: url.replace(str(folder), f"memory:/{folder}") for part, url in urls.items()}


@form
def remote_class_folders(folder: Path, parts: Parts) -> dict[str, str]:
    return remote(class_folders, folder, parts)


@form
def remote_shards(folder: Path, parts: Parts) -> dict[str, str]:
    return remote(webdataset_shards, folder, parts)


@form
def remote_parquet(folder: Path, parts: Parts) -> dict[str, str]:
    return remote(parquet_of_the_hub, folder, parts)


WITHOUT_LABELS = ("heap", "file list")
LABELLED = [name for name in FORMS if name not in WITHOUT_LABELS]

Urls = dict[str, dict[str, str]]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole() -> Parts:
    """All pictures can be read."""
    return make_parts()


@pytest.fixture(scope="module")
def damaged(whole: Parts) -> Parts:
    """One cannot."""
    train = list(whole["train"])
    one = train[BROKEN]
    train[BROKEN] = Picture(one.label, one.name, one.data[: len(one.data) // 2])
    return {"train": train, "val": whole["val"]}


def written(parts: Parts, folder: Path) -> Urls:
    found = {}
    for number, (name, writer) in enumerate(FORMS.items()):
        (folder / str(number)).mkdir()
        found[name] = writer(folder / str(number), parts)
    return found


@pytest.fixture(scope="module")
def whole_urls(whole: Parts, tmp_path_factory: pytest.TempPathFactory) -> Urls:
    return written(whole, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def urls(damaged: Parts, tmp_path_factory: pytest.TempPathFactory) -> Urls:
    return written(damaged, tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_every_form_has_the_same_bytes_labels_and_classes_in_the_same_order(
    name: str, part: str, urls: Urls, damaged: Parts
) -> None:
    source = open_source(urls[name][part], part)
    pictures = damaged[part]
    labelled = name not in WITHOUT_LABELS
    assert [source.read(index) for index in range(len(source))] == [
        (picture.data, picture.label if labelled else None) for picture in pictures
    ]
    assert source.classes == (CLASSES if labelled else None)
    assert (source.labels is None) != labelled
    names = [source.name(index) for index in range(len(source))]
    assert len(set(names)) == len(names)
    assert [shown.rpartition("/")[2] for shown in names] == [picture.name for picture in pictures]
    # What a source calls itself opens it again: a checkpoint remembers no more.
    assert open_source(source.url, part).fingerprint() == source.fingerprint()


def batches_of(source: Source, workers: int, steps: int) -> list[Batch]:
    sampler = StepSampler(len(source), 8, seed=3, start_step=0, stop_step=steps)
    return list(build_loader(source, tiny_config().augmentation(), sampler, 3, workers, CPU))


@pytest.fixture(scope="module")
def expected(urls: Urls) -> list[Batch]:
    """Two epochs of the folder."""
    return batches_of(open_source(urls["class folders"]["train"]), 0, 10)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_same_one_and_listed_in_every_form(
    name: str, workers: int, urls: Urls, expected: list[Batch], tmp_path: Path
) -> None:
    source = open_source(urls[name]["train"], "train")
    found = batches_of(source, workers, 10)
    assert len(found) == len(expected) == 10
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


@pytest.mark.parametrize("name", FORMS)
def test_check_finds_the_broken_image_in_every_form(
    name: str, urls: Urls, whole_urls: Urls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check([urls[name]["train"], "--part", "train", "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "40 images" in out
    assert "1 image cannot be read" in out
    assert f"{open_source(urls[name]['train'], 'train').name(BROKEN)}: " in out
    assert ("3 classes of 13" in out) == (name not in WITHOUT_LABELS)
    assert check([whole_urls[name]["train"], "--part", "train", "--workers", "0"]) == 0


def trained(source: Source) -> dict[str, torch.Tensor]:
    """What two steps leave."""
    config = tiny_config()
    sampler = StepSampler(len(source), config.batch_size_per_gpu, seed=config.seed, start_step=0, stop_step=2)
    schedules = Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)
    state = build_state(config, CPU)
    loader = build_loader(source, config.augmentation(), sampler, config.seed, 0, CPU)
    for _ in range(2):
        train_step(state, list(islice(loader, 1)), schedules, config)
    assert state.step == 2
    return learnt(state)


def test_two_steps_of_training_leave_the_same_bits_in_every_form(urls: Urls) -> None:
    first = trained(open_source(urls["class folders"]["train"], "train"))
    for name in FORMS:
        assert differing_bits(first, trained(open_source(urls[name]["train"], "train"))) == [], name


@pytest.mark.parametrize("name", LABELLED)
def test_evaluators_take_both_parts_of_every_form_with_labels(name: str, whole_urls: Urls, whole: Parts) -> None:
    both = open_parts(None, whole_urls[name]["train"], whole_urls[name]["val"])
    for source, pictures in zip(both, whole.values(), strict=True):
        assert source.classes == CLASSES
        assert source.labels is not None
        assert source.labels.tolist() == [picture.label for picture in pictures]
        assert source.read(len(source) - 1) == (pictures[-1].data, 2)


@pytest.mark.parametrize(
    "name",
    [
        "class folders",
        "parquet of the hub",
        "imagenet as downloaded",
        "saved by datasets",
        "remote class folders",
        "remote parquet",
    ],
)
def test_forms_that_hold_both_parts_are_given_to_evaluators_at_once(name: str, whole_urls: Urls) -> None:
    url = whole_urls[name]["train"].removesuffix("/train")
    train, val = open_parts(url, None, None)
    assert (len(train), len(val)) == (40, 12)
    assert train.classes == val.classes == CLASSES


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_forms_without_labels_are_refused_by_evaluators_alone(name: str, urls: Urls) -> None:
    with pytest.raises(InputError, match="has no labels"):
        open_parts(None, urls[name]["train"], urls[name]["val"])


@pytest.mark.parametrize("name", ["webdataset shards", "parquet of the hub"])
def test_a_pattern_of_one_part_is_not_taken_for_both(name: str, whole_urls: Urls) -> None:
    pattern = open_source(whole_urls[name]["train"], "train").url
    with pytest.raises(InputError, match="is one part: give --train-data and --val-data"):
        open_parts(pattern, None, None)


def test_torchvision_decodes_the_same_pictures(whole: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands over pixels, not files, so that its own checks of a file apply."""
    class_folders(tmp_path, {"train": whole["train"]})
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path / "train"))
    source = open_source("torchvision:ImageFolder")
    assert source.classes == CLASSES
    assert source.labels is not None
    assert source.labels.tolist() == [picture.label for picture in whole["train"]]
    for index, picture in enumerate(whole["train"]):
        item, label = source.read(index)
        assert np.array_equal(np.asarray(item), np.asarray(decode(picture.data, "x")))
        assert label == picture.label
