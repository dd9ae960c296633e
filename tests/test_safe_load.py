"""Safe loading of untrusted files: hostile files are refused quickly, and valid files of every layout are read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import LARGE, OTHERS, PROGRAMS, UNBOUNDED
from hostile_ground_truths import GROUND_TRUTHS
from hostile_parts import Maker
from test_weights import fresh_state, full_dino_file, same

from dino_xcit import safe_load
from dino_xcit.errors import InputError
from dino_xcit.safe_load import RefusedError
from dino_xcit.weights import load_backbone

ROOT = Path(__file__).parent.parent
SECONDS, MEGABYTES = 2, 500

Ask = Callable[[str, Path], dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Read a file in a separate process; return its time, memory and error."""
    command = [sys.executable, str(ROOT / "tests/reading_server.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def answer(reader: str, path: Path) -> dict[str, Any]:
        print(json.dumps({"reader": reader, "path": str(path)}), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield answer
    server.stdin.close()
    server.wait(10)


def assert_refused(taken: dict[str, Any], path: Path) -> None:
    assert taken["error"] == "InputError", taken
    assert str(path) in taken["sentence"]
    assert "\n" not in taken["sentence"]
    assert len(taken["sentence"]) < 600
    assert "weights_only" not in taken["sentence"]  # PyTorch's message recommends unsafe loading
    assert taken["seconds"] < SECONDS, taken
    assert taken["megabytes"] < MEGABYTES, taken


@pytest.mark.parametrize("name", [*PROGRAMS, *OTHERS])
def test_hostile_checkpoint_is_refused_quickly_and_not_executed(tmp_path: Path, ask: Ask, name: str) -> None:
    path, canary = tmp_path / "hostile.pth", tmp_path / "ran"
    (PROGRAMS | OTHERS)[name](path, canary)
    for reader in ("read", "load_backbone") if name in PROGRAMS else ("read",):
        assert_refused(ask(reader, path), path)
    assert not canary.exists()
    if name in PROGRAMS:
        ask("trusting", path)
        assert canary.exists()


@pytest.mark.parametrize(
    "name", ["bytes_made_by_a_call", pytest.param("billion_laughs_as_a_key", marks=pytest.mark.slow)]
)
def test_unbounded_checkpoint_is_refused_or_exceeds_time_limit(tmp_path: Path, ask: Ask, name: str) -> None:
    """SIGPROF ends the reading process after its limit of CPU time."""
    path, canary = tmp_path / "hostile.pth", tmp_path / "ran"
    UNBOUNDED[name](path, canary)
    assert ask("read", path)["error"] in ("InputError", f"ended with {-signal.SIGPROF}")
    assert not canary.exists()


@pytest.mark.parametrize("maker", LARGE.values(), ids=LARGE)
def test_small_file_that_claims_a_large_network_is_refused(tmp_path: Path, ask: Ask, maker: Maker) -> None:
    maker(tmp_path / "small.pth", tmp_path / "ran")
    assert ask("read", tmp_path / "small.pth")["error"] is None
    assert_refused(ask("load_backbone", tmp_path / "small.pth"), tmp_path / "small.pth")


@pytest.mark.parametrize("name", GROUND_TRUTHS)
def test_hostile_ground_truth_is_refused_quickly_and_not_executed(tmp_path: Path, ask: Ask, name: str) -> None:
    path, canary = tmp_path / "gnd.pkl", tmp_path / "ran"
    GROUND_TRUTHS[name](path, canary)
    assert_refused(ask("read_ground_truth", path), path)
    assert not canary.exists()
    if name.startswith("program") or name.endswith("that_run"):
        ask("unpickling", path)
        assert canary.exists()


@pytest.mark.parametrize("reader", [safe_load.read, safe_load.read_ground_truth, load_backbone])
def test_pipes_devices_folders_and_missing_files_are_refused(tmp_path: Path, reader: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="pipe or a device"):
            reader(path)
    for path in (tmp_path / "absent", tmp_path, Path("a\0")):
        with pytest.raises(InputError):
            reader(path)


@pytest.mark.parametrize("cut", [0, 3, 20, 300, -100, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_refused(tmp_path: Path, cut: int, zipped: bool) -> None:
    path = tmp_path / "b.pth"
    torch.save(fresh_state(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError, match="read safely"):
        safe_load.read(path)


@pytest.mark.parametrize("changes", [20, pytest.param(150, marks=pytest.mark.slow)])
def test_randomly_changed_files_raise_no_other_error_than_input_error(tmp_path: Path, changes: int) -> None:
    path = tmp_path / "b.pth"
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for zipped in (True, False):
        full_dino_file(path)
        torch.save(safe_load.read(path), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        start = whole.index(b"\x80\x02")
        for _ in range(changes):
            changed = bytearray(whole)
            for place in torch.randint(start, start + 20_000, (3,), generator=generator).tolist():
                changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            try:
                safe_load.read(path)
            except InputError:
                refused += 1
    assert 0 < refused < 2 * changes


# ---- valid checkpoints


@pytest.mark.parametrize("zipped", [True, False])
def test_valid_checkpoint_reads_back_as_written(tmp_path: Path, zipped: bool) -> None:
    state = torch.nn.BatchNorm2d(3).state_dict()  # an OrderedDict with an attribute
    shared = torch.arange(12.0)
    content = {
        "student": state,
        "model": {"a": torch.nn.Parameter(torch.ones(2, 3).t()), "whole": shared, "part": shared[3:7]},
        "kinds": [torch.zeros(2, dtype=kind) for kind in (torch.half, torch.bfloat16, torch.int64, torch.bool)],
        "odd": [torch.zeros(0, 3), torch.tensor(3.5), torch.tensor([], dtype=torch.uint8)],
        "args": argparse.Namespace(arch="xcit_pico_4", lr=0.1, scale=(0.4, 1.0), none=None, words=["ä", b"\xff"]),
        "numbers": [np.float64(0.25), np.float32(2), np.int64(-3), np.array([1.5], ">f8")[0], 2**70, -1, True],
        "rest": [{1, 2}, torch.Size([2, 3]), torch.float32, OrderedDict(a=1)],
        3: None,
    }
    path = tmp_path / "b.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    back = safe_load.read(path)
    assert list(back) == list(content)
    assert same(back["student"], state)
    assert back["student"]._metadata == state._metadata
    assert all(torch.equal(back["model"][key], value) for key, value in content["model"].items())
    assert back["model"]["part"].untyped_storage().data_ptr() == back["model"]["whole"].untyped_storage().data_ptr()
    for name in ("kinds", "odd"):
        assert [(a.dtype, a.tolist()) for a in back[name]] == [(a.dtype, a.tolist()) for a in content[name]]
    for name in ("args", "numbers", "rest"):
        assert back[name] == content[name]
    assert [type(number) for number in back["numbers"][:3]] == [np.float64, np.float32, np.int64]


def test_checkpoint_with_thousands_of_tensors_is_read(tmp_path: Path) -> None:
    """A DINO checkpoint of a network with forty layers has as many tensors."""
    torch.save({str(place): torch.full((1,), place) for place in range(4000)}, tmp_path / "b.pth")
    assert safe_load.read(tmp_path / "b.pth")["3999"].item() == 3999


def test_check_content_refuses_objects_hostile_tensors_and_repetition() -> None:
    honest = {"a": torch.zeros(3), "b": [1, "x", {2: (None, 3.0)}]}
    safe_load.check_content(honest, room=1000)
    inside, attributed = torch.zeros(4), torch.zeros(4)
    attributed.note = print  # type: ignore[attr-defined]
    tensors = [inside.expand(3, 4), inside.to_sparse(), torch.zeros(4, device="meta"), torch.zeros(1000), attributed]
    for hostile in (*tensors, print, object(), np.array([None]), argparse.Namespace(a=print), {"a": [inside] * 1000}):
        with pytest.raises(RefusedError):
            safe_load.check_content({"a": hostile}, room=1000)


@pytest.mark.parametrize(
    "content",
    [
        {3: torch.zeros(1)}, {"teacher": {3: torch.zeros(1)}}, {"teacher": {"backbone.a": 3}},
        {"cls_token": torch.tensor(1.0), "pos_embeder.token_projection.weight": torch.zeros(1)},
        {
            "cls_token": torch.zeros(1, 1, 4), "pos_embeder.token_projection.weight": torch.zeros(1),
            "blocks.0.attn.temperature": torch.tensor(1.0),
        },
        {"a\nb" * 1000: torch.zeros(1)},
        {"teacher": {"backbone.a": torch.zeros(1)}, "args": {"arch": "timm:" + "a\n" * 10_000}},
    ],
)  # fmt: skip
def test_invalid_backbone_names_and_shapes_are_refused_in_one_line(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "b.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


HUGE = {"resize": 1, "crop": 1, "interpolation": "bicubic", "mean": [10**400] * 3, "std": [1, 1, 1]}


@pytest.mark.parametrize("stored", [None, 3, {"resize": "x"}, [torch.zeros(300, 3)], HUGE])
def test_invalid_eval_transform_is_refused_in_one_line(tmp_path: Path, stored: Any) -> None:
    full_dino_file(tmp_path / "full.pth", eval_transform=stored)
    with pytest.raises(InputError, match=r"full\.pth") as caught:
        load_backbone(tmp_path / "full.pth")
    assert "\n" not in str(caught.value)


# ---- valid ground truths


def ground_truth() -> dict[str, Any]:
    query = {
        "bbx": [136.5, 34.1, 648.5, -1e-9], "easy": np.array([3, 1, 2]), "hard": [70_000, 300, 5, -1, 2**40],
        "junk": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)), "none": np.zeros((0,), np.int32),
        "score": np.float32(0.5), "flags": (True, False, None), "set": {1, 2},
    }  # fmt: skip
    return {"imlist": ["all_souls_000013", "oxford_ä"], "qimlist": ["all_souls_000006"], "gnd": [query]}


@pytest.mark.parametrize("protocol", range(5))
def test_ground_truth_is_read_in_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(ground_truth(), protocol))
    back: Any = safe_load.read_ground_truth(tmp_path / "gnd.pkl")
    there, here = ground_truth()["gnd"][0], back["gnd"][0]
    assert list(back) == list(ground_truth())
    assert back["imlist"] == ground_truth()["imlist"]
    for name, value in there.items():
        assert np.array_equal(here[name], value) if isinstance(value, np.ndarray) else here[name] == value
        assert type(here[name]) is type(value)


def test_ground_truth_of_python_2_is_read_with_latin_1_text(tmp_path: Path) -> None:
    # {'gnd': [array([1, 2], dtype=int16), 7L], 'caf\xe9': u'x'}, pickled by Python 2 in protocol 2.
    data = (
        b"\x80\x02}q\x00(U\x03gnd]q\x01(cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x04\x01\x00\x02\x00tb\x8a\x01\x07eU\x04caf\xe9X\x01\x00\x00\x00xu."
    )
    (tmp_path / "gnd.pkl").write_bytes(data)
    back: Any = safe_load.read_ground_truth(tmp_path / "gnd.pkl")
    assert pickle.loads(data, encoding="latin1").keys() == back.keys() == {"gnd", "café"}
    assert back["gnd"][0].tolist() == [1, 2]
    assert back["gnd"][1] == 7
    assert back["café"] == "x"


def test_ground_truth_of_published_size_is_read(tmp_path: Path) -> None:
    queries = [{"easy": list(range(900))} for _ in range(70)]
    content = {"imlist": [f"paris_{n:06d}" for n in range(6322)], "gnd": queries}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content))
    assert safe_load.read_ground_truth(tmp_path / "gnd.pkl") == content
