"""Tar archives as data sets."""

from __future__ import annotations

import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hostile_archives import GOOD, header, packed, pax, png, record
from tar_fixtures import labels, names, three_shards

from dino_xcit.data import Source, open_parts, open_source
from dino_xcit.data.tar.members import scan
from dino_xcit.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DINO_XCIT_CACHE", str(folder))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> tuple[str, dict[str, bytes]]:
    return three_shards(tmp_path)


# ---- round trips


def test_every_image_is_read_byte_by_byte_in_any_order(shards: tuple[str, dict[str, bytes]]) -> None:
    pattern, contents = shards
    source = open_source(pattern)
    assert isinstance(source, Source)
    assert names(source) == list(contents)
    assert labels(source) == [(shard + number) % 4 for shard in range(3) for number in range(10)]
    assert source.classes == ("0", "1", "2", "3")
    order = list(range(30))
    random.Random(1).shuffle(order)
    for index in order:
        data, label = source.read(index)
        assert data == contents[source.name(index)]
        assert source.labels is not None
        assert label == source.labels[index]
    with pytest.raises(IndexError):
        source.read(30)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_as_tarfile_finds_them(tmp_path: Path, form: int) -> None:
    contents = {"a.png": b"1", "d/" * 20 + "b.png": b"22", "ü/ß.png": bytes(513), "e.png": b"", "f/g.h.png": bytes(512)}
    if form != tarfile.USTAR_FORMAT:
        contents |= {"long/" * 60 + "name.png": b"333", "x" * 180 + ".jpg": b"4"}
    path = tmp_path / "a.tar"
    path.write_bytes(packed(contents, form))
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [member[:3] for member in scan(str(path))] == expected
    assert [name for name, _, _ in expected] == list(contents)


def test_a_tar_written_by_the_tar_command_is_read(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.png", "dog/" + "n" * 60 + "/" + "m" * 60 + ".png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(len(name)))
    for form in ("gnu", "pax", "ustar", "v7"):
        kept = ("--exclude=dog",) if form == "v7" else ()
        file = tmp_path / f"{form}.tar"
        subprocess.run(["tar", *kept, f"--format={form}", "-cf", file, "-C", tmp_path / "in", "."], check=True)
        found = {member.name: member for member in scan(str(file))}
        assert len(found) == (2 if form == "v7" else 3)
        for name, member in found.items():
            assert file.read_bytes()[member.offset :][: member.size] == (tmp_path / "in" / name).read_bytes()


def test_a_size_in_an_extended_header_counts(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pax(record("size", "5")) + header(b"a.jpg", 0) + b"12345" + bytes(507) + GOOD)
    assert next(scan(str(tmp_path / "a.tar")))[:3] == ("a.jpg", 1536, 5)
    assert open_source(f"tar:{tmp_path}/a.tar").read(0)[0] == b"12345"


def test_an_archive_within_a_file_is_listed_with_offsets_in_the_file(tmp_path: Path) -> None:
    inner = packed({"x/1.JPEG": b"one", "x/2.JPEG": b"two"})
    path = tmp_path / "outer.tar"
    path.write_bytes(packed({"n01.tar": inner, "n02.tar": packed({"3.JPEG": b"three"})}))
    outer = list(scan(str(path)))
    assert [member.name for member in outer] == ["n01.tar", "n02.tar"]
    data = path.read_bytes()
    found = {m.name: data[m.offset : m.offset + m.size] for o in outer for m in scan(str(path), o.offset, o.size)}
    assert found == {"x/1.JPEG": b"one", "x/2.JPEG": b"two", "3.JPEG": b"three"}
    with pytest.raises(InputError, match="ends before byte"):
        list(scan(str(path), outer[1].offset, 1 << 30))
    with pytest.raises(InputError, match="cut short"):
        list(scan(str(path), outer[0].offset, 1024))


# ---- samples


def written(tmp_path: Path, contents: dict[str, bytes], name: str = "a.tar") -> str:
    (tmp_path / name).write_bytes(packed(contents))
    return f"tar:{tmp_path / name}"


def test_one_image_is_taken_of_a_sample_that_has_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = written(
        tmp_path, {"1.mask.png": b"m", "1.jpg": b"a", "1.png": b"b", "1.cls": b" 0\n", "2.x.PNG": b"c", "2.cls": b"1"}
    )
    source = open_source(url)
    assert names(source) == ["a.tar/1.jpg", "a.tar/2.x.PNG"]
    assert labels(source) == [0, 1]
    assert "passed over 2 further images of a sample" in capsys.readouterr().err


def test_images_alone_are_items_each_whatever_dots_their_names_have(tmp_path: Path) -> None:
    url = written(tmp_path, {"2020.01.01.jpg": b"a", "2020.01.02.jpg": b"b", "x.jpg": b"c", "x.png": b"d"})
    source = open_source(url)
    assert [source.read(index) for index in range(4)] == [(b"a", None), (b"b", None), (b"c", None), (b"d", None)]


def test_of_repeated_names_the_last_is_taken_as_by_extracting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = packed({"1.jpg": b"old", "2.jpg": b"two"}), packed({"1.jpg": b"new"})
    (tmp_path / "a.tar").write_bytes(first[:2048] + second)
    source = open_source(f"tar:{tmp_path}/a.tar")
    assert sorted((source.name(i), source.read(i)[0]) for i in range(2)) == [
        ("a.tar/1.jpg", b"new"),
        ("a.tar/2.jpg", b"two"),
    ]
    assert "1 names that come again" in capsys.readouterr().err


def test_shards_of_the_same_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, {"1.jpg": folder.encode()})
    assert names(open_source(f"tar:{tmp_path}/{{a,b}}/a.tar")) == [
        f"{tmp_path}/{folder}/a.tar/1.jpg" for folder in "ab"
    ]


def test_folders_are_classes_where_nothing_else_says_so(tmp_path: Path) -> None:
    url = written(tmp_path, {"./in/train/dog/1.jpg": b"a", "in/train/cat/2.jpg": b"b", "in/train/dog/deep/3.jpg": b"c"})
    source = open_source(url)
    assert source.classes == ("cat", "dog")
    assert labels(source) == [1, 0, 1]
    assert open_source(written(tmp_path, {"in/cat/1.jpg": b"a"}, "b.tar")).classes == ("cat",)
    assert open_source(written(tmp_path, {"1.jpg": b"a", "2.jpg": b"b"}, "c.tar")).classes is None
    assert open_source(written(tmp_path, {"x/1.jpg": b"a", "2.jpg": b"b"}, "d.tar")).classes is None


def test_labels_in_json_are_numbers_or_names(tmp_path: Path) -> None:
    contents = {"1.jpg": b"a", "1.json": b'{"label": 2}', "2.jpg": b"b", "2.json": b'{"label": 0, "more": [1]}'}
    source = open_source(written(tmp_path, contents))
    assert (labels(source), source.classes) == ([2, 0], ("0", "1", "2"))
    contents |= {"1.json": b'{"label": "yak"}', "2.json": b'{"label": "ape"}'}
    source = open_source(written(tmp_path, contents, "b.tar"))
    assert (labels(source), source.classes) == ([1, 0], ("ape", "yak"))
    contents |= {"1.cls": b"1", "2.cls": b"0"}
    assert labels(open_source(written(tmp_path, contents, "c.tar"))) == [1, 0]


def test_a_set_in_which_some_labels_are_missing_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(
        written(tmp_path, {"1.jpg": b"a", "1.cls": b"0", "2.jpg": b"b", "3.jpg": b"c", "3.cls": b"-1"})
    )
    assert source.labels is source.classes is source.read(0)[1] is None
    assert "2 of 3 images have no label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "crane\ntench\ncrane\n"),
        ("classes.json", '["crane", "tench", "crane"]'),
        ("classes.json", '{"1": "tench", "0": "crane", "2": "crane"}'),
    ],
)
def test_a_file_beside_the_shards_names_the_classes(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    source = open_source(written(tmp_path, {"1.jpg": b"a", "1.cls": b"2", "2.jpg": b"b", "2.cls": b"1"}))
    assert source.classes == ("crane (0)", "tench", "crane (2)")
    (tmp_path / file).write_text(text[:9])
    with pytest.raises(InputError, match=r"classes\.\w+ names \d classes, but there are labels up to 2"):
        open_source(f"tar:{tmp_path}/a.tar")


def test_classes_may_be_numbered_by_name(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"tench": 1, "crane": 0}')
    assert open_source(written(tmp_path, {"1.jpg": b"a", "1.cls": b"1"})).classes == ("crane", "tench")


# ---- both parts


def test_each_part_of_an_evaluation_may_be_archives(tmp_path: Path) -> None:
    train = written(tmp_path, {"1.jpg": b"a", "1.cls": b"0", "2.jpg": b"b", "2.cls": b"2"}, "t-0.tar")
    val = written(tmp_path, {"1.jpg": b"c", "1.cls": b"1"}, "v-0.tar")
    one, other = open_parts(None, train, val)
    assert one.classes == other.classes == ("0", "1", "2")
    assert (labels(one), labels(other)) == ([0, 2], [1])
    with pytest.raises(InputError, match="--train-data and --val-data"):
        open_parts(train, None, None)
    with pytest.raises(InputError, match=r"no labels.*\.cls"):
        open_parts(None, written(tmp_path, {"1.jpg": b"a"}, "u.tar"), val)
