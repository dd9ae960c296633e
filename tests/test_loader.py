"""Loader: the images and views of a step depend on (seed, step) only."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import CPU, tiny_source

from dino_xcit.augment import MultiCropAugmentation
from dino_xcit.data import Source, UndecodableImage, open_source
from dino_xcit.data import workers as workers_module
from dino_xcit.data.loader import Batch, Loader, MultiCropDataset, StepSampler, build_loader
from dino_xcit.data.workers import choose_workers
from dino_xcit.errors import InputError

Key = tuple[int, int]


def keys(
    length: int, batch: int, accumulation: int = 1, rank: int = 0, world: int = 1, **options: int
) -> list[list[Key]]:
    sampler = StepSampler(length, batch, accumulation, rank, world, **{"start_step": 0, "stop_step": 6} | options)
    out = list(sampler)
    assert len(out) == len(sampler)
    return out


def test_sampler_visits_every_image_once_per_epoch() -> None:
    visited = keys(40, 8, stop_step=10)
    for epoch in range(2):
        batches = visited[5 * epoch : 5 * epoch + 5]
        assert sorted(index for batch in batches for _, index in batch) == list(range(40))
        assert {e for batch in batches for e, _ in batch} == {epoch}
    assert visited[:5] != [[(0, index) for _, index in batch] for batch in visited[5:]]


def test_sampler_drops_incomplete_last_batch_of_other_images_each_epoch() -> None:
    visited = keys(43, 8, stop_step=10)
    assert all(len(batch) == 8 for batch in visited)
    left_out = [set(range(43)) - {i for batch in visited[5 * e : 5 * e + 5] for _, i in batch} for e in range(2)]
    assert [len(part) for part in left_out] == [3, 3]
    assert left_out[0] != left_out[1]


def test_sampler_order_is_shuffled_and_depends_on_seed() -> None:
    first, second = keys(40, 8), keys(40, 8, seed=1)
    assert first != second
    assert first == keys(40, 8)
    assert [index for _, index in first[0]] != list(range(8))


def global_batches(accumulation: int, world: int, batch: int) -> list[list[Key]]:
    """Return for each step the keys of all forward passes of all ranks, ordered by part, then by rank."""
    ranks = [keys(50, batch, accumulation, rank, world) for rank in range(world)]
    steps = []
    for step in range(6):
        parts = [ranks[rank][step * accumulation + part] for part in range(accumulation) for rank in range(world)]
        steps.append([key for part in parts for key in part])
    return steps


def test_sampler_step_does_not_depend_on_ranks_or_accumulation() -> None:
    expected = global_batches(1, 1, 8)
    assert global_batches(2, 1, 4) == expected
    assert global_batches(1, 2, 4) == expected
    assert global_batches(2, 2, 2) == expected
    assert global_batches(1, 8, 1) == expected


@pytest.mark.parametrize("start", [1, 4, 5, 6, 7])
def test_sampler_resumed_at_any_step_continues_same_sequence(start: int) -> None:
    whole = keys(40, 4, accumulation=2, stop_step=10)
    assert keys(40, 4, accumulation=2, start_step=start, stop_step=10) == whole[2 * start :]


def test_sampler_refuses_too_few_images_and_suggests_batch_size() -> None:
    with pytest.raises(InputError, match=r"10 training images .* 16: .*batch-size-per-gpu to at most 2"):
        StepSampler(10, 4, accumulation_steps=2, world_size=2)
    StepSampler(16, 4, accumulation_steps=2, world_size=2)
    with pytest.raises(InputError, match="use fewer ranks or more images"):
        StepSampler(4, 1, world_size=8)


def test_sampler_of_finished_run_is_empty() -> None:
    assert len(StepSampler(40, 8, start_step=5, stop_step=5)) == 0
    assert list(StepSampler(40, 8, start_step=7, stop_step=5)) == []


AUGMENTATION = MultiCropAugmentation(
    global_crops_size=20, local_crops_size=12, local_crops_number=3, global_blur=(0.5, 0.5)
)


def load(source: Source, workers: int, batch: int = 4, start: int = 0, stop: int = 4, seed: int = 5) -> Loader:
    sampler = StepSampler(len(source), batch, seed=seed, start_step=start, stop_step=stop)
    return build_loader(source, AUGMENTATION, sampler, seed, workers, CPU)


def assert_same_batches(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        assert torch.equal(first.indices, second.indices)
        assert first.epoch == second.epoch
        assert first.views == second.views
        assert all(torch.equal(x, y) for x, y in zip(first.crops, second.crops, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_finished_on_device_are_bitwise_equal(workers: int) -> None:
    pytest.importorskip("triton")
    plain = list(load(tiny_source(10), workers))
    sampler = StepSampler(10, 4, seed=5, stop_step=len(plain))
    dataset = MultiCropDataset(tiny_source(10), AUGMENTATION, 5, finish_on_device=True)
    sent = dataset.__getitems__(next(iter(sampler)))
    assert isinstance(sent, Batch)
    assert sent.plans is not None
    assert_same_batches(list(Loader(dataset, sampler, workers, CPU)), plain)


LEAVES = """
import sys, time, torch
from dino_xcit.config import PretrainConfig
from dino_xcit.data import open_source
from dino_xcit.data.loader import StepSampler, build_loader
from dino_xcit.data.workers import usable_cores
if __name__ == "__main__":
    source = open_source("sample:fashion-mnist", "train")
    source.read = lambda index: time.sleep(300)
    views = PretrainConfig(global_crops_size=16, local_crops_size=8).augmentation()
    sampler = StepSampler(len(source), 4, start_step=0, stop_step=100)
    loader = build_loader(source, views, sampler, 0, usable_cores() + 1, torch.device("cpu"))
    kept = sys.modules["kept"] = [loader, time.sleep(1)]
"""


def test_process_with_unclosed_loader_exits(tmp_path: Path) -> None:
    """The workers ignore SIGTERM, which multiprocessing sends before it waits for them, and the disk blocks."""
    script = tmp_path / "leave.py"
    script.write_text(LEAVES)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, script], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # more workers than cores are allowed: they help with slow disks


def test_crops_are_view_major_grouped_by_size_and_seeded_by_image() -> None:
    """Views depend on (seed, epoch, image), not on the batch or the position in it."""
    source = tiny_source(10)
    batches = list(load(source, 0))
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1]
    for batch in batches:
        assert batch.views == [2, 3]
        assert [tuple(crop.shape) for crop in batch.crops] == [(2 * 4, 3, 20, 20), (3 * 4, 3, 12, 12)]
        assert all(crop.dtype is torch.uint8 for crop in batch.crops)
        for place, index in enumerate(batch.indices.tolist()):
            item, _ = source.read(index)
            views = AUGMENTATION(Image.fromarray(np.asarray(item)).convert("RGB"), 5, batch.epoch, index)
            found = [*batch.crops[0][place::4], *batch.crops[1][place::4]]
            assert all(torch.equal(a, b) for a, b in zip(found, views, strict=True))


def folder_with_bad_images(folder: Path, count: int, bad: dict[int, bytes]) -> Source:
    """Write noise images 00.png, 01.png, ...; the files in ``bad`` have the given bytes."""
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    for index, data in bad.items():
        (folder / f"{index:02d}.png").write_bytes(data)
    return open_source(str(folder))


def test_loader_replaces_and_reports_exactly_the_unreadable_images(tmp_path: Path) -> None:
    source = folder_with_bad_images(tmp_path, 12, {3: b"<html>gone</html>", 7: b"", 11: b"\x89PNG\r\n\x1a\n"})
    (tmp_path / "05.png").unlink()
    batches = list(load(source, 0, batch=4, stop=3))
    order = np.random.default_rng([5, 0]).permutation(12).tolist()
    shown = [index for batch in batches for index in batch.indices.tolist()]
    unreadable = {bad.index: bad for batch in batches for bad in batch.unreadable}
    assert set(unreadable) == {3, 5, 7, 11}
    assert all(index == wanted or wanted in unreadable for index, wanted in zip(shown, order, strict=True))
    assert not set(shown) & set(unreadable)
    assert all(bad.name.endswith(f"{index:02d}.png") and bad.epoch == 0 for index, bad in unreadable.items())
    assert unreadable[3].cause == "a web page, not an image"
    assert unreadable[7].cause == "empty file"
    assert "there is no file" in unreadable[5].cause


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_resume_step(tmp_path: Path, workers: int) -> None:
    source = folder_with_bad_images(tmp_path, 12, {1: b"x", 2: b"x", 9: b"x"})
    whole = list(load(source, 0, stop=6))
    again = list(load(source, workers, stop=6))
    assert_same_batches(whole, again)
    assert [batch.unreadable for batch in whole] == [batch.unreadable for batch in again]
    assert_same_batches(whole[4:], list(load(source, workers, start=4, stop=6)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_raises_one_line_error_if_all_images_are_unreadable(tmp_path: Path, workers: int) -> None:
    source = folder_with_bad_images(tmp_path, 4, dict.fromkeys(range(4), b"<html>gone</html>"))
    with pytest.raises(UndecodableImage, match=r"\.png cannot be read \(.* neither can 20 other") as caught:
        list(load(source, workers, batch=2, stop=2))
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workers_whose_batches_exceed_shared_memory_are_not_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each worker prefetches two batches of four images. Without the check a worker dies of a bus error."""
    each = 2 * 4 * sum(3 * view.size**2 for view in AUGMENTATION.views)
    whole = list(load(tiny_source(10), 0))
    for free, expected in ((2 * each, 2), (2 * each - 1, 1), (each - 1, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        before = len(multiprocessing.active_children())
        loader = load(tiny_source(10), 2)
        assert len(multiprocessing.active_children()) - before == expected
        assert_same_batches(list(loader), whole)
        loader.close()
        assert ("--shm-size" in capsys.readouterr().out) == (expected < 2)


def test_choose_workers_returns_request_or_share_of_cores() -> None:
    assert choose_workers(0, 4) == 0
    assert choose_workers(7, 4) == 7
    cores = choose_workers(-1, 1)
    assert 1 <= cores <= 10
    assert choose_workers(-1, 1000) == 1
    assert all(choose_workers(-1, n) <= cores for n in range(1, 9))


def test_choose_workers_leaves_two_cores_of_a_large_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 96)
    assert [choose_workers(-1, ranks, on_gpu=True) for ranks in (1, 6, 8, 96)] == [20, 14, 10, 1]
    assert [choose_workers(-1, ranks) for ranks in (1, 8)] == [10, 10]


def test_choose_workers_refuses_excessive_request() -> None:
    assert choose_workers(64, 1) == 64
    with pytest.raises(InputError, match=r"num_workers is 100000 \(2 ranks, .* here\), .* such as --num-workers \d"):
        choose_workers(100_000, 2)
