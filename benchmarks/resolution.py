"""Time and memory against resolution: XCA's two paths, XCiT with them, timm's XCiT, a ViT with quadratic attention.

    python benchmarks/resolution.py [--device cpu|cuda] [--threads 1] [--rounds 5] [--batch 1] [--quick] [--out DIR]

First XCA alone: direct and Gram path in turn in one process, with LayerScale, forward (no gradient) and forward with
backward pass; that table is where ``choose`` in dino_xcit/models/xca.py has its thresholds from. Then whole networks
without a classifier. Each configuration has a process of its own. Memory is the peak above what the process had after
the imports and a tiny pass (resident set on a CPU, ``torch.cuda.max_memory_allocated`` on a GPU), so weights and
gradients are in it. Times are medians after one pass that warms up; a pass of more than a minute is measured once,
without. What does not fit in 20 GB says so. The run fails if the two paths' outputs or gradients differ.

Writes resolution.json and resolution.png to ``--out`` (benchmarks/). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from resolution_figure import draw  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dino_xcit.errors import InputError, run_main  # noqa: E402
from dino_xcit.models import build_backbone  # noqa: E402
from dino_xcit.models.xca import XCA, choose  # noqa: E402

HEADS = {128: 4, 384: 8, 512: 8}
TOKENS = (196, 400, 576, 784, 1024, 3136, 4096, 16384)
NETWORKS = {"xcit_small_12_p16": 384, "xcit_small_12_p8": 384, "xcit_medium_24_p8": 512}
VIT = "vit_small_patch16"
SIDES = (224, 384, 512, 1024)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMIT_GB = 20
SLOW_PASS_S = 60.0

Row = dict[str, Any]


# ---- one configuration, in a process of its own


def memory_now(device: str) -> int:
    """Bytes in use; the peak is counted from here on."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed is given back, or it would hide as much of what follows
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes that were in use since :func:`memory_now`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call; of a single thread the processor's time, in which others on the machine count less."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def a_pass(module: nn.Module, inputs: tuple[Tensor, ...], one: Row) -> Callable[[], object]:
    """A forward pass without gradient, or a forward and a backward pass whose gradients are let go."""
    wanted = [*module.parameters(), *(tensor for tensor in inputs if tensor.requires_grad)]

    def forward() -> Tensor:
        with torch.autocast(one["device"], torch.bfloat16, enabled=one["precision"] == "bf16"):
            out = module(*inputs)
        return out if isinstance(out, Tensor) else out.cls_token

    def without_gradient() -> None:
        with torch.no_grad():
            forward()

    def with_backward() -> None:
        forward().float().square().mean().backward()
        for tensor in wanted:
            tensor.grad = None

    return with_backward if one["training"] else without_gradient


def random_xca(one: Row) -> tuple[XCA, tuple[Tensor, Tensor]]:
    """XCA of the networks' start, and what a block gives it: LayerNorm's output with a common part, and LayerScale."""
    dim = one["dim"]
    torch.manual_seed(0)
    xca = XCA(dim, HEADS[dim])
    nn.init.trunc_normal_(xca.qkv.weight, std=0.02)
    nn.init.trunc_normal_(xca.proj.weight, std=0.02)
    tokens = nn.functional.layer_norm(torch.randn(one["batch"], one["tokens"], dim) + torch.randn(dim), (dim,))
    xca, tokens, scale = xca.to(one["device"]), tokens.to(one["device"]), torch.ones(dim, device=one["device"])
    return xca, (tokens.requires_grad_(one["training"]), scale.requires_grad_(one["training"]))


def xca_times(one: Row) -> Row:
    """Medians of both paths, measured in turn, in milliseconds; with gradients, their difference too."""
    xca, inputs = random_xca(one)
    run = a_pass(xca, inputs, one)
    times: dict[str, list[float]] = {"direct": [], "gram": []}
    for _ in range(one["rounds"] + 1):
        for path, found in times.items():
            xca.path = path  # type: ignore[assignment]
            repeats = max(1, 2048 // (one["tokens"] * one["batch"]))
            found.append(sum(seconds(run, one["device"]) for _ in range(repeats)) / repeats)
    result: Row = {f"{path}_ms": 1e3 * median(found[1:]) for path, found in times.items()}
    if one["training"]:
        result["difference"] = xca_difference(xca, inputs, one)
    return result


def xca_difference(xca: XCA, inputs: tuple[Tensor, ...], one: Row) -> float:
    """The greatest relative difference between the paths' outputs and gradients."""
    found: list[list[Tensor]] = []
    direction: Tensor | None = None  # the same for both: an output near 0 may have either sign
    for path in ("direct", "gram"):
        xca.path = path  # type: ignore[assignment]
        with torch.autocast(one["device"], torch.bfloat16, enabled=one["precision"] == "bf16"):
            out = xca(*inputs)
        if direction is None:
            direction = torch.ones_like(out) + out.detach().sign()
        found.append([out.detach(), *torch.autograd.grad(out, [*inputs, *xca.parameters()], direction)])
    pairs = zip(*found, strict=True)
    return max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs)


def network(one: Row) -> nn.Module:
    """One of ours, with one of XCA's paths or both; timm's of the same name; or the ViT."""
    if one["network"] == VIT:
        model: nn.Module = timm.create_model(f"{VIT}_224", num_classes=0, img_size=one["side"])
    elif one["contender"] == "timm":
        model = timm.create_model(f"{one['network']}_224", num_classes=0)
    else:
        model = build_backbone(one["network"])
        for module in model.modules():
            if isinstance(module, XCA):
                module.path = one["contender"]
    return model.train(one["training"]).to(one["device"])


def prepared(one: Row) -> Callable[[], object]:
    """The pass that ``one`` describes, of a network or of XCA alone."""
    if "network" in one:
        return a_pass(network(one), (torch.randn(one["batch"], 3, one["side"], one["side"]).to(one["device"]),), one)
    xca, inputs = random_xca(one)
    xca.path = one["contender"]
    return a_pass(xca, inputs, one)


def figures(one: Row) -> Row:
    """Seconds and peak memory of a pass."""
    prepared(one | {"side": 32, "tokens": 32, "batch": 2})()  # libraries are in memory after it
    before = memory_now(one["device"])
    if one["device"] == "cpu":
        limit = _status("VmData") + LIMIT_GB * 10**9
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        run = prepared(one)
        first = seconds(run, one["device"])
        rounds = (
            0 if first > SLOW_PASS_S else 1 if first > 20 else min(3, one["rounds"]) if first > 5 else one["rounds"]
        )
        times = [seconds(run, one["device"]) for _ in range(rounds)] or [first]
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        return {"error": f"more than {LIMIT_GB} GB" if one["device"] == "cpu" else "out of memory"}
    return {
        "seconds": median(times),
        "rounds": len(times),
        "peak_MB": (peak_memory(one["device"]) - before) / 1e6,
    }


def network_difference(one: Row) -> Row:
    """Between the outputs of the whole network on either path."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, one["side"], one["side"]).to(one["device"])
    model = network(one | {"contender": "auto"})
    for name, parameter in model.named_parameters():
        if "gamma" in name:  # deep networks begin with 1e-5, by which any difference would vanish
            nn.init.ones_(parameter)
    outputs = []
    for path in ("direct", "gram"):
        for module in model.modules():
            if isinstance(module, XCA):
                module.path = path  # type: ignore[assignment]
        with torch.no_grad():
            outputs.append(model(images).cls_token)
    return {"difference": float((outputs[0] - outputs[1]).norm() / outputs[0].norm())}


def in_a_process(one: Row) -> Row:
    """What the function of the kind ``one["kind"]`` finds, in a process of its own.

    It is forked, so nothing is imported again: this process itself computes nothing, and never asks for a GPU.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(one["threads"])
        sender.send_bytes(json.dumps(KINDS[one["kind"]](one)).encode())

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        found = json.loads(receiver.recv_bytes())
    except EOFError:
        found = None
    process.join()
    if found is None and process.exitcode != -9:
        raise RuntimeError(f"{one} failed with exit code {process.exitcode}")
    return {"error": "ended by the system: out of memory?"} if found is None else found


def device_name(one: Row) -> Row:
    """What is measured on."""
    if one["device"] == "cpu":
        return {"name": f"CPU, {one['threads']} thread(s)"}
    return {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


KINDS = {"device_name": device_name, "xca_times": xca_times, "figures": figures, "difference": network_difference}


# ---- all of them


def crossover(common: Row, quick: bool) -> Iterator[Row]:
    """XCA alone, one row a table row."""
    print(f"XCA alone, batch {common['batch']}: ms on the direct path / on the Gram path, and their ratio; peak MB")
    print(
        "precision    D      N      forward                  forward + backward      difference   MB direct   MB gram"
    )
    for precision in DTYPES:
        for dim in (384, 512) if quick else HEADS:
            for tokens in (196, 1024) if quick else TOKENS:
                one = common | {"precision": precision, "dim": dim, "tokens": tokens}
                row: Row = {"precision": precision, "dim": dim, "tokens": tokens}
                for name, training in (("forward", False), ("training", True)):
                    times = in_a_process(one | {"kind": "xca_times", "training": training})
                    row |= {f"{name}_{path}": round(times[path], 3) for path in ("direct_ms", "gram_ms")}
                    row[f"{name}_ratio"] = round(times["direct_ms"] / times["gram_ms"], 2)
                    row[f"{name}_chosen"] = choose(tokens, dim, DTYPES[precision], common["device"], training)
                row["difference"] = times["difference"]
                if not row["difference"] < (1e-5 if precision == "fp32" else 0.1):
                    raise RuntimeError(f"the two paths differ by {row['difference']:.2g}: {row}")
                for path in ("direct", "gram"):
                    kind = {"kind": "figures", "training": True, "contender": path, "rounds": 1}
                    row[f"{path}_MB"] = round(in_a_process(one | kind)["peak_MB"], 1)
                print(
                    f"{precision}       {dim}  {tokens:6d}  "
                    + "  ".join(
                        f"{row[f'{name}_direct_ms']:8.2f} {row[f'{name}_gram_ms']:8.2f} {row[f'{name}_ratio']:5.2f}"
                        f"{'*' if row[f'{name}_chosen'] == 'gram' else ' '}"
                        for name in ("forward", "training")
                    )
                    + f"   {row['difference']:9.1e}   {row['direct_MB']:9.1f} {row['gram_MB']:9.1f}",
                    flush=True,
                )
                yield row
    print("(* chosen)")


def contenders(one: Row) -> Iterator[str]:
    """Who is measured: "auto" is ours; "direct" the same without the Gram path, where that would be taken."""
    if one["network"] == VIT:
        yield "timm"
        return
    yield "auto"
    patch = int(one["network"].rpartition("_p")[2])
    tokens = (one["side"] // patch) ** 2
    dtype = DTYPES[one["precision"]]
    if choose(tokens, NETWORKS[one["network"]], dtype, one["device"], one["training"]) == "gram":
        yield "direct"
    yield "timm"


def networks(common: Row, quick: bool) -> Iterator[Row]:
    """Whole networks, one row a measurement."""
    print(f"\nwhole networks, batch {common['batch']}")
    print("network            px  precision  pass      contender    seconds  rounds   peak MB")
    names = [*NETWORKS, VIT] if not quick else ["xcit_small_12_p16", "xcit_small_12_p8", VIT]
    for name in names:
        if name != VIT:
            check = in_a_process(
                common | {"kind": "difference", "network": name, "side": 224, "precision": "fp32", "training": False}
            )
            if not check["difference"] < 1e-4:
                raise RuntimeError(f"{name}: the outputs by the two paths differ by {check['difference']:.2g}")
            print(f"{name}: outputs by the two paths differ by {check['difference']:.1e} at 224 px in fp32")
        for side in (224, 384) if quick else SIDES:
            for precision in DTYPES:
                for training in (False, True):
                    setting = {"network": name, "side": side, "precision": precision, "training": training}
                    for contender in contenders(common | setting):
                        row = in_a_process(common | setting | {"kind": "figures", "contender": contender})
                        columns = (
                            row["error"]
                            if "error" in row
                            else f"{row['seconds']:9.3f}    {row['rounds']:4d} {row['peak_MB']:9.0f}"
                        )
                        print(
                            f"{name:18s} {side:4d}  {precision}      {'training' if training else 'forward ':8s}  "
                            f"{contender:7s}  {columns}",
                            flush=True,
                        )
                        yield (
                            setting
                            | {"contender": contender}
                            | {
                                key: round(row[key], 4) if isinstance(row[key], float) else row[key]
                                for key in ("seconds", "rounds", "peak_MB", "error")
                                if key in row
                            }
                        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two resolutions, the small networks: a few minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    began = time.perf_counter()
    common = {key: getattr(arguments, key) for key in ("device", "threads", "rounds", "batch")}
    device = in_a_process(common | {"kind": "device_name"})["name"]
    if device is None:
        raise InputError("--device cuda, but PyTorch finds no GPU here: use --device cpu")
    result: Row = common | {"device_name": device, "torch": torch.__version__, "quick": arguments.quick}
    result["xca"] = list(crossover(common, arguments.quick))
    result["networks"] = list(networks(common, arguments.quick))
    result["minutes"] = round((time.perf_counter() - began) / 60, 1)
    (arguments.out / "resolution.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.out / "resolution.png")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
