"""python -m eval.dense knn: fractions, draw and vote against brute force, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import tiny_checkpoint
from numpy.typing import NDArray
from PIL import Image
from run_here import Command, Here, on_two_ranks

from dino_xcit.data.masks import IGNORE
from dino_xcit.models import build_backbone
from dino_xcit.transform import EvalTransform
from eval import compare
from eval.dense import __main__ as entry
from eval.dense import knn
from eval.dense.patches import patch_features
from eval.search_index import DeviceIndex

CPU = torch.device("cpu")
COLOURS = np.array([[90, 90, 90], [230, 40, 40], [40, 60, 230]], dtype=np.uint8)


def set_of(root: Path, train: int = 6, val: int = 3) -> Path:
    """Write grey images of different sizes with a red and a blue square; the first rows of the masks are ignored."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((40 + 4 * number, 48), dtype=np.uint8)
            for label in (1, 2):
                top, left = rng.integers(0, 24, 2)
                labels[top : top + 16, left : left + 16] = label
            pixels = COLOURS[labels] + rng.integers(0, 20, (*labels.shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / part / f"{number}.png")
            labels[:3] = IGNORE
            Image.fromarray(labels).save(root / "masks" / part / f"{number}.png")
    (root / "classes.txt").write_text("wall\nfire\nwater\n")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    return tiny_checkpoint(folder, folder)


@pytest.fixture
def segment(here: Here, weights: Path, data: Path) -> Command:
    """The last of repeated flags counts."""
    common = ["--weights", weights, "--device", "cpu", "--size", 48, "--memory", 500, "--num-workers", 0]
    return lambda *words: here(knn, *common, "--data-path", data, *words)


# ---- parts


@pytest.mark.parametrize("grid", [(2, 3), (6, 4), (5, 5)])
def test_shares_of_patches_equal_counting(grid: tuple[int, int]) -> None:
    mask = np.random.default_rng(1).choice([0, 1, 3, IGNORE], (12, 12)).astype(np.uint8)
    mask[:6, :4] = IGNORE
    fractions, scored = knn.class_fractions(mask, grid, 4)
    pixels: dict[int, list[int]] = {}
    for row, column in np.ndindex(mask.shape):
        place = row * grid[0] // 12 * grid[1] + column * grid[1] // 12
        pixels.setdefault(place, []).append(int(mask[row, column]))
    for place, labels in pixels.items():
        valid = [label for label in labels if label != IGNORE]
        assert scored[place] == bool(valid)
        expected = [valid.count(label) / max(1, len(valid)) for label in range(4)]
        np.testing.assert_allclose(fractions[place], expected, rtol=1e-6)
    assert 0 < scored.sum() < len(scored) == len(pixels)


def test_draw_prefers_patches_with_rare_classes() -> None:
    fractions = np.zeros((100, 2), dtype=np.float32)
    fractions[:95, 0], fractions[95:, 1] = 1, 1
    scored = np.arange(100) % 10 != 0
    chosen = [knn.choose_patches(fractions, scored, 8, np.random.default_rng(seed)) for seed in range(20)]
    assert all(scored[one].all() and len(set(one.tolist())) == 8 for one in chosen)
    assert np.mean([(one >= 95).sum() for one in chosen]) > 4, "five of 100 patches have the rare class"
    np.testing.assert_array_equal(chosen[3], knn.choose_patches(fractions, scored, 8, np.random.default_rng(3)))
    assert len(knn.choose_patches(fractions, scored, 1000, np.random.default_rng(0))) == 90
    assert len(knn.choose_patches(fractions, scored, 0, np.random.default_rng(0))) == 0


@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_vote_equals_brute_force(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_NUMBERS_AT_ONCE", chunk)
    rng = np.random.default_rng(2)
    known, queries = rng.normal(size=(30, 5)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    fractions = rng.dirichlet(np.ones(3), 30)
    memory = knn.Memory(DeviceIndex(known, CPU), torch.from_numpy(fractions))
    found = knn.knn_predict(queries, memory, k, 0.2)
    for query, row in zip(queries.astype(np.float64), found.numpy(), strict=True):
        cosines = known @ query / np.linalg.norm(known, axis=1) / np.linalg.norm(query)
        near = np.argsort(-cosines)[:k]
        votes = np.exp(cosines[near] / 0.2)
        np.testing.assert_allclose(row, votes @ fractions[near] / votes.sum(), atol=1e-5)


def test_labels_are_the_largest_of_the_enlarged_shares() -> None:
    fractions = torch.zeros(2, 2, 5)
    fractions[..., 4], fractions[0, 0, 4], fractions[0, 0, 2] = 1, 0, 1
    found = knn.draw_labels(fractions, 8, 12)
    expected: NDArray[np.int64] = np.full((8, 12), 4)
    maps = torch.nn.functional.interpolate(fractions.permute(2, 0, 1)[None], (8, 12), mode="bilinear")[0]
    expected[(maps[2] > maps[4]).numpy()] = 2
    np.testing.assert_array_equal(found, expected)
    assert set(np.unique(found)) == {2, 4}


@pytest.mark.parametrize(
    ("name", "grid"), [("xcit_pico_4_p8", (8, 12)), ("vit_tiny_2_p16", (4, 6)), ("timm:resnet18", (2, 3))]
)
def test_every_kind_of_backbone_has_unit_patch_features(name: str, grid: tuple[int, int]) -> None:
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    features = patch_features(build_backbone(name).eval(), images, EvalTransform(), "fp32")
    assert features.shape[1:3] == grid
    torch.testing.assert_close(features.norm(dim=3), torch.ones(1, *grid))


# ---- the command


def test_command_measures_draws_and_compares(
    segment: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    done = segment("--json", files[0], "--out", tmp_path / "sheet.png", "--baselines")
    assert done.code == 0, done.err
    assert segment("--json", files[1]).code == 0
    trained = json.loads(files[0].read_text())["results"]
    assert list(trained["iou"]) == ["wall", "fire", "water"]
    assert trained["miou"] == pytest.approx(np.mean([*trained["iou"].values()]))
    assert trained["miou"] > 60, "colours are easy"
    assert 0 < trained["untrained"]["miou"] < 100
    assert trained["patches"] == 500
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 3 * 40
    compare.main(list(map(str, files)))
    assert "+0.0" in capsys.readouterr().out
    assert segment("--json", files[1], "--memory", 30).code == 0
    assert json.loads(files[1].read_text())["results"]["patches"] == 30


def test_wrong_input_is_refused(segment: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment("--size", 50).assert_refused("size is 50", "--size 48")
    segment("--data-path", tmp_path / "none").assert_refused("there is no folder")
    segment("--data-path", "sample:scenes").assert_refused("dino_xcit.data scenes DIR")
    segment("--data-path", tmp_path).assert_refused("no training images with masks")
    segment("--eval-crop", 224).assert_refused("eval_crop")
    segment("--out", "x.jpg").assert_refused(".png")
    with monkeypatch.context() as patched:
        patched.setattr(knn, "available_memory", lambda: 100_000)
        segment().assert_refused("memory is 500", "--memory 152")
        patched.setattr(knn, "available_memory", lambda: 100)
        segment().assert_refused("memory is 500", "use fewer processes")
    set_of(tmp_path / "set", 2, 1)
    broken = tmp_path / "set/images/train/1.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    segment("--data-path", tmp_path / "set").assert_refused("1.png cannot be read")


@pytest.mark.process
def test_two_ranks_get_the_results_of_one(segment: Command, weights: Path, data: Path, tmp_path: Path) -> None:
    words = ["--memory", 500, "--size", 48, "--num-workers", 0, "--json"]
    assert segment(*words, tmp_path / "one.json", "--out", tmp_path / "one.png").code == 0
    common = ["--weights", weights, "--device", "cpu", "--data-path", data]
    on_two_ranks(knn, tmp_path, *common, *words, tmp_path / "two.json", "--out", tmp_path / "two.png")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_entry_needs_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (([], "found no command"), (["kn"], "found 'kn'"), (["knn", "--sice", "3"], "--size")):
        monkeypatch.setattr(sys, "argv", ["dense", *words])
        with pytest.raises(SystemExit) as end:
            entry.command()
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
