"""Exports that differ from their original never appear, and what is there already is not lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from export_fixtures import checkpoint, export
from safetensors.torch import save_file
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.export import timm_folder
from dino_xcit.export.output import SUFFIXES
from dino_xcit.export.provenance import is_export, metadata
from dino_xcit.weights import load_backbone
from dino_xcit.weights.names import to_timm


def _keys_as_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = to_timm(state)
    first = "cls_attn_blocks.0.attn."
    return out | {f"{first}v.weight": out[f"{first}k.weight"].clone()}


@pytest.mark.parametrize("before", [False, True])
def test_an_export_that_differs_is_removed_and_the_one_before_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    weights = checkpoint(tmp_path)
    out = tmp_path / "out"
    if before:
        export(weights, "timm", out)
        first = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(timm_folder, "to_timm", _keys_as_values)
    with pytest.raises(InputError, match=r"the export differs from .*ckpt\.pth at .* and was removed"):
        export(weights, "timm", out, "--overwrite")
    assert out.exists() == before
    assert not before or (out / "model.safetensors").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth"} | ({"out"} if before else set())


def test_an_export_is_replaced_on_request_alone_and_nothing_else_ever(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    file, folder, mine = tmp_path / "a.safetensors", tmp_path / "a", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for target, out in (("safetensors", file), ("timm", folder)):
        export(weights, target, out)
        with pytest.raises(InputError, match="--overwrite"):
            export(weights, target, out)
        export(weights, target, out, "--overwrite")
    with pytest.raises(InputError, match="no earlier export"):
        export(weights, "timm", mine, "--overwrite")
    assert (mine / "thesis.tex").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth", file.name, folder.name, mine.name}


def test_a_folder_with_anything_besides_an_export_is_not_replaced(tmp_path: Path) -> None:
    weights, out = checkpoint(tmp_path), tmp_path / "clone"
    export(weights, "timm", out)
    (out / ".git").mkdir()
    with pytest.raises(InputError, match=r"no earlier export \(an export writes no \.git\)"):
        export(weights, "timm", out, "--overwrite")
    (out / ".git").rmdir()
    save_file({"a": torch.ones(1)}, out / "model.safetensors")  # a model of somebody else's, with a config.json
    with pytest.raises(InputError, match=r"no earlier export \(nothing in model\.safetensors says"):
        export(weights, "timm", out, "--overwrite")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("target", ["safetensors", "onnx", "torch-export"])
def test_a_file_that_no_export_wrote_is_not_replaced(tmp_path: Path, target: str) -> None:
    weights, out = checkpoint(tmp_path), tmp_path / f"mine{SUFFIXES[target]}"
    if target == "safetensors":
        save_file({"a": torch.ones(1)}, out)
    else:
        out.write_bytes(b"years of work")
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"is no earlier export .*remove this one yourself"):
        export(weights, target, out, "--overwrite")
    assert out.read_bytes() == before


def test_onnx_files_and_torch_programs_are_known_as_exports_by_their_own_word(tmp_path: Path) -> None:
    def plus_one() -> torch.export.ExportedProgram:
        class PlusOne(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        return torch.export.export(PlusOne(), (torch.zeros(2),))

    onnx = pytest.importorskip("onnx")
    said = metadata(load_backbone(checkpoint(tmp_path)))
    for words in (said, {"written_by": "somebody"}):
        with open(tmp_path / "a.pt2", "wb") as file:
            torch.export.save(plus_one(), file, extra_files=dict(words))
        model = onnx.ModelProto()
        for key, value in words.items():
            model.metadata_props.add(key=key, value=value)
        (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
        for name in ("a.pt2", "a.onnx"):
            assert is_export(tmp_path / name) == (words is said)


def test_an_export_does_not_replace_its_own_input(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "safetensors", tmp_path / "a.safetensors")
    export(tmp_path / "ckpt.pth", "timm", tmp_path / "a")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    for weights, target, out in (
        ("a.safetensors", "safetensors", "a.safetensors"),
        ("b.safetensors", "safetensors", "a.safetensors"),
        ("a/model.safetensors", "timm", "a"),
    ):
        with pytest.raises(InputError, match="is or holds the weights that are to be exported"):
            export(tmp_path / weights, target, tmp_path / out, "--overwrite")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has /proc")
def test_a_place_where_nothing_can_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write /proc/x\.safetensors: No such file or directory; give another"):
        export(checkpoint(tmp_path), "safetensors", Path("/proc/x.safetensors"))
    with pytest.raises(InputError, match=r"cannot write .*name too long"):
        export(tmp_path / "ckpt.pth", "timm", tmp_path / ("x" * 300))
