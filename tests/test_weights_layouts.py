"""Every layout of a file: the network that is asked for comes out as its own program computes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import pytest
import torch
from tiny_run import differing_bits
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import Allowed, LoadedBackbone, load_backbone, read_weights

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
WIDTHS = {"vit": 192, "xcit": 64, "resnet": 512}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


@torch.no_grad()
def output(network: nn.Module) -> Tensor:
    """[3, D]: what a network gives for three images, ours or its own program's."""
    found: Any = network(IMAGES)
    return (found if isinstance(found, Tensor) else found.cls_token).flatten(1)


def assert_same_output(loaded: LoadedBackbone, original: nn.Module) -> None:
    ours, theirs = output(loaded.backbone), output(original)
    assert ours.shape == theirs.shape
    assert float((theirs[0] - theirs[1]).norm() / theirs[0].norm()) > 1e-3  # it tells images apart, and is finite
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * float(theirs.abs().max()))


# ---- DINO


@pytest.mark.parametrize("kind", ["vit", "xcit", "resnet"])
def test_a_full_dino_file_gives_student_and_teacher_of_each_kind(tmp_path: Path, kind: str) -> None:
    make: Callable[[int], nn.Module] = {
        "vit": lambda seed: files.vit(seed),
        "xcit": lambda seed: files.xcit(seed),
        "resnet": lambda seed: files.resnet("resnet18", seed),
    }[kind]
    student, teacher = make(1), make(2)
    path = saved(tmp_path, files.dino(student, teacher, WIDTHS[kind], teacher_wrapped=kind != "vit"))
    read = load_backbone(path)
    assert_same_output(read, teacher)
    assert_same_output(load_backbone(path, "student"), student)
    assert not torch.allclose(output(student), output(teacher))
    assert read.arch == {"vit": "vit_tiny_2_p16_64", "xcit": "xcit_pico_4_p8", "resnet": "timm:resnet18"}[kind]
    assert "teacher" in read.describe()
    assert set(read.left_aside) == {"head", "student"}


def test_the_transformer_has_the_names_of_dinos_own_code() -> None:
    assert files.vit().state_dict().keys() == files.DINO_VIT_KEYS


def test_dinos_resnet_50_is_read_from_a_full_and_a_bare_file(tmp_path: Path) -> None:
    network = files.resnet("resnet50")
    read = load_backbone(saved(tmp_path, network.state_dict()))
    assert (read.arch, read.network) == ("timm:resnet50", "the only network")
    assert_same_output(read, network)


def test_a_bare_transformer_shows_its_patch_size_and_its_image_size(tmp_path: Path) -> None:
    for side, patch, name in ((64, 16, "vit_tiny_2_p16_64"), (64, 8, "vit_tiny_2_p8_64"), (224, 32, "vit_tiny_2_p32")):
        network = files.vit(side=side, patch=patch)
        read = load_backbone(saved(tmp_path, network.state_dict()))
        assert read.arch == name
        crop = EvalTransform() if side == 224 else EvalTransform(resize=73, crop=64)
        assert read.transform == crop
        if side == 64:
            assert_same_output(read, network)


def test_a_transformer_whose_heads_no_shape_shows_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, files.vit(width=96, heads=2).state_dict())
    with pytest.raises(InputError, match=r"number of heads follows from no shape .*--arch timm:NAME"):
        load_backbone(path)


@pytest.mark.parametrize("kind", ["head of its own", "registers", "no block left", "flat positions"])
def test_what_only_resembles_a_transformer_is_refused(tmp_path: Path, kind: str) -> None:
    state = dict(files.vit().state_dict())
    expected = {
        "head of its own": "has besides fc_norm.weight",
        "registers": "positions, expected one and a square number",
        "no block left": "0 layers",
        "flat positions": r"expected \[1, 1 \+ h \* h, D\]",
    }[kind]
    if kind == "head of its own":
        state["fc_norm.weight"] = torch.ones(192)
    if kind == "registers":
        state["pos_embed"] = torch.zeros(1, 21, 192)
    if kind == "no block left":
        state = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    if kind == "flat positions":
        state["pos_embed"] = torch.zeros(192)
    with pytest.raises(InputError, match=expected):
        load_backbone(saved(tmp_path, state))


def test_a_resnet_of_other_blocks_is_refused_with_its_blocks(tmp_path: Path) -> None:
    state = {key: value for key, value in files.resnet().state_dict().items() if not key.startswith("layer4.1.")}
    with pytest.raises(InputError, match=r"2 \+ 2 \+ 2 \+ 1 blocks"):
        load_backbone(saved(tmp_path, state))


def test_heads_that_nobody_named_are_said_to_be_assumed(tmp_path: Path) -> None:
    state = files.vit().state_dict()
    said = "heads assumed: 3 (a family's; --arch names another)"
    assert load_backbone(saved(tmp_path, state)).describe().count(said) == 1
    assert said not in load_backbone(tmp_path / "file.pth", arch="vit_tiny_2_p16_64").describe()
    for named in ("vit_tiny_2_p16_64", "vit_tiny"):  # this project's settings, and DINO's
        content = {"teacher": files.prefixed("backbone.", state), "args": {"arch": named}}
        assert said not in load_backbone(saved(tmp_path, content)).describe()
    assert "heads assumed" not in load_backbone(saved(tmp_path, files.xcit().state_dict())).describe()


def test_heads_that_a_checkpoint_of_ours_names_are_kept(tmp_path: Path) -> None:
    network = files.vit(heads=6)
    content = {"teacher": files.prefixed("backbone.", network.state_dict()), "args": {"arch": "vit_tiny_2_p16_64_h6"}}
    read = load_backbone(saved(tmp_path, content))
    assert (read.arch, read.heads_assumed) == ("vit_tiny_2_p16_64_h6", 0)
    assert_same_output(read, network)


def test_a_supervised_resnet_loses_its_classifier_and_says_so(tmp_path: Path) -> None:
    network = files.resnet("resnet18", classes=True)
    read = load_backbone(saved(tmp_path, network.state_dict()))
    assert read.left_aside == ("fc",)
    assert "left aside, not the backbone: fc" in read.describe()
    network.fc = nn.Identity()
    assert_same_output(read, network)


def test_counts_of_batches_that_old_files_do_not_have_are_no_gap_but_one_lost_count_is(tmp_path: Path) -> None:
    network = files.resnet()
    state = dict(network.state_dict())
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    assert_same_output(load_backbone(saved(tmp_path, {k: v for k, v in state.items() if k not in counts})), network)
    del state[counts[3]]
    with pytest.raises(InputError, match=f"lacks {counts[3]}"):
        load_backbone(saved(tmp_path, state))


def test_a_head_under_the_names_of_pytorchs_newer_weight_norm_is_dinos(tmp_path: Path) -> None:
    network, head = files.xcit(), files.head(64)
    newer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12, bias=False))
    written = {key: value for key, value in head.items() if key.startswith("mlp.")}
    written |= files.prefixed("last_layer.", newer.state_dict())
    content = {"teacher": files.prefixed("backbone.", network.state_dict()) | files.prefixed("head.", written)}
    read = read_weights(saved(tmp_path, content)).head
    assert read.keys() == head.keys()
    rows = read["last_layer.weight_g"] * nn.functional.normalize(read["last_layer.weight_v"], dim=1)
    torch.testing.assert_close(rows, newer.weight)


# ---- supervised XCiT, and wrappers


def test_a_supervised_xcit_loses_its_classifier_and_its_average_is_named(tmp_path: Path) -> None:
    network = files.xcit()
    classifier = {"head.weight": torch.randn(1000, 64), "head.bias": torch.zeros(1000)}
    state = dict(network.state_dict()) | classifier
    read = load_backbone(saved(tmp_path, {"model": state, "model_ema": state, "epoch": 400}))
    assert read.left_aside == ("head", "model_ema")
    assert_same_output(read, network)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "model."])
def test_wrappers_of_a_bare_backbone_are_taken_off(tmp_path: Path, prefix: str) -> None:
    network = files.xcit()
    read = load_backbone(saved(tmp_path, files.prefixed(prefix, network.state_dict())))
    assert not differing_bits(read.backbone.state_dict(), network.state_dict())


# ---- VISSL


def test_a_vissl_resnet_is_read(tmp_path: Path) -> None:
    network = files.resnet()
    trunk = files.prefixed("_feature_blocks.", network.state_dict())
    read = load_backbone(saved(tmp_path, files.vissl(trunk, {"0.clf.0.weight": torch.zeros(3, 512)})))
    assert (read.arch, read.network, read.layout) == ("timm:resnet18", "the only network", "a VISSL checkpoint")
    assert read.left_aside == ("heads",)
    assert_same_output(read, network)


def test_a_vissl_xcit_has_its_dino_teacher_in_the_loss(tmp_path: Path) -> None:
    student, teacher = files.xcit(1), files.xcit(2)
    content = files.vissl(dict(student.state_dict()), files.vissl_head(64), dict(teacher.state_dict()))
    path = saved(tmp_path, content)
    for name, network in (("teacher", teacher), ("student", student)):
        read = load_backbone(path, name)
        assert read.network == name
        assert_same_output(read, network)
    head = read_weights(path, "student").head
    assert not differing_bits(head, files.head(64))


def test_a_vissl_file_without_a_trunk_is_refused(tmp_path: Path) -> None:
    for inside in ({}, {"base_model": {"model": {"heads": {}}}}, {"base_model": {"model": 3}}, {"base_model": []}):
        with pytest.raises(InputError, match="not a VISSL checkpoint"):
            load_backbone(saved(tmp_path, {"classy_state_dict": inside}))


# ---- lightly and solo-learn


def test_lightlys_example_is_read_though_its_resnet_is_a_sequential(tmp_path: Path) -> None:
    student, teacher = files.resnet(seed=1), files.resnet(seed=2)
    path = saved(tmp_path, files.lightly_example(student, teacher, 512))
    read = load_backbone(path)
    assert (read.arch, read.network, read.layout) == ("timm:resnet18", "teacher", "a checkpoint of lightly")
    assert_same_output(read, teacher)
    assert_same_output(load_backbone(path, "student"), student)
    assert not differing_bits(read_weights(path).head, files.head(512))


def test_lightlys_benchmark_is_read_though_its_teacher_is_called_backbone(tmp_path: Path) -> None:
    student, teacher = files.vit(1), files.vit(2)
    path = saved(tmp_path, files.lightly_benchmark(student, teacher, 192))
    assert_same_output(load_backbone(path), teacher)
    assert_same_output(load_backbone(path, "student"), student)
    assert set(load_backbone(path).left_aside) >= {"student_backbone", "criterion", "online_classifier"}


def test_lightlys_moco_gives_the_encoder_of_queries_as_the_student(tmp_path: Path) -> None:
    query, key = files.resnet(seed=1), files.resnet(seed=2)
    path = saved(tmp_path, files.lightly_moco(query, key))
    read = load_backbone(path)
    assert_same_output(read, key)
    assert (read.network, read.layout) == ("teacher", "a checkpoint of lightly")
    assert_same_output(load_backbone(path, "student"), query)


def test_of_two_backbones_under_unknown_names_none_is_taken_for_the_student(tmp_path: Path) -> None:
    first, second = files.resnet(seed=1), files.resnet(seed=2)
    both = files.prefixed("backbone.", first.state_dict()) | files.prefixed("target_backbone.", second.state_dict())
    path = saved(tmp_path, files.lightning(both))
    assert_same_output(load_backbone(path), first)
    with pytest.raises(InputError, match=r"holds backbone and target_backbone, .* leave out --network student"):
        load_backbone(path, "student")


def test_lightlys_mask_token_is_left_aside_and_another_key_is_named_and_can_be_allowed(tmp_path: Path) -> None:
    content = files.lightly_benchmark(files.vit(1), files.vit(2), 192)
    content["state_dict"]["backbone.mask_token"] = torch.zeros(1, 1, 192)
    assert "mask_token" in load_backbone(saved(tmp_path, content)).left_aside
    content["state_dict"]["backbone.mask_token2"] = torch.zeros(192)
    path = saved(tmp_path, content)
    with pytest.raises(InputError, match=r"has besides mask_token2 .*--allow-unexpected KEY"):
        load_backbone(path)
    read = load_backbone(path, allowed=Allowed(unexpected=("mask_token2",)))
    assert read.allowed == ("unexpected mask_token2",)
    assert_same_output(read, files.vit(2))


def test_solo_learn_is_read_with_the_momentum_backbone_as_teacher(tmp_path: Path) -> None:
    student, teacher = files.resnet(seed=1), files.resnet(seed=2)
    path = saved(tmp_path, files.solo_learn(student, teacher, 512))
    assert_same_output(load_backbone(path), teacher)
    assert_same_output(load_backbone(path, "student"), student)


def test_a_module_with_one_backbone_gives_it_whatever_network_is_asked_for(tmp_path: Path) -> None:
    network = files.xcit()
    state = files.prefixed("backbone.", network.state_dict()) | files.prefixed("projection_head.", {"w": torch.ones(1)})
    read = load_backbone(saved(tmp_path, files.lightning(state)))
    assert (read.network, read.left_aside) == ("the only network", ("projection_head",))
    assert_same_output(read, network)


def test_a_module_without_the_network_asked_for_says_which_it_has(tmp_path: Path) -> None:
    path = saved(tmp_path, files.lightning(files.prefixed("student_backbone.", files.xcit().state_dict())))
    with pytest.raises(InputError, match="holds no teacher, only student: use --network student"):
        load_backbone(path)
    assert load_backbone(path, "student").network == "student"


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "dino": lambda state: {"teacher": files.prefixed("backbone.", state)},
    "supervised": lambda state: {"model": state},
    "bare": lambda state: dict(state),
    "vissl": lambda state: files.vissl(state),
    "lightly": lambda state: files.lightning(files.prefixed("teacher_backbone.", state)),
    "solo-learn": lambda state: files.lightning(
        files.prefixed("momentum_backbone.", state) | files.prefixed("backbone.", state)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_gaps_leftovers_and_other_shapes_are_named(tmp_path: Path, layout: str) -> None:
    state = dict(files.xcit().state_dict())
    wrong = {
        "lacks blocks.2.mlp.fc1.bias": {key: value for key, value in state.items() if key != "blocks.2.mlp.fc1.bias"},
        "has besides blocks.2.mlp.fc3.bias": state | {"blocks.2.mlp.fc3.bias": torch.zeros(2)},
        "has in another shape norm.weight": state | {"norm.weight": torch.zeros(65)},
        "has as whole numbers norm.weight": state | {"norm.weight": torch.zeros(64, dtype=torch.int64)},
    }
    for sentence, content in wrong.items():
        with pytest.raises(InputError, match=sentence):
            load_backbone(saved(tmp_path, LAYOUTS[layout](content)))
    assert load_backbone(saved(tmp_path, LAYOUTS[layout](state))).allowed == ()


def test_names_that_are_a_million_wrappers_long_cost_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"module." * 1_000_000 + "x": torch.zeros(1)})
    started = time.process_time()
    with pytest.raises(InputError, match=r"cannot tell the architecture") as caught:
        load_backbone(path)
    assert time.process_time() - started < 5  # one by one they would take an hour
    assert len(str(caught.value)) < 500


# ---- exceptions by name


def test_a_key_that_is_allowed_to_be_missing_keeps_the_same_untrained_value_each_time(tmp_path: Path) -> None:
    state = dict(files.xcit().state_dict())
    lost = [key for key in state if key.startswith("cls_attn_blocks.1.mlp.")]
    path = saved(tmp_path, {key: value for key, value in state.items() if key not in lost})
    allowed = Allowed(missing=("cls_attn_blocks.1.mlp.*",))
    torch.manual_seed(1)
    first = load_backbone(path, allowed=allowed)
    torch.manual_seed(2)
    second = load_backbone(path, allowed=allowed)
    assert first.allowed == tuple(f"missing {key}" for key in sorted(lost))
    assert first.hash == second.hash
    assert "warning: allowed, though the file does not fit" in first.describe()
    with pytest.raises(InputError, match=r"lacks cls_attn_blocks\.1\.mlp\.fc2"):
        load_backbone(path, allowed=Allowed(missing=("cls_attn_blocks.1.mlp.fc1*",)))


def test_a_name_without_a_star_allows_that_key_alone(tmp_path: Path) -> None:
    state = dict(files.xcit().state_dict())
    del state["norm.bias"]
    path = saved(tmp_path, state)
    for name in ("norm", "norm.", "norm.bia", "norm.bias.x"):
        with pytest.raises(InputError, match=r"lacks norm\.bias"):
            load_backbone(path, allowed=Allowed(missing=(name,)))
    assert load_backbone(path, allowed=Allowed(missing=("norm.bias",))).allowed == ("missing norm.bias",)


def test_a_shape_is_never_allowed_to_differ(tmp_path: Path) -> None:
    path = saved(tmp_path, dict(files.xcit().state_dict()) | {"norm.weight": torch.zeros(65)})
    with pytest.raises(InputError, match="another shape"):
        load_backbone(path, allowed=Allowed(("norm.weight",), ("norm.weight",)))


@pytest.mark.parametrize("pattern", ["*", "", "**", "a*b"])
def test_nobody_can_allow_everything(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match="expected names of keys"):
        load_backbone(saved(tmp_path, files.xcit().state_dict()), allowed=Allowed(missing=(pattern,)))
