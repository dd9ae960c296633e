"""Checks and measurements on one GPU: correctness, profile, training step, loader.

    benchmarks/gpu.sh OUT quick|full [REFERENCE]

``quick`` takes less than 150 seconds, ``full`` less than 7 minutes. ``REFERENCE`` is a folder with checkouts of
facebookresearch/dino as ``dino/`` and of facebookresearch/xcit as ``xcit/``. Each row is printed and written to
OUT/gpu.jsonl when it is done. If a package is missing, its rows are skipped and name it. A failed row does not stop the
others. OUT/profile.txt has the 30 kernels that take most of the time. The last line is one JSON object: commit, machine
and all rows.

With ``--device cpu`` tiny networks run on the CPU, which tests this script; the figures are meaningless.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from against import commit_of  # noqa: E402

from dino_xcit.errors import InputError, run_main  # noqa: E402

SECONDS = {"quick": 150, "full": 420}
SPARE = 5
"""Seconds reserved for the summary."""


@dataclass(frozen=True)
class Context:
    """Output folder, reference checkouts and device of a run."""

    out: Path
    reference: str
    device: Any

    @property
    def settings(self) -> Any:
        """Settings of benchmarks/step.py."""
        import step

        return replace(step.QUICK, device="cpu") if self.device == "cpu" else step.Settings(batch=64, device="cuda")

    @property
    def small(self) -> Any:
        """Settings with a network small enough for a CPU."""
        import step

        return replace(step.QUICK, device=self.device)

    def own_step(self, settings: Any, key: str = "ours-bf16", **changes: Any) -> Any:
        """Build a step of this project."""
        import step

        (row,) = (row for row in step.rows_for(self.device) if row.key == key)
        return step.OurStep(settings, row, **changes)

    def wait(self) -> None:
        """Wait for the device."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


Row = Callable[[Context], dict[str, Any]]

# ---- correctness


def same_gradients(context: Context) -> dict[str, Any]:
    """Compare loss and gradients of ours-fp32 and ours-bf16 with a plain float64 step of timm's network."""
    import step

    rows = [row for row in step.rows_for(context.device) if row.key in ("ours-fp32", "ours-bf16")]
    found = step.check(context.small, rows, context.reference)
    return {"passed": all(error <= limit for _, error, limit in found)} | {name: error for name, error, _ in found}


def same_as_cpu(context: Context) -> dict[str, Any]:
    """Losses of three fp32 steps on the device and on the CPU."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    losses = []
    for device in (context.device, "cpu"):
        settings = replace(context.small, device=device)
        own, crops = context.own_step(settings, "ours-fp32"), crops_on(device, settings)
        losses.append([float(own(crops)) for _ in range(3)])
    error = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    return {"passed": error < 1e-4, "error": error, "loss": losses[0]}


def same_augmentation(context: Context) -> dict[str, Any]:
    """Compare, bit by bit, views whose colours, blur and solarisation are computed on the device and in the loader."""
    import numpy as np
    import torch

    from dino_xcit.augment import MultiCropAugmentation, ViewMaker, group_by_size
    from dino_xcit.augment.parameters import device_plan
    from dino_xcit.kernels.photometric import finish_views

    augmentation, maker, rng = MultiCropAugmentation(solarize=0.5), ViewMaker(), np.random.default_rng(5)
    different = views = 0
    for index in range(20):
        maker.load(rng.integers(0, 256, (260, 300, 4), dtype=np.uint8) // (1 + index % 3))
        rows = augmentation.draw_rows(300, 260, 0, 0, index)
        for group in group_by_size([kind.size for kind in augmentation.views]):
            side = augmentation.views[group[0]].size
            given, expected = (np.empty((len(group), 3, side, side), dtype=np.uint8) for _ in range(2))
            for row, unfinished, view in zip(rows[group], given, expected, strict=True):
                maker.make(row, unfinished, photometric=False)
                maker.make(row, view)
            finished = torch.from_numpy(given).to(context.device)
            finish_views(finished, torch.from_numpy(device_plan(rows[group])).to(context.device))
            different += int((finished.cpu().numpy() != expected).any(axis=(1, 2, 3)).sum())
            views += len(group)
    return {"passed": different == 0, "views": views, "different": different}


def no_waits(context: Context) -> dict[str, Any]:
    """Train 12 steps from the loader; from the third on, PyTorch raises an error if the host waits for the device."""
    import torch

    config, loader, own = loading(context, context.small, "sample:fashion-mnist", workers=2)
    completed = 0
    batches = loader.steps(1)
    try:
        for number in range(12):
            if context.device == "cuda" and number == 2:  # two steps create and copy what stays on the device
                torch.cuda.set_sync_debug_mode("error")
            own.step(next(batches))
            completed += 1
    finally:
        if context.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        loader.close()
    return {"passed": completed == 12, "steps": completed, "arch": config.arch}


def deterministic(context: Context) -> dict[str, Any]:
    """Compare two runs of three steps with --deterministic.

    For a ViT, PyTorch may lack a deterministic kernel for bicubic interpolation.
    """
    import torch

    torch.use_deterministic_algorithms(True)
    equal: dict[str, Any] = {}
    try:
        for arch in ("xcit_tiny_12_p16", "vit_tiny_12_p16"):
            settings = replace(context.small, arch=arch)
            crops, losses = crops_on(context.device, settings), []
            try:
                for _ in range(2):
                    own = context.own_step(settings)
                    losses.append([float(own(crops)) for _ in range(3)])
                equal[arch] = losses[0] == losses[1]
            except RuntimeError as error:
                if "deterministic implementation" not in str(error):
                    raise
                equal[arch] = str(error).split(".")[0]
    finally:
        torch.use_deterministic_algorithms(False)
    return {"passed": equal["xcit_tiny_12_p16"] is True and equal["vit_tiny_12_p16"] is not False} | equal


# ---- speed


def crops_on(device: str, settings: Any) -> list[Any]:
    """Return the crops of one step on the device."""
    import step

    return [crop.to(device) for crop in step.draw_crops(settings, 0)]


def timed(context: Context, run: Callable[[], Any], steps: int, warm_up: int = 3) -> float:
    """Return seconds per call."""
    steps, warm_up = (2, 1) if context.device == "cpu" else (steps, warm_up)
    for _ in range(warm_up):
        run()
    context.wait()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    context.wait()
    return (time.perf_counter() - began) / steps


def speed(key: str, arch: str = "xcit_small_12_p16", largest: bool = False, kernels: str = "eager") -> Row:
    """Return a row that measures images/s and peak memory of a row of step.py with crops on the device.

    Args:
        largest: double the batch until it does not fit, and measure the largest that fits.
    """

    def measure(context: Context) -> dict[str, Any]:
        import step
        import torch

        if key == "reference" and not context.reference:
            return {"skipped": "no REFERENCE given"}
        (row,) = (row for row in step.rows_for(context.device) if row.key == key)
        on_gpu = context.device == "cuda"
        settings = replace(context.settings, arch=arch) if on_gpu else context.settings

        def seconds_at(batch: int) -> float:
            own = replace(settings, batch=batch)
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            run, batches = step.build(row, own, context.reference)
            if kernels != "eager":
                run = context.own_step(own, key, kernels=kernels)
            crops = [crop.to(context.device) for crop in batches[0]]
            return timed(context, lambda: run(crops), 10)

        found: dict[str, Any] = {"failed": "out of memory"}
        batch = settings.batch
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            while True:
                seconds = seconds_at(batch)
                peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
                found = {"batch": batch, "img_per_s": batch / seconds, "ms": 1e3 * seconds, "GB": peak}
                if not (largest and on_gpu):
                    break
                batch *= 2
        return found

    return measure


def profile(context: Context) -> dict[str, Any]:
    """Kernels of one step; the 30 that take most of the time go to OUT/profile.txt."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    own, crops = context.own_step(context.settings), crops_on(context.device, context.settings)
    timed(context, lambda: own(crops), 1)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (context.device == "cuda")
    with profiler(activities=activities) as recorded:
        own(crops)
        context.wait()
    averages = recorded.key_averages()
    order = "self_cuda_time_total" if context.device == "cuda" else "self_cpu_time_total"
    (context.out / "profile.txt").write_text(averages.table(sort_by=order, row_limit=30))
    kernels = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    busy = sum(event.device_time for event in kernels) / 1e3
    return {"kernels": len(kernels), "device_ms": busy, "file": str(context.out / "profile.txt")}


class _Loaded:
    """A step that takes the batches of a loader."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def step(self, batches: Sequence[Any]) -> Any:
        from dino_xcit.train import train_step

        own = self._own
        return train_step(own.state, batches, own.schedules, own.config)


def loading(context: Context, settings: Any, url: str, workers: int = -1) -> tuple[Any, Any, _Loaded]:
    """Return the configuration, a loader that does not end, and a step."""
    from dino_xcit.data import open_source
    from dino_xcit.data.loader import StepSampler, build_loader
    from dino_xcit.data.workers import choose_workers

    own = context.own_step(settings)
    config, device = own.config, own.state.skipped_steps.device
    source = open_source(url, "train")
    sampler = StepSampler(len(source), config.batch_size_per_gpu)
    sampler.stop_step = 100_000
    workers = choose_workers(workers, 1, on_gpu=context.device == "cuda")
    return config, build_loader(source, config.augmentation(), sampler, 0, workers, device), _Loaded(own)


def photos(out: Path) -> Path:
    """Write 512 JPEGs of 500 x 375 pixels with structure at several scales."""
    import numpy as np
    from PIL import Image

    folder, rng = out / "photos", np.random.default_rng(0)
    if not folder.is_dir():
        unfinished = out / "photos-unfinished"
        unfinished.mkdir(exist_ok=True)
        for number in range(512):
            coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((500, 375))
            fine = rng.normal(0, 8, (375, 500, 1))
            pixels = np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(unfinished / f"{number:03d}.jpg", quality=90)
        unfinished.rename(folder)
    return folder


def with_loader(trains: bool) -> Row:
    """Return a row that measures images/s of the loader alone, or together with the steps."""

    def measure(context: Context) -> dict[str, Any]:
        import simplejpeg  # noqa: F401  # if it is missing, the row says so

        config, loader, own = loading(context, context.settings, str(photos(context.out)))
        batches = loader.steps(1)
        run = (lambda: own.step(next(batches))) if trains else (lambda: next(batches))
        try:
            seconds = timed(context, run, 15, warm_up=6)
        finally:
            loader.close()
        return {"img_per_s": config.batch_size_per_gpu / seconds, "cores": len(os.sched_getaffinity(0))}

    return measure


# ---- which rows, in which process

P8 = "xcit_small_12_p8"


def speeds(name: str, at_64: bool = True, **row: Any) -> tuple[str, dict[str, Row]]:
    """Return a group of the full mode: batch 64, unless the quick mode has it, and the largest batch."""
    largest = {f"{name}, largest batch": speed(**row, largest=True)}
    return "full", ({name: speed(**row)} if at_64 else {}) | largest


GROUPS: tuple[tuple[str, dict[str, Row]], ...] = (
    ("quick", {"same gradients as timm": same_gradients, "same losses as the CPU": same_as_cpu}),
    ("quick", {"S12/16 ours-bf16": speed("ours-bf16"), "profile": profile}),
    ("quick", {"same augmentation": same_augmentation, "no waits": no_waits, "deterministic": deterministic}),
    ("quick", {"S12/16 reference": speed("reference")}),
    ("quick", {"S12/16 timm-bf16": speed("timm-bf16")}),
    ("quick", {"loader alone": with_loader(False), "loader and step": with_loader(True)}),
    speeds("S12/8 ours-bf16", key="ours-bf16", arch=P8),
    speeds("S12/8 reference", key="reference", arch=P8),
    speeds("S12/16 ours-bf16", at_64=False, key="ours-bf16"),
    speeds("S12/16 reference", at_64=False, key="reference"),
    speeds("S12/8 timm-bf16", key="timm-bf16", arch=P8),
    speeds("S12/16 timm-bf16", at_64=False, key="timm-bf16"),
    speeds("S12/16 ours-bf16, fused", key="ours-bf16", kernels="fused"),
    speeds("S12/8 ours-bf16, fused", key="ours-bf16", kernels="fused", arch=P8),
    speeds("S12/16 ours-bf16, compiled", key="ours-bf16", kernels="compile"),
    speeds("S12/8 ours-bf16, compiled", key="ours-bf16", kernels="compile", arch=P8),
)
"""Rows that share a process, the most important first."""


def work(context: Context, number: int) -> None:
    """Run the rows of a group; print a JSON line for each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output
    if context.device == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # PyTorch reads it once, before the first product
        import torch

        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    for name, row in GROUPS[number][1].items():
        try:
            found = row(context)
        except ModuleNotFoundError as error:
            found = {"skipped": f"package {error.name} is not installed"}
        except Exception as error:  # the other rows go on
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps({"row": name} | found), file=answers, flush=True)


def rows_of(context: Context, number: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Run a group in a process of its own that ends at the deadline; yield its rows."""
    names = list(GROUPS[number][1])
    words = [str(context.out), "quick", context.reference, "--device", context.device, "--group", str(number)]
    with (context.out / f"group-{number}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), os.killpg, (process.pid, 9))
        timer.start()
        assert process.stdout
        try:
            for line in process.stdout:
                found = json.loads(line)
                names.remove(found["row"])
                yield found
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # interrupted
                os.killpg(process.pid, 9)
                process.wait()
    why = "no time left" if time.monotonic() >= deadline else f"the process ended with code {code}: {log.name}"
    yield from ({"row": name, "failed": why} for name in names)


def machine() -> dict[str, Any]:
    """Return the versions of Python, PyTorch and CUDA, and the GPU's name and memory."""
    import torch

    about: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        about |= {"gpu": torch.cuda.get_device_name(), "GB": total / 1e9, "free_GB": free / 1e9}
        about["capability"] = torch.cuda.get_device_capability()
    return about


def shown(values: dict[str, Any]) -> str:
    """Format the values of a row."""
    numbers = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in numbers.items() if key != "row")


def main() -> None:
    """Run all groups of the mode within its time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("mode", choices=SECONDS)
    parser.add_argument("reference", nargs="?", default="")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--group", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    began = time.monotonic()
    reference = str(Path(given.reference).resolve()) if given.reference else ""
    context = Context(given.out.resolve(), reference, given.device)
    if given.group is not None:
        return work(context, given.group)
    about = machine()
    if given.device == "cuda" and "gpu" not in about:
        raise InputError("PyTorch finds no GPU: run this on a machine that has one (--device cpu tests this script)")
    if given.out.exists() and not given.out.is_dir():
        raise InputError(f"OUT is {given.out}, which is a file: give a folder")
    given.out.mkdir(parents=True, exist_ok=True)
    print(shown(about), flush=True)
    rows: dict[str, Any] = {}
    with (context.out / "gpu.jsonl").open("w") as file:
        for number, (mode, _) in enumerate(GROUPS):
            if mode == "full" and given.mode == "quick":
                continue
            for found in rows_of(context, number, began + SECONDS[given.mode] - SPARE):
                print(f"[{time.monotonic() - began:5.0f} s] {found['row']}: {shown(found)}", flush=True)
                print(json.dumps(found), file=file, flush=True)
                rows[found.pop("row")] = found
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"commit": commit_of(ROOT), "machine": about, "seconds": seconds, "rows": rows}))
    return None


if __name__ == "__main__":
    run_main(main)
