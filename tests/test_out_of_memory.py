"""What a command says when the memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_fixtures import SMALL, pretrain_here

from dino_xcit.errors import run_main


def in_torch() -> None:
    torch.empty(1 << 50)


def in_numpy() -> None:
    np.ones(1 << 50, np.uint8)


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 8 GiB")


@pytest.mark.parametrize(
    ("main", "amount"), [(in_torch, "4,503,599.6 GB"), (in_numpy, "1.00 PiB"), (on_a_gpu, "20.50 GiB")]
)
def test_the_sentence_has_the_amount_and_flags_of_nobody_else(
    capsys: pytest.CaptureFixture[str], main: Callable[[], None], amount: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: out of memory (tried to allocate {amount}): ")
    assert said.count("\n") == 1
    assert not any(flag in said for flag in ("--out-dim", "--accumulation-steps", "alloc_cpu.cpp"))


def test_pretraining_names_its_own_flags(labelled_photos: Path) -> None:
    ended = pretrain_here("--data-path", labelled_photos, *SMALL, "--out-dim", "100000000000")
    ended.assert_refused("out of memory", "--batch-size-per-gpu", "--accumulation-steps", "--out-dim")
