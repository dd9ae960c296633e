"""A function of every image of a source, in several processes, with what it returns in the images' order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.loader import choose_workers
from dino_xcit.data.socket_folder import share_socket_folder
from dino_xcit.data.source import Source
from dino_xcit.data.worker import set_up_worker
from dino_xcit.errors import InputError

Result = TypeVar("Result")

AT_ONCE = 4
"""Images a piece of work: handing over a piece costs some 0.2 ms, an image of a few hundred pixels some 5 ms."""
_PIECES_A_WORKER = 3


class _Pieces(Dataset[list[Result]]):
    """What the processes work off: piece ``n`` to its results."""

    def __init__(self, source: Source, indices: range, work: Callable[[Source, int], Result]) -> None:
        self.source, self.indices, self.work = source, indices, work

    def __len__(self) -> int:
        return -(-len(self.indices) // AT_ONCE)

    def __getitem__(self, piece: int) -> list[Result]:
        return [self.work(self.source, index) for index in self.indices[piece * AT_ONCE : (piece + 1) * AT_ONCE]]


def each_image(
    source: Source, indices: range, work: Callable[[Source, int], Result], workers: int
) -> Generator[Result, None, None]:
    """``work(source, index)`` for each index, in order, the images read in that order too.

    At most 12 results a process exist at a time, however slowly they are taken. Close the iterator where it is not
    taken to its end. The processes end with this one, however it ends.

    Args:
        source: where the images are.
        indices: which images.
        work: a function of a module, or a ``functools.partial`` of one; its results must be picklable.
        workers: processes; 0 or 1: this one.

    Raises:
        InputError: a process was killed, or more are wanted than anybody means.
    """
    choose_workers(workers, 1, "workers")
    if workers <= 1 or len(indices) <= AT_ONCE:
        yield from (work(source, index) for index in indices)
        return
    share_socket_folder()
    pieces = _Pieces(source, indices, work)
    loader: DataLoader[list[Result]] = DataLoader(
        pieces,
        batch_size=None,
        num_workers=min(workers, len(pieces)),
        prefetch_factor=_PIECES_A_WORKER,
        # Starts at once, and shares the million names of a source with its children.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        worker_init_fn=partial(set_up_worker, os.getpid()),
    )
    done = 0
    try:
        for results in loader:
            done += len(results)
            yield from results
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process was killed while it read {source.name(indices[done])} or an image soon after it (the system "
            "does so where memory runs out): run the same command with fewer --workers"
        ) from error
