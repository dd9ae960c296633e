"""Runs run_pretrain.py many times without importing PyTorch, or taking it apart, anew each time.

A line of JSON on stdin, ``{"argv": [...], "cwd": ..., "out": ..., "err": ...}``, becomes a forked process that runs
the script as ``__main__`` with those arguments and with files as its output; a line with its exit code answers.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

SCRIPT = str(Path(__file__).parent.parent / "run_pretrain.py")


def run_as_main(argv: list[str], cwd: str, out: str, err: str) -> int:
    """Redirect this process, run the script in it, and return the exit code that Python would end with."""
    os.chdir(cwd)
    for path, descriptor in (("/dev/null", 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = [SCRIPT, *argv]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve until stdin ends."""
    runpy.run_path(SCRIPT, run_name="imported")  # the imports alone
    importlib.import_module("matplotlib.pyplot")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = run_as_main(**json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


if __name__ == "__main__":
    main()
