"""Files by path, here and elsewhere."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from dino_xcit.data import files
from dino_xcit.data.patterns import expand
from dino_xcit.errors import InputError


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty place in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield "memory://bucket"
    system.store.clear()


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


# ---- patterns


def names(folder: Path, *given: str) -> list[str]:
    for name in given:
        (folder / name).write_bytes(b"x")
    return [str(folder / name) for name in given]


def test_a_range_in_braces_keeps_its_zeros(tmp_path: Path) -> None:
    expected = names(tmp_path, *(f"s-{number:03d}.tar" for number in range(8, 12)))
    assert expand(f"{tmp_path}/s-{{008..011}}.tar") == expected
    assert expand(f"{tmp_path}/s-{{011..008}}.tar") == expected
    bare = names(tmp_path, *(f"t{number}.tar" for number in (10, 11, 8, 9)))
    assert expand(f"{tmp_path}/t{{8..11}}.tar") == bare


def test_choices_and_ranges_in_braces_multiply(tmp_path: Path) -> None:
    expected = names(tmp_path, "train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar")
    assert expand(f"{tmp_path}/{{val,train}}-{{0..1}}.tar") == expected
    assert expand(f"{tmp_path}/{{train-{{0..1}},val-0}}.tar") == expected[:3]


def test_wildcards_find_files_and_no_folders(tmp_path: Path) -> None:
    expected = names(tmp_path, "a1.tar", "a2.tar", "b1.tar")
    (tmp_path / "a3.tar").mkdir()
    assert expand(f"{tmp_path}/*.tar") == expected
    assert expand(f"{tmp_path}/a?.tar") == expected[:2]
    assert expand(f"{tmp_path}/[ab]1.tar") == [expected[0], expected[2]]
    assert expand(f"{tmp_path}/{{a,b}}*.tar") == expected


def test_local_patterns_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = names(tmp_path, "a.tar")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("a.tar") == expand("./*.tar") == expand("~/a.tar") == expected


def test_a_file_whose_name_looks_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    expected = names(tmp_path, "photos [2020] {a,b}.tar")
    assert expand(expected[0]) == expected
    expected = names(tmp_path, "{x}.tar")
    assert expand(f"{tmp_path}/{{x}}.tar") == expected


def test_the_first_missing_file_of_a_range_is_named(tmp_path: Path) -> None:
    names(tmp_path, "s-0.tar", "s-1.tar", "s-3.tar")
    with pytest.raises(InputError, match=r"there is no file .*s-2\.tar, which .*s-\{0\.\.4\}"):
        expand(f"{tmp_path}/s-{{0..4}}.tar")
    with pytest.raises(InputError, match=r"there is no file .*absent\.tar: check"):
        expand(f"{tmp_path}/absent.tar")
    with pytest.raises(InputError, match=r"no file matches .*t-"):
        expand(f"{tmp_path}/{{s,t}}-*.tar")


def test_a_folder_or_a_pipe_in_a_pattern_s_place_is_called_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=f"{tmp_path} is a folder: expected files, or a pattern of them such as"):
        expand(str(tmp_path))
    with pytest.raises(InputError, match="pipe is a named pipe: expected a file"):
        expand(f"{tmp_path}/{{pipe,rest}}")


def test_a_pattern_of_a_thousand_braces_is_refused() -> None:
    with pytest.raises(InputError, match="more than 50 braces"):
        expand("/x/" + "{0..1}" * 1200)


def test_a_pattern_for_a_trillion_files_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="more than 1,000,000 files"):
        expand("/x/{0..999999999999}.tar")
    with pytest.raises(InputError, match="more than 1,000,000 files"):
        expand("/x/" + "{0..9}" * 12)


def test_patterns_work_elsewhere_too(memory: str) -> None:
    for name in ("a-00.tar", "a-01.tar", "b-00.tar", "sub/c.tar"):
        put(f"{memory}/{name}", b"x")
    assert [path[-8:] for path in expand(f"{memory}/*.tar")] == ["a-00.tar", "a-01.tar", "b-00.tar"]
    assert expand(f"{memory}/a-{{00..01}}.tar") == [f"{memory}/a-00.tar", f"{memory}/a-01.tar"]
    assert [files.read_range(path, 0, 1) for path in expand(f"{memory}/a*")] == [b"x", b"x"]
    with pytest.raises(InputError, match=r"a-02\.tar"):
        expand(f"{memory}/a-{{00..05}}.tar")
    with pytest.raises(InputError, match="no file matches"):
        expand("memory://nowhere/*.tar")


# ---- reading


@pytest.fixture(params=["local", "memory"])
def digits(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    """The path of a file that holds b"0123456789"."""
    path = str(tmp_path / "digits") if request.param == "local" else f"{memory}/digits"
    put(path, b"0123456789")
    return path


def test_ranges_are_read_exactly(digits: str) -> None:
    assert files.read_range(digits, 3, 4) == b"3456"
    assert files.read_range(digits, 0, 10) == b"0123456789"
    assert files.read_range(digits, 4, 0) == b""


def test_a_range_beyond_the_end_is_an_error(digits: str) -> None:
    for start, length in ((8, 3), (10, 1), (50, 1)):
        with pytest.raises(InputError, match="digits ends before byte"):
            files.read_range(digits, start, length)


def test_a_whole_file_is_read_up_to_a_limit(digits: str) -> None:
    assert files.read_file(digits, 10) == b"0123456789"
    with pytest.raises(InputError, match="more than 9 bytes"):
        files.read_file(digits, 9)
    put(digits, b"")
    assert files.read_file(digits, 9) == b""


def test_an_open_file_can_seek(digits: str) -> None:
    with files.open_file(digits) as file:
        file.seek(7)
        assert file.read(2) == b"78"
        file.seek(1)
        assert file.read(1) == b"1"


def test_the_stamp_tells_the_size_and_changes_with_the_file(digits: str) -> None:
    before = files.stamp(digits)
    assert before[0] == 10
    assert files.stamp(digits) == before
    put(digits, b"9876543210")
    if not files.is_remote(digits):
        os.utime(digits, ns=(0, 1))
    after = files.stamp(digits)
    assert after[0] == 10
    assert after != before
    assert files.stamps([digits, digits]) == [after, after]


def test_missing_files_and_folders_are_sentences(digits: str) -> None:
    absent, folder = digits + "-absent", digits.rpartition("/")[0]
    for ask in (files.stamp, files.open_file, lambda path: files.read_file(path, 9)):
        with pytest.raises(InputError, match="absent"):
            ask(absent)
        with pytest.raises(InputError):
            ask(folder)
    with pytest.raises(InputError, match="absent"):
        files.read_range(absent, 0, 1)


def test_what_is_no_file_is_called_by_its_kind_and_never_waited_for(tmp_path: Path) -> None:
    """A named pipe would be opened when somebody writes into it, and a socket never."""
    pipe, address, link = str(tmp_path / "pipe"), str(tmp_path / "socket"), str(tmp_path / "link")
    os.mkfifo(pipe)
    os.symlink("/dev/zero", link)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        asks: list[Callable[[str], object]] = [files.stamp, files.open_file]
        for ask in (*asks, lambda path: files.read_file(path, 9), lambda path: files.read_range(path, 0, 1)):
            kinds = {pipe: "a named pipe", address: "a socket", link: "a device", str(tmp_path): "a folder"}
            for path, kind in kinds.items():
                with pytest.raises(InputError, match=f"{path} is {kind}: expected a file"):
                    ask(path)


def test_a_local_file_with_another_stamp_than_expected_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    before = files.stamp(str(path))
    assert files.read_range(str(path), 0, 3, before) == b"old"
    for content, time in ((b"new", 1), (b"longer", int(before[1]))):
        path.write_bytes(content)
        os.utime(path, ns=(0, time))
        with pytest.raises(InputError, match="x was replaced or changed since it was opened; start the same command"):
            files.read_range(str(path), 0, 3, before)
        with pytest.raises(InputError, match="replaced or changed"):
            files.open_file(str(path), before)


def test_a_path_that_no_file_can_have_is_a_sentence(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/a\0b", f"{tmp_path}/\ud800"):
        with pytest.raises(InputError, match=r"cannot read .*check the path"):
            files.read_file(path, 9)


def test_a_file_without_permission_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")

    def refused(*_: object) -> int:  # root may read everything: no test could show it otherwise
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(InputError, match=r"no permission to read .*/x: run as somebody who may, or ask its owner"):
        files.read_file(str(tmp_path / "x"), 9)


def test_folders_are_known(digits: str) -> None:
    folder = digits.rpartition("/")[0]
    assert files.is_folder(folder)
    assert not files.is_folder(digits)
    assert not files.is_folder(folder + "/absent")


def test_everything_below_a_remote_folder_is_listed(memory: str) -> None:
    for name in ("a.png", "x/b.png", "x/y/c.png"):
        put(f"{memory}/top/{name}", name.encode())
    put(f"{memory}/top-other/d.png", b"")
    found = files.files_below(f"{memory}/top")
    assert sorted(found) == ["a.png", "x/b.png", "x/y/c.png"]
    assert found["x/b.png"] == files.stamp(f"{memory}/top/x/b.png")


def test_forked_processes_read_what_their_parent_opened(digits: str) -> None:
    files.read_range(digits, 0, 1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, files.read_range(digits, 2, 3))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 10) == b"234"


# ---- what is missing


def test_a_missing_package_is_named_with_its_command() -> None:
    for url, command in (("s3://bucket/x", "pip install s3fs"), ("gs://bucket/x", "pip install gcsfs")):
        if fsspec_can(url):
            continue
        with pytest.raises(InputError, match=command):
            files.read_range(url, 0, 1)


def fsspec_can(url: str) -> bool:
    try:
        fsspec.core.url_to_fs(url)
    except ImportError:
        return False
    return True


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="s4"):
        expand("s4://bucket/{0..1}.tar")


class Flaky:
    """A file system that fails some times before it answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left, self.error, self.asked = failures, error, 0

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise self.error
        return b"x" * (end - start)


@pytest.mark.parametrize(
    ("error", "failures", "asked"),
    [
        (ConnectionResetError("reset"), 2, 3),
        (PermissionError("no"), 1, 1),
        (TimeoutError(), 9, 3),
        (KeyError("a"), 9, 3),
    ],
)
def test_what_may_pass_is_tried_three_times(
    monkeypatch: pytest.MonkeyPatch, error: Exception, failures: int, asked: int
) -> None:
    system = Flaky(failures, error)
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(files, "_file_system", lambda path: (system, path))
    if failures < asked:
        assert files.read_range("s3://x", 0, 2) == b"xx"
    else:
        with pytest.raises(InputError, match="s3://x"):
            files.read_range("s3://x", 0, 2)
    assert system.asked == asked
