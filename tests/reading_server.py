"""Read files in forked processes and measure time and memory, without importing PyTorch again for each file.

Each line of JSON on stdin, ``{"reader": ..., "path": ...}``, starts a forked process. The answer is a line on stdout,
``{"seconds": ..., "megabytes": ..., "error": ..., "sentence": ...}``. ``megabytes`` is the growth of the process's peak
resident memory.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm  # noqa: F401  (imported before forking: load_backbone imports it, which is not to be measured)
import torch

from dino_xcit import safe_load
from dino_xcit.weights import load_backbone

SECONDS = 3
READERS: dict[str, Callable[[Path], object]] = {
    "read": safe_load.read,
    "load_backbone": load_backbone,
    "read_ground_truth": safe_load.read_ground_truth,
    "trusting": lambda path: torch.load(path, weights_only=False),
    "unpickling": lambda path: pickle.loads(path.read_bytes()),
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(reader: str, path: str) -> dict[str, object]:
    error = sentence = None
    before, started = peak(), time.process_time()
    try:
        READERS[reader](Path(path))
    except Exception as caught:
        error, sentence = type(caught).__name__, str(caught)
    taken = {"seconds": time.process_time() - started, "megabytes": (peak() - before) / 1e6}
    return taken | {"error": error, "sentence": sentence}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time, which does not depend on the load of the machine
            signal.alarm(20 * SECONDS)
            os.write(into, json.dumps(measured(**json.loads(line))).encode()[:60_000])
            os._exit(0)
        os.close(into)
        with open(out, "rb") as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended = {"seconds": float(SECONDS), "megabytes": 0.0, "error": f"ended with {code}", "sentence": ""}
        print(answer.decode() if code == 0 else json.dumps(ended), flush=True)
    os._exit(0)  # skips the teardown of PyTorch, which takes seconds


if __name__ == "__main__":
    main()
