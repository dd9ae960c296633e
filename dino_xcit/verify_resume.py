"""Check that resuming is exact on this machine and with this data.

    python -m dino_xcit.verify_resume [--processes N] FLAGS OF run_pretrain.py

trains 12 steps twice: once without interruption, and once with two SIGKILLs, the second during a save. It prints the
SHA-256 of both final states and exits with code 2 if they differ.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from annotated_types import Ge

from dino_xcit import safe_load
from dino_xcit.bounds import annotations_of
from dino_xcit.checkpoint.folder import FOLDER, LATEST
from dino_xcit.checkpoint.state import hash_content
from dino_xcit.cli import parse_known, read_flags
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError, run_main
from dino_xcit.metrics import read_metrics
from dino_xcit.recipes import parse_pretrain
from dino_xcit.runtime import logging as log

STEPS, SAVE_EVERY = 12, 4
OWN = {
    "max_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "knn_every": 0, "resume": "auto",
    "deterministic": True,
}  # fmt: skip
"""Settings fixed by this command."""
SCRIPT = Path(__file__).parent.parent / "run_pretrain.py"


@dataclass(frozen=True)
class VerifyConfig:
    """Compare an uninterrupted run with a killed and resumed one. The flags of run_pretrain.py are accepted as well."""

    processes: Annotated[int, Ge(1)] = 1
    """Number of processes of each run."""


@dataclass(frozen=True)
class Trial:
    """A run that is started and resumed until it is complete."""

    settings: Mapping[str, object]
    processes: int
    folder: Path

    def train(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Start or resume the run, and kill all its processes as soon as ``until`` holds; return whether it was killed.

        Raises:
            InputError: the run failed, with its own error message.
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
        """Return the last step in ``metrics.jsonl``."""
        return max((int(record["step"]) for record in read_metrics(self.folder / "metrics.jsonl")), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is partly written."""
        return any((self.folder / FOLDER).glob(".step*.tmp"))

    def hash(self) -> str:
        """Return the SHA-256 of the trained state."""
        return hash_content(safe_load.read(self.folder / LATEST))

    def _start(self, printed: Path) -> list[subprocess.Popen[bytes]]:
        """Start the ranks like torchrun, which itself would leave them running when it is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = str(self.processes)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        settings = self.folder.with_suffix(".yaml")
        values = {**self.settings, "output_dir": str(self.folder)}
        settings.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        command = [sys.executable, str(SCRIPT), "--config", str(settings)]
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
    """Train both runs in a temporary folder next to the output directory, and compare their hashes.

    Raises:
        InputError: invalid flags, a failed run, or different hashes.
    """
    verify, flags = parse_known(VerifyConfig, argv, "python -m dino_xcit.verify_resume", annotations_of(PretrainConfig))
    for name in OWN.keys() & read_flags(PretrainConfig, flags).keys():
        raise InputError(f"--{name} is set by verify_resume: leave it out")
    config, _, given = parse_pretrain(flags)
    if "WORLD_SIZE" in os.environ:
        raise InputError("verify_resume starts its own processes: use --processes N instead of torchrun")
    settings = {name: getattr(config, name) for name in sorted(given - {"wandb", "train_data", "val_data"})} | OWN
    beside = Path(config.output_dir).parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=beside, ignore_cleanup_errors=True) as folder:
        straight, resumed = (Trial(settings, verify.processes, Path(folder, name)) for name in ("straight", "resumed"))
        straight.train()
        log.info(f"{STEPS} steps, uninterrupted       SHA-256 {straight.hash()}")
        kill_twice(resumed)
        resumed.train()
        log.info(f"{STEPS} steps, killed and resumed  SHA-256 {resumed.hash()}")
        log.info(compare(straight.hash(), resumed.hash()))


def kill_twice(trial: Trial) -> None:
    """Kill the run between two saves, then during a save (or near the end if saves are too fast to hit)."""

    def second_save_begins() -> bool:
        return trial.step() >= 2 * SAVE_EVERY - 1 and trial.is_saving()

    def nearly_done() -> bool:
        return trial.step() >= STEPS - 2

    for until in (lambda: trial.step() >= SAVE_EVERY + 2, lambda: second_save_begins() or nearly_done()):
        if trial.train(until):
            log.info(f"SIGKILL after step {trial.step()}{', while saving' if trial.is_saving() else ''}")


def compare(straight: str, resumed: str) -> str:
    """Return a sentence for equal hashes.

    Raises:
        InputError: the hashes differ.
    """
    if straight != resumed:
        raise InputError("the resumed run DIFFERS from the uninterrupted one")
    return "resuming is exact: both runs are equal bit for bit"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the folder is removed
    run_main(lambda: main(sys.argv[1:]))
