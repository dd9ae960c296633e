"""Result files are whole or not there."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from result_fixtures import hits, knn_figure, write_result

from dino_xcit.errors import InputError
from eval.protocol import write_json


def test_a_number_that_json_has_no_word_for_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("of before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"long": list(range(100_000)), "T": math.inf})
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "of before"


def test_an_interruption_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {})
    assert not os.listdir(tmp_path)


def test_what_cannot_be_replaced_is_a_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*a\.json: Is a directory; choose another place"):
        write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == ["a.json"]


def test_figures_of_one_name_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="two figures of one name"):
        write_result(tmp_path / "a.json", knn_figure(20, hits(5)), knn_figure(20, hits(6)))
