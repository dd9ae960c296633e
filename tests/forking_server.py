"""Runs run_pretrain.py many times without importing PyTorch anew each time.

A line of JSON on stdin, ``{"argv": [...], "cwd": ..., "out": ..., "err": ...}``, becomes a forked process that runs
the script as ``__main__`` with those arguments and files as its output, and ends as any Python process does; a line
with its exit code answers.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).parent.parent / "run_pretrain.py")


def become(argv: list[str], cwd: str, out: str, err: str) -> None:
    """Redirect this process and run the script in it; does not catch what the script raises."""
    os.chdir(cwd)
    for path, descriptor in (("/dev/null", 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = [SCRIPT, *argv]
    runpy.run_path(SCRIPT, run_name="__main__")


def main() -> None:
    """Serve until stdin ends."""
    runpy.run_path(SCRIPT, run_name="imported")  # the imports alone
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(**json.loads(line))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()
