"""How the loops of this package are compiled, and where the result is kept.

Numba keeps compiled code beside the file that it is of, else in a cache folder of the user's (NUMBA_CACHE_DIR names
another), and knows of changes in that file alone: so no compiled function calls one of another file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import NullCache

_functions: list[Any] = []


def compiled(function: Callable[..., Any]) -> Any:
    """A function of numbers and arrays, compiled when it is first called. Division by zero is not looked for in it."""
    made: Any
    try:
        made = njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder can be written: a container with a stranger's user id
        made = njit(nogil=True, error_model="numpy")(function)
    _functions.append(made)
    return made


def call_first(function: Callable[[], object]) -> None:
    """Call what calls compiled functions, for the first time in a process.

    What was kept may be damaged, and the disk may be full: then it is compiled anew, and at last kept nowhere.
    """
    for remedy in (lambda made: made._cache.flush(), lambda made: setattr(made, "_cache", NullCache())):
        try:
            function()
        except Exception:
            for made in _functions:
                try:
                    remedy(made)
                except OSError:
                    made._cache = NullCache()
        else:
            return
    function()
