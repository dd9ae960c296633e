"""run_linear.py, killed with SIGKILL at any moment: the same command ends with the same bits. With two ranks too."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dying_child import end_of, fork
from eval_fixtures import image_tree, tiny_checkpoint
from ranks import environments

import run_linear
from eval.linear.logistic import LogisticRegression
from eval.linear.sgd import LinearHeads


class Death(NamedTuple):
    """SIGKILL to a process as it calls a function for the ``call``-th time (from 1)."""

    owner: Any
    name: str
    call: int


def forked(words: Sequence[str], log: Path, death: Death | None = None, ranks: int = 1) -> list[int]:
    """Fork the ranks of a run, of which the first dies if there is a ``death``; the others are then killed, as torchrun
    does it. Their exit codes, minus the signal that ended them; what they printed is in ``log``."""

    def run(told: dict[str, str], death: Death | None) -> None:
        os.environ.update(told)
        if death:
            setattr(death.owner, death.name, _deadly(getattr(death.owner, death.name), death.call))
        sys.argv = ["run_linear.py", *words]
        run_linear.command()

    children = [
        fork(functools.partial(run, told, None if rank else death), log.with_suffix(f".{rank}"))
        for rank, told in enumerate(environments(ranks))
    ]
    codes = [end_of(children[0])]
    for child in children[1:]:
        if codes[0]:
            os.kill(child, signal.SIGKILL)
        codes.append(end_of(child))
    return codes


def _deadly(function: Any, call: int) -> Any:
    left = [call]

    @functools.wraps(function)
    def dies(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return dies


STEPS, GRIDS = 7, 2
"""Of an epoch; and of choices of features, each with a grid that takes every step beside the paper's classifier."""
WITHIN_EPOCH_2 = Death(LinearHeads, "step", (STEPS + 3) * (1 + GRIDS))
"""Counted from where a run goes on: for one that goes on with epoch 2, it is within epoch 3."""
THE_THIRD_FILE = Death(os, "replace", 3)
"""Two files appear, and of the next there is only what was written aside."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    return tiny_checkpoint(folder / "run", image_tree(folder / "photos", train=10))


def words(weights: Path, folder: Path, *more: str, batch: int = 4) -> list[str]:
    return [
        "--weights", str(weights), "--output-dir", str(folder), "--json", str(folder / "card.json"), "--epochs", "3",
        "--batch-size", str(batch), "--num-workers", "0", "--holdout", "0.2", "--lrs", "0.5", "0.01", "--cache-dir",
        str(folder / "features"), "--crop-scale", "0.5", "1", "--features", "cls", "last3", "--logreg", "--logreg-cs",
        "0.01", "1", "--device", "cpu", *more,
    ]  # fmt: skip


def bits(value: Any) -> Any:
    """Values that are equal where all bits are, without seconds."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(one) for name, one in value.items() if name != "seconds"}
    return [bits(one) for one in value] if isinstance(value, list) else value


def left_by(folder: Path) -> dict[str, Any]:
    """All that a probe leaves, features included; and that nothing else is left."""
    card = json.loads((folder / "card.json").read_text())
    found = {name: bits(torch.load(folder / name, weights_only=True)) for name in ("linear.pth", "logreg.pth")}
    found |= {name: card[name] for name in ("results", "figures", "history", "protocol")}
    # What a killed process had begun to extract lies aside for an hour: another may be at it.
    found |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("features/[!.]*/*.npy")}
    assert not [path.name for path in folder.glob(".*")]
    return found


def killed_and_gone_on(weights: Path, folder: Path, deaths: list[Death], *more: str, ranks: int = 1) -> dict[str, Any]:
    """A probe that dies again and again, each time a little later, then lives."""
    command = words(weights, folder, *more, batch=4 // ranks)
    for death in deaths:
        assert forked(command, folder.with_suffix(".log"), death, ranks)[0] == -9, death
    assert forked(command, folder.with_suffix(".log"), ranks=ranks) == [0] * ranks
    return left_by(folder)


def straight(weights: Path, folder: Path, *more: str, ranks: int = 1) -> dict[str, Any]:
    return killed_and_gone_on(weights, folder, [], *more, ranks=ranks)


def test_killed_within_epochs_and_regressions_the_probe_ends_with_the_same_bits(weights: Path, tmp_path: Path) -> None:
    deaths = [
        WITHIN_EPOCH_2,
        WITHIN_EPOCH_2,  # now in epoch 3
        Death(os, "replace", 2),  # linear.pth of the last epoch is there, logreg.pth is not yet
        Death(LogisticRegression, "solve", 2),
        Death(os, "replace", 2),
    ]
    found = killed_and_gone_on(weights, tmp_path / "killed", deaths)
    assert found == straight(weights, tmp_path / "straight")
    assert len(found["history"]) == 3


def test_killed_at_each_file_of_a_cached_probe_it_ends_with_the_same_bits(weights: Path, tmp_path: Path) -> None:
    wanted = straight(weights, tmp_path / "straight", "--cached", "--cached-epochs", "2")
    # 19 files: two each for the features of training, held-out and validation images and of two kept epochs, linear.pth
    # three times, logreg.pth once a regression and once in the end, the result file.
    deaths = [THE_THIRD_FILE] * 8
    found = killed_and_gone_on(weights, tmp_path / "killed", deaths, "--cached", "--cached-epochs", "2")
    assert found == wanted
    assert sum(name.endswith("features.npy") for name in found) == 5


@pytest.mark.parametrize("more", [(), ("--cached", "--cached-epochs", "2")], ids=["full", "cached"])
def test_two_ranks_that_are_killed_end_with_the_bits_of_two_that_are_not(
    weights: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    deaths = [WITHIN_EPOCH_2, Death(LogisticRegression, "solve", 2)]
    found = killed_and_gone_on(weights, tmp_path / "killed", deaths, *more, ranks=2)
    assert found == straight(weights, tmp_path / "straight", *more, ranks=2)
