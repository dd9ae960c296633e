"""Memory and time limits of decoding bombs and damaged images, measured in subprocesses."""

from __future__ import annotations

import io
import json
import resource
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_images import encoded, files_of_all_formats, large_pngs, mutate, photograph, png, refusal
from PIL import Image
from ranks import Server

from dino_xcit.data.decode import FORMATS, MAX_PIXELS, UndecodableImage, decode


def in_a_process(server: Server, function: Callable[[int], None], number: int) -> dict[str, float]:
    """Run ``function`` of this file in a subprocess and return the JSON of its last output line.

    The test fails if the subprocess does.
    """
    module = Path(__file__).stem
    done = server.python("-c", f"import {module}; {module}.{function.__name__}({number})", timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def peak_mb() -> float:
    """Return the peak memory of this process.

    getrusage includes the peak of the parent process, which would mask the increase.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def decode_bombs(_: int) -> None:
    Image.MAX_IMAGE_PIXELS = None  # leaves only our own limit
    webp = encoded(photograph(1), "WEBP", lossless=True)
    bombs = [
        *large_pngs().values(),
        png(20_000, 20_000, bytes(20_000 * 2501), bits=1),
        webp[:21] + struct.pack("<L", 16_382 | 16_382 << 14) + webp[25:],
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
        b"P6 60000 60000 255\n" + bytes(1000),
        b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0\x60\xea\0\0\x60\xea\0\0\1\0\x18\0" + bytes(1000),
    ]
    jpeg = bytearray(encoded(photograph(1), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    bombs.append(bytes(jpeg))
    before, slowest = peak_mb(), 0.0
    for data in bombs:
        started = time.process_time()
        assert refusal(data).cause.startswith("too many pixels")
        slowest = max(slowest, time.process_time() - started)
    print(json.dumps({"bombs": len(bombs), "before_mb": before, "more_mb": peak_mb() - before, "slowest_s": slowest}))


def test_bombs_are_refused_quickly_and_with_little_memory(server: Server) -> None:
    report = in_a_process(server, decode_bombs, 0)
    assert report["bombs"] == 8
    assert report["more_mb"] < 100
    assert report["slowest_s"] < 2


def decode_mutants(count: int) -> None:
    rng = np.random.default_rng(11)
    files = files_of_all_formats(11)
    for whole in files:
        decode(whole, "whole")
    warnings.simplefilter("error")  # the decoder must not emit warnings
    before, begin, slowest = peak_mb(), time.process_time(), 0.0
    causes = Counter[str]()
    for number in range(count):
        data = mutate(files[number % len(files)], files[int(rng.integers(len(files)))], rng)
        started = time.process_time()
        try:
            picture = decode(data, f"mutant {number}")
        except UndecodableImage as error:
            cause = error.cause
        else:
            cause = "decoded"
            assert picture.mode == "RGB"
            assert picture.width * picture.height <= MAX_PIXELS
            picture.tobytes()
        assert cause, number
        assert cause.isprintable(), number
        causes[cause[:20]] += 1
        slowest = max(slowest, time.process_time() - started)
    report: dict[str, float] = {"decoded": causes.pop("decoded", 0), "refused": causes.total(), "causes": len(causes)}
    report |= {
        "before_mb": before,
        "more_mb": peak_mb() - before,
        "seconds": time.process_time() - begin,
        "slowest_s": slowest,
    }
    print(json.dumps(report))


# Some of the 100,000 mutants have the maximum number of pixels and need the higher limit.
@pytest.mark.parametrize(("count", "most_mb"), [(1000, 450), pytest.param(100_000, 1950, marks=pytest.mark.slow)])
def test_mutated_image_is_decoded_or_raises_undecodable_image(server: Server, count: int, most_mb: float) -> None:
    report = in_a_process(server, decode_mutants, count)
    assert report["decoded"] + report["refused"] == count
    assert report["decoded"] > count / 20
    assert report["refused"] > count / 2
    assert report["causes"] > 10
    assert report["more_mb"] < most_mb
    assert report["slowest_s"] < 10


def test_mutation_corpus_contains_every_allowed_format() -> None:
    formats = {Image.open(io.BytesIO(data)).format for data in files_of_all_formats(11)}
    assert formats == {*FORMATS, "MPO"}
