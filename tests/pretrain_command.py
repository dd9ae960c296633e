"""What run_pretrain.py makes of a command line."""

from __future__ import annotations

import pytest

from dino_xcit.cli import parse_pretrain
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import run_main

DATA = ["--data-path", "photos"]


def parsed(*argv: str) -> PretrainConfig:
    return parse_pretrain(argv)[0]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command line that cannot be used prints; exit code 2 is demanded."""
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: parse_pretrain(argv) and None)
    assert caught.value.code == 2
    return capsys.readouterr().err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
