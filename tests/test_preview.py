"""Preview of augmented views: python -m dino_xcit.augment preview."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny_run import tiny_config, tiny_source

from dino_xcit.data import open_source
from dino_xcit.errors import InputError
from dino_xcit.preview import draw_preview, main


def test_preview_draws_the_views_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    augmentation, source = tiny_config().augmentation(), tiny_source(10)
    assert draw_preview(source, augmentation, tmp_path / "grid.png", images=3, seed=7) == [0, 4, 9]
    picture = Image.fromarray(np.asarray(source.read(4)[0])).convert("RGB")
    views = augmentation(picture, seed=7, epoch=0, index=4)
    for axis, view in zip(drawn[0].axes[6:10], views, strict=True):
        assert (np.asarray(axis.images[0].get_array()) == view.permute(1, 2, 0).numpy()).all()


def test_preview_accepts_image_name_that_is_not_utf8(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "caf\udce9.png")
    draw_preview(open_source(str(tmp_path)), tiny_config().augmentation(), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert len(grid.getcolors(1 << 20) or ()) > 2, "images and captions are drawn"


def test_preview_command_writes_png_and_reports_counts(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "views.png"
    main(["preview", str(photos), f"--out={out}", "--images", "2", "--local-crops-number=3"])
    assert Image.open(out).format == "PNG"
    assert "views of 2 of 160 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected: python -m dino_xcit.augment preview"),
        (["prevew", "SRC"], "'prevew'"),
        (["preview"], "source is empty"),
        (["preview", "SRC", "--images", "101"], "images is 101"),
        (["preview", "absent"], "absent"),
        (["preview", "SRC", "--out", "absent/grid.png"], "cannot write absent/grid.png"),
        (["preview", "SRC", "--out", "grid.doc"], "cannot write grid.doc"),
        (["preview", "SRC", "--local-crop-number", "3"], "did you mean --local_crops_number"),
    ],
)
def test_preview_command_refuses_invalid_arguments(
    argv: list[str], words: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        main([str(photos) if word == "SRC" else word for word in argv])
