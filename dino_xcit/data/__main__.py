"""``python -m dino_xcit.data check SRC``, ``pack SRC DST`` and ``scenes DST``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dino_xcit.data import check, pack, scenes
from dino_xcit.errors import InputError, run_main

USAGE = "python -m dino_xcit.data check SRC, pack SRC DST, or scenes DST (each has --help)"
COMMANDS = {"check": check.main, "pack": pack.main, "scenes": scenes.main}


def main(argv: Sequence[str]) -> int:
    """Run a command and return the exit code.

    Raises:
        InputError: The command line or the data are invalid.
    """
    if list(argv[:1]) in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        found = f"found {argv[0]!r}" if argv else "found no command"
        raise InputError(f"{found}, expected: {USAGE}")
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_main(lambda: sys.exit(main(sys.argv[1:])))
