"""What benchmarks/step.py measures: one configuration, and the pipelines that are measured in it.

Without PyTorch: the process that makes the others take turns computes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

Project = Literal["reference", "timm", "ours", "peak", "checks"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Settings:
    """The work of a step, the same for all pipelines."""

    arch: str = "xcit_small_12_p16"
    """An XCiT by this project's name."""
    batch: int = 4
    """Images a step."""
    out_dim: int = 65536
    """Prototypes K."""
    local_crops: int = 8
    """Besides the two global ones."""
    global_size: int = 224
    """Pixels a side."""
    local_size: int = 96
    """Pixels a side."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_bottleneck: int = 256
    """Width of the head's output before the prototypes."""
    drop_path: float = 0.1
    """Of the student."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all of them compute."""

    @property
    def views(self) -> int:
        """Crops an image."""
        return 2 + self.local_crops

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(views, pixels a side) of each crop size, the global one first: one pass of the backbone each."""
        if self.local_crops == 0 or self.local_size == self.global_size:
            return [(self.views, self.global_size)]
        return [(2, self.global_size), (self.local_crops, self.local_size)]

    def in_words(self) -> str:
        """One line for the screen."""
        locals_ = f" + {self.local_crops} x {self.local_size}" if self.local_crops else ""
        return (
            f"{self.arch}, 2 x {self.global_size}{locals_} px, batch {self.batch}, K = {self.out_dim}, "
            f"drop-path {self.drop_path:g}, AdamW, clipping, EMA"
        )


SMALL = Settings(
    arch="xcit_nano_12_p4",
    batch=64,
    out_dim=4096,
    local_crops=4,
    global_size=28,
    local_size=14,
    head_hidden=256,
    head_bottleneck=64,
)
"""A small network on small images, with the head of the ``sample`` recipe."""

QUICK = Settings(arch="xcit_tiny_12_p16", batch=2, out_dim=1024, local_crops=2, global_size=64, local_size=32)
"""To see that the script runs; its figures say nothing. The smallest network that the reference can train in fp32."""

QUICK_SMALL = dataclasses.replace(SMALL, arch="xcit_pico_4_p4", batch=8, out_dim=256)


@dataclass(frozen=True)
class Row:
    """One pipeline: a process of its own, and a line of the table."""

    key: str
    """By which --only and the JSON name it."""
    title: str
    project: Project
    precision: Precision
    checkpointing: bool = False
    """Activation checkpointing."""
    keep_freed_memory: bool = True
    """Whether glibc keeps what is freed (dino_xcit.runtime.memory), as run_pretrain.py sets it on a CPU."""
    data: str = ""
    """Where the loader reads images from; empty: crops that are there already."""


def rows_for(device: str) -> list[Row]:
    """Every pipeline of the first table. The reference computes as its own defaults say: in fp16 on a GPU, which it
    needs; where there is none, in fp32."""
    reference: Precision = "fp16" if device == "cuda" else "fp32"
    return [
        Row("reference", f"reference, {reference}", "reference", reference),
        Row("timm-fp32", "timm, plain step, fp32", "timm", "fp32"),
        Row("timm-bf16", "timm, plain step, bf16", "timm", "bf16"),
        Row("ours-fp32", "ours, fp32", "ours", "fp32"),
        Row("ours-bf16", "ours, bf16", "ours", "bf16"),
        Row("ours-fp32-ckpt", "ours, fp32, checkpointing", "ours", "fp32", checkpointing=True),
        Row("ours-bf16-ckpt", "ours, bf16, checkpointing", "ours", "bf16", checkpointing=True),
    ]


def small_rows() -> list[Row]:
    """Every pipeline of the small network's table."""
    return [
        Row("small-timm-fp32", "timm, plain step, fp32", "timm", "fp32"),
        Row("small-timm-bf16", "timm, plain step, bf16", "timm", "bf16"),
        Row("small-ours-fp32", "ours, fp32", "ours", "fp32"),
        Row("small-ours-bf16", "ours, bf16", "ours", "bf16"),
    ]


CHECKS = Row("checks", "checks", "checks", "fp32")
"""The process in which all of them are held beside each other."""


def fed_row(data: str) -> Row:
    """The fastest of ours, with the loader feeding it from ``data``."""
    return Row("ours-bf16-fed", "ours, bf16, the loader feeding it", "ours", "bf16", data=data)


def reference_again(row: Row) -> Row:
    """The reference beside a second group of rows."""
    return dataclasses.replace(row, key="reference-again", title=f"{row.title}, again")


def peak_row(precision: Precision) -> Row:
    """The product of two large matrices, beside which the steps are held."""
    return Row(f"peak-{precision}", f"2048^3 product, {precision}", "peak", precision)


@dataclass(frozen=True)
class Task:
    """What a process is started with."""

    row: Row
    settings: Settings
    reference: str = ""
    """The folder that holds the peers' checkouts."""

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The inverse of :meth:`to_json`; what it reads comes from this program."""
        values = json.loads(text)
        return cls(Row(**values["row"]), Settings(**values["settings"]), values["reference"])
