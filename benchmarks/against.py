"""Helpers of the benchmarks: comparison with an earlier commit (``--against DIR``) and with facebookresearch/dino.

``--against DIR`` alternates between the scripts of this commit and of an earlier one, with the same arguments; each
imports the code of its own commit. Ratios are figures of this commit divided by those of the earlier one in the same
round.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from dino_xcit.errors import InputError, RunStopped

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :func:`compare_commits`."""
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with DIR, an earlier commit's checkout")
    parser.add_argument("--against-rounds", type=int, default=3, metavar="N", help="runs of each of the two")


def compare_commits(scripts: Sequence[str], figures: Mapping[str, str], given: argparse.Namespace) -> None:
    """Alternate between the scripts of two commits; print a table and, as the last line, a JSON object.

    Args:
        scripts: name of the script in benchmarks/, then its names in earlier commits.
        figures: keys of the scripts' last line, each with the better direction: "more" or "less".
        given: the flags of :func:`add_arguments`.

    Raises:
        InputError: DIR has no such script, or the number of rounds is below 1.
        RunStopped: a run failed, or the two have no figure in common.
    """
    there = [name for name in scripts if (given.against / "benchmarks" / name).is_file()]
    if not there:
        raise InputError(f"--against {given.against} has no benchmarks/{scripts[0]}: git worktree add DIR COMMIT")
    if given.against_rounds < 1:
        raise InputError(f"--against-rounds is {given.against_rounds}, expected at least 1")
    exit_on_sigterm()
    own_flags = argparse.ArgumentParser(add_help=False)
    add_arguments(own_flags)
    words = own_flags.parse_known_args()[1]
    files = [ROOT / "benchmarks" / scripts[0], given.against.resolve() / "benchmarks" / there[0]]
    commits = [commit_of(file.parent) for file in files]
    rounds = []
    for number in range(given.against_rounds):
        print(f"round {number + 1} of {given.against_rounds}", flush=True)
        rounds.append([_run(file, words) for file in files])
    out: dict[str, Any] = {}
    print(f"{'median (min - max)':24} {commits[0]:^32} {commits[1]:^32} {'ratio':^24} better")
    for name, better in figures.items():
        pairs = [(this[name], that[name]) for this, that in rounds if this.get(name) and that.get(name)]
        if pairs:
            ratios = [this / that for this, that in pairs]
            this, that = zip(*pairs, strict=True)
            print(f"{name:24} {spread(this):^32} {spread(that):^32} {spread(ratios):^24} {better}")
            out[name] = {"ratio": median(ratios), "rounds": ratios, "this": median(this), "that": median(that)}
            out[name]["better"] = better
    if not out:
        raise RunStopped(1, "error: the two commits have no figure in common: run both with fewer arguments")
    print(json.dumps({"commits": commits, "arguments": words, "against": out}))


def _run(file: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run a script in the current directory and return the JSON object in its last line."""
    command = [sys.executable, str(file), *words]
    environment = os.environ | {"PYTHONPATH": str(file.parent.parent)}  # precedes an installed version
    with process_group() as group:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, process_group=group, check=False
        )
    if done.returncode:
        raise RunStopped(max(1, done.returncode), f"error: {file} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def pretrain_once(folder: Path, flags: str) -> Path:
    """Pretrain on one thread in ``folder``, unless it has a finished run with the same flags; return the folder."""
    done = folder / "done"
    if not done.exists() or done.read_text() != flags:
        folder.mkdir(parents=True, exist_ok=True)
        more = ["--num-workers=0", "--no-report-pictures", "--quiet", "--resume=never", f"--output-dir={folder}"]
        command = [sys.executable, str(ROOT / "run_pretrain.py"), *shlex.split(flags), *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, cwd=folder.parent, check=True)
        done.write_text(flags)
    return folder


def spread(values: Sequence[float]) -> str:
    """Format as ``median (min - max)`` with four digits."""
    return f"{median(values):.4g} ({min(values):.4g} - {max(values):.4g})"


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with a plus if it has changes; the folder if it is not a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or str(folder)


def import_peer(folder: Path, name: str) -> Any:
    """Import a module of the reference, such as ``import_peer(DIR, "dino/main_dino.py")`` or ``"xcit/xcit.py"``.

    Stubs torch._six, which PyTorch has removed, and a download by main_dino.py.

    Raises:
        InputError: the checkout is missing.
    """
    import torch

    file = folder / name
    if not file.is_file():
        raise InputError(f"no {file}: --reference needs a folder with checkouts of facebookresearch's dino/ and xcit/")
    six: Any = types.ModuleType("torch._six")
    six.inf = float("inf")
    sys.modules["torch._six"] = six
    torch.hub.list = lambda *_, **__: []  # noqa: TID251
    sys.path.insert(0, str(file.parent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns about old import paths
        module = importlib.import_module(file.stem)
    sys.path.remove(str(file.parent))
    return module


def timed(run: Callable[[], T]) -> tuple[T, float, float]:
    """Call a function; return its result, the wall time and the CPU time of all threads, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    # On Linux getrusage includes the peak of the parent process.
    if sys.platform == "linux":
        return memory_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_status(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmHWM (peak resident memory), VmRSS (current) or VmData."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """Create a process group for ``Popen(process_group=...)``, which is killed at the end of the block.

    A shell in the group kills it when this process dies, even by SIGKILL, because the shell's stdin closes.
    """
    watcher = subprocess.Popen(["sh", "-c", "read -r _; kill -KILL 0"], stdin=subprocess.PIPE, process_group=0)
    with watcher:
        try:
            yield watcher.pid
        finally:
            os.killpg(watcher.pid, signal.SIGKILL)


def in_a_process(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a forked process, whose memory is freed afterwards, and return its result.

    Raises:
        BrokenProcessPool: the process was killed, such as by the out-of-memory killer.
    """
    with ProcessPoolExecutor(1, get_context("fork"), initializer=_exit_with_parent) as pool:
        return pool.submit(work, *arguments).result()


def _exit_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def exit_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit, so that ``with`` and ``finally`` clean up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
