"""A process without a GPU of its own: what is said under torchrun, and what in a job of run_slurm.py."""

from __future__ import annotations

import pytest
import torch

from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The third process of a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    return monkeypatch


def test_under_torchrun_its_own_flag_is_named(third: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="PyTorch finds 2; lower torchrun's --nproc-per-node to 2"):
        distributed.choose_device("auto")


def test_in_a_queued_job_the_launcher_s_flags_are_named(third: pytest.MonkeyPatch) -> None:
    third.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(InputError, match=r"run_slurm\.py --gpus-per-node 3 or more, or leave --tasks-per-node out"):
        distributed.choose_device("auto")
    third.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"or give run_slurm\.py --gpus-per-node"):
        distributed.choose_device("cuda")
