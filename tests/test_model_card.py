"""The model card says what the files say, and nothing that they smuggle in."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_checkpoints as files
import pytest
import timm
import torch
from export_fixtures import SMALL, checkpoint, export, scrambled

from dino_xcit.errors import InputError
from dino_xcit.export import model_card
from dino_xcit.export.provenance import shown_place
from dino_xcit.weights import load_backbone


def result_file(path: Path, weights_hash: str, **changes: object) -> Path:
    card: dict[str, object] = {
        "measure": "knn",
        "protocol": {"name": "weighted k-NN", "ks": [10]},
        "results": [{"model": "trained", "k": 10, "top1": 76.25, "top1_interval": [74.5, 78.0]}],
        "weights": {"hash": weights_hash, "path": "/home/somebody/ckpt.pth"},
        "data": {"val": {"url": "/home/somebody/pets/val", "images": 3000, "fingerprint": "abcdef0123456789"}},
        "transform": SMALL.to_dict(),
        "versions": {"torch": "2.15"},
    }
    path.write_text(json.dumps(card | changes))
    return path


def test_the_hub_s_folder_loads_and_its_card_says_what_the_files_say(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, recipe="dino", teacher_temp=0.07, epochs=100, lr=3e-4, output_dir="/home/somebody/x")
    (tmp_path / "curves.png").write_bytes(b"a picture")
    card = result_file(tmp_path / "knn.json", load_backbone(weights).hash)
    export(weights, "hf", tmp_path / "out", "--card", str(card))
    text = (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "curves.png", "model.safetensors",
    }  # fmt: skip
    assert text.startswith("---\nlibrary_name: timm\n")
    assert "| teacher\\_temp | 0.07 | 0.04 |" in text
    assert "| lr | 0.0003 | 0.0005 |" in text
    assert "| epochs |" not in text  # it is the default
    assert "top1 76.25 \\[74.5, 78\\]" in text
    assert "3000 of .../pets/val, fingerprint abcdef012345" in text
    assert load_backbone(weights).hash in text
    assert "somebody" not in text
    assert "(curves.png)" in text
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 0


def test_a_card_claims_nothing_that_the_file_does_not_say(tmp_path: Path) -> None:
    torch.save({"model": scrambled("xcit_pico_4_p8").state_dict()}, tmp_path / "supervised.pth")
    export(tmp_path / "supervised.pth", "hf", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "holds no settings" in text
    assert "does not say on what" in text
    assert "dino\n" not in text
    assert "self-supervised" not in text
    assert "does not say how images are prepared" in text
    assert "Evaluation" not in text
    assert "license" not in text
    assert "curves" not in text


def test_the_card_names_dino_for_dinos_files_alone(tmp_path: Path) -> None:
    student, teacher = files.vit(1), files.vit(2)
    resnet = files.resnet()
    full = files.dino(student, teacher, 192, teacher_wrapped=False)
    ibot = files.ibot(student, teacher)
    ibot["args"].pred_ratio = [0.0, 0.3]
    state = teacher.state_dict()
    tags = {
        "full": (full, "dino self-supervised-learning"),
        "ours alone": ({"state_dict": state, "args": {"teacher_temp": 0.04}}, "dino self-supervised-learning"),
        "MoCo 1": (files.moco(resnet, resnet, version=1), "self-supervised-learning"),
        "MoCo 3": (files.moco_v3(student, teacher, "head"), "self-supervised-learning"),
        "iBOT": (ibot, "self-supervised-learning"),
        "one network": (state, ""),
    }
    for name, (content, expected) in tags.items():
        torch.save(content, tmp_path / "file.pth")
        head = model_card._head(load_backbone(tmp_path / "file.pth"))
        found = [line.removeprefix("- ") for line in head.split("---")[1].splitlines() if line.startswith("- ")]
        assert found == ["image-feature-extraction", "timm", *expected.split()], name
        assert ("https://arxiv.org/abs/2104.14294" in head) == ("dino" in found), name


def test_a_result_of_other_weights_is_refused(tmp_path: Path) -> None:
    card = result_file(tmp_path / "knn.json", "0123456789abcdef")
    with pytest.raises(InputError, match="measured other weights"):
        export(checkpoint(tmp_path), "hf", tmp_path / "out", "--card", str(card))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weights": {}}', "[" * 5000, "\xff"])
def test_files_that_are_no_results_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "knn.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"knn\.json is no") as caught:
        export(checkpoint(tmp_path), "hf", tmp_path / "out", "--card", str(tmp_path / "knn.json"))
    assert "\n" not in str(caught.value)


def test_nothing_in_a_file_becomes_markdown_or_html_of_the_card(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> [x](http://evil) | `y`\n# z"
    weights = checkpoint(tmp_path, data_path=evil, optimizer=evil, lr=[[evil]], epochs={"a": 1})
    results: dict[str, object] = {"top1": 1.0, "name": evil}
    for _ in range(40):
        results = {"deeper": results, "top1": 2.0}
    card = result_file(tmp_path / "knn.json", load_backbone(weights).hash, results=results, measure=evil)
    export(weights, "hf", tmp_path / "out", "--card", str(card))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in text
    assert "[x](" not in text
    assert "\n# z" not in text
    assert text.count("top1 2") < 10


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/home/me/imagenet/train/", ".../imagenet/train"),
        ("tar:/data/in/train-{000..146}.tar", "tar:.../in/train-{000..146}.tar"),
        ("~/photos", ".../~/photos"),
        ("sample:fashion-mnist", "sample:fashion-mnist"),
        ("s3://bucket/a/b/c", "s3://bucket/a/b/c"),
        ("photos", "photos"),
    ],
)
def test_a_data_set_is_named_without_the_machine_s_folders(url: str, shown: str) -> None:
    assert shown_place(url) == shown
