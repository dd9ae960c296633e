"""Hostile checkpoints: they run a program, exhaust the memory or claim false content. One function writes each."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hostile_parts import (
    HONEST,
    LAUGHS,
    TAIL,
    Entry,
    Maker,
    Runs,
    archive,
    called,
    dictionary,
    named,
    number,
    old_format,
    pickled,
    shape,
    storage,
    tensor,
    text,
    zeros_deflated,
    zipped,
)

PROGRAMS: dict[str, Maker] = {}
"""Files with a program that runs if the file is loaded without safety checks."""
OTHERS: dict[str, Maker] = {}
UNBOUNDED: dict[str, Maker] = {}
"""Files whose time or memory could be bounded only by interpreting the pickle."""
LARGE: dict[str, Maker] = {}
"""Valid files that name or resemble a network of several gigabytes."""


def into(makers: dict[str, Maker]) -> Callable[[Maker], Maker]:
    """Return a decorator that registers a function in ``makers`` by name."""

    def put(maker: Maker) -> Maker:
        makers[maker.__name__] = maker
        return maker

    return put


program, other, unbounded, large = map(into, (PROGRAMS, OTHERS, UNBOUNDED, LARGE))

# ---- files that run a program


@program
def program_in_an_archive(path: Path, canary: Path) -> None:
    torch.save({"student": Runs(canary)}, path)


@program
def program_in_the_old_format(path: Path, canary: Path) -> None:
    torch.save({"student": Runs(canary)}, path, _use_new_zipfile_serialization=False)


@program
def program_in_the_namespace(path: Path, canary: Path) -> None:
    torch.save({"args": argparse.Namespace(arch=Runs(canary)), "model": {"a": torch.zeros(3)}}, path)


@program
def program_in_a_tar_archive(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            data = pickle.dumps(Runs(canary), 2)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@program
def program_in_an_object_array(path: Path, canary: Path) -> None:
    torch.save({"epoch": np.array([Runs(canary)], dtype=object)}, path)


@program
def program_in_the_second_of_two_pickles(path: Path, canary: Path) -> None:
    evil = pickle.dumps(Runs(canary), 2)
    path.write_bytes(zipped(Entry("data.pkl", pickled(HONEST)), Entry("data.pkl", evil), *TAIL))


@program
def program_in_a_plain_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"student": Runs(canary)}))


@other
def program_in_a_nested_pickle(path: Path, canary: Path) -> None:
    archive(path, HONEST, Entry("data/0", bytes(16)), Entry("data/evil/data.pkl", pickle.dumps(Runs(canary), 2)))


@other
def program_of_torchscript(path: Path, canary: Path) -> None:
    evil = b"def forward(self, x: Tensor) -> Tensor:\n  return torch.neg(x)\n"
    archive(path, HONEST, Entry("constants.pkl", pickled(b")")), Entry("code/__torch__.py", evil))


@other
def callable_in_the_namespace(path: Path, canary: Path) -> None:
    hidden = dictionary(arch=named("torch._utils", "_rebuild_tensor_v2"))
    archive(path, dictionary(args=named("argparse", "Namespace") + b")\x81" + hidden + b"b"))


@other
def method_in_the_namespace(path: Path, canary: Path) -> None:
    hidden = dictionary(__setstate__=named("torch", "device"))
    archive(path, dictionary(args=named("argparse", "Namespace") + b")\x81" + hidden + b"b" + hidden + b"b"))


# ---- archives with false claims


@other
def bomb_of_twelve_gigabytes(path: Path, canary: Path) -> None:
    body = dictionary(weight=tensor(storage(3_000_000_000), (3_000_000_000,), (1,)))
    archive(path, body, Entry("data/0", zeros_deflated(1200), 12_000_000_000, deflated=True))


@other
def bomb_in_the_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(zipped(Entry("data.pkl", zeros_deflated(300), 3_000_000_000, deflated=True), *TAIL))


@other
def entry_longer_than_the_file(path: Path, canary: Path) -> None:
    body = dictionary(weight=tensor(storage(3_000_000_000), (3_000_000_000,), (1,)))
    archive(path, body, Entry("data/0", bytes(16), 12_000_000_000))


@other
def entries_in_one_place(path: Path, canary: Path) -> None:
    """200 storages of 12 MB in the same 12 MB of the file."""
    each = [Entry(f"data/{key}", b"", 12_000_000, at=0 if key else None) for key in range(200)]
    each[0].data = bytes(12_000_000)
    body = b"}(" + b"".join(text(str(k)) + tensor(storage(3_000_000, str(k)), (3_000_000,), (1,)) for k in range(200))
    path.write_bytes(zipped(*each, Entry("data.pkl", pickled(body + b"u")), TAIL[1]))


@other
def two_directories(path: Path, canary: Path) -> None:
    honest = zipped(Entry("data.pkl", pickled(HONEST)), *TAIL)
    archive(path, named("posix", "system"), Entry("data/0", bytes(16)))
    within = bytearray(path.read_bytes())
    within[-2:] = struct.pack("<H", len(honest))  # the second archive is a comment of the first
    path.write_bytes(bytes(within) + honest)


@other
def directory_of_a_million_entries(path: Path, canary: Path) -> None:
    data = zipped(Entry("data.pkl", pickled(HONEST)), *TAIL)
    start = struct.unpack("<I", data[-6:-2])[0]
    line = data[start : start + 46 + len("archive/data.pkl")]
    directory = line * 1_000_000
    wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, len(directory), start)
    wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + wide + end)


@other
def pickle_of_thirty_megabytes(path: Path, canary: Path) -> None:
    archive(path, dictionary(words=b"(" + text("x" * 10_000) * 3000 + b"t"))


# ---- pickles with false claims

BODIES: dict[str, bytes] = {
    "storage_of_a_trillion": dictionary(weight=tensor(storage(10**12), (10**12,), (1,))),
    "shape_of_a_trillion": dictionary(weight=tensor(storage(4), (10**6, 10**6), (10**6, 1))),
    # PyTorch enlarges the storage and exposes uninitialised memory.
    "shape_of_six_gigabytes": dictionary(weight=tensor(storage(4), (1_500_000_000,), (1,))),
    "tensor_behind_its_storage": dictionary(weight=tensor(storage(4), (2, 2), (3, 1))),
    "tensor_made_by_a_call": dictionary(weight=called(named("torch", "FloatTensor"), number(10**12))),
    "billion_laughs": dictionary(args=b"]" + LAUGHS),
    "list_that_holds_itself": dictionary(args=b"]q\x00h\x00a"),
    "lists_a_hundred_thousand_deep": dictionary(args=b"]" * 100_000 + b"a" * 99_999),
    "text_of_four_gigabytes": dictionary(epoch=b"X" + struct.pack("<I", 2**32 - 1)),
}
"""Pickles of otherwise valid archives."""
TENSORS: dict[str, torch.Tensor] = {
    "tensor_repeated_a_trillion_times": torch.zeros(1).expand(10**6, 10**6),
    "sparse_tensor_of_a_trillion": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6), check_invariants=True),
    "tensor_without_data": torch.empty(10**6, 10**6, device="meta"),
}
OTHERS |= {name: lambda path, _, body=body: archive(path, body) for name, body in BODIES.items()}
OTHERS |= {name: lambda path, _, weight=weight: torch.save({"w": weight}, path) for name, weight in TENSORS.items()}


@other
def tensor_in_five_thousand_places(path: Path, canary: Path) -> None:
    whole = torch.zeros(2_000_000)
    torch.save({str(place): whole.view(2, -1) for place in range(5000)}, path)


@other
def quantized_tensor(path: Path, canary: Path) -> None:
    rebuild = named("torch._utils", "_rebuild_qtensor")
    scheme = b"(" + named("torch", "per_tensor_affine") + b"G" + bytes(8) + number(0) + b"t"
    quantized = called(rebuild, storage(4), number(0), shape(10**10), shape(1), scheme, b"\x89", b"N")
    archive(path, dictionary(weight=quantized))


@other
def storage_of_forty_gigabytes_in_the_old_format(path: Path, canary: Path) -> None:
    body = dictionary(weight=tensor(storage(10**10, legacy=True), (10**10,), (1,)))
    old_format(path, body, b"]" + text("0") + b"a", struct.pack("<q", 10**10) + bytes(64))


@other
def storage_that_is_never_filled_in_the_old_format(path: Path, canary: Path) -> None:
    """The tensor would expose uninitialised memory."""
    old_format(path, dictionary(weight=tensor(storage(10**6, legacy=True), (10**6,), (1,))), b"]", b"")


@other
def tar_archive_in_the_old_format(path: Path, canary: Path) -> None:
    """Both formats at once. PyTorch tries the tar archive first, whose header claims 8 GiB."""
    torch.save(0, path, _use_new_zipfile_serialization=False)
    member = tarfile.TarInfo(path.read_bytes()[:26].decode("latin1"))
    member.type, member.size = tarfile.XHDTYPE, 8 * 2**30 - 1
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT, "latin1", "strict") + bytes(2048))


@other
def billion_laughs_in_the_list_of_storages(path: Path, canary: Path) -> None:
    old_format(path, HONEST.replace(b"tQ", b"NtQ"), b"]]" + LAUGHS + b"a", b"")


@other
def number_of_numpys_of_two_gigabytes(path: Path, canary: Path) -> None:
    dtype = called(named("numpy", "dtype"), text("V2000000000"), b"\x89", b"\x88")
    archive(path, dictionary(epoch=called(named("numpy.core.multiarray", "scalar"), dtype, text(""))))


@other
def number_of_numpys_that_is_an_object(path: Path, canary: Path) -> None:
    dtype = called(named("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
    data = called(named("_codecs", "encode"), text("\x01" * 8), text("latin1"))
    archive(path, dictionary(epoch=called(named("numpy._core.multiarray", "scalar"), dtype, data)))


@other
def number_type_of_numpys_with_a_false_state(path: Path, canary: Path) -> None:
    dtype = called(named("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    state = b"(" + number(3) + text("<") + shape(2**30) + b"NN" + number(2**30) + number(1) + number(0) + b"t"
    archive(path, dictionary(epoch=dtype + state + b"b"))


# ---- files with unbounded time or memory


@unbounded
def billion_laughs_as_a_key(path: Path, canary: Path) -> None:
    """Python hashes a tuple again for each of its references."""
    archive(path, b"})" + b"q\x00h\x00\x86" * 40 + b"Ns")


@unbounded
def bytes_made_by_a_call(path: Path, canary: Path) -> None:
    archive(path, dictionary(epoch=called(named("__builtin__", "bytearray"), number(1_000_000_000))))


# ---- files whose backbone exceeds the memory


@large
def names_a_network_of_seven_billion_weights(path: Path, canary: Path) -> None:
    torch.save({"teacher": {"backbone.x": torch.zeros(1)}, "args": {"arch": "timm:vit_7b_patch16_dinov3"}}, path)


@large
def resembles_an_xcit_large(path: Path, canary: Path) -> None:
    state = {"cls_token": torch.zeros(1, 1, 768), "pos_embeder.token_projection.weight": torch.zeros(1)}
    state |= {f"blocks.{block}.attn.temperature": torch.zeros(16, 1, 1) for block in range(24)}
    torch.save(state | {f"patch_embed.proj.{stage}.0.weight": torch.zeros(1) for stage in (0, 2, 4)}, path)
