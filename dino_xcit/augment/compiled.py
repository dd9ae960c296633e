"""Compile loops with Numba and cache the result.

Numba caches compiled code beside the source file, or else in a cache folder of the user (NUMBA_CACHE_DIR). It detects
changes in this source file only, so compiled functions must not call compiled functions of other files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import NullCache

_functions: list[Any] = []


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of numbers and arrays on its first call. Division by zero raises no exception in it."""
    made: Any
    try:
        made = njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no writable cache folder, such as in a container with an unknown user id
        made = njit(nogil=True, error_model="numpy")(function)
    _functions.append(made)
    return made


def call_first(function: Callable[[], object]) -> None:
    """Make the first call of compiled functions in a process.

    If it fails, for example because of a damaged cache or a full disk, flush the cache, then disable it.
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
