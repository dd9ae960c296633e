"""One image, two images: what the commands say of numbers."""

from __future__ import annotations

import re
import tokenize
from pathlib import Path

from dino_xcit.runtime.logging import counted

ROOT = Path(__file__).parents[1]


def test_one_of_a_thing_is_no_plural() -> None:
    said = [counted(count, noun) for noun in ("image", "process", "query", "patch") for count in (1, 2, 12_000)]
    assert said == ["1 image", "2 images", "12,000 images", "1 process", "2 processes", "12,000 processes", "1 query",
                    "2 queries", "12,000 queries", "1 patch", "2 patches", "12,000 patches"]  # fmt: skip
    assert counted(0, "epoch") == "0 epochs"


def test_no_message_leaves_the_plural_to_its_reader() -> None:
    for path in [*(ROOT / "dino_xcit").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), *ROOT.glob("run_*.py")]:
        with tokenize.open(path) as file:
            texts = [
                token.string
                for token in tokenize.generate_tokens(file.readline)
                if token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
            ]
        assert not [text for text in texts if re.search(r"[a-z]\((s|es)\)", text)], path
