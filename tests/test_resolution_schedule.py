"""--resolution-schedule: crops of each epoch, exact resuming across a change, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import CPU, differing_bits, learnt, tiny_config, tiny_source

import run_pretrain
from dino_xcit.config import differences
from dino_xcit.data.loader import MultiCropDataset
from dino_xcit.errors import InputError
from dino_xcit.train import TrainState

SCHEDULE = "0:16/8 .5:20/12 0.75:28/16"  # 4 epochs


def test_each_epoch_has_the_crops_of_its_stage() -> None:
    config = tiny_config(resolution_schedule=SCHEDULE)
    dataset = MultiCropDataset(tiny_source(), config.augmentation(), 0, first=config.first_augmentations())
    sizes = [[crop.shape[-1] for crop in dataset.__getitems__([(epoch, 3), (epoch, 4)]).crops] for epoch in range(6)]
    assert sizes == [[16, 8], [16, 8], [20, 12], [28, 16], [28, 16], [28, 16]]
    assert dataset.sides == [28, 28, 16, 16]


def test_blur_radius_follows_the_size_of_the_crops() -> None:
    config = tiny_config(resolution_schedule="0:14/8 0.5:28/16", blur_radius=(0.2, 1.0), global_blur=(1.0, 1.0))
    small, large = (
        np.array([view.blur_radius for index in range(20) for view in one.draw(28, 28, 0, 0, index)[:2]])
        for one in (config.first_augmentations()[0], config.augmentation())
    )
    np.testing.assert_allclose(2 * small, large)


def test_empty_schedule_has_no_other_augmentations() -> None:
    assert tiny_config().first_augmentations() == []
    assert tiny_config(resolution_schedule="0:28/16").first_augmentations() == []


def test_run_resumes_exactly_across_a_change(tmp_path: Path) -> None:
    config = tiny_config(resolution_schedule=SCHEDULE, data_path=str(folder_of_images(tmp_path)), num_workers=0)

    def run(name: str, steps: int) -> TrainState:
        own = dataclasses.replace(config, output_dir=str(tmp_path / name), max_steps=steps)
        return run_pretrain.train(own, CPU, evaluators=())

    whole = run("whole", 8)
    for stop in (3, 5, 8):  # epochs of two steps: within the first stage, within the second, in the last
        parts = run("parts", stop)
    assert differing_bits(learnt(whole), learnt(parts)) == []


def folder_of_images(parent: Path) -> Path:
    folder = parent / "images"
    folder.mkdir()
    for number in range(16):
        item, _ = tiny_source().read(number)
        Image.fromarray(item).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("0:16", "expected SHARE:GLOBAL/LOCAL"),
        ("0:16/8, 0.5:28/16", "expected SHARE:GLOBAL/LOCAL"),
        ("0.25:16/8 0.5:28/16", r"begin at epochs \[1, 2\] of 4: expected the first at 0"),
        ("0:16/8 0.5:20/12 0.6:28/16", r"begin at epochs \[0, 2, 2\] of 4"),
        ("0:16/8 1:28/16", r"begin at epochs \[0, 4\] of 4"),
        ("0:16/8 0.5:24/16", "crops of 24 and 16 pixels, but the run's are 28 and 16.*--global-crops-size 24"),
        ("0:0/8 0.5:28/16", "global_crops_size"),
    ],
)
def test_invalid_schedule_is_refused(schedule: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny_config(resolution_schedule=schedule)


def test_changed_schedule_is_a_changed_setting() -> None:
    old, new = tiny_config(), tiny_config(resolution_schedule=SCHEDULE)
    assert differences(dataclasses.asdict(old), new) == [f"resolution_schedule empty -> {SCHEDULE}"]
