"""Exports to timm, which classifies as we do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from export_fixtures import SMALL, checkpoint, close, export, scrambled

from dino_xcit.data import Subset, decode, open_source
from dino_xcit.errors import InputError
from dino_xcit.export import timm_folder
from dino_xcit.export.photographs import photographs
from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from eval.features import extract
from eval.knn import knn_predict


def sample(part: str, count: int) -> Any:
    return Subset(open_source("sample:fashion-mnist", part), np.arange(count))


def test_timm_classifies_as_we_do(tmp_path: Path) -> None:
    """Features by timm's network from images that timm prepared; neighbours vote the same for every image."""
    weights = checkpoint(tmp_path)
    export(weights, "timm", tmp_path / "out")
    loaded = load_backbone(weights)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    ours, theirs, labels = [], [], []
    for part, count in (("train", 300), ("val", 100)):
        source = sample(part, count)
        found = extract(loaded.backbone, source, loaded.transform, torch.device("cpu"), 100, 0)
        ours.append(found.features)
        labels.append(found.labels)
        with torch.no_grad():
            images = torch.stack([prepare(_picture(source, index)) for index in range(count)])
            theirs.append(model(images).numpy())
        assert close(torch.from_numpy(theirs[-1]), torch.from_numpy(ours[-1]))
    expected, found = (
        knn_predict(train, labels[0], test, [1, 20], [0.07]) for train, test in ((ours[0], ours[1]), theirs)
    )
    assert all((expected[key] == found[key]).all() for key in expected)
    assert len(np.unique(expected[20, 0.07][:, 0])) > 3  # (it does tell images apart)


def _picture(source: Any, index: int) -> Any:
    return decode(source.read(index)[0], source.name(index))


def test_an_official_size_has_timms_own_name_and_loads_by_it(tmp_path: Path) -> None:
    export(checkpoint(tmp_path, "xcit_nano_12_p16"), "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "xcit_nano_12_p16_224"
    assert "model_args" not in config
    path = str(tmp_path / "out" / "model.safetensors")
    model = timm.create_model("xcit_nano_12_p16_224", checkpoint_path=path, num_classes=0).eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert close(model(images), scrambled("xcit_nano_12_p16")(images).cls_token)


def test_timm_puts_a_fresh_classifier_on_it(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 7)
    assert torch.equal(model.norm.weight, scrambled("xcit_pico_4_p8").norm.weight)  # type: ignore[union-attr]


def test_timm_knows_every_official_size() -> None:
    official = [name for name in XCIT_SIZES if "_12" in name or "_24" in name]
    assert len(official) == 7
    assert all(timm.is_model(f"{name}_p{patch}_224") for name in official for patch in (8, 16))


def test_another_timm_model_exports_under_its_name(tmp_path: Path) -> None:
    backbone = build_backbone("timm:resnet18")
    path = tmp_path / "b.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
                "args": {"arch": "timm:resnet18"}, "eval_transform": SMALL.to_dict()}, path)  # fmt: skip
    export(path, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), backbone.eval()(images).cls_token)


def test_a_patch_that_timm_lacks_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"patches of 8 and 16 pixels, xcit_pico_4_p4 has 4: --to safetensors"):
        export(checkpoint(tmp_path, "xcit_pico_4_p4"), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_timm_resizes_to_the_same_number_of_pixels_for_every_size() -> None:
    for crop in range(16, 520, 7):
        for resize in {*range(crop, 2 * crop, 3), crop - 5}:
            share = timm_folder.crop_share(EvalTransform(resize, crop))
            assert math.floor(crop / share) == resize


def test_a_folder_that_timm_would_prepare_images_otherwise_for_is_found_out(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "timm", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["interpolation"] = "bicubic"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="prepares an image"):
        timm_folder.check_transform(timm_folder.reload(tmp_path / "out"), SMALL, photographs())
