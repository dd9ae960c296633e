"""A runner as one of several ranks: ``python runner_process.py OUT``, with its module and flags in ``OUT/words.json``.

What it says goes to ``OUT/said-RANK``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    out = Path(sys.argv[1])
    name, *words = json.loads((out / "words.json").read_text())
    sys.argv = [f"{name}.py", *words]
    with open(out / f"said-{os.environ['RANK']}", "w") as said, contextlib.redirect_stdout(said):
        importlib.import_module(name).command()
