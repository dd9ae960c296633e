"""Pretraining runs of one or more real processes: start them, wait for a step, send signals, read their output."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_xcit.metrics import read_metrics

HERE = Path(__file__).parent
PRETRAIN = str(HERE.parent / "run_pretrain.py")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
SMALL = [
    "--recipe", "dino",
    "--arch", "xcit_pico_4_p4", "--out-dim", "32", "--head-hidden-dim", "16", "--head-bottleneck-dim", "8",
    "--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1", "--num-workers", "0",
    "--device", "cpu", "--knn-every", "0", "--log-every", "1", "--warmup-epochs", "0", "--epochs", "4",
    "--no-report-pictures",
]  # fmt: skip
"""Flags of a run whose steps take tens of milliseconds."""


Start = Callable[..., "Run"]
"""``start(*flags, name="run", ranks=2, faults=())`` starts a run on the photos, in the folder of the test."""


def environments(ranks: int) -> list[dict[str, str]]:
    """Return the environment variables that torchrun would set for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in environment.items()} for environment in own]


def torchrun(folder: Path, *flags: object, restarts: int = 0) -> subprocess.Popen[str]:
    """Start two processes of run_pretrain.py under torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
         str(restarts), "--monitor-interval", "0.1", PRETRAIN,
         *map(str, [*SMALL, *flags, "--output-dir", folder])],
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@dataclass
class Run:
    """Processes of one run, in rank order."""

    server: Server
    pids: list[int]
    logs: list[tuple[Path, Path]]
    folder: Path
    started: float = field(default_factory=time.monotonic)

    def codes(self) -> list[int | None]:
        """Return the exit codes; None for a running process."""
        return self.server.ask({"poll": self.pids})

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait until all processes have ended and return their exit codes.

        Raises:
            TimeoutError: with their output; the processes are killed.
        """
        until = time.monotonic() + timeout
        while None in (codes := self.codes()):
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"{codes} after {timeout} s:\n{self.out()}\n{self.err()}")
            time.sleep(0.01)
        return [code for code in codes if code is not None]

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            self.send(signal.SIGKILL, self.pids.index(pid))

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to one rank, if it is running."""
        if self.codes()[rank] is None:
            os.kill(self.pids[rank], number)

    def out(self, rank: int | None = None) -> str:
        """Return the stdout of one rank, or of all."""
        return "".join(out.read_text() for out, _ in (self.logs if rank is None else [self.logs[rank]]))

    def err(self, rank: int | None = None) -> str:
        """Return the stderr of one rank, or of all."""
        return "".join(err.read_text() for _, err in (self.logs if rank is None else [self.logs[rank]]))

    def until(self, happened: Callable[[], bool], timeout: float = 120) -> None:
        """Poll every few milliseconds until a condition holds; fail if the run has ended or the time is up."""
        until, asked = time.monotonic() + timeout, time.monotonic()
        while not happened():
            time.sleep(0.005)
            if time.monotonic() - asked > 0.5:
                asked = time.monotonic()
                assert None in self.codes(), f"the run ended before the condition held:\n{self.out()}\n{self.err()}"
                assert time.monotonic() < until, f"timed out after {timeout} s:\n{self.out()}\n{self.err()}"

    def until_step(self, step: int) -> None:
        """Wait until the metrics reach a step."""
        self.until(lambda: any(record["step"] >= step for record in read_metrics(self.folder / "metrics.jsonl")))


class Server:
    """Client of tests/rank_server.py, which forks processes that have imported PyTorch already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command, pipe = [sys.executable, str(HERE / "rank_server.py")], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | ENVIRONMENT, text=True)
        self._runs = 0

    def ask(self, request: dict[str, Any]) -> list[Any]:
        """Send one request and return its answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: list[Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self, output_dir: Path, *flags: str | Path, ranks: int = 2, faults: Sequence[Sequence[Any] | None] = ()
    ) -> Run:
        """Start a run of ``ranks`` processes; ``faults[rank]`` is the name of a fault and its arguments."""
        argv = map(str, [*SMALL, "--output-dir", output_dir, *flags])
        return self._launch([PRETRAIN, *argv], environments(ranks), output_dir, self.folder, faults)

    def launch(self, *words: object, env: dict[str, str] | None = None) -> Run:
        """Start ``python WORDS`` in a separate process and return without waiting for it."""
        return self._launch([*map(str, words)], [env or {}], self.folder, self.folder, ())

    def python(self, *words: object, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``python WORDS`` in a separate process until it ends."""
        run = self._launch([*map(str, words)], [{}], self.folder, cwd or self.folder, ())
        (code,) = run.wait(timeout)
        return subprocess.CompletedProcess(words, code, run.out(), run.err())

    def two_ranks(self, script: str, *words: object, timeout: float) -> None:
        """Run a script of this folder on two ranks with the arguments ``words``; both must succeed."""
        run = self._launch([str(HERE / script), *map(str, words)], environments(2), self.folder, self.folder, ())
        assert run.wait(timeout) == [0, 0], run.err()

    def _launch(
        self,
        words: list[str],
        told: list[dict[str, str]],
        folder: Path,
        cwd: Path,
        faults: Sequence[Sequence[Any] | None],
    ) -> Run:
        """Start one process per element of ``told``, its additional environment variables."""
        self._runs += 1
        names = [f"{self._runs}-{rank}" for rank in range(len(told))]
        logs = [(self.folder / f"{name}.out", self.folder / f"{name}.err") for name in names]
        requests = []
        for rank, (environment, (out, err)) in enumerate(zip(told, logs, strict=True)):
            out.touch()
            err.touch()
            fault = list(faults[rank] or []) if rank < len(faults) else []
            where = {"cwd": str(cwd), "out": str(out), "err": str(err)}
            requests.append({"words": words, "env": environment, "fault": fault, **where})
        return Run(self, self.ask({"start": requests}), logs, folder)

    def close(self) -> None:
        """End the server and every running rank."""
        self._process.stdin.close()
        self._process.wait(timeout=120)
        self._process.stdout.close()


@contextmanager
def rank_server(folder: Path) -> Iterator[Server]:
    """Provide a server, and end it with all its processes."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()


def state_in(output_dir: Path) -> dict[str, Tensor]:
    """Return the trained state in ``checkpoint.pth``, by path."""
    from tiny_run import tensors_of

    content = torch.load(output_dir / "checkpoint.pth", weights_only=True)
    learnt = ("student", "teacher", "optimizer", "dino_loss", "skipped_steps", "skipped_in_a_row", "step")
    return tensors_of({key: content[key] for key in learnt})
