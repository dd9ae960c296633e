"""One image, two images: what the commands say of numbers."""

from __future__ import annotations

from dino_xcit.runtime.logging import counted


def test_one_of_a_thing_is_no_plural() -> None:
    said = [counted(count, noun) for noun in ("image", "process", "query", "patch") for count in (1, 2, 12_000)]
    assert said == ["1 image", "2 images", "12,000 images", "1 process", "2 processes", "12,000 processes", "1 query",
                    "2 queries", "12,000 queries", "1 patch", "2 patches", "12,000 patches"]  # fmt: skip
    assert counted(0, "epoch") == "0 epochs"
