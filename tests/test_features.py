"""Extraction in order, and the cache: never the wrong features, never half a file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import SMALL, MeanColours, image_tree, noise_source
from numpy.typing import NDArray
from tiny_run import CPU

from dino_xcit.data import ArraySource, UndecodableImage, decode, open_source
from dino_xcit.models import build_backbone
from dino_xcit.transform import EvalTransform, normalise
from eval.baselines import Pixels, untrained
from eval.features import Features, cached, extract, find_kept, write_rows


def extract_cached(backbone: MeanColours, cache: Path | None, **changes: Any) -> Features:
    arguments: dict[str, Any] = {"weights_hash": "w", "source": noise_source(10), "transform": SMALL, "batch_size": 4}
    return cached(backbone, device=CPU, cache_dir=cache, num_workers=0, **(arguments | changes))


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (3, 2), (100, 0), (1, 1)])
def test_rows_are_the_backbones_answers_in_the_order_of_the_source(batch_size: int, workers: int) -> None:
    source = noise_source(10)
    found = extract(MeanColours(), source, SMALL, CPU, batch_size, workers, progress=False)
    backbone = MeanColours().eval()
    for index in range(10):
        image = SMALL(decode(source.read(index)[0], "image"))
        row = backbone(normalise(image[None], SMALL.mean, SMALL.std)).cls_token[0].numpy()
        assert found.features[index] == pytest.approx(row, abs=1e-5)
    assert found.labels is not None
    assert (found.labels == source.labels).all()
    assert found.features.dtype == np.float32


def test_the_backbone_measures_in_eval_mode_and_gets_its_mode_back() -> None:
    backbone = build_backbone("xcit_pico_4_p4").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract(backbone, noise_source(6), SMALL, CPU, progress=False)
    assert backbone.training
    assert all((value == before[name]).all() for name, value in backbone.state_dict().items())


def test_a_damaged_image_is_named_also_when_a_loader_process_finds_it(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "data")
    (tree / "val" / "dots" / "dots 01.png").write_bytes(b"not a picture")
    for workers in (0, 2):
        with pytest.raises(UndecodableImage, match=r"dots 01\.png cannot be read"):
            extract(MeanColours(), open_source(str(tree / "val")), SMALL, CPU, 4, workers, progress=False)


def test_kept_features_are_used_again(tmp_path: Path) -> None:
    backbone = MeanColours()
    first = extract_cached(backbone, tmp_path)
    assert backbone.seen == 10
    again = extract_cached(backbone, tmp_path)
    assert backbone.seen == 10
    assert isinstance(again.features, np.memmap)
    assert (np.asarray(again.features) == first.features).all()
    assert first.fingerprint == noise_source(10).fingerprint()
    kept = find_kept("w", first.fingerprint, (10, 5), SMALL, tmp_path)
    assert kept is not None
    assert (kept == first.features).all()


def test_other_weights_data_labels_or_preprocessing_are_extracted_anew(tmp_path: Path) -> None:
    backbone = MeanColours()
    extract_cached(backbone, tmp_path)
    relabelled = noise_source(10)
    relabelled.labels = relabelled.labels[::-1].copy() if relabelled.labels is not None else None
    others: list[dict[str, Any]] = [
        {"weights_hash": "other"},
        {"source": noise_source(10, seed=1)},
        {"source": relabelled},
        {"transform": EvalTransform(resize=8, crop=6, interpolation="bilinear")},
        {"transform": EvalTransform(resize=8, crop=8, interpolation="bilinear", mean=(0, 0, 0))},
    ]
    for number, changes in enumerate(others, start=1):
        extract_cached(backbone, tmp_path, **changes)
        assert backbone.seen == 10 * (number + 1), changes


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    backbone = MeanColours()
    for _ in range(2):
        extract_cached(backbone, None)
    assert backbone.seen == 20
    assert find_kept("w", "any", (10, 5), SMALL, None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_file_is_replaced(tmp_path: Path) -> None:
    first = extract_cached(MeanColours(), tmp_path)
    wanted = np.array(first.features)
    (kept,) = tmp_path.glob("*/features.npy")
    whole = kept.read_bytes()
    wrong: list[bytes] = [whole[:-8], b"", b"no array"]
    for content in wrong:
        kept.write_bytes(content)
        backbone = MeanColours()
        assert (np.asarray(extract_cached(backbone, tmp_path).features) == wanted).all()
        assert backbone.seen == 10
        assert kept.read_bytes() == whole


class Breaking(ArraySource):
    """Fails at its eighth image, as a disk may."""

    def read(self, index: int) -> Any:
        if index == 7:
            raise OSError("the disk is gone")
        return super().read(index)


def test_an_interrupted_extraction_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        extract_cached(MeanColours(), tmp_path, source=noise_source(10, kind=Breaking))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_but_work_in_progress_is_not(tmp_path: Path) -> None:
    for name, age in ((".abandoned.1.tmp", 7200), (".busy.2.tmp", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features.npy").write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / name / "features.npy", (then, then))
    extract_cached(MeanColours(), tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".busy.2.tmp"]


def test_written_rows_read_back_as_an_array_and_a_wrong_count_is_a_fault(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)

    def pieces() -> Any:
        return iter([rows[:4], rows[4:]])

    write_rows(tmp_path / "rows.npy", pieces(), (7, 3))
    back: NDArray[np.float32] = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert (back == rows).all()
    with pytest.raises(ValueError, match="7 rows, expected 8"):
        write_rows(tmp_path / "rows.npy", pieces(), (8, 3))


def test_pixel_baselines_are_the_prepared_pictures() -> None:
    source = noise_source(4)
    raw = extract(Pixels(SMALL, normalised=False), source, SMALL, CPU, progress=False).features
    assert raw.shape == (4, 3 * 8 * 8)
    assert raw == pytest.approx(source.images.transpose(0, 3, 1, 2).reshape(4, -1) / 255, abs=1e-5)
    normal = extract(Pixels(SMALL, normalised=True), source, SMALL, CPU, progress=False).features
    mean, std = np.repeat(SMALL.mean, 64), np.repeat(SMALL.std, 64)
    assert normal == pytest.approx((raw - mean) / std, abs=1e-4)


def test_the_untrained_baseline_is_the_same_each_time() -> None:
    first, second = (untrained("xcit_pico_4_p4").state_dict() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)
