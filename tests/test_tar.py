"""Tar archives as data sets: members, damage, samples, labels, the cached index, pickling, remote shards."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from data_fixtures import labels, names
from hostile_archives import END, GOOD, REFUSED, SKIPPED, header, packed, padded, pax, png, record

from dino_xcit.data import Source, decode, open_parts, open_source, tar
from dino_xcit.data.tar import Member
from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log

Shards = tuple[str, dict[str, bytes]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    log.warn_once.cache_clear()
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def scan(path: Path, start: int = 0, end: int | None = None) -> list[Member]:
    with open(path, "rb") as file:
        return list(tar.scan(file, str(path), start, end))


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Three shards of ten labelled images each: their pattern, and the bytes of each image by name."""
    rng = np.random.default_rng(0)
    contents: dict[str, bytes] = {}
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(10):
            data = rng.bytes(int(rng.integers(1, 3000)))
            members |= {f"{number:04d}.cls": str((shard + number) % 4).encode(), f"{number:04d}.jpg": data}
            contents[f"s-{shard}.tar/{number:04d}.jpg"] = data
        (tmp_path / f"s-{shard}.tar").write_bytes(packed(members))
    return f"tar:{tmp_path}/s-{{0..2}}.tar", contents


# ---- members


def test_images_are_read_exactly_in_any_order(shards: Shards) -> None:
    pattern, contents = shards
    source = open_source(pattern)
    assert isinstance(source, Source)
    assert names(source) == list(contents)
    expected = [(shard + number) % 4 for shard in range(3) for number in range(10)]
    assert labels(source) == expected
    assert source.classes == ("0", "1", "2", "3")
    for index in np.random.default_rng(1).permutation(30).tolist():
        assert source.read(index) == (contents[source.name(index)], expected[index])
    with pytest.raises(IndexError):
        source.read(30)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_finds_same_members_as_tarfile(tmp_path: Path, form: int) -> None:
    contents = {"a.png": b"1", "d/" * 20 + "b.png": b"22", "ü/ß.png": bytes(513), "e.png": b"", "f/g.h.png": bytes(512)}
    if form != tarfile.USTAR_FORMAT:
        contents |= {"long/" * 60 + "name.png": b"333", "x" * 180 + ".jpg": b"4"}
    path = tmp_path / "a.tar"
    path.write_bytes(packed(contents, form))
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [member[:3] for member in scan(path)] == expected
    assert [name for name, _, _ in expected] == list(contents)


def test_size_in_pax_header_overrides_size_in_header(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pax(record("size", "5")) + header(b"a.jpg", 0) + b"12345" + bytes(507) + GOOD)
    assert scan(tmp_path / "a.tar")[0][:3] == ("a.jpg", 1536, 5)
    assert open_source(f"tar:{tmp_path}/a.tar").read(0)[0] == b"12345"


# ---- damage


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_archive_is_refused_with_one_line_error(tmp_path: Path, kind: str) -> None:
    content, pattern = REFUSED[kind]
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(InputError, match=pattern) as caught:
        open_source(f"tar:{tmp_path}/bad.tar")
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SKIPPED)
def test_skipped_members_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    content, said = SKIPPED[kind]
    (tmp_path / "odd.tar").write_bytes(content)
    source = open_source(f"tar:{tmp_path}/odd.tar")
    assert names(source) == ["odd.tar/a.png"]
    assert decode(source.read(0)[0], "x").size == (3, 2)
    told = capsys.readouterr().out
    assert (said in told) if said else not told


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_damage_raises_no_error_other_than_input_error(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(3)
    members = {"a.png": png(), "a.cls": b"1", "n" * 150 + ".png": png(), "ü" * 60 + ".jpg": b"x"}
    whole = padded(packed(members, tarfile.PAX_FORMAT).rstrip(b"\0")) + END
    path = tmp_path / "a.tar"
    refused = 0
    for _ in range(count):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.2 else whole)
        for place in rng.integers(0, max(1, len(data)), size=rng.integers(1, 6)):
            if data:
                data[place] = rng.integers(256)
        if rng.random() < 0.7:  # valid checksums let damage reach later checks
            for place in range(0, len(data) - 511, 512):
                if data[place + 257 : place + 262] == b"ustar":
                    data[place + 148 : place + 156] = b" " * 8
                    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
        path.write_bytes(data)
        try:
            for member in scan(path):
                assert 512 <= member.offset <= member.offset + member.size <= len(data)
        except InputError:
            refused += 1
    assert count / 8 < refused < count


# ---- samples and labels


def written(tmp_path: Path, contents: dict[str, bytes], name: str = "a.tar") -> str:
    (tmp_path / name).write_bytes(packed(contents))
    return f"tar:{tmp_path / name}"


def test_labelled_sample_gives_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {"1.mask.png": b"m", "1.jpg": b"a", "1.png": b"b", "1.cls": b" 0\n"}
    source = open_source(written(tmp_path, first | {"2.x.PNG": b"c", "2.cls": b"1"}))
    assert names(source) == ["a.tar/1.jpg", "a.tar/2.x.PNG"]
    assert labels(source) == [0, 1]
    assert "skipped 2 further images of a sample" in capsys.readouterr().out


def test_label_applies_to_image_with_same_key(tmp_path: Path) -> None:
    """The key of a label ends at the last dot if there is such an image, else at the first dot."""
    contents = {f"in/{n:03d}.v2.{end}": data for n in range(3) for end, data in (("jpg", b"a"), ("cls", b"%d" % n))}
    contents |= {"in/003.jpg": b"a", "in/003.mask.png": b"b", "in/003.cls": b"7"}
    contents |= {"in/004.a.jpg": b"a", "in/004.b.jpg": b"b", "in/004.a.cls": b"4", "in/004.b.json": b'{"label": 5}'}
    source = open_source(written(tmp_path, contents))
    assert labels(source) == [0, 1, 2, 7, 4, 5]


def test_images_without_labels_are_separate_items(tmp_path: Path) -> None:
    url = written(tmp_path, {"2020.01.01.jpg": b"a", "2020.01.02.jpg": b"b", "x.jpg": b"c", "x.png": b"d"})
    source = open_source(url)
    assert [source.read(index) for index in range(4)] == [(b"a", None), (b"b", None), (b"c", None), (b"d", None)]


def test_last_member_of_repeated_name_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = packed({"1.jpg": b"old", "2.jpg": b"two"}), packed({"1.jpg": b"new"})
    (tmp_path / "a.tar").write_bytes(first[:2048] + second)
    source = open_source(f"tar:{tmp_path}/a.tar")
    assert {source.name(i): source.read(i)[0] for i in range(2)} == {"a.tar/1.jpg": b"new", "a.tar/2.jpg": b"two"}
    assert "1 earlier members of the same name" in capsys.readouterr().out


def test_shards_of_same_name_in_two_folders_are_distinguished(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, {"1.jpg": folder.encode()})
    found = names(open_source(f"tar:{tmp_path}/{{a,b}}/a.tar"))
    assert found == [f"{tmp_path}/a/a.tar/1.jpg", f"{tmp_path}/b/a.tar/1.jpg"]


def test_folders_are_classes_without_other_labels(tmp_path: Path) -> None:
    url = written(tmp_path, {"./in/train/dog/1.jpg": b"a", "in/train/cat/2.jpg": b"b", "in/train/dog/deep/3.jpg": b"c"})
    source = open_source(url)
    assert source.classes == ("cat", "dog")
    assert labels(source) == [1, 0, 1]
    assert open_source(written(tmp_path, {"in/cat/1.jpg": b"a"}, "b.tar")).classes == ("cat",)
    assert open_source(written(tmp_path, {"1.jpg": b"a", "2.jpg": b"b"}, "c.tar")).classes is None
    assert open_source(written(tmp_path, {"x/1.jpg": b"a", "2.jpg": b"b"}, "d.tar")).classes is None


def test_json_labels_are_numbers_or_names(tmp_path: Path) -> None:
    contents = {"1.jpg": b"a", "1.json": b'{"label": 2}', "2.jpg": b"b", "2.json": b'{"label": 0, "more": [1]}'}
    source = open_source(written(tmp_path, contents))
    assert (labels(source), source.classes) == ([2, 0], ("0", "1", "2"))
    contents |= {"1.json": b'{"label": "yak"}', "2.json": b'{"label": "ape"}'}
    source = open_source(written(tmp_path, contents, "b.tar"))
    assert (labels(source), source.classes) == ([1, 0], ("ape", "yak"))
    contents |= {"1.cls": b"0", "2.cls": b"1"}
    assert labels(open_source(written(tmp_path, contents, "c.tar"))) == [0, 1], ".cls takes precedence over .json"


def test_missing_labels_of_some_images_disable_labels_with_reason(tmp_path: Path) -> None:
    contents = {"1.jpg": b"a", "1.cls": b"0", "2.jpg": b"b", "3.jpg": b"c", "3.cls": b"-1"}
    for _ in range(2):  # the second time from the cached index
        source = open_source(written(tmp_path, contents))
        assert source.labels is source.classes is source.read(0)[1] is None
        with pytest.raises(InputError, match=r"no labels.*2 of 3 images have no label, such as 2\.jpg"):
            open_parts(None, source.url, source.url)


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        ({"a/1.jpg": b"a", "a/1.json": b'{"label": true}', "b/2.jpg": b"b"}, "1 labels in .json members"),
        ({"a/1.jpg": b"a", "a/1.json": b'{"label": [1]}'}, "1 labels in .json members"),
        ({"a/1.jpg": b"a", "a/1.json": b'{"label": "ape\\udfff"}'}, "1 labels in .json members that are neither"),
        ({"a/1.jpg": b"a", "b/2.jpg": b"b", "stray.jpg": b"c"}, "some images lie beside its folders"),
    ],
)
def test_error_states_why_there_are_no_labels(tmp_path: Path, contents: dict[str, bytes], why: str) -> None:
    url = written(tmp_path, contents)
    with pytest.raises(InputError, match=f"no labels.*{why}"):
        open_parts(None, url, url)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "crane\ntench\ncrane\n"),
        ("classes.json", '["crane", "tench", "crane"]'),
        ("classes.json", '{"1": "tench", "0": "crane", "2": "crane"}'),
    ],
)
def test_classes_file_beside_shards_names_classes(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    source = open_source(written(tmp_path, {"1.jpg": b"a", "1.cls": b"2", "2.jpg": b"b", "2.cls": b"1"}))
    assert source.classes == ("crane (0)", "tench", "crane (2)")
    (tmp_path / file).write_text(text[:9])
    with pytest.raises(InputError, match=r"classes\.\w+ names \d classes, but there are labels up to 2"):
        open_source(f"tar:{tmp_path}/a.tar")


def test_cls_names_become_classes_in_sorted_order(tmp_path: Path) -> None:
    given = {"a": b"tench\n", "b": b"crane", "c": b"tench", "d": "Käfer 2".encode()}
    contents = {f"{key}.png": png() for key in given} | {f"{key}.cls": name for key, name in given.items()}
    source = open_source(written(tmp_path, contents))
    assert source.classes == ("Käfer 2", "crane", "tench")
    assert labels(source) == [2, 1, 2, 0]
    assert open_source(source.url).fingerprint() == source.fingerprint()  # from the cached index


# ---- cached index


def test_index_is_reused_until_a_shard_changes(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, contents = shards
    index_shard = Mock(side_effect=tar._index_shard)
    monkeypatch.setattr(tar, "_index_shard", index_shard)
    first, second = open_source(pattern), open_source(pattern)
    assert index_shard.call_count == 3
    assert names(second) == names(first)
    assert [second.read(index)[0] for index in range(30)] == list(contents.values())
    assert second.fingerprint() == first.fingerprint()
    longer = {"other.jpg": b"new", "other.cls": b"1", "notes.txt": bytes(100_000)}  # longer than all old offsets
    (tmp_path / "s-1.tar").write_bytes(packed(longer))
    third = open_source(pattern)
    assert index_shard.call_count == 6
    assert len(third) == 21
    assert third.read(10) == (b"new", 1)
    assert third.fingerprint() != first.fingerprint()


def test_shard_replaced_or_deleted_in_use_raises_error(shards: Shards, tmp_path: Path) -> None:
    source = open_source(shards[0])
    (tmp_path / "s-0.tar").write_bytes(packed({f"{number}.jpg": bytes(2000) for number in range(40)}))
    (tmp_path / "s-1.tar").write_bytes(GOOD)
    (tmp_path / "s-2.tar").unlink()
    for index in range(30):
        with pytest.raises(InputError, match=r"s-\d\.tar"):
            source.read(index)


# ---- other processes


def test_pickled_source_is_small_and_reads_the_same(tmp_path: Path) -> None:
    members = b"".join(header(b"%08d.jpg" % number, 0) for number in range(1000))
    (tmp_path / "a.tar").write_bytes(members + END)
    source = open_source(f"tar:{tmp_path}/a.tar")
    travelling = pickle.dumps(source)
    assert len(travelling) < 2000
    again = pickle.loads(travelling)
    assert len(again) == 1000
    assert again.name(999) == source.name(999) == "a.tar/00000999.jpg"
    assert again.read(999) == (b"", None)
    assert again.fingerprint() == source.fingerprint()


# ---- remote shards


def test_remote_shards_are_read_like_local_ones(shards: Shards, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for file in tmp_path.glob("*.tar"):
        memory.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    memory.pipe_file("/bucket/classes.txt", b"ape\nbee\ncow\ndog\n")
    for remote in ("tar:memory://bucket/s-{0..2}.tar", "tar:memory://bucket/s-*.tar"):
        source = open_source(remote)
        assert {source.name(index): source.read(index)[0] for index in range(30)} == shards[1]
        assert source.classes == ("ape", "bee", "cow", "dog")
    memory.pipe_file("/bucket/s-0.tar", GOOD)
    with pytest.raises(InputError, match=r"s-0\.tar"):
        source.read(0)
    assert len(open_source("tar:memory://bucket/s-*.tar")) == 21
