"""``python -m dino_xcit.data check SRC``."""

from __future__ import annotations

import sys

from dino_xcit.data import check
from dino_xcit.errors import InputError, run_main


def main() -> None:
    """The command."""
    if sys.argv[1:2] != ["check"]:
        raise InputError(f"expected: {check.USAGE}")
    sys.exit(check.main(sys.argv[2:]))


if __name__ == "__main__":
    run_main(main)
