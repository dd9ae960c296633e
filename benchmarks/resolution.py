"""Time and memory by resolution: the two paths of XCA, XCiT, timm's XCiT, and a ViT with quadratic attention.

    python benchmarks/resolution.py [--device cpu|cuda] [--threads 1] [--rounds 5] [--batch 1] [--quick] [--out DIR]

First XCA alone: direct and Gram path in turn, with LayerScale, forward only and with the backward pass. The thresholds
of ``choose`` in dino_xcit/models/xca.py are fitted to this table. The run fails if outputs or gradients of the paths
differ. Then whole networks without a classifier. Each configuration runs in a separate process. Memory is the increase
of the peak after the imports and a tiny pass (resident on a CPU, allocated on a GPU), so it includes weights and
gradients. Times are medians after a warm-up pass; passes above a minute run once. On a CPU with one thread, times are
CPU time. Configurations above 20 GB are reported as such.

Writes resolution.json and resolution.png to ``--out`` (benchmarks/). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from against import in_a_process, memory_status, timed  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dino_xcit.errors import InputError, is_out_of_memory, run_main  # noqa: E402
from dino_xcit.models import build_backbone  # noqa: E402
from dino_xcit.models.xca import XCA, choose  # noqa: E402

HEADS = {128: 4, 384: 8, 512: 8}
TOKENS = (196, 400, 576, 784, 1024, 3136, 4096, 16384)
VIT = "vit_small_patch16"
NETWORKS = {"xcit_small_12_p16": 384, "xcit_small_12_p8": 384, "xcit_medium_24_p8": 512, VIT: 384}
SIDES = (224, 384, 512, 1024)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMIT_GB = 20

Row = dict[str, Any]


# ---- one configuration, in a separate process


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the seconds of one call; CPU time with a single thread, because it varies less with other load."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else tuple
    wait()
    _, wall, cpu = timed(lambda: (run(), wait()))
    return cpu if device == "cpu" and torch.get_num_threads() == 1 else wall


def outputs(module: nn.Module, inputs: tuple[Tensor, ...], one: Row) -> Tensor:
    """Run a forward pass in the precision of ``one``."""
    with torch.autocast(one["device"], torch.bfloat16, enabled=one["precision"] == "bf16"):
        out = module(*inputs)
    return out if isinstance(out, Tensor) else out.cls_token


def a_pass(module: nn.Module, inputs: tuple[Tensor, ...], one: Row) -> Callable[[], None]:
    """Return a forward pass without gradients, or a forward and backward pass that discards the gradients."""

    def run() -> None:
        with torch.set_grad_enabled(one["training"]):
            out = outputs(module, inputs, one)
        if one["training"]:
            out.float().square().mean().backward()
            for tensor in (*module.parameters(), *inputs):
                tensor.grad = None

    return run


def random_xca(one: Row) -> tuple[XCA, tuple[Tensor, Tensor]]:
    """Return an XCA with its initial weights, and inputs like a block's: normalised tokens with a common component,
    and LayerScale."""
    dim = one["dim"]
    torch.manual_seed(0)
    xca = XCA(dim, HEADS[dim])
    nn.init.trunc_normal_(xca.qkv.weight, std=0.02)
    nn.init.trunc_normal_(xca.proj.weight, std=0.02)
    tokens = nn.functional.layer_norm(torch.randn(one["batch"], one["tokens"], dim) + torch.randn(dim), (dim,))
    xca, tokens, scale = xca.to(one["device"]), tokens.to(one["device"]), torch.ones(dim, device=one["device"])
    return xca, (tokens.requires_grad_(one["training"]), scale.requires_grad_(one["training"]))


def xca_times(one: Row) -> Row:
    """Return the median milliseconds of both paths, measured in turn; in training also their difference."""
    xca, inputs = random_xca(one)
    run = a_pass(xca, inputs, one)
    times: dict[str, list[float]] = {"direct": [], "gram": []}
    repeats = max(1, 2048 // (one["tokens"] * one["batch"]))
    for _ in range(one["rounds"] + 1):
        for path, found in times.items():
            xca.path = path  # type: ignore[assignment]
            found.append(sum(seconds(run, one["device"]) for _ in range(repeats)) / repeats)
    result: Row = {path: 1e3 * median(found[1:]) for path, found in times.items()}
    if one["training"]:
        result["difference"] = xca_difference(xca, inputs, one)
    return result


def xca_difference(xca: XCA, inputs: tuple[Tensor, ...], one: Row) -> float:
    """Return the maximum relative difference between the outputs and gradients of the paths."""
    found: list[list[Tensor]] = []
    for path in ("direct", "gram"):
        xca.path = path  # type: ignore[assignment]
        out = outputs(xca, inputs, one)
        if not found:  # use the same direction for both: outputs near 0 may differ in sign
            direction = torch.ones_like(out) + out.detach().sign()
        found.append([out.detach(), *torch.autograd.grad(out, [*inputs, *xca.parameters()], direction)])
    pairs = zip(*found, strict=True)
    return max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs)


def prepared(one: Row) -> Callable[[], object]:
    """Return the pass that ``one`` describes: of XCA alone, of our network, or of timm's."""
    if "network" not in one:
        xca, inputs = random_xca(one)
        xca.path = one["contender"]
        return a_pass(xca, inputs, one)
    if one["contender"] == "timm":
        size = {"img_size": one["side"]} if one["network"] == VIT else {}
        model: nn.Module = timm.create_model(f"{one['network']}_224", num_classes=0, **size)
    else:
        model = build_backbone(one["network"])
        for module in model.modules():
            if isinstance(module, XCA):
                module.path = one["contender"]
    images = torch.randn(one["batch"], 3, one["side"], one["side"]).to(one["device"])
    return a_pass(model.train(one["training"]).to(one["device"]), (images,), one)


def figures(one: Row) -> Row:
    """Return seconds and peak memory of a pass."""
    prepared(one | {"side": 32, "tokens": 32, "batch": 2})()  # load the libraries
    gc.collect()
    cpu = one["device"] == "cpu"
    if cpu:
        ctypes.CDLL(None).malloc_trim(0)  # free memory in the allocator would hide as much of the peak
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        limit = memory_status("VmData") + LIMIT_GB * 10**9
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    else:
        torch.cuda.reset_peak_memory_stats()
    before = memory_status("VmRSS") if cpu else torch.cuda.memory_allocated()
    try:
        run = prepared(one)
        first = seconds(run, one["device"])
        rounds = 0 if first > 60 else 1 if first > 20 else min(3, one["rounds"]) if first > 5 else one["rounds"]
        times = [seconds(run, one["device"]) for _ in range(rounds)] or [first]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"error": f"more than {LIMIT_GB} GB" if cpu else "out of memory"}
    peak = memory_status("VmHWM") if cpu else torch.cuda.max_memory_allocated()
    return {"seconds": round(median(times), 4), "rounds": len(times), "peak_MB": round((peak - before) / 1e6, 4)}


def device_name(one: Row) -> Row:
    """Return the name of the device."""
    if one["device"] == "cpu":
        return {"device_name": f"CPU, {one['threads']} thread(s)"}
    if not torch.cuda.is_available():
        raise InputError("--device is cuda, but PyTorch finds no GPU: use --device cpu")
    return {"device_name": torch.cuda.get_device_name()}


def found_apart(work: Callable[[Row], Row], one: Row) -> Row:
    """Run ``work`` in a separate process; this one does not initialise the GPU."""
    try:
        return in_a_process(work, one)
    except BrokenProcessPool:
        return {"error": "killed by the system: out of memory?"}


# ---- all configurations


def show(values: list[Any]) -> None:
    """Print a line of a table."""
    print("  ".join(f"{f'{value:.4g}' if isinstance(value, float) else value!s:>18}" for value in values), flush=True)


def crossover(common: Row, quick: bool) -> Iterator[Row]:
    """Yield a row of XCA alone for each precision, width and number of tokens."""
    for precision in DTYPES:
        for dim in (384, 512) if quick else HEADS:
            for tokens in (196, 1024) if quick else TOKENS:
                row: Row = {"precision": precision, "dim": dim, "tokens": tokens}
                for name, training in (("forward", False), ("training", True)):
                    times = found_apart(xca_times, common | row | {"training": training})
                    row |= {f"{name}_{path}_ms": round(times[path], 3) for path in ("direct", "gram")}
                    row[f"{name}_ratio"] = round(times["direct"] / times["gram"], 2)
                    row[f"{name}_chosen"] = choose(tokens, dim, DTYPES[precision], common["device"], training)
                row["difference"] = times["difference"]
                if not row["difference"] < (1e-5 if precision == "fp32" else 0.1):
                    raise RuntimeError(f"the two paths differ by {row['difference']:.2g}: {row}")
                for path in ("direct", "gram"):
                    one = common | row | {"training": True, "contender": path, "rounds": 1}
                    row[f"{path}_MB"] = round(found_apart(figures, one)["peak_MB"], 1)
                yield row


def contenders(one: Row) -> list[str]:
    """Return what to measure: "auto" is ours; "direct" is ours without the Gram path, if "auto" uses it."""
    if one["network"] == VIT:
        return ["timm"]
    tokens = (one["side"] // int(one["network"].rpartition("_p")[2])) ** 2
    path = choose(tokens, NETWORKS[one["network"]], DTYPES[one["precision"]], one["device"], one["training"])
    return ["auto", "direct", "timm"] if path == "gram" else ["auto", "timm"]


def networks(common: Row, quick: bool) -> Iterator[Row]:
    """Yield a row for each measurement of a whole network."""
    for name in ["xcit_small_12_p16", "xcit_small_12_p8", VIT] if quick else NETWORKS:
        for side in (224, 384) if quick else SIDES:
            for precision in DTYPES:
                for training in (False, True):
                    one = {"network": name, "side": side, "precision": precision, "training": training}
                    for contender in contenders(common | one):
                        row = one | {"contender": contender}
                        yield row | found_apart(figures, common | row)


# ---- the figure, as in the XCiT paper

STYLES = {
    "auto": ("-", "o", "this project"),
    "direct": (":", ".", "this project, direct path only"),
    "timm": ("--", "x", "timm"),
}
PANELS = [("fp32", "seconds"), ("bf16", "seconds"), ("fp32", "peak_MB"), ("bf16", "peak_MB")]


def draw(result: Row, path: Path) -> None:
    """Draw a row of panels for the forward pass and one for training; colours are networks, styles contenders."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(2, len(PANELS), figsize=(17, 8), sharex=True, layout="constrained")
    sides = sorted({row["side"] for row in result["networks"]})
    names = list(dict.fromkeys(row["network"] for row in result["networks"]))
    handles: dict[str, Any] = {}
    for axis, (training, (precision, quantity)) in zip(
        axes.flat, [(training, panel) for training in (False, True) for panel in PANELS], strict=True
    ):
        points: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in result["networks"]:
            if (row["precision"], row["training"]) == (precision, training) and quantity in row:
                points.setdefault((row["network"], row["contender"]), []).append((row["side"], row[quantity]))
        for (name, contender), line in points.items():
            style, marker, project = STYLES[contender]
            color, label = f"C{names.index(name)}", f"{name}, {project}"
            (handles[label],) = axis.plot(*zip(*line, strict=True), style, marker=marker, color=color)
        axis.set(xscale="log", yscale="log", xlabel="image side in pixels")
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        unit = "seconds" if quantity == "seconds" else "peak memory, MB"
        axis.set_title(f"{'training' if training else 'forward'}, {precision}: {unit}")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{result['device_name']}, batch {result['batch']}")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, write the files and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two resolutions, the small networks: a few minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    common: Row = {key: getattr(given, key) for key in ("device", "threads", "rounds", "batch")}
    result = common | found_apart(device_name, common) | {"torch": torch.__version__, "quick": given.quick}
    for name, rows in (("xca", crossover(common, given.quick)), ("networks", networks(common, given.quick))):
        result[name] = []
        for row in rows:
            if not result[name]:
                show([*row])
            show([*row.values()])
            result[name].append(row)
    (given.out / "resolution.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, given.out / "resolution.png")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
