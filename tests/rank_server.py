"""Starts the ranks of a run again and again without importing PyTorch anew each time.

A line of JSON on stdin is a request, a line on stdout its answer:

- ``{"start": [{"argv": [...], "env": {...}, "cwd": ..., "out": ..., "err": ..., "fault": [name, ...]}, ...]}`` forks a
  process for each entry that runs run_pretrain.py as ``__main__``, after ``faults.name(...)``; answers their pids;
- ``{"poll": [pid, ...]}`` answers their exit codes, null for those that still run, minus the signal for killed ones.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from typing import Any

import faults
from forking_server import SCRIPT, run_as_main


def start(request: dict[str, Any]) -> int:
    """Fork one rank; its pid."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    os.environ.update(request["env"])
    name, *arguments = request["fault"] or ["none"]
    getattr(faults, name)(*arguments)
    code = run_as_main(request["argv"], request["cwd"], request["out"], request["err"])
    for thread in threading.enumerate():  # as the interpreter does: a saver finishes what it has begun
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    runpy.run_path(SCRIPT, run_name="imported")  # the imports alone
    importlib.import_module("matplotlib.pyplot")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    started: list[int] = []
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: list[Any] = [start(rank) for rank in request["start"]]
            started += answer
        else:
            for pid in [pid for pid in started if pid not in ended]:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = [ended.get(pid) for pid in request["poll"]]
        print(json.dumps(answer), flush=True)
    for pid in started:
        if pid not in ended:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
