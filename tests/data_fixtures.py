"""Image folders for the tests of data sets."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dino_xcit.data import Source


def write_image(path: Path, shade: int = 100, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 20, 200 - shade)).save(path)
    return path


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def parts_tree(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> Path:
    """Write one image per class to root/train and to root/val."""
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            write_image(root / part / name / "0.png")
    return root


def labels(source: Source) -> list[int] | None:
    return None if source.labels is None else source.labels.tolist()


def odd_tree(folder: Path) -> Path:
    """Write class folders with images of three classes, and files and folders that a data set must skip."""
    for path in ("dog/b.png", "dog/a.jpg", "cat/deep/er/c.PNG", "cat/d.jpeg", "ant/e.webp"):
        write_image(folder / path)
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    write_image(folder / ".cache" / "f.png")
    (folder / "empty").mkdir()
    return folder
