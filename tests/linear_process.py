"""One process of a linear probe over two, started by test_linear_choices.py with the flags in ``OUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import run_linear

if __name__ == "__main__":
    sys.argv = ["run_linear.py", *json.loads(Path(f"{sys.argv[1]}.json").read_text())]
    run_linear.command()
