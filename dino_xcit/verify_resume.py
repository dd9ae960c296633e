"""``python run_pretrain.py --verify-resume [PROCESSES] ...``: is a resumed run the same run on this machine and data?

It trains some steps twice, with the user's own settings: once in one go, and once with two SIGKILLs, the second of them
while a checkpoint is being written. Both end with a SHA-256 over all that training changes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import FOLDER, LATEST
from dino_xcit.checkpoint.state import hash_content
from dino_xcit.cli import parse_pretrain, replace_flags
from dino_xcit.errors import InputError
from dino_xcit.runtime.metrics import read_metrics

FLAG = "--verify-resume"
STEPS, SAVE_EVERY = 12, 4


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    straight: str
    """Hash of the run in one go."""
    resumed: str
    """Hash of the run that was killed."""
    killed_after: tuple[int, ...]
    """The last step in the metrics at each kill."""
    killed_while_saving: bool
    """Whether the second kill left a half-written file."""

    def report(self) -> str:
        """For the screen."""
        where = ", then ".join(f"after step {step}" for step in self.killed_after)
        saving = (
            "the second time while saving" if self.killed_while_saving else "never while saving: saves are too fast"
        )
        equal = self.straight == self.resumed
        return (
            f"{STEPS} steps in one go          SHA-256 {self.straight}\n"
            f"{STEPS} steps, killed and resumed  SHA-256 {self.resumed}\n"
            f"(SIGKILL {where}; {saving})\n"
            + (
                "resuming is exact here: both are the same, bit for bit"
                if equal
                else "NOT the same: see --deterministic"
            )
        )


def asked(argv: Sequence[str]) -> bool:
    """Whether a command line asks for this."""
    return any(word.replace("_", "-").split("=")[0] == FLAG for word in argv)


def main(argv: Sequence[str], script: Path) -> None:
    """The command: both runs below a temporary folder beside the output directory, which is removed.

    Raises:
        InputError: a mistake in the other flags, a run that ended early, or two different hashes.
    """
    processes, flags = _split(argv)
    config, _ = parse_pretrain(flags)
    if "WORLD_SIZE" in os.environ:
        raise InputError(f"{FLAG} starts processes itself: python run_pretrain.py {FLAG} PROCESSES, without torchrun")
    beside = Path(config.output_dir).parent
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=beside))
    try:
        ours = ["--max-steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--log-every", "1", "--knn-every", "0"]
        ours += ["--deterministic", "--wandb="]
        verdict = verify([sys.executable, str(script), *replace_flags(flags, ours)], processes, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(verdict.report())
    if verdict.straight != verdict.resumed:
        raise InputError("a resumed run is not the same run here")


def verify(command: Sequence[str], processes: int, folder: Path) -> Verdict:
    """Both runs, with ``--output-dir`` below ``folder``."""
    with tqdm(total=2 * STEPS, unit="step", desc="verifying", disable=not sys.stderr.isatty()) as bar:
        _run_until(command, processes, folder / "straight", lambda: False, bar)
        killed = folder / "killed"
        after = [_run_until(command, processes, killed, lambda: _step(killed) >= SAVE_EVERY + 2, bar)]

        def second_save_begins() -> bool:
            return _step(killed) >= 2 * SAVE_EVERY - 1 and _half_written(killed)

        until = lambda: second_save_begins() or _step(killed) >= STEPS - 2  # noqa: E731
        after.append(_run_until(command, processes, killed, until, bar))
        while_saving = _half_written(killed)
        _run_until(command, processes, killed, lambda: False, bar)
    hashes = [hash_content(safe_load.read(path / LATEST)) for path in (folder / "straight", killed)]
    return Verdict(hashes[0], hashes[1], tuple(after), while_saving)


def _run_until(
    command: Sequence[str], processes: int, output_dir: Path, then_kill: Callable[[], bool], bar: tqdm
) -> int:
    """Run to the end, or until SIGKILL becomes due for all its processes; the last step that was logged.

    Raises:
        InputError: the run ended with an error; its own words.
    """
    log = output_dir.with_suffix(".log")
    with open(log, "wb") as file:
        ranks = _start(replace_flags(command, ["--output-dir", str(output_dir)]), processes, file)
        try:
            shown = _step(output_dir)
            while any(rank.poll() is None for rank in ranks) and not then_kill():
                now = _step(output_dir)
                bar.update(max(0, now - shown))
                shown = now
                time.sleep(0.001)
        finally:
            step = _step(output_dir)
            killed = [rank for rank in ranks if rank.poll() is None]
            for rank in killed:
                os.killpg(rank.pid, signal.SIGKILL)
            codes = [rank.wait() for rank in ranks]
    if not killed and any(codes):
        lines = log.read_text(errors="replace").strip().splitlines()
        last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        raise InputError(f"the run ended with code {max(codes)}: {last.removeprefix('error: ')}")
    return step


def _start(command: Sequence[str], processes: int, log: IO[bytes]) -> list[subprocess.Popen[bytes]]:
    """The ranks of a run, as torchrun would start them: torchrun itself would let them live when it is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return [
        subprocess.Popen(
            command,
            env=os.environ | {key: str(value) for key, value in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        for r in range(processes)
    ]


def _step(output_dir: Path) -> int:
    return max((int(record["step"]) for record in read_metrics(output_dir / "metrics.jsonl")), default=0)


def _half_written(output_dir: Path) -> bool:
    return any((output_dir / FOLDER).glob(".step*.tmp"))


def _split(argv: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes were asked for, and the other flags."""
    words = list(argv)
    place = next(i for i, word in enumerate(words) if word.replace("_", "-").split("=")[0] == FLAG)
    _, equals, value = words.pop(place).partition("=")
    if not equals and place < len(words) and not words[place].startswith("--"):
        value = words.pop(place)
    if value and not (value.isdigit() and int(value) > 0):
        raise InputError(f"{FLAG} is {value!r}, expected a number of processes, or nothing for one")
    own = ("max-steps", "save-every", "log-every", "knn-every", "deterministic")
    for word in words:
        if word.removeprefix("--").split("=")[0].replace("_", "-") in own and word.startswith("--"):
            raise InputError(f"{word.split('=')[0]} is set by {FLAG} itself: leave it out")
    return int(value or 1), words
