"""Fixtures shared by all tests, which use one thread and start from the same seed."""

from __future__ import annotations

import os

# Set before torch is imported; processes started by the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_fixtures import SMALL, Stopped, pretrain_here, two_classes
from ranks import Run, Server, Start, rank_server
from run_here import Here, run_here

torch.set_num_threads(1)
# The first backward pass starts autograd's device threads, for fake CUDA devices too, and forbids later forks.
# This one finds no devices and starts none.
torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files that start processes first: they take longest, and would otherwise run alone at the end."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("process")
    first = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # runners of an earlier test set "high"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server that starts runs of real processes."""
    with rank_server(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture
def start(server: Server, photos: Path, tmp_path: Path) -> Start:
    """``start(*flags)`` starts a run of two ranks on the photos in ``tmp_path / "run"``."""

    def begin(*flags: object, name: str = "run", **options: Any) -> Run:
        return server.start(tmp_path / name, "--data-path", photos, *flags, **options)

    return begin


@pytest.fixture(scope="session")
def labelled_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train and val, two classes each: 16 and 4 images."""
    return two_classes(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def stopped(labelled_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """A run that stopped after two steps; ``copy`` it before resuming."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    flags = ["--data-path", labelled_photos, *SMALL, "--output-dir", folder]
    return Stopped(folder, flags, pretrain_here("--max-steps", "2", *flags))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Function that calls the console entry of a runner in this process."""
    return run_here(monkeypatch, capsys)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 160 small noise images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(160):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A colour image of 130 x 90 pixels with smooth and sharp regions."""
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[0:90, 0:130]
    waves = np.stack([np.sin(rows / 9 + 2), np.cos(columns / 13), np.sin((rows + columns) / 17)], axis=-1)
    pixels = 127 + 90 * waves + rng.normal(0, 12, (90, 130, 3))
    pixels[20:50, 30:70] = (250, 20, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
