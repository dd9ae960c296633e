"""MoCo's, MAE's and iBOT's files."""

from __future__ import annotations

from pathlib import Path

import foreign_checkpoints as files
import pytest
import torch
from test_weights_layouts import assert_same_output, saved
from tiny_run import differing_bits

from dino_xcit.errors import InputError
from dino_xcit.weights import load_backbone, read_weights


def test_moco_v3_gives_both_encoders_of_a_transformer(tmp_path: Path) -> None:
    student, teacher = files.vit(1), files.vit(2)
    path = saved(tmp_path, files.moco_v3(student, teacher, "head"))
    read = load_backbone(path)
    assert_same_output(read, teacher)
    assert_same_output(load_backbone(path, "student"), student)
    assert (read.layout, read.network) == ("a checkpoint of MoCo v3", "teacher")
    assert set(read.left_aside) == {"head", "predictor", "base_encoder"}
    assert read.classifiers == ()  # its head is a projector: nobody used labels


def test_moco_v3s_small_transformer_has_twelve_heads(tmp_path: Path) -> None:
    network = files.vit(width=384, heads=12)
    read = load_backbone(saved(tmp_path, files.moco_v3(network, network, "head")))
    assert (read.arch, read.heads_assumed) == ("vit_small_2_p16_64_h12", 0)
    assert_same_output(read, network)
    with pytest.raises(AssertionError):  # as everybody else's small one it would be another network
        assert_same_output(load_backbone(saved(tmp_path, network.state_dict())), network)


def test_moco_v3s_resnet_is_read(tmp_path: Path) -> None:
    student, teacher = files.resnet(seed=1), files.resnet(seed=2)
    path = saved(tmp_path, files.moco_v3(student, teacher, "fc"))
    assert_same_output(load_backbone(path), teacher)
    assert_same_output(load_backbone(path, "student"), student)


def test_moco_v3s_stem_of_convolutions_is_refused_by_name(tmp_path: Path) -> None:
    state = {key.replace("patch_embed.proj.", "patch_embed.proj.0."): v for key, v in files.vit().state_dict().items()}
    with pytest.raises(InputError, match=r"several convolutions \(MoCo v3's vit_conv_\.\.\.\), which is not read"):
        load_backbone(saved(tmp_path, state))


def test_moco_gives_both_encoders_and_a_published_file_the_student(tmp_path: Path) -> None:
    student, teacher = files.resnet(seed=1), files.resnet(seed=2)
    path = saved(tmp_path, files.moco(student, teacher))
    assert_same_output(load_backbone(path), teacher)
    read = load_backbone(path, "student")
    assert_same_output(read, student)
    assert (read.layout, read.left_aside[0]) == ("a checkpoint of MoCo", "fc")
    path = saved(tmp_path, files.moco(student, None))
    with pytest.raises(InputError, match="holds no teacher, only student: use --network student"):
        load_backbone(path)
    assert_same_output(load_backbone(path, "student"), student)


def test_moco_1s_projector_is_no_classifier(tmp_path: Path) -> None:
    network = files.resnet()
    read = load_backbone(saved(tmp_path, files.moco(network, network, version=1)))
    assert (read.left_aside[0], read.classifiers) == ("fc", ())


def test_mae_leaves_its_decoder_aside_by_name(tmp_path: Path) -> None:
    network = files.vit()
    read = load_backbone(saved(tmp_path, files.mae(network)))
    assert_same_output(read, network)
    assert (read.layout, read.network) == ("a MAE checkpoint", "the only network")
    assert set(read.left_aside) == {
        "mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred",
    }  # fmt: skip


def test_a_key_that_only_begins_like_a_known_leftover_is_refused(tmp_path: Path) -> None:
    for key in ("mask_token_2", "decoder_pos_embed2", "decoder.weight", "poolers.weight"):
        content = files.mae(files.vit())
        content["model"][key] = torch.zeros(2)
        with pytest.raises(InputError, match=rf"has besides {key} "):
            load_backbone(saved(tmp_path, content))


def test_ibot_is_read_as_dino_with_the_head_of_whole_images(tmp_path: Path) -> None:
    student, teacher = files.vit(1), files.vit(2)
    path = saved(tmp_path, files.ibot(student, teacher))
    assert_same_output(load_backbone(path), teacher)
    read = load_backbone(path, "student")
    assert_same_output(read, student)
    assert set(read.left_aside) == {"masked_embed", "head", "teacher"}
    assert not differing_bits(read_weights(path).head, files.head(192, seed=2))
