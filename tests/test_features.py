"""Feature extraction and the feature cache: order of the rows, no stale features, no partial files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import SMALL, MeanColours, image_tree, noise_source
from tiny_run import CPU

from dino_xcit.data import UndecodableImage, decode, open_source
from dino_xcit.models import build_backbone
from dino_xcit.transform import EvalTransform, normalise
from eval.baselines import Pixels
from eval.features import Features, cached, extract, find_kept, write_rows
from eval.pooling import Descriptor


def extract_cached(backbone: MeanColours, cache: Path | None, **changes: Any) -> Features:
    arguments: dict[str, Any] = {"weights_hash": "w", "source": noise_source(10), "transform": SMALL, "batch_size": 4}
    return cached(backbone, device=CPU, cache_dir=cache, **({"num_workers": 0} | arguments | changes))


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (3, 2), (100, 0)])
def test_feature_rows_equal_backbone_outputs_in_source_order(batch_size: int, workers: int) -> None:
    source = noise_source(10)
    found = extract_cached(MeanColours(), None, batch_size=batch_size, num_workers=workers)
    backbone = MeanColours().eval()
    images = torch.stack([SMALL(decode(source.read(index)[0], "image")) for index in range(10)])
    expected = backbone(normalise(images, SMALL.mean, SMALL.std)).cls_token.numpy()
    assert found.features == pytest.approx(expected, abs=1e-5)
    np.testing.assert_array_equal(found.labels, source.labels)
    assert found.features.dtype == np.float32


def test_extract_uses_eval_mode_and_restores_training_mode() -> None:
    backbone = build_backbone("xcit_pico_4_p4").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract(backbone, noise_source(6), SMALL, CPU, progress=False)
    assert backbone.training
    assert all((value == before[name]).all() for name, value in backbone.state_dict().items())


def test_unreadable_image_in_worker_is_named_in_error(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "data")
    (tree / "val" / "dots" / "dots 01.png").write_bytes(b"not a picture")
    with pytest.raises(UndecodableImage, match=r"dots 01\.png"):
        extract(MeanColours(), open_source(str(tree / "val")), SMALL, CPU, 2, progress=False)


def test_cached_features_are_reused(tmp_path: Path) -> None:
    backbone = MeanColours()
    first, again = (extract_cached(backbone, tmp_path) for _ in range(2))
    assert backbone.seen == 10
    assert isinstance(again.features, np.memmap)
    assert first.fingerprint == noise_source(10).fingerprint()
    for rows in (again.features, find_kept("w", first.fingerprint, (10, 5), SMALL, tmp_path)):
        np.testing.assert_array_equal(rows, first.features)
    assert len(extract_cached(backbone, None).features) == 10
    assert backbone.seen == 20


def test_changed_weights_data_transform_or_descriptor_misses_cache(tmp_path: Path) -> None:
    backbone = MeanColours()
    extract_cached(backbone, tmp_path)
    relabelled = noise_source(10)
    relabelled.labels = (relabelled.labels + 1) % 3 if relabelled.labels is not None else None
    others: list[dict[str, Any]] = [
        {"weights_hash": "other"}, {"source": noise_source(10, seed=1)}, {"source": relabelled},
        {"transform": EvalTransform(resize=8, crop=6, interpolation="bilinear")},
        {"transform": EvalTransform(resize=8, crop=8, interpolation="bilinear", mean=(0, 0, 0))},
        {"descriptor": Descriptor(scales=(0.5,))}, {"descriptor": Descriptor(precision="bf16")},
    ]  # fmt: skip
    for number, changes in enumerate(others, start=1):
        assert len(extract_cached(backbone, tmp_path, **changes).features) == 10
        assert backbone.seen == 10 * (number + 1), changes


@pytest.mark.parametrize("length", [-8, 0])
def test_damaged_cache_file_is_replaced(tmp_path: Path, length: int) -> None:
    extract_cached(MeanColours(), tmp_path)
    (kept,) = tmp_path.glob("*/features.npy")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    backbone = MeanColours()
    extract_cached(backbone, tmp_path)
    assert (backbone.seen, kept.read_bytes()) == (10, whole)


def test_abandoned_temporary_folder_is_deleted_and_recent_one_kept(tmp_path: Path) -> None:
    for name, age in ((".abandoned.1.tmp", 7200), (".busy.2.tmp", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features.npy").write_bytes(b"half")
        for path in (tmp_path / name / "features.npy", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    extract_cached(MeanColours(), tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".busy.2.tmp"]


@pytest.mark.parametrize("half", [False, True])
def test_write_rows_round_trips_and_refuses_wrong_row_count(tmp_path: Path, half: bool) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16 if half else np.float32)
    for count, fewer in ((7, False), (1_000_000, True)):
        write_rows(tmp_path / "rows.npy", [rows[:4], rows[4:]], (count, 3), half, fewer)
        np.testing.assert_array_equal(np.load(tmp_path / "rows.npy", mmap_mode="r"), rows, strict=True)
    for count, fewer in ((8, False), (6, False), (6, True)):
        with pytest.raises(ValueError, match=f"7 rows, expected {count}"):
            write_rows(tmp_path / "rows.npy", [rows], (count, 3), half, fewer)


def test_pixel_baselines_equal_transformed_images() -> None:
    source = noise_source(4)
    raw = extract(Pixels(SMALL, normalised=False), source, SMALL, CPU, progress=False).features
    assert raw.shape == (4, 3 * 8 * 8)
    assert raw == pytest.approx(source.images.transpose(0, 3, 1, 2).reshape(4, -1) / 255, abs=1e-5)
    normal = extract(Pixels(SMALL, normalised=True), source, SMALL, CPU, progress=False).features
    mean, std = np.repeat(SMALL.mean, 64), np.repeat(SMALL.std, 64)
    assert normal == pytest.approx((raw - mean) / std, abs=1e-4)
