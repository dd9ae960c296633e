"""Packing as a command: images that cannot be read, disks that are full, folders and words that are refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_images import encoded, photograph, write_corpus
from pack_fixtures import FIVE, class_tree, content, items, pixels

from dino_xcit.data import Source, each_image, open_source
from dino_xcit.data.__main__ import main as data_command
from dino_xcit.data.packing import command
from dino_xcit.data.packing.command import main, pack
from dino_xcit.data.packing.folder import Options, PackFolder
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

SHARD = {"end": 9, "images": 4, "bytes": 1, "sha256": ""}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return class_tree(tmp_path / "tree")


# ---- images that cannot be read


def test_unreadable_images_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write_corpus(tmp_path / "in", good=30, seed=4)
    command = [str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    assert f"left out: {len(bad)} images that cannot be read" in capsys.readouterr().out
    assert main([*command, "--strict"]) == 1  # also where all is there already
    rows = [json.loads(line) for line in (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()]
    assert [Path(row["name"]) for row in rows] == bad
    assert all(row["cause"] for row in rows)
    assert [name for name, _, _ in items(tmp_path / "out")] == [path.name for path in good]
    assert [data for _, data, _ in items(tmp_path / "out")] == [path.read_bytes() for path in good]


def test_a_source_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 images .* can be read, the first because: empty file"):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])


def test_a_disk_that_goes_away_ends_the_packing_instead_of_leaving_all_out(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_IN_A_ROW", 4)
    source = open_source(str(tree))
    pack(source, tmp_path / "whole", FIVE, 1)
    out = tmp_path / "out"
    monkeypatch.setattr(source, "read", _gone_after(source, 7))
    with pytest.raises(InputError, match=r"4 images in a row cannot be read.*is the disk there\?"):
        pack(source, out, FIVE, 1)
    assert {path.name for path in out.glob("*shard*")} == {"shard-000000.tar"}
    monkeypatch.undo()
    pack(source, out, FIVE, 1)
    assert content(out) == content(tmp_path / "whole")


def _gone_after(source: Source, last: int) -> Callable[[int], Any]:
    read = source.read

    def reading(index: int) -> Any:
        if index >= last:
            raise InputError(f"cannot read the image {source.name(index)}: Input/output error")
        return read(index)

    return reading


def kill_at_five(source: Source, index: int) -> int:
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_a_killed_process_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"a process was killed while it read .*fewer --workers"):
        list(each_image.each_image(pixels(40), range(40), kill_at_five, 2))


# ---- disks and folders


def test_a_full_disk_is_a_sentence_leaves_nothing_half_named_and_is_made_good_later(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = open_source(str(tree)), tmp_path / "out"
    writes = atomic._HashingFile.write
    written = 0

    def until_full(self: Any, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 40_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writes(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic._HashingFile, "write", until_full)
        with pytest.raises(InputError, match=r"no space left on the disk for .*free some space, then run the same"):
            pack(source, out, FIVE, 1)
    assert sorted(content(out)) == ["classes.json", "pack.json", "shard-000000.tar"]
    pack(source, out, FIVE, 1)
    pack(source, tmp_path / "whole", FIVE, 1)
    assert content(out) == content(tmp_path / "whole")


def test_other_options_and_other_images_are_refused_by_name(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(open_source(str(tree)), out, Options(max_side=64, shard_images=5), 1)
    before = content(out)
    for options, words in (
        (Options(max_side=32, shard_images=5), "was begun with --max-side 64, this command is with --max-side 32"),
        (Options(shard_images=5), "with --max-side 64, this command is without --max-side"),
        (Options(max_side=64, quality=80, shard_images=5), "with --quality 90"),
        (Options(max_side=64, shard_mb=5), "without --shard-mb, this command is with --shard-mb 5"),
    ):
        with pytest.raises(InputError, match=words):
            pack(open_source(str(tree)), out, options, 1)
    (tree / "n01" / "new.jpg").write_bytes(encoded(photograph(9), "JPEG"))
    with pytest.raises(InputError, match=r"with 12 images, this command packs .* with 13, and they differ.*rm -r"):
        pack(open_source(str(tree)), out, Options(max_side=64, shard_images=5), 1)
    assert content(out) == before


def test_folders_that_cannot_be_used_are_refused(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "full" / ".precious.tmp").write_text("x")
    for place, words in (
        (tree / "out", "it lies in .*tree, which is packed"),
        (tree, "it lies in .*tree, which is packed"),
        (tmp_path / "file", "it is a file"),
        (tmp_path / "full", r"it holds \.precious\.tmp and more and no pack\.json"),
        (Path("s3://bucket/x"), "DST is a local folder"),
        (Path("/proc/nowhere/out"), "cannot write /proc/nowhere/out"),
    ):
        with pytest.raises(InputError, match=words):
            pack(source, place, FIVE, 1)
    assert len(content(tmp_path / "full")) == 2


def test_a_source_or_folder_that_cannot_be_looked_at_is_a_sentence(tree: Path, tmp_path: Path) -> None:
    for source, out in ((str(tree), tmp_path / ("x" * 300)), ("y" * 300, tmp_path / "out"), ("~nobody-here/x", "out")):
        with pytest.raises(InputError, match=r"File name too long|no data at '~nobody-here/x'"):
            main([source, str(out)])


def test_two_packings_into_one_folder_do_not_meet(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    with PackFolder(tmp_path / "out", source, FIVE), pytest.raises(InputError, match="another process packs into"):
        pack(source, tmp_path / "out", FIVE, 1)
    pack(source, tmp_path / "out", FIVE, 1)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "shards": 3}',
        b"[" * 100_000,
        b'{"version": 1, "shards": [{"name": "/x.tar", "first": 0, "end": 1, "images": 1, "bytes": 1, "sha256": ""}]}',
        json.dumps({"version": 1, "shards": [{"name": "shard-000000.tar", "first": 5} | SHARD]}).encode(),
        json.dumps(
            {"version": 1, "shards": [{"name": "shard-000000.tar", "first": 0} | SHARD | {"end": 10**12}]}
            | {"source": "x", "fingerprint": "y", "images": 12, "options": {}}
        ).encode(),
    ],
)
def test_a_damaged_manifest_is_a_sentence(tree: Path, tmp_path: Path, damage: bytes) -> None:
    source = open_source(str(tree))
    pack(source, tmp_path / "out", FIVE, 1)
    (tmp_path / "out" / "pack.json").write_bytes(damage)
    with pytest.raises(InputError, match=r"pack\.json is damaged"):
        pack(source, tmp_path / "out", FIVE, 1)


# ---- the command


def test_the_parts_of_a_folder_are_packed_one_by_one(tmp_path: Path) -> None:
    for part in ("train", "val"):
        class_tree(tmp_path / "in" / part, images=2)
    with pytest.raises(InputError, match="parts train and val: pack each"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--part", "val", "--workers", "1"]) == 0
    assert len(items(tmp_path / "out")) == 4


def test_the_same_source_from_another_folder_is_the_same(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    main([str(tree), out, "--workers", "1"])
    assert "images/s" in capsys.readouterr().out
    monkeypatch.chdir(tree.parent)
    main([tree.name, out, "--workers", "1"])
    assert "all of it was there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "found no command"),
        (["pakc"], "'pakc'"),
        (["pack", "x"], "destination is empty"),
        (["pack", "x", "y", "--max-side", "-1"], "max_side is -1"),
        (["pack", "x", "y", "--max_side", "big"], "--max_side.*'big'"),
        (["pack", "sample:fashion-mnist", "y", "--quality", "101"], "quality is 101"),
        (["pack", "x", "y", "--shard-mb", "1", "--shard-images", "1"], "shard_mb and shard_images"),
        (["pack", "absent", "y"], "no data at 'absent'"),
    ],
)
def test_mistakes_become_sentences(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        data_command(argv)


@pytest.mark.parametrize(("argv", "word"), [([], "pack SRC DST"), (["pack"], "--max_side"), (["check"], "--report")])
def test_help_is_shown(argv: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(data_command([*argv, "--help"]))
    assert ended.value.code == 0
    assert word in capsys.readouterr().out
