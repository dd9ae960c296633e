"""Compile the Triton kernels of a training step for GPUs that this machine need not have; registers and spills.

    python benchmarks/kernels.py [--arch xcit_small_12_p16] [--batch 64] [--capability 80 90 120]

The kernels, their types and constants are those of a step on fake CUDA tensors (fake_cuda.py), in bfloat16, and of the
augmentation. Spilled bytes are those of the stack. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fake_cuda  # noqa: E402

from dino_xcit.errors import RunStopped, run_main  # noqa: E402
from eval.table import table  # noqa: E402

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.uint8: "*u8", int: "i32", float: "fp32",
}  # fmt: skip


def compiled(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], capability: int) -> Any:
    """Return the kernel of a launch as Triton compiles it for the arguments and options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, aligned = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names[: len(args)], args, strict=True)):
        if value is None:
            constants[name] = None
            continue
        signature[name] = TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]  # as the launcher finds; it also specialises for 1
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned
    )
    others = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, GPUTarget("cuda", capability, 32), others)


def resources(made: Any) -> tuple[int, int]:
    """Return the registers per thread and the spilled bytes of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout)
    if not found:
        raise RunStopped(1, f"error: expected REG and STACK from cuobjdump, found {shown.stdout!r}")
    return int(found[1]), int(found[2])


def main() -> None:
    """Compile each kernel once for each GPU and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="xcit_small_12_p16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 120])
    given = parser.parse_args()
    with fake_cuda.launches_of_triton() as launches:
        fake_cuda.fake_step("fused", batch=given.batch, arch=given.arch)
        fake_cuda.fake_augmentation(given.batch)
    rows, spilled = [], {}
    for name, launch in sorted(launches.items()):
        found = {capability: resources(compiled(launch, capability)) for capability in given.capability}
        rows.append([name, *(f"{registers}, {spills}" for registers, spills in found.values())])
        spilled[name] = sum(spills for _, spills in found.values())
    print(table(["registers, spilled bytes", *(f"sm_{capability}" for capability in given.capability)], rows))
    print(json.dumps({"kernels": len(spilled), "spilled": {name: bytes for name, bytes in spilled.items() if bytes}}))


if __name__ == "__main__":
    run_main(main)
