"""One process of run_retrieval.py over two, started by test_run_retrieval.py with the flags in ``OUT/words.json``.

What it says goes to ``OUT/said-RANK``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import run_retrieval

if __name__ == "__main__":
    out = Path(sys.argv[1])
    sys.argv = ["run_retrieval.py", *json.loads((out / "words.json").read_text())]
    with open(out / f"said-{os.environ['RANK']}", "w") as said, contextlib.redirect_stdout(said):
        run_retrieval.command()
