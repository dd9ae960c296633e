"""How much memory a process has, and had at most; bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def _status(name: str, pid: int | str = "self") -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # no Linux, or the process is gone
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def peak_memory() -> int:
    """The most that this process has had resident, from its start."""
    # getrusage's figure comes second: on Linux a process begins with that of the one that started it.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """What this process has resident now; 0 where the system does not say."""
    return _status("VmRSS") or 0


def memory_of_helpers(pid: int) -> int:
    """What the processes that a process has started have resident now, all together: the compiler's helpers."""
    total, todo = 0, [pid]
    while todo:
        for listed in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            try:
                children = [int(child) for child in listed.read_text().split()]
            except OSError:
                continue
            total += sum(_status("VmRSS", child) or 0 for child in children)
            todo += children
    return total
