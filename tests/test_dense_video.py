"""python -m eval.dense video: J and F of DAVIS, label propagation against brute force, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import tiny_checkpoint
from numpy.typing import NDArray
from PIL import Image
from run_here import Command, Here, on_two_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models import BackboneOutput
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone
from eval.dense import davis, video
from eval.dense.config import VideoConfig

SIDE, BOX = 64, 24


def square(top: int, left: int, number: int = 1, side: int = BOX) -> NDArray[np.uint8]:
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[top : top + side, left : left + side] = number
    return mask


# ---- J and F


def test_scores_of_identical_disjoint_and_empty_masks() -> None:
    one, other, none = square(4, 4) > 0, square(36, 36) > 0, np.zeros((SIDE, SIDE), dtype=np.bool_)
    for measure in (davis.region_similarity, davis.boundary_measure):
        assert measure(one, one) == measure(none, none) == 1
        assert measure(one, other) == measure(none, one) == measure(one, none) == 0


def test_shifted_square_has_known_iou_and_boundary_precision() -> None:
    """24 x 24 pixels shifted by 8 columns overlap in 16. Of the boundary, as many pixels lie within the tolerance as a
    comparison of all pairs finds."""
    one, other = square(20, 10) > 0, square(20, 18) > 0
    assert davis.region_similarity(one, other) == pytest.approx(16 / 32)
    tolerance = math.ceil(0.008 * math.hypot(SIDE, SIDE))
    assert tolerance == 1

    def near(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
        pairs = np.argwhere(first)[:, None] - np.argwhere(second)[None]
        return float((np.sqrt((pairs.astype(np.float64) ** 2).sum(axis=2)).min(axis=1) <= tolerance).mean())

    edges = [official_boundary(mask) for mask in (one, other)]
    precision, recall = near(edges[0], edges[1]), near(edges[1], edges[0])
    assert 0 < precision < 1
    found = davis.boundary_measure(one, other)
    assert found == pytest.approx(2 * precision * recall / (precision + recall))
    assert davis.boundary_measure(one, square(20, 11) > 0) == 1, "a shift within the tolerance"
    scores = davis.score_frame(square(20, 10, 3), square(20, 18, 3), [3, 5])
    np.testing.assert_allclose(scores, [[50, 100 * found], [100, 100]])


def official_boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The definition, pixel by pixel: a pixel differs from its right, lower or lower right neighbour, if it has one."""
    found = np.zeros_like(mask)
    for row, column in np.ndindex(mask.shape):
        for down, right in ((0, 1), (1, 0), (1, 1)):
            inside = row + down < mask.shape[0] and column + right < mask.shape[1]
            found[row, column] |= inside and mask[row, column] != mask[row + down, column + right]
    return found


def test_boundary_equals_its_definition() -> None:
    mask = np.random.default_rng(0).random((9, 7)) > 0.7
    mask[-3:, -2:] = True  # touches the border, where there is no lower right neighbour
    np.testing.assert_array_equal(davis.boundary(mask), official_boundary(mask))


# ---- propagation


def brute_force(target: Tensor, sources: Tensor, labels: Tensor, radius: int, k: int, temperature: float) -> Tensor:
    height, width, _ = target.shape
    out = torch.zeros(height, width, labels.shape[3], dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            near = [
                (math.exp(float(target[row, column] @ source[y, x]) / temperature), label[y, x])
                for source, label in zip(sources, labels, strict=True)
                for y in range(max(0, row - radius), min(height, row + radius + 1))
                for x in range(max(0, column - radius), min(width, column + radius + 1))
            ]
            best = sorted(near, key=lambda pair: -pair[0])[:k]
            out[row, column] = sum(weight * label for weight, label in best) / sum(weight for weight, _ in best)
    return out


@pytest.mark.parametrize(("radius", "k"), [(0, 5), (1, 3), (2, 5), (12, 400)])
@pytest.mark.parametrize("tile", [2, 16])
def test_propagation_equals_brute_force(radius: int, k: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 2 patches split the grid, whose sides are no multiples of it."""
    monkeypatch.setattr(video, "TILE", tile)
    target, sources = F.normalize(torch.randn(5, 7, 6).double(), dim=2), F.normalize(torch.randn(3, 5, 7, 6), dim=3)
    labels = torch.rand(3, 5, 7, 2).double()
    inputs = target, sources.double(), labels, radius, k, 0.1
    found = video.propagate(*inputs)
    torch.testing.assert_close(found, brute_force(*inputs))


@pytest.mark.parametrize(
    ("size", "short", "patch", "expected"),
    [((854, 480), 480, 8, (832, 480)), ((480, 854), 480, 16, (480, 832)), ((1920, 1080), 480, 14, (826, 476)),
     ((64, 64), 64, 8, (64, 64)), ((100, 96), 96, 16, (96, 96))],
)  # fmt: skip
def test_size_of_resized_frames(size: tuple[int, int], short: int, patch: int, expected: tuple[int, int]) -> None:
    assert video.resized(size, short, patch) == expected


def test_drawn_map_of_a_weak_object_wins_where_it_is_strongest() -> None:
    soft = torch.zeros(4, 4, 2)
    soft[..., 0], soft[0, 0] = 1, torch.tensor([0.7, 0.3])
    found = video.to_label_map(soft, 8, 8)
    assert found[0, 0] == 1
    assert found[4:, 4:].sum() == 0
    assert video.to_label_map(torch.ones(4, 4, 2), 8, 8).sum() == 0, "a constant map is no object"


class Colours(nn.Module):
    """Backbone whose patch tokens are the mean colours of patches of 4 pixels."""

    embed_dim, patch_size = 3, 4

    def forward(self, images: Tensor) -> BackboneOutput:
        tokens = F.avg_pool2d(images, 4)
        return BackboneOutput(images.mean(dim=(2, 3)), tokens.flatten(2).transpose(1, 2), tokens.shape[2:])


# ---- the command


def frames_of(folder: Path, masks: Path, count: int, all_masks: bool = True) -> None:
    """Write a video in which a red and a green square move by 4 pixels a frame over a blue background."""
    folder.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(count):
        labels = square(8, 4 + 4 * number) + square(36, 36 - 4 * number, 2)
        colours = np.array([[20, 30, 200], [220, 30, 30], [20, 220, 60]], dtype=np.uint8)
        Image.fromarray(colours[labels]).save(folder / f"{number:05d}.png")
        if all_masks or number == 0:
            palette = Image.fromarray(labels)
            palette.putpalette(colours.tobytes())
            palette.save(masks / f"{number:05d}.png")


@pytest.fixture
def davis_folder(tmp_path: Path) -> Path:
    root = tmp_path / "davis"
    for name, count in (("cat", 5), ("dog", 4), ("of train", 4)):
        frames_of(root / "JPEGImages/480p" / name, root / "Annotations/480p" / name, count)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("cat\ndog\n")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    return tiny_checkpoint(folder, folder)


@pytest.fixture
def track(here: Here, weights: Path) -> Command:
    return lambda *words: here(video, "--weights", weights, "--device", "cpu", "--size", SIDE, *words)


def test_objects_with_distinct_colours_are_followed(davis_folder: Path) -> None:
    loaded = LoadedBackbone(
        arch="", network="", path=Path(), transform=EvalTransform(), data=None, backbone=Colours(), hash=""
    )
    config = VideoConfig(data_path=str(davis_folder), size=SIDE)
    cpu, (cat, dog) = torch.device("cpu"), video.open_videos(config)
    assert (len(cat.measured), len(dog.measured)) == (3, 2), "the first and the last frame are left out"
    for one in (cat, dog):
        scores = video.evaluate_video(one, loaded, config, cpu, lambda: None)
        assert scores.keys() == {1, 2}
        assert min(value for pair in scores.values() for value in pair) > 85, scores
    # The squares move by a patch a frame: over one row and column, labels must come from the previous frames.
    for radius, previous, arrives in ((0, 7, False), (1, 0, False), (1, 1, True)):
        config = VideoConfig(data_path=str(davis_folder), size=SIDE, radius=radius, previous=previous)
        regions = [pair[0] for pair in video.evaluate_video(cat, loaded, config, cpu, lambda: None).values()]
        assert (min(regions) > 85) == (max(regions) > 85) == arrives


def test_davis_command_writes_results_masks_and_animation(davis_folder: Path, track: Command, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "davis.json"
    done = track("--data-path", davis_folder, "--out", out, "--json", file)
    assert done.code == 0, done.err
    content = json.loads(file.read_text())
    results = content["results"]
    assert results["videos"].keys() == {"cat", "dog"}
    objects = [pair for scores in results["objects"].values() for pair in scores.values()]
    assert len(objects) == 4
    np.testing.assert_allclose([results["J"], results["F"]], np.mean(objects, axis=0))
    assert results["J&F"] == pytest.approx((results["J"] + results["F"]) / 2)
    assert {one["name"]: one["top1"] for one in content["metrics"]} == {
        name: results[name] for name in ("J&F", "J", "F")
    }
    first = np.asarray(Image.open(out / "cat/00000.png"))
    np.testing.assert_array_equal(first, np.asarray(Image.open(davis_folder / "Annotations/480p/cat/00000.png")))
    assert {path.suffix for path in (out / "cat").iterdir()} == {".png", ".jpg"}
    assert len(list((out / "cat").iterdir())) == 10
    with Image.open(out / "dog.webp") as animation:
        assert animation.n_frames == 4
    data = content["data"]["val"]
    mask = davis_folder / "Annotations/480p/cat/00002.png"
    mask.write_bytes((davis_folder / "Annotations/480p/cat/00001.png").read_bytes())
    assert track("--data-path", davis_folder, "--json", file).code == 0
    changed = json.loads(file.read_text())["data"]["val"]
    assert {name for name in data if data[name] != changed[name]} == {"labels"}
    (davis_folder / "ImageSets/2017/val.txt").unlink()
    assert "of train" in track("--data-path", davis_folder).out, "without a list all videos are evaluated"


def test_folder_of_frames(track: Command, tmp_path: Path) -> None:
    frames_of(tmp_path / "frames", tmp_path / "elsewhere", 4, all_masks=False)
    words = ["--data-path", tmp_path / "frames", "--out", tmp_path / "out"]
    track(*words).assert_refused("no mask of its first frame", "--first-mask")
    mask = tmp_path / "mask.png"
    Image.fromarray(square(8, 4, 255)).save(mask)
    assert track(*words, "--first-mask", mask).code == 0
    assert set(np.unique(np.asarray(Image.open(tmp_path / "out/frames/00003.png")))) <= {0, 255}
    (tmp_path / "elsewhere").rename(tmp_path / "frames/masks")
    assert track(*words).code == 0
    track(*words[:2]).assert_refused("--out")
    track(*words[:2], "--out", tmp_path).assert_refused("would overwrite")
    for labels, expected in (
        (square(0, 0, 0), "0 objects"), (square(8, 4)[:, :50], "50 x 64"),
        (np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE), "255 objects, expected 1 to 64"),
        (np.stack([square(8, 4)] * 3, axis=2), "RGB"),
    ):  # fmt: skip
        Image.fromarray(labels).save(mask)
        track(*words, "--first-mask", mask).assert_refused("mask.png", expected)


def test_names_with_dots_and_objects_that_are_lost(track: Command, tmp_path: Path) -> None:
    frames_of(tmp_path / "frames", tmp_path / "masks", 3, all_masks=False)
    for number in range(3):
        (tmp_path / f"frames/{number:05d}.png").rename(tmp_path / f"frames/clip.{number:04d}.png")
    mask = tmp_path / "mask.png"
    Image.fromarray(square(8, 4) + square(60, 60, 2, 1) + square(58, 56, 5, 1)).save(mask)
    words = ("--data-path", tmp_path / "frames", "--first-mask", mask, "--out")
    done = track(*words, tmp_path / "out")
    assert done.code == 0, done.err
    assert "are lost (2, 5)" in done.out
    written = sorted(path.name for path in (tmp_path / "out/frames").iterdir())
    assert written == [f"clip.{number:04d}.{suffix}" for number in range(3) for suffix in ("jpg", "png")]
    track(*words, mask).assert_refused("out is", "cannot be written")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "JPEGImages/480p/dog").rename(root / "gone"), "no folder"),
        (lambda root: (root / "Annotations/480p/dog/00000.png").unlink(), "dog has no mask of its first frame"),
        (lambda root: [(root / f"JPEGImages/480p/dog/0000{n}.png").unlink() for n in (1, 2, 3)], "dog has 1 frame"),
        (lambda root: (root / "JPEGImages/480p/dog/00002.png").write_bytes(b"no"), "dog/00002.png cannot be read"),
        (lambda root: shorten(root / "JPEGImages/480p/dog/00002.png"), "dog/00002.png cannot be read"),
        (lambda root: shorten(root / "Annotations/480p/dog/00002.png"), "dog/00002.png cannot be read"),
    ],
)
def test_damaged_davis_is_refused(davis_folder: Path, track: Command, damage: object, expected: str) -> None:
    damage(davis_folder)  # type: ignore[operator]
    track("--data-path", davis_folder).assert_refused(expected)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.process
def test_two_ranks_share_the_videos(davis_folder: Path, weights: Path, track: Command, tmp_path: Path) -> None:
    words = ["--data-path", davis_folder, "--json"]
    assert track(*words, tmp_path / "one.json").code == 0
    common = ["--weights", weights, "--device", "cpu", "--size", SIDE]
    assert on_two_ranks(video, tmp_path, *common, *words, tmp_path / "two.json")[1] == ""
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"]
    assert two["processes"] == 2
