"""Is a resumed run the same run, on this machine and with this data?

    python -m dino_xcit.verify_resume [--processes N] FLAGS OF run_pretrain.py

trains 12 steps with these flags twice: once in one go, and once with two SIGKILLs, the second of them while a
checkpoint is being written. It prints a SHA-256 of both, over all that training changes, and ends with code 2 where
they differ.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import FOLDER, LATEST
from dino_xcit.checkpoint.state import hash_content
from dino_xcit.cli import parse_pretrain, replace_flags
from dino_xcit.errors import InputError, run_main
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.metrics import read_metrics

STEPS, SAVE_EVERY = 12, 4
OWN = {
    "--max-steps": str(STEPS), "--save-every": str(SAVE_EVERY), "--log-every": "1", "--knn-every": "0",
    "--resume": "auto",
}  # fmt: skip
"""Flags that this command sets itself."""
SCRIPT = Path(__file__).parent.parent / "run_pretrain.py"


@dataclass(frozen=True)
class Trial:
    """A run that is started until it is complete."""

    flags: Sequence[str]
    processes: int
    folder: Path

    def train(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Start it, or resume it. Returns whether it was killed: as soon as ``until`` holds, with all its processes.

        Raises:
            InputError: it ended with an error; its own words.
        """
        printed = self.folder.with_suffix(".log")
        ranks = self._start(printed)
        try:
            while any(rank.poll() is None for rank in ranks) and not until():
                time.sleep(0.001)
        finally:
            alive = [rank for rank in ranks if rank.poll() is None]
            for rank in alive:
                os.killpg(rank.pid, signal.SIGKILL)
            codes = [rank.wait() for rank in ranks]
        if not alive and any(codes):
            lines = printed.read_text(errors="replace").strip().splitlines() or [""]
            sentence = next((line for line in lines if line.startswith("error: ")), lines[-1])
            raise InputError(f"the run ended with code {max(codes, key=abs)}: {sentence.removeprefix('error: ')}")
        return bool(alive)

    def step(self) -> int:
        """The last step in its metrics."""
        return max((int(record["step"]) for record in read_metrics(self.folder / "metrics.jsonl")), default=0)

    def is_saving(self) -> bool:
        """Whether there is half a checkpoint."""
        return any((self.folder / FOLDER).glob(".step*.tmp"))

    def hash(self) -> str:
        """Of all that it has learnt."""
        return hash_content(safe_load.read(self.folder / LATEST))

    def _start(self, printed: Path) -> list[subprocess.Popen[bytes]]:
        """Its ranks, as torchrun would start them: torchrun itself lets them live when it is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = str(self.processes)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        command = [sys.executable, str(SCRIPT), *replace_flags(self.flags, ["--output-dir", str(self.folder)])]
        with open(printed, "wb") as file:
            return [
                subprocess.Popen(
                    command,
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
                for rank in range(self.processes)
            ]


def main(argv: Sequence[str]) -> None:
    """The command: both runs below a temporary folder beside the output directory, which is removed.

    Raises:
        InputError: a mistake in the flags, a run that ended early, or two different hashes.
    """
    processes, flags = split(argv)
    config, _ = parse_pretrain(flags)
    if "WORLD_SIZE" in os.environ:
        raise InputError("verify_resume starts the processes itself: give it --processes N, without torchrun")
    flags = replace_flags(flags, [*(word for pair in OWN.items() for word in pair), "--deterministic", "--wandb="])
    beside = Path(config.output_dir).parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=beside, ignore_cleanup_errors=True) as folder:
        straight, resumed = (Trial(flags, processes, Path(folder, name)) for name in ("straight", "resumed"))
        straight.train()
        log.info(f"{STEPS} steps in one go          SHA-256 {straight.hash()}")
        kill_twice(resumed)
        resumed.train()
        log.info(f"{STEPS} steps, killed and resumed  SHA-256 {resumed.hash()}")
        log.info(compare(straight.hash(), resumed.hash()))


def kill_twice(trial: Trial) -> None:
    """Between two saves, then inside one; where saves are too fast for that, near the end."""

    def a_save_begins() -> bool:
        return trial.step() >= 2 * SAVE_EVERY - 1 and trial.is_saving()

    def it_nearly_ends() -> bool:
        return trial.step() >= STEPS - 2

    for until in (lambda: trial.step() >= SAVE_EVERY + 2, lambda: a_save_begins() or it_nearly_ends()):
        if trial.train(until):
            log.info(f"SIGKILL after step {trial.step()}{', while saving' if trial.is_saving() else ''}")


def compare(straight: str, resumed: str) -> str:
    """The verdict on two hashes.

    Raises:
        InputError: they differ.
    """
    if straight != resumed:
        raise InputError("the resumed run DIFFERS from the uninterrupted one")
    return "resuming is exact: both runs are equal, bit for bit"


def split(argv: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes the runs have, and the flags of run_pretrain.py."""
    parser = argparse.ArgumentParser(
        "python -m dino_xcit.verify_resume", description=__doc__, allow_abbrev=False, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="of each run (default: 1)")
    try:
        known, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    if known.processes < 1:
        raise InputError(f"--processes is {known.processes}, expected at least 1")
    for word in flags:
        name = word.partition("=")[0].replace("_", "-").replace("--no-", "--")
        if name in {*OWN, "--deterministic"}:
            raise InputError(f"{name} is set by verify_resume itself: leave it out")
    return known.processes, flags


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
