"""Published figures: what they may be held against, and how."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from result_fixtures import KNN, knn_figure, larger, refusal, write_result

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from eval.compare.__main__ import main
from eval.compare.published import IMAGENET_CLASSES, IMAGENET_TRAIN, IMAGENET_VAL, PUBLISHED, published_result
from eval.figures import Figure

NAME = "published:xcit_small_12_p16"
HITS = np.arange(IMAGENET_VAL) < 38_250  # 76.5%


def on_imagenet(path: Path, *figures: Figure, transform: EvalTransform | None = None, **changed: object) -> Path:
    """A result whose data have ImageNet-1k's numbers."""
    write_result(path, *(figures or (knn_figure(20, HITS),)), transform=transform or EvalTransform())
    card = json.loads(path.read_text())
    for part, images in (("train", IMAGENET_TRAIN), ("val", IMAGENET_VAL)):
        card["data"][part] |= {"images": images, "classes": IMAGENET_CLASSES}
    path.write_text(json.dumps(card | changed))
    return path


def test_the_figures_are_those_of_the_papers() -> None:
    found = {name: (one.knn, one.linear) for name, one in PUBLISHED.items()}
    assert found == {
        "xcit_small_12_p16": (76.0, 77.8),
        "xcit_small_12_p8": (77.1, 79.2),
        "xcit_medium_24_p16": (76.4, 78.8),
        "xcit_medium_24_p8": (77.9, 80.3),
        "vit_small_p16_100ep": (69.3, 74.0),
    }


def test_a_result_on_imagenet_is_held_against_a_published_figure_without_significance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = on_imagenet(tmp_path / "mine.json", knn_figure(10, HITS), knn_figure(20, HITS))
    for order in ((NAME, mine), (mine, NAME)):
        main([str(word) for word in order])
        text = capsys.readouterr().out
        assert f"{NAME}: published, not measured here; facebookresearch/dino" in text
        rows = [line.split() for line in text.splitlines() if "76.0" in line or "76.5" in line]
        assert len(rows) == 2, "k = 20 alone"
        assert rows[1][-4:] == ["+0.5" if order[0] == NAME else "-0.5", "-", "-", "-"]
        assert "k=10" not in text


def test_two_results_are_not_tested_against_each_other_through_a_published_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = on_imagenet(tmp_path / "a.json"), on_imagenet(tmp_path / "b.json")
    main([NAME, str(a), str(b)])
    text = capsys.readouterr().out
    assert text.count("+0.5") == 2
    assert "McNemar" not in text


def test_the_linear_figure_is_held_against_the_best_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = Figure("paper, best epoch, top-1", {"classifier": "paper", "epoch": "best"}, 78.0, None)
    probe = {"name": "linear", "epochs": 100, "lr": 0.001, "crop_scale": [0.08, 1.0], "batch": 1024, "seed": 0}
    mine = on_imagenet(tmp_path / "mine.json", best, measure="linear", protocol=probe)
    main([NAME, str(mine)])
    assert "+0.2" in capsys.readouterr().out
    fewer = on_imagenet(tmp_path / "fewer.json", best, measure="linear", protocol=probe | {"epochs": 10})
    assert "epochs 100 -> 10" in refusal(NAME, fewer)
    cached = on_imagenet(tmp_path / "c.json", best, measure="linear", protocol=probe | {"cached": "4 epochs"})
    assert "cached not set -> 4 epochs" in refusal(NAME, cached)


def test_a_linear_figure_of_several_blocks_is_held_against_no_figure_of_one(tmp_path: Path) -> None:
    best = Figure("paper, best epoch, top-1", {"classifier": "paper", "epoch": "best"}, 78.0, None)
    probe = {"name": "linear", "epochs": 100, "lr": 0.001, "crop_scale": [0.08, 1.0], "batch": 1024, "seed": 0}
    mine = on_imagenet(tmp_path / "mine.json", best, measure="linear", protocol=probe)
    assert "cannot be compared with published:vit_small_p16_100ep: features last4 ->" in refusal(
        "published:vit_small_p16_100ep", mine
    )


def test_another_data_set_is_refused_with_the_reason(tmp_path: Path) -> None:
    mine = write_result(tmp_path / "mine.json", knn_figure(20, np.ones(400, bool)), transform=EvalTransform())
    sentences = refusal(NAME, mine).split("\n")
    assert sentences[1] == (
        f"{mine} cannot be compared with {NAME}: other validation images: 50,000 of 1000 classes -> 400 of 3 classes"
    )
    assert "other training images: 1,281,167 of 1000 classes" in sentences[0]
    assert "--allow val" not in refusal(NAME, mine, "--allow", "val", "train"), "of which nothing can be allowed"


def test_another_transform_or_k_is_refused(tmp_path: Path) -> None:
    smaller = on_imagenet(tmp_path / "smaller.json", transform=larger(EvalTransform()))
    assert "transform: crop 224 -> 28" in refusal(NAME, smaller)
    other_k = on_imagenet(tmp_path / "k.json", knn_figure(10, HITS))
    assert "k 20 -> 10" in refusal(NAME, other_k)


def test_another_way_of_searching_is_refused(tmp_path: Path) -> None:
    mine = on_imagenet(tmp_path / "mine.json", protocol=KNN | {"name": "approximate"})
    assert "approximate" in refusal(NAME, mine)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    mine = on_imagenet(tmp_path / "mine.json")
    assert "did you mean xcit_small_12_p16 or" in refusal("published:xcit_small_12_p61", mine)
    assert "only published figures given" in refusal(NAME, "published:xcit_small_12_p8")
    with pytest.raises(InputError, match="has k-NN and linear figures, no retrieval"):
        published_result(NAME, "retrieval")
