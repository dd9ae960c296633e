"""What a result file holds beside its figures, and that nothing in one is believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import image_tree, noise_source
from PIL import Image
from result_fixtures import hits, knn_figure, write_result

from dino_xcit.data import Subset, open_source, pack
from dino_xcit.errors import InputError
from eval.compare.result_file import read_result, shown
from eval.figures import figure, unpack
from eval.protocol import images_card


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 50_000])
def test_hits_come_back_bit_by_bit(images: int) -> None:
    found = np.random.default_rng(images).random(images) < 0.7
    card = figure("any", {}, found).to_card()
    assert (unpack(str(card["hits"]), images) == found).all()
    assert len(str(card["hits"])) <= -(-images // 6) + 4, "ImageNet's 50,000 images are 8 KB of text"


def test_bits_beyond_the_last_image_are_refused() -> None:
    assert unpack("/g==", 7).all()
    with pytest.raises(ValueError, match="bits beyond its 7 images"):
        unpack("/w==", 7)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", knn_figure(20, hits(300)), knn_figure(10, hits(280, seed=1)))
    result = read_result(str(path))
    assert (result.measure, result.weights, result.counts()) == ("knn", "a", "400 validation images")
    assert [(one.name, one.percent) for one in result.figures] == [
        ("trained k=20 T=0.07 top-1", 75.0),
        ("trained k=10 T=0.07 top-1", 70.0),
    ]
    assert (result.figures[1].hits == hits(280, seed=1)).all()
    assert result.transform["antialias"] is True
    assert result.transform["mean"] == [0.485, 0.456, 0.406], "as JSON has it, whoever compares"


# ---- which images


def test_a_folder_that_was_moved_holds_the_same_images(tmp_path: Path) -> None:
    image_tree(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    first, second = (open_source(str(tmp_path / name / "val")) for name in ("here", "there"))
    assert images_card(first) == images_card(second)
    assert first.fingerprint() != second.fingerprint(), "which is why the fingerprint cannot say it"


def test_a_folder_that_was_packed_holds_the_same_images_under_other_names(tmp_path: Path) -> None:
    folder = image_tree(tmp_path / "photos") / "val"
    pack.main([str(folder), str(tmp_path / "shards")])
    first, second = images_card(open_source(str(folder))), images_card(open_source(f"tar:{tmp_path}/shards/*.tar"))
    assert {key for key in first if first[key] == second[key]} == {"contents", "labels", "names"}


def test_images_that_were_saved_anew_have_other_contents_and_the_same_names(tmp_path: Path) -> None:
    folder = image_tree(tmp_path / "photos") / "val"
    before = images_card(open_source(str(folder)))
    for path in folder.rglob("*.*"):
        with Image.open(path) as image:
            image.resize((20, 16)).save(path)
    after = images_card(open_source(str(folder)))
    assert (after["order"], after["members"]) == (before["order"], before["members"])
    assert after["contents"] != before["contents"]


def test_another_order_is_told_from_other_images() -> None:
    whole = noise_source(50)
    turned, fewer = Subset(whole, np.arange(50)[::-1].copy()), Subset(whole, np.arange(49))
    cards = [images_card(source) for source in (whole, turned, fewer)]
    assert cards[0]["members"] == cards[1]["members"] != cards[2]["members"]
    assert len({str(card["order"]) for card in cards}) == 3


def test_another_label_makes_other_images() -> None:
    source = noise_source(50)
    before = images_card(source)
    assert source.labels is not None
    source.labels = (source.labels + 1) % 3
    assert images_card(source)["members"] != before["members"]


# ---- nothing is believed


def at(*keys: str | int) -> Callable[[Any, object], None]:
    def put(card: Any, value: object) -> None:
        for key in keys[:-1]:
            card = card[key]
        card[keys[-1]] = value

    return put


def nested(times: int) -> object:
    value: object = 1
    for number in range(times):
        value = [value] if number % 2 else {"a": value}
    return value


WRONG: list[tuple[Callable[[Any, object], None], object, str]] = [
    (at("format"), 0, "has format 0, expected 1: it was written by another version"),
    (at("format"), "x" * 5000, "has format xxx"),
    (at("measure"), 3, "is no result"),
    (at("figures"), [], "is a result of knn without figures image by image or query by query: either"),
    (at("figures"), {"a": 1}, "figures is no list"),
    (at("figures"), [3], "a figure is no mapping"),
    (at("figures", 0, "hits"), "AAAA", "3 bytes for 400 images"),
    (at("figures", 0, "hits"), "?" * 68, "no base64"),
    (at("figures", 0, "images"), 399, "hits of 399 images, expected 400"),
    (at("figures", 0, "top1"), 75.5, "its hits make 75.0000, but it says 75.5000"),
    (at("figures", 0, "top1"), 101, "top1 is 101, expected percent"),
    (at("figures", 0, "top1"), True, "top1 is True, expected percent"),
    (at("figures", 0, "name"), "a\x1b[2J", "expected a word"),
    (at("figures", 0, "settings"), [1], "settings is no mapping"),
    (at("figures", 0, "settings", "k"), {"a": 1}, "expected a word or a number"),
    (at("figures", 1, "name"), "trained k=20 T=0.07 top-1", "two of its figures have one name"),
    (at("data"), 3, "is damaged"),
    (at("data"), {}, "is damaged"),
    (at("data", "val", "images"), -1, "images is -1, expected a count"),
    (at("data", "val", "images"), 1e9, "expected a count"),
    (at("data", "val", "images"), 10**12, "expected a count"),
    (at("data", "val", "classes"), "ten", "classes is ten, expected a count"),
    (at("data", "val", "order"), 7, "order is 7, expected a word"),
    (at("weights"), "hash", "weights is no mapping"),
    (at("protocol", "x"), nested(19), "more than 20 within each other"),
    (at("results"), nested(900), "more than 20 within each other"),
    (at("protocol"), {str(number): 1 for number in range(201)}, "protocol has 201 names, expected at most 200"),
    (at("figures"), [{}] * 10_001, "10,001 figures, expected at most 10,000"),
    (at("figures", 0, "settings", "a\nb"), 1, "settings has a name that cannot be shown"),
    (at("protocol", "bad\nname"), 1, "a name that cannot be shown"),
    (at("transform"), None, "transform is no mapping"),
]


@pytest.mark.parametrize(("put", "value", "sentence"), WRONG)
def test_a_damaged_result_is_refused_in_a_sentence(
    tmp_path: Path, put: Callable[[Any, object], None], value: object, sentence: str
) -> None:
    path = write_result(tmp_path / "a.json", knn_figure(20, hits(300)), knn_figure(10, hits(280)))
    card = json.loads(path.read_text())
    put(card, value)
    path.write_text(json.dumps(card))
    with pytest.raises(InputError) as refusal:
        read_result(str(path))
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert len(str(refusal.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"measure": NaN}',
        "[1, 2]",
        "\x00",
        '"knn"',
        '{"format": ' + "9" * 5000 + "}",
        '{"T": -1e999}',
    ],
)
def test_a_file_that_is_no_result_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"expected a file that run_knn\.py, .* wrote with --json"):
        read_result(str(path))


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=why):
            read_result(str(path))


def test_a_file_too_large_for_a_result_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    monkeypatch.setattr("eval.compare.result_file.MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(InputError, match="is larger than"):
        read_result(str(path))


def test_a_number_too_large_to_be_one_is_refused(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    text = path.read_text()
    assert text.count('"k": 20') == 1
    path.write_text(text.replace('"k": 20', '"k": 1e999'))
    with pytest.raises(InputError, match="1e999 is too large a number"):
        read_result(str(path))


def test_settings_within_each_other_are_read_up_to_the_limit(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    card = json.loads(path.read_text())
    card["protocol"]["x"] = nested(18)  # in the protocol, in the file: 20
    path.write_text(json.dumps(card))
    assert read_result(str(path)).protocol["x"] == nested(18)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"approximate": "ivf", "probes": 16}, "approximate ivf, probes 16"),
        ({"name": "L-BFGS", "cs": [0.1, 10.0]}, "name L-BFGS, cs 0.1 10"),
        ([[0.5, 1.0], [0.2]], "0.5 1 0.2"),
        ({"a": {"b": {"c": 1}}, "d": [[[2]]], "e": []}, "a b ..., d ..., e "),
        ({"\x1b[2J": 1}, "\\x1b[2J 1"),
        ({str(number): number for number in range(1000)}, ", ".join(f"{n} {n}" for n in range(20))),
        ("x" * 500, "x" * 157 + "..."),
    ],
)
def test_values_of_a_file_are_shown_as_words_two_levels_deep(value: object, text: str) -> None:
    assert shown(value) == text
