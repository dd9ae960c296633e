"""Run Python programs in forked processes, as ``python WORDS`` would, without importing PyTorch again for each.

Each line of JSON on stdin is a request. The answer is a line on stdout:

- ``{"start": [{"words": [...], "env": {...}, "cwd": ..., "out": ..., "err": ..., "fault": [name, ...]}, ...]}`` forks a
  process for each entry. The process calls ``faults.name(...)`` and then runs ``words``, the arguments of ``python``: a
  script, ``-m MODULE`` or ``-c CODE``, each with its own arguments. The answer lists the process IDs.
- ``{"poll": [pid, ...]}``: the answer lists the exit codes, null for running processes, and the negative signal number
  for killed ones.
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
import traceback
from pathlib import Path
from typing import Any

import faults

IMPORTED = ("run_pretrain", "run_linear", "run_extract", "matplotlib.pyplot", "torch._dynamo")
"""Modules that take seconds to import. Constructing an optimizer imports torch._dynamo."""


def warm_up() -> None:
    """Load modules, compiled augmentation code and fonts once, so that forked processes inherit them."""
    for module in IMPORTED:
        importlib.import_module(module)
    from tiny_run import tiny_config

    tiny_config().augmentation().compile()


def run_as_main(words: list[str], cwd: str, out: str, err: str) -> int:
    """Redirect the standard streams, run the program in this process and return the exit code of Python."""
    os.chdir(cwd)
    for path, descriptor in (("/dev/null", 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        run_words(words)
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_words(words: list[str]) -> None:
    """Run a script, ``-m MODULE`` or ``-c CODE``, each with its arguments."""
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def start(request: dict[str, Any]) -> int:
    """Fork one process and return its process ID."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    os.environ.update(request["env"])
    name, *arguments = request["fault"] or ["none"]
    getattr(faults, name)(*arguments)
    code = run_as_main(request["words"], request["cwd"], request["out"], request["err"])
    for thread in threading.enumerate():  # as at interpreter exit: saver threads finish their files
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    warm_up()
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
    os._exit(0)  # skips interpreter shutdown, which takes seconds


if __name__ == "__main__":
    main()
