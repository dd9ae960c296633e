"""Hostile ground-truth files: pickles that run a program, exhaust memory or declare false sizes."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
from hostile_parts import LAUGHS, Maker, Runs, pickled

GROUND_TRUTHS: dict[str, Maker] = {}


def ground_truth(maker: Maker) -> Maker:
    GROUND_TRUTHS[maker.__name__] = maker
    return maker


def _program_in_protocol(protocol: int) -> Maker:
    def write(path: Path, canary: Path) -> None:
        path.write_bytes(pickle.dumps({"gnd": [Runs(canary)]}, protocol))

    return write


for _protocol in range(6):
    GROUND_TRUTHS[f"program_in_protocol_{_protocol}"] = _program_in_protocol(_protocol)


@ground_truth
def program_by_an_instance(path: Path, canary: Path) -> None:
    path.write_bytes(b"(S'touch " + str(canary).encode() + b"'\nios\nsystem\n.")


@ground_truth
def array_of_objects_that_run(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"gnd": np.array([Runs(canary)], dtype=object)}, 2))


@ground_truth
def array_longer_than_its_bytes(path: Path, canary: Path) -> None:
    data = pickle.dumps(np.zeros(3, np.uint8), 2)
    path.write_bytes(data.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85", 1))


@ground_truth
def laughing_lists(path: Path, canary: Path) -> None:
    path.write_bytes(pickled(b"]" + LAUGHS))


@ground_truth
def text_longer_than_the_file(path: Path, canary: Path) -> None:
    path.write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.")


@ground_truth
def bytes_of_protocol_5(path: Path, canary: Path) -> None:
    path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b"abc.")


@ground_truth
def number_of_a_million_digits(path: Path, canary: Path) -> None:
    path.write_bytes(b"L" + b"9" * 1_000_000 + b"L\n.")


@ground_truth
def module_reached_by_dots(path: Path, canary: Path) -> None:
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.")


@ground_truth
def longer_than_any(path: Path, canary: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(10**10)
