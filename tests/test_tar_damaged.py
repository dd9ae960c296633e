"""Tar archives that lie, are damaged or hold what is no image."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hostile_archives import GOOD, PASSED_OVER, REFUSED, packed, pax, png, write
from tar_fixtures import names

from dino_xcit.data import decode, open_source
from dino_xcit.data.tar.members import scan
from dino_xcit.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DINO_XCIT_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("kind", REFUSED)
def test_an_archive_that_cannot_be_used_is_refused_with_a_sentence(tmp_path: Path, kind: str) -> None:
    content, pattern = REFUSED[kind]
    write(content, tmp_path / "bad.tar")
    began = time.process_time()
    with pytest.raises(InputError, match=pattern) as caught:
        open_source(f"tar:{tmp_path}/bad.tar")
    assert time.process_time() - began < 2
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PASSED_OVER)
def test_what_is_no_regular_image_is_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    content, said = PASSED_OVER[kind]
    write(content, tmp_path / "odd.tar")
    source = open_source(f"tar:{tmp_path}/odd.tar")
    assert names(source) == ["odd.tar/a.png"]
    assert decode(source.read(0)[0], "x").size == (3, 2)
    told = capsys.readouterr().err
    assert said in told
    assert bool(told) == bool(said)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    whole = packed(
        {"a.png": png(), "a.cls": b"1", "n" * 150 + ".png": png(), "ü" * 60 + ".jpg": b"x"}, tarfile.PAX_FORMAT
    )
    whole = whole.rstrip(b"\0")
    whole += bytes(-len(whole) % 512 + 1024)
    path = tmp_path / "a.tar"
    refused = 0
    for _ in range(400):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.2 else whole)
        for place in rng.integers(0, max(1, len(data)), size=rng.integers(1, 6)):
            if data:
                data[place] = rng.integers(256)
        if rng.random() < 0.7:  # with right checksums damage goes deeper
            for place in range(0, len(data) - 511, 512):
                if data[place + 257 : place + 262] == b"ustar":
                    data[place + 148 : place + 156] = b" " * 8
                    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
        path.write_bytes(data)
        try:
            for member in scan(str(path)):
                assert 512 <= member.offset <= member.offset + member.size <= len(data)
        except InputError:
            refused += 1
    assert 50 < refused < 400


def test_an_archive_of_pax_headers_alone_costs_no_more_than_its_length(tmp_path: Path) -> None:
    records = b"5 a=\n" * 200_000  # a megabyte: one header
    path = tmp_path / "a.tar"
    path.write_bytes(pax(records) * 8 + GOOD)
    began = time.process_time()
    assert [member.name for member in scan(str(path))] == ["a.png"]
    assert time.process_time() - began < 5


def test_more_members_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(packed({f"{number}.jpg": b"" for number in range(11)}))
    monkeypatch.setattr("dino_xcit.data.tar.members.MOST_MEMBERS", 10)
    with pytest.raises(InputError, match="more than 10 members"):
        open_source(f"tar:{tmp_path}/a.tar")
