"""Whatever file says how images are prepared: a deviation by which nothing can be divided is named there, at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import pytest
import torch
import transformers_files as hf
from safetensors.torch import save_file

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone


def _checkpoint(folder: Path, std: list[float]) -> Path:
    said = EvalTransform().to_dict() | {"std": std}
    torch.save({"teacher": files.prefixed("backbone.", files.vit().state_dict()), "eval_transform": said},
               folder / "ckpt.pth")  # fmt: skip
    return folder / "ckpt.pth"


def _export(folder: Path, std: list[float]) -> Path:
    said = {"eval_transform": json.dumps(EvalTransform().to_dict() | {"std": std})}
    save_file(dict(files.vit().state_dict()), folder / "e.safetensors", said)
    return folder / "e.safetensors"


def _timm(folder: Path, std: list[float]) -> Path:
    config: dict[str, Any] = files.XCIT_CONFIG | {"pretrained_cfg": files.XCIT_CONFIG["pretrained_cfg"] | {"std": std}}
    return files.timm_folder(folder, files.timm_xcit(), config)


def _transformers(folder: Path, std: list[float]) -> Path:
    said = hf.DINO_PREPROCESSOR | {"image_std": std}
    return hf.folder(folder, hf.weights("vit"), hf.VIT_CONFIG, said)


@pytest.mark.parametrize("written", [_checkpoint, _export, _timm, _transformers])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_deviation_by_which_nothing_can_be_divided_is_refused(
    tmp_path: Path, written: Callable[[Path, list[float]], Path], bad: float
) -> None:
    path = written(tmp_path, [0.2, bad, 0.2])
    with pytest.raises(InputError, match=rf"evaluation transform\b.*std is 0\.2, {bad:g}, 0\.2, expected") as caught:
        load_backbone(path)
    assert str(path.parent if path.is_file() else path) in str(caught.value)
    load_backbone(written(tmp_path, [0.2, 0.3, 0.2]))
