"""One of two ranks with separate or shared output directories of the same name; started by test_shared_folder.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from tiny_run import CPU, tiny_config

from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.checkpoint.resume import find_stored, output_folder
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed


def main() -> None:
    """Begin a run like run_pretrain.py, twice for each kind of directory: first without, then with a checkpoint."""
    distributed.start(CPU)
    rank, out = distributed.rank(), Path(sys.argv[1])
    said: dict[str, list[str]] = {}
    for name, place in (("apart", out / str(rank)), ("together", out)):
        place.mkdir(exist_ok=True)
        os.chdir(place)  # emulates machines with separate disks or a shared one
        said[name] = []
        for _ in range(2):
            heard = io.StringIO()
            try:
                with contextlib.redirect_stdout(heard), output_folder(Path("run")):
                    find_stored(tiny_config(output_dir="run"), CheckpointFolder(Path("run")))
            except InputError as error:
                heard.write(str(error))
            said[name].append(heard.getvalue())
            if rank == 0:
                Path("run/checkpoint.pth").write_bytes(b"no checkpoint, but there")
            distributed.barrier()
        if rank == 0:
            said[f"{name} files"] = sorted(os.listdir("run"))
    (out / f"said-{rank}.json").write_text(json.dumps(said))
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
