"""Local and remote files by path."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest

from dino_xcit.data import storage
from dino_xcit.data.storage import expand
from dino_xcit.errors import InputError


@pytest.fixture
def memory() -> str:
    """URL of an empty folder in fsspec's in-memory file system."""
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket"


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


# ---- patterns


def names(folder: Path, *given: str) -> list[str]:
    for name in given:
        (folder / name).write_bytes(b"x")
    return [str(folder / name) for name in given]


@pytest.mark.parametrize(("braces", "numbers"), [
    ("{008..011}", ["008", "009", "010", "011"]), ("{011..008}", ["008", "009", "010", "011"]),
    ("{8..11}", ["10", "11", "8", "9"]), ("{0..10}", ["0", "1", "10", *"23456789"]), ("{0..3}", [*"0123"]),
])  # fmt: skip
def test_brace_range_keeps_zero_padding(tmp_path: Path, braces: str, numbers: list[str]) -> None:
    expected = names(tmp_path, *(f"{number}.tar" for number in numbers))
    assert expand(f"{tmp_path}/{braces}.tar") == expected


def test_wildcards_match_files_but_not_folders(tmp_path: Path) -> None:
    expected = names(tmp_path, "a1.tar", "a2.tar", "b1.tar")
    (tmp_path / "a3.tar").mkdir()
    assert expand(f"{tmp_path}/*.tar") == expected
    assert expand(f"{tmp_path}/a?.tar") == expected[:2]
    assert expand(f"{tmp_path}/[ab]1.tar") == [expected[0], expected[2]]
    assert expand(f"{tmp_path}/{{b,a}}*.tar") == expected
    assert expand(f"{tmp_path}/{{a{{1..2}},b1}}.tar") == expected


def test_local_patterns_expand_to_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = names(tmp_path, "a.tar")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("a.tar") == expand("./*.tar") == expand("~/a.tar") == expected


@pytest.mark.parametrize("name", ["photos [2020] {a,b}.tar", "{x}.tar"])
def test_existing_file_with_pattern_characters_is_taken_literally(tmp_path: Path, name: str) -> None:
    expected = names(tmp_path, name)
    assert expand(f"{tmp_path}/{name}") == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("s-{0..4}.tar", r"s-2\.tar"),
        ("absent.tar", r"absent\.tar"),
        ("{s,t}-*.tar", "no file matches .*t-"),
        ("", "is a folder"),
        ("{0..999999999999}.tar", "more than 1,000 files"),
        ("{0..9}" * 12, "more than 1,000 files"),
    ],
)
def test_unmatched_or_oversized_pattern_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, words: str
) -> None:
    monkeypatch.setattr(storage, "MAX_FILES", 1000)
    names(tmp_path, "s-0.tar", "s-1.tar", "s-3.tar")
    with pytest.raises(InputError, match=words):
        expand(f"{tmp_path}/{pattern}")


def test_patterns_expand_on_remote_storage(memory: str) -> None:
    for name in ("a-00.tar", "a-01.tar", "b-00.tar", "sub/c.tar"):
        put(f"{memory}/{name}", b"x")
    assert [path[-8:] for path in expand(f"{memory}/*.tar")] == ["a-00.tar", "a-01.tar", "b-00.tar"]
    assert expand(f"{memory}/a-{{00..01}}.tar") == [f"{memory}/a-00.tar", f"{memory}/a-01.tar"]
    assert [storage.read_range(path, 0, 1) for path in expand(f"{memory}/a*")] == [b"x", b"x"]
    with pytest.raises(InputError, match=r"a-02\.tar"):
        expand(f"{memory}/a-{{00..05}}.tar")
    with pytest.raises(InputError, match="no file matches"):
        expand("memory://nowhere/*.tar")


# ---- reading


@pytest.fixture(params=["local", "memory"])
def digits(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    """Path of a file that contains b"0123456789"."""
    path = str(tmp_path / "digits") if request.param == "local" else f"{memory}/digits"
    put(path, b"0123456789")
    return path


def test_read_range_returns_the_requested_bytes(digits: str) -> None:
    assert storage.read_range(digits, 3, 4) == b"3456"
    assert storage.read_range(digits, 0, 10) == b"0123456789"
    assert storage.read_range(digits, 4, 0) == b""


def test_read_range_beyond_the_end_is_refused(digits: str) -> None:
    for start, length in ((8, 3), (10, 1), (50, 1)):
        with pytest.raises(InputError, match="digits ends before byte"):
            storage.read_range(digits, start, length)


def test_read_file_reads_whole_files_up_to_a_limit(digits: str) -> None:
    assert storage.read_file(digits, 10) == b"0123456789"
    with pytest.raises(InputError, match="more than 9 bytes"):
        storage.read_file(digits, 9)
    put(digits, b"")
    assert storage.read_file(digits, 9) == b""


def test_stamp_contains_size_and_changes_with_the_file(digits: str) -> None:
    before = storage.stamp(digits)
    assert storage.stamp(digits) == before
    put(digits, b"9876543210")
    if not storage.is_remote(digits):
        os.utime(digits, ns=(0, 1))
    after = storage.stamp(digits)
    assert after != before
    assert after[0] == before[0] == 10
    assert storage.stamps([digits, digits]) == [after, after]


def test_missing_files_and_folders_raise_input_error(digits: str) -> None:
    absent, folder = digits + "-absent", digits.rpartition("/")[0]
    for ask in (storage.stamp, storage.open_file, lambda path: storage.read_file(path, 9)):
        with pytest.raises(InputError, match="absent"):
            ask(absent)
        with pytest.raises(InputError):
            ask(folder)
    with pytest.raises(InputError, match="absent"):
        storage.read_range(absent, 0, 1)


def test_named_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match=r"pipe\.jpg is a device, pipe or socket"):
        storage.read_file(str(tmp_path / "pipe.jpg"), 9)


def test_files_below_lists_a_remote_folder_recursively(memory: str) -> None:
    for name in ("a.png", "x/b.png", "x/y/c.png"):
        put(f"{memory}/top/{name}", name.encode())
    put(f"{memory}/top-other/d.png", b"")
    found = storage.files_below(f"{memory}/top")
    assert sorted(found) == ["a.png", "x/b.png", "x/y/c.png"]
    assert found["x/b.png"] == storage.stamp(f"{memory}/top/x/b.png")


# ---- errors


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs")])
def test_missing_package_error_gives_install_command(monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        storage.read_range(url, 0, 1)


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="s4"):
        expand("s4://bucket/{0..1}.tar")


@pytest.mark.parametrize(
    ("error", "failures", "asked"),
    [
        (ConnectionResetError("reset"), 2, 3),
        (PermissionError("no"), 1, 1),
        (TimeoutError(), 9, 3),
        (KeyError("a"), 9, 3),
    ],
)
def test_remote_read_is_retried_twice_except_for_permission_errors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, failures: int, asked: int
) -> None:
    system = Mock()
    system.cat_file.side_effect = [error] * failures + [b"xx"]
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(storage, "_file_system", lambda path: (system, path))
    if failures < asked:
        assert storage.read_range("s3://x", 0, 2) == b"xx"
    else:
        with pytest.raises(InputError, match="s3://x"):
            storage.read_range("s3://x", 0, 2)
    assert system.cat_file.call_count == asked


def test_wildcard_in_a_chained_url_is_refused(memory: str) -> None:
    with pytest.raises(InputError, match=r"has a wildcard and a chain of file systems: list the files"):
        expand(f"filecache::{memory}/a-*.tar")
