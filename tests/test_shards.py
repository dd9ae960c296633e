"""An extraction in parts: what is made, by whom, what is made again, and what is refused."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import SMALL, MeanColours, noise_source
from numpy.typing import NDArray
from tiny_run import CPU

from dino_xcit.data import ArraySource, UndecodableImage
from dino_xcit.errors import InputError
from eval.collection import shards
from eval.collection.folder import claim
from eval.collection.shards import Parts, Plan, begin, extract_parts
from eval.features import extract
from eval.pooling import CLASS_TOKEN

PLAN = Plan({"weights": "w", "pooling": "cls"}, images=10, width=5, part_images=4)


def make(parts: Parts, missing: list[int], source: Any = None, **changes: Any) -> MeanColours:
    backbone = MeanColours()
    settings: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "unreadable": "refuse"} | changes
    extract_parts(
        parts, missing, backbone, source or noise_source(10), SMALL, CLASS_TOKEN, CPU, settings["batch_size"],
        settings["num_workers"], settings["unreadable"],
    )  # fmt: skip
    return backbone


def rows_of(parts: Parts) -> NDArray[np.float32]:
    return np.concatenate(list(parts.rows()))


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_together_are_the_rows_of_a_plain_extraction(tmp_path: Path, workers: int) -> None:
    parts = begin(tmp_path, PLAN, replace=False)
    assert parts.missing("refuse") == [0, 1, 2]
    backbone = make(parts, [0, 1, 2], num_workers=workers)
    assert backbone.seen == 10
    plain = extract(MeanColours(), noise_source(10), SMALL, CPU, 2, 0, progress=False).features
    assert (rows_of(parts) == plain).all()
    assert [len(rows) for rows in parts.rows()] == [4, 4, 2]
    assert parts.missing("refuse") == []
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_finished_part_is_never_made_twice_and_one_that_is_damaged_or_lacks_its_hash_is(tmp_path: Path) -> None:
    make(begin(tmp_path, PLAN, False), [0, 1, 2])
    wanted = rows_of(begin(tmp_path, PLAN, False))
    whole = (tmp_path / "part-000001.npy").read_bytes()
    for name, content in (
        ("part-000001.npy", whole[:-1] + b"\x01"),
        ("part-000001.npy", whole[:-4]),
        ("part-000001.json", b""),
        ("part-000001.json", b'{"size": 1}'),
        ("part-000001.json", b'{"size": 1, "sha256": "x", "unreadable": [2]}'),
        ("part-000001.json", None),
        ("part-000001.npy", None),
    ):
        path = tmp_path / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        parts = begin(tmp_path, PLAN, False)
        assert parts.missing("refuse") == [1], (name, content)
        with pytest.raises(InputError, match=r"part-000001\.npy is not there, or not as it was written"):
            rows_of(parts)
        assert make(parts, [1]).seen == 4
        assert (rows_of(parts) == wanted).all()


def test_the_plan_that_was_begun_counts_and_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    make(begin(tmp_path, PLAN, False), [0, 1, 2])
    (tmp_path / ".part-000002.npy.tmp").write_bytes(b"half")
    parts = begin(tmp_path, Plan(PLAN.identity, 10, 5, part_images=7), False)
    assert parts.plan == PLAN
    assert parts.missing("refuse") == []
    assert not list(tmp_path.glob(".*.tmp"))


def test_parts_of_another_extraction_are_refused_by_name_or_replaced(tmp_path: Path) -> None:
    make(begin(tmp_path, PLAN, False), [0, 1, 2])
    other = Plan({"weights": "w", "pooling": "gem"}, 10, 5, 4)
    with pytest.raises(InputError, match="is not finished, with another pooling: repeat the command that began it"):
        begin(tmp_path, other, False)
    with pytest.raises(InputError, match="is not finished: repeat"):
        begin(tmp_path, Plan(PLAN.identity, 11, 5, 4), False)
    assert begin(tmp_path, PLAN, False).missing("refuse") == [], "a refusal changes nothing"
    assert begin(tmp_path, other, True).missing("refuse") == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", json.dumps({"version": 1, "identity": {}, "images": 10, "width": 5, "part_images": 0})],
)
def test_parts_whose_plan_is_damaged_are_said_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    make(begin(tmp_path, PLAN, False), [0, 1, 2])
    assert capsys.readouterr().out == ""
    (tmp_path / "plan.json").write_text(text)
    assert shards.are_of(tmp_path, {"weights": "another"}, 3), "nobody's, so that a finished collection removes them"
    parts = begin(tmp_path, PLAN, False)
    assert f"warning: {tmp_path / 'plan.json'} is damaged" in capsys.readouterr().out
    assert parts.missing("refuse") == [0, 1, 2]
    assert make(parts, [0, 1, 2]).seen == 10
    assert begin(tmp_path, PLAN, False).missing("refuse") == []


def test_a_plan_that_is_not_for_this_version_or_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    make(begin(tmp_path, PLAN, False), [0])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"version": 2}))
    with pytest.raises(InputError, match="is of another version of this program"):
        begin(tmp_path, PLAN, False)
    plan.unlink()
    plan.mkdir()
    with pytest.raises(InputError, match="cannot read"):
        begin(tmp_path, PLAN, False)
    assert (tmp_path / "part-000000.npy").exists()


class Damaged(ArraySource):
    """The pictures 3 and 9 cannot be read."""

    def read(self, index: int) -> Any:
        if index in (3, 9):
            raise UndecodableImage(f"picture {index} is cut short")
        return super().read(index)


def test_an_unreadable_image_ends_the_work_or_is_left_out(tmp_path: Path) -> None:
    parts = begin(tmp_path, PLAN, False)
    with pytest.raises(InputError, match=r"picture 3 is cut short \(--unreadable skip leaves such images out\)"):
        make(parts, [0, 1, 2], noise_source(10, kind=Damaged))
    assert make(parts, parts.missing("skip"), noise_source(10, kind=Damaged), unreadable="skip").seen == 8
    assert parts.unreadable() == [3, 9]
    plain = extract(MeanColours(), noise_source(10), SMALL, CPU, 2, 0, progress=False).features
    assert rows_of(parts) == pytest.approx(np.delete(plain, [3, 9], axis=0), abs=1e-6)
    assert parts.missing("skip") == []
    assert parts.missing("refuse") == [0, 2], "a part that lacks an image will not do then"


def test_for_an_unreadable_image_skip_is_offered_first_and_what_a_changed_folder_costs(tmp_path: Path) -> None:
    class Advised(Damaged):
        def read(self, index: int) -> Any:
            if index == 3:
                raise UndecodableImage("picture 3 cannot be read: cut short; remove it", "cut short")
            return super().read(index)

    source = noise_source(10, kind=Advised)
    with pytest.raises(InputError) as refused:
        make(begin(tmp_path, PLAN, False), [0, 1, 2], source)
    assert str(refused.value).startswith(f"{source.name(3)} cannot be read: cut short (--unreadable skip leaves")
    assert "remove it" not in str(refused.value)
    assert "a folder that is changed" in str(refused.value)
    assert str(refused.value).endswith("is extracted from its start, with --overwrite")


def test_vectors_that_are_no_numbers_end_the_work_before_a_part_is_kept(tmp_path: Path) -> None:
    parts = begin(tmp_path, PLAN, False)

    def diverged(backbone: Any, images: torch.Tensor) -> torch.Tensor:
        rows = CLASS_TOKEN(backbone, images)
        rows[-1, 0] = torch.inf
        return rows

    with pytest.raises(InputError, match="the vectors are not finite numbers"):
        extract_parts(parts, [0, 1, 2], MeanColours(), noise_source(10), SMALL, diverged, CPU, 2, 0, "skip")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("part-*"))


def test_a_batch_of_nothing_but_unreadable_images_is_nothing_special(tmp_path: Path) -> None:
    class None_(Damaged):
        def read(self, index: int) -> Any:
            raise UndecodableImage("gone")

    parts = begin(tmp_path, PLAN, False)
    make(parts, [0, 1, 2], noise_source(10, kind=None_), unreadable="skip")
    assert parts.unreadable() == list(range(10))
    assert rows_of(parts).shape == (0, 5)


def test_the_backbone_gets_its_mode_back(tmp_path: Path) -> None:
    backbone = MeanColours().train()
    extract_parts(
        begin(tmp_path, PLAN, False), [0, 1, 2], backbone, noise_source(10), SMALL, CLASS_TOKEN, CPU, 3, 0, "refuse"
    )
    assert backbone.training
    assert not torch.is_inference_mode_enabled()


def test_two_extractions_into_one_folder_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card: dict[str, Any] = {"data": {"fingerprint": "d"}}
    with ExitStack() as first, ExitStack() as second:
        assert claim(tmp_path / "v", card, noise_source(3), False, False, first) == ""
        with pytest.raises(InputError, match="is in use by another run"):
            claim(tmp_path / "v", card, noise_source(3), False, False, second)
        # A collection that is complete, and is being replaced: that run is not disturbed.
        monkeypatch.setattr("eval.collection.folder.existing", lambda *_: "same")
        with pytest.raises(InputError, match="is in use by another run"):
            claim(tmp_path / "v", card, noise_source(3), False, False, second)
        monkeypatch.undo()
    with ExitStack() as third:
        assert claim(tmp_path / "v", card, noise_source(3), False, False, third) == ""
    shards.remove(tmp_path / "v" / shards.FOLDER)
    assert list((tmp_path / "v").iterdir()) == []
