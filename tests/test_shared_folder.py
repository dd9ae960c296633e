"""An output directory that is another one on every machine: said at the start, refused where it would be missed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ranks import Server


@pytest.fixture(scope="module")
def said(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes said (shared_folder_process.py)."""
    out = tmp_path_factory.mktemp("machines")
    server.two_ranks("shared_folder_process.py", out, timeout=120)
    return [json.loads((out / f"said-{rank}.json").read_text()) for rank in range(2)]


def test_a_fresh_run_goes_on_with_a_warning(said: list[dict[str, Any]]) -> None:
    assert re.search(r"warning: process 1 on .* cannot see the output directory of rank 0", said[0]["apart"][0])
    assert "cannot resume" not in said[0]["apart"][0]
    assert said[1]["apart"][0] == ""


def test_a_run_that_would_resume_is_refused_by_every_process(said: list[dict[str, Any]]) -> None:
    for one in said:
        assert "cannot resume from run/checkpoint.pth: process 1 on " in one["apart"][1]
        assert "--resume never" in one["apart"][1]


def test_nothing_is_said_where_all_see_it_and_nothing_is_left_there(said: list[dict[str, Any]]) -> None:
    assert [one["together"][0] for one in said] == ["", ""]
    assert "cannot see" not in said[0]["together"][1]  # that checkpoint has another flaw
    assert said[0]["together files"] == said[0]["apart files"] == [".lock", "checkpoint.pth"]
