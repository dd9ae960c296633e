"""Settings that run_pretrain.py parses from a command line."""

from __future__ import annotations

from dino_xcit.config import PretrainConfig
from dino_xcit.recipes import parse_pretrain

DATA = ["--data-path", "photos"]


def parsed(*argv: str) -> PretrainConfig:
    return parse_pretrain(argv).config
