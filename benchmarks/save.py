"""Cost of reliability: pause of the training per save, duration of a save, and overhead per step.

    python benchmarks/save.py [--arch xcit_small_12_p16] [--out-dim 65536]

The state is that of a run after one optimizer step (student, teacher, both moments of AdamW). The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from against import timed  # noqa: E402
from step import OurStep, Row, Settings, draw_crops  # noqa: E402
from torch.multiprocessing.spawn import spawn  # noqa: E402

from dino_xcit.checkpoint.folder import CheckpointFolder, why_damaged  # noqa: E402
from dino_xcit.checkpoint.saver import Saver, on_cpu  # noqa: E402
from dino_xcit.checkpoint.state import Run, content_of  # noqa: E402
from dino_xcit.health import StopFlags  # noqa: E402
from dino_xcit.runtime import atomic, distributed  # noqa: E402


def work(seconds: float) -> float:
    """Multiply matrices in this thread for about ``seconds``; return the products per second."""
    a = torch.randn(256, 256)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ a
        count += 1
    return count / (time.perf_counter() - began)


def measure_saving(settings: Settings, folder: Path) -> dict[str, float]:
    """Return the seconds of each part of a save."""
    step = OurStep(settings, Row("ours-fp32", "ours, fp32", "ours", "fp32"))
    step(draw_crops(settings, 0))  # creates the moments of the optimizer
    content = content_of(step.state, Run(step.config, 1000))
    on_cpu(content)  # warm-up: the first copy also allocates its memory
    copy, copying, _ = timed(lambda: on_cpu(content))
    checkpoints = CheckpointFolder(folder, keep_last=2)
    manifest, writing, _ = timed(partial(checkpoints.write, copy))
    file = folder / "checkpoints" / manifest.name
    _, hashing, _ = timed(lambda: atomic.digest_of(file))
    newest, finding, _ = timed(lambda: not why_damaged(file, manifest) and checkpoints.newest()[0])
    if not newest:
        raise SystemExit("the written checkpoint is damaged")
    del copy
    alone = work(2.0)
    saver = Saver(checkpoints, max_failures=1)
    content["step"] = 2
    _, held_up, _ = timed(lambda: saver.save(content))
    beside = work(0.7 * writing)
    saver.ensure(2, lambda: content)
    return {
        "checkpoint_MB": manifest.size / 1e6,
        "copy_s": copying,
        "training_held_up_s": held_up,
        "write_flush_verify_s": writing,
        "sha256_s": hashing,
        "find_newest_s": finding,
        "work_beside_a_save": beside / alone,
    }


def exchange(rank: int, folder: str) -> None:
    """Measure the all-reduce of the stop flags in one of two gloo processes, in microseconds per step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    flags = StopFlags(torch.device("cpu"), 60)
    times = [timed(lambda: flags.exchange(stop=0, diverged=0))[1] for _ in range(2200)]
    if rank == 0:
        Path(folder, "exchange.json").write_text(json.dumps(1e6 * median(times[200:])))
    distributed.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="xcit_small_12_p16")
    parser.add_argument("--out-dim", type=int, default=65536)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    given = parser.parse_args()
    device = distributed.choose_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(given.arch, 2, given.out_dim, 0, global_size=64, device=device.type)  # type: ignore[arg-type]
        figures = measure_saving(settings, Path(folder))
        spawn(exchange, args=(folder,), nprocs=2)
        figures["agreement_of_two_processes_us"] = json.loads(Path(folder, "exchange.json").read_text())
    for name, value in figures.items():
        print(f"{name:32} {value:10.3f}")
    where = {"arch": given.arch, "out_dim": given.out_dim, "device": device.type, "torch": torch.__version__}
    print(json.dumps(where | figures))


if __name__ == "__main__":
    main()
