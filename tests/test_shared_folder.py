"""An output directory that the ranks do not share: a warning at the start, an error on resuming."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ranks import Server


@pytest.fixture(scope="module")
def said(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The messages of each of two ranks (shared_folder_process.py)."""
    out = tmp_path_factory.mktemp("machines")
    server.two_ranks("shared_folder_process.py", out, timeout=120)
    return [json.loads((out / f"said-{rank}.json").read_text()) for rank in range(2)]


def test_fresh_run_warns_about_unshared_output_directory(said: list[dict[str, Any]]) -> None:
    assert re.search(r"warning: process 1 on .* cannot see the output directory of rank 0", said[0]["apart"][0])
    assert "cannot resume" not in said[0]["apart"][0]
    assert said[1]["apart"][0] == ""


def test_resume_from_unshared_output_directory_is_refused_on_every_rank(said: list[dict[str, Any]]) -> None:
    for one in said:
        assert "cannot resume from run/checkpoint.pth: process 1 on " in one["apart"][1]
        assert "--resume never" in one["apart"][1]


def test_shared_output_directory_gives_no_warning_and_no_extra_files(said: list[dict[str, Any]]) -> None:
    assert [one["together"][0] for one in said] == ["", ""]
    assert "cannot see" not in said[0]["together"][1]  # the resume fails because the checkpoint is invalid
    assert said[0]["together files"] == said[0]["apart files"] == [".lock", "checkpoint.pth"]
