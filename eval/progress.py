"""The progress bar of the evaluators: images a second and the time left."""

from __future__ import annotations

import sys

from tqdm import tqdm

from dino_xcit.console import Lines


def progress_bar(total: int, description: str, shown: bool, done: int = 0) -> tqdm:
    """A bar over images, on stderr; on a terminal it vanishes when it is closed.

    Into a file it writes a line every 15 s, and none for work that is quicker than that.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="img",
        disable=not shown,
        file=sys.stderr if terminal else Lines(sys.stderr),
        leave=False,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 15.0,
        delay=0 if terminal else 15,
        ascii=not terminal,
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} "
        "[{elapsed} < ETA {remaining}, {rate_fmt}{postfix}]",
    )
