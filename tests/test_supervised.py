"""What supervised tasks share: layer-wise rates, schedules, batches, averaged weights, repeated augmentation."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import noise_source
from numpy.typing import NDArray
from tiny_run import CPU, differing_bits, tensors_of
from torch import Tensor, nn

from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.methods.method import Stats
from dino_xcit.models import build_backbone
from dino_xcit.optim import Rates, set_rates
from dino_xcit.train import TrainState, new_state, train_step
from supervised.config import SupervisedConfig
from supervised.method import (
    Supervised,
    SupervisedBatch,
    SupervisedDataset,
    build_schedules,
    layer_groups,
    layers_of,
    load_initial_weights,
)

# ---- layers


def test_layers_of_xcit_are_stem_blocks_and_class_attention() -> None:
    backbone = build_backbone("xcit_pico_4_p4")
    layers = layers_of(backbone)
    assert layers.keys() == dict(backbone.named_parameters()).keys()
    by_part = {name.rsplit(".weight")[0]: layer for name, layer in layers.items()}
    assert {layer for name, layer in layers.items() if name.startswith(("patch_embed", "pos_embeder"))} == {0}
    assert [layers[f"blocks.{number}.gamma1"] for number in range(4)] == [1, 2, 3, 4]
    assert layers["cls_token"] == layers["cls_attn_blocks.0.gamma1"] == 5
    assert by_part["norm"] == max(layers.values())


def test_layers_of_timm_models_are_timms_own() -> None:
    layers = layers_of(build_backbone("vit_tiny_2_p16"))
    assert layers["model.pos_embed"] == layers["model.patch_embed.proj.weight"] == 0
    assert layers["model.blocks.0.attn.qkv.weight"] == 1
    assert layers["model.blocks.1.attn.qkv.weight"] == 2
    with pytest.raises(InputError, match="layer_decay"):
        layers_of(nn.Linear(2, 2))


def test_learning_rate_falls_by_layer_and_frozen_parameters_have_none() -> None:
    network = nn.ModuleDict({"backbone": build_backbone("xcit_pico_4_p4"), "head": nn.Linear(4, 3)})
    backbone: Any = network["backbone"]
    backbone.cls_token.requires_grad_(False)
    groups = layer_groups(network, backbone, decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_rates(optimizer, lr=1.0, weight_decay=0.3)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == sum(parameter.requires_grad for parameter in network.parameters())
    above = max(layers_of(backbone).values()) + 1
    assert found[id(network["head"].weight)] == (1.0, 0.3)
    assert found[id(network["head"].bias)] == (1.0, 0.0)
    assert found[id(backbone.blocks[0].attn.qkv.weight)] == (0.5 ** (above - 1), 0.3)
    assert found[id(backbone.blocks[3].gamma1)] == (0.5 ** (above - 4), 0.0)
    even = layer_groups(network, backbone, decay=1.0)
    assert {group["lr_scale"] for group in even} == {1.0}


# ---- schedules


def config_of(**changes: Any) -> SupervisedConfig:
    settings: dict[str, Any] = {"weights": "none", "arch": "xcit_pico_4_p4", "batch_size_per_gpu": 4, "lr": 1.0}
    settings |= {"lr_reference_batch": 0, "min_lr": 0.0, "warmup_epochs": 0.0, "epochs": 12, "precision": "fp32"}
    return SupervisedConfig(**(settings | changes))


def test_learning_rate_drops_at_shares_of_the_run_after_a_linear_warm_up() -> None:
    config = config_of(lr_schedule="step", lr_drops=(2 / 3, 11 / 12), warmup_steps=4, warmup_start_lr=0.2)
    lr = build_schedules(config, steps_per_epoch=10, global_batch=4).lr
    assert [lr.at(step) for step in (0, 2, 4, 79)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert [lr.at(step) for step in (80, 109, 110, 119)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_learning_rate_falls_linearly_over_the_given_steps_and_scales_with_the_batch() -> None:
    config = config_of(lr_schedule="linear", steps=40, lr_reference_batch=16)
    schedules = build_schedules(config, steps_per_epoch=15, global_batch=32)
    assert (schedules.total_steps, schedules.epochs) == (40, 3)
    assert [schedules.lr.at(step) for step in (0, 10, 40)] == pytest.approx([2.0, 1.5, 0.0])
    assert math.isnan(schedules.at(3).momentum), "without an average of the weights there is no momentum"
    assert "shortened to 4" in build_schedules(config_of(steps=40, warmup_steps=40), 15, 4).warning


# ---- batches


class Brightness(SupervisedDataset):
    """Images with random noise and their labels."""

    def augmented(self, index: int, pixels: NDArray[np.uint8], label: int | None) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(pixels / 255.0).permute(2, 0, 1).float() + torch.rand(1), torch.tensor(label)


def test_batch_is_a_function_of_seed_epoch_and_image() -> None:
    dataset = Brightness(noise_source(6), seed=3)
    batch = dataset.__getitems__([(0, 2), (0, 4)])
    torch.rand(5)  # the state of the generators does not matter
    again = dataset.__getitems__([(0, 4)])
    other = dataset.__getitems__([(1, 4)])
    assert isinstance(batch, SupervisedBatch)
    assert isinstance(again, SupervisedBatch)
    assert isinstance(other, SupervisedBatch)
    assert torch.equal(batch.images[1], again.images[0])
    assert not torch.equal(again.images, other.images)
    assert batch.indices.tolist() == [2, 4]
    assert len(list(batch.tensors())) == 3


def test_every_tensor_of_nested_targets_moves() -> None:
    targets = [{"boxes": torch.zeros(2, 4), "name": "a"}, {"boxes": torch.zeros(0, 4), "name": "b"}]
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)]
    batch = SupervisedBatch(images=images, targets=targets, epoch=0, indices=torch.arange(2))
    moved = batch.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved.tensors())
    assert len(list(moved.tensors())) == 5
    assert moved.targets[1]["name"] == "b"


# ---- the method


class Regression(Supervised):
    """Predicts a label from the class token."""

    def loss(self, batch: SupervisedBatch, rates: Rates) -> tuple[Tensor, Stats]:
        network: Any = self.ddp_student
        predicted = network.head(network.backbone(batch.images).cls_token)[:, 0]
        loss = (predicted - batch.targets).square().mean()
        return loss, {"images": torch.tensor(float(len(batch.targets))), "largest": predicted.detach().abs().sum()}


def state_of(config: SupervisedConfig) -> TrainState:
    start = load_initial_weights(config)
    network = nn.ModuleDict({"backbone": start.backbone, "head": nn.Linear(int(start.backbone.embed_dim), 1)})
    return new_state(config, Regression(config, CPU, network, start.backbone), CPU)


def batch_of(step: int) -> SupervisedBatch:
    found = Brightness(noise_source(32), seed=0).__getitems__([(0, 4 * step + place) for place in range(4)])
    assert isinstance(found, SupervisedBatch)
    return found


def test_averaged_weights_follow_accepted_steps_only_and_copy_batch_norm() -> None:
    config = config_of(ema=0.75, lr=1e-2)
    state = state_of(config)
    method: Any = state.method
    schedules = build_schedules(config, 4, 4)
    before = {name: value.clone() for name, value in method.evaluated.state_dict().items()}
    result = train_step(state, [batch_of(0)], schedules, config)
    assert bool(result.accepted)
    assert result.metrics(method)["momentum"] == 0.75
    own, averaged = method.trained.state_dict(), method.evaluated.state_dict()
    for name, value in averaged.items():
        if name in dict(method.trained.named_parameters()):
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * own[name])
        else:
            assert torch.equal(value, own[name]), name
    kept = tensors_of(method.state_dict())
    bad = batch_of(1)
    bad.targets = bad.targets * math.inf
    assert not bool(train_step(state, [bad], schedules, config).accepted)
    assert differing_bits(kept, tensors_of(method.state_dict())) == []
    assert method.eval_backbone is method.evaluated["backbone"]


def test_other_classes_do_not_fit_a_checkpoint() -> None:
    method: Any = state_of(config_of()).method
    state = method.state_dict()
    method.classes = ["cat", "dog"]
    with pytest.raises(ValueError, match="classes"):
        method.load_state_dict(state)


def test_accumulated_passes_give_the_mean_gradient_and_statistics() -> None:
    config = config_of(lr=1e-2, clip_grad=0.0, arch="vit_tiny_1_p8_16")  # no BatchNorm
    state = state_of(config)
    result = train_step(state, [batch_of(0), batch_of(1)], build_schedules(config, 4, 8), config)
    whole = state_of(config)
    both = batch_of(0)
    both.images, both.targets = (torch.cat([a, b]) for a, b in zip(
        (both.images, both.targets), (batch_of(1).images, batch_of(1).targets), strict=True))  # fmt: skip
    once = train_step(whole, [both], build_schedules(config, 4, 8), config)
    torch.testing.assert_close(result.gradient_norm, once.gradient_norm)
    assert result.metrics(state.method)["largest"] == pytest.approx(once.metrics(whole.method)["largest"], rel=1e-5)


def test_initial_weights_are_required_and_reproducible() -> None:
    first, second = (load_initial_weights(config_of()).backbone.state_dict() for _ in range(2))
    assert differing_bits(first, second) == []
    with pytest.raises(InputError, match="no weights"):
        load_initial_weights(SupervisedConfig())
    with pytest.raises(InputError, match="--arch"):
        SupervisedConfig(weights="none")
    with pytest.raises(InputError, match="activation_checkpointing"):
        load_initial_weights(config_of(arch="vit_tiny_1_p16", activation_checkpointing="on"))


# ---- repeated augmentation


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_visits_images_with_different_augmentations(repeats: int) -> None:
    def keys(rank: int, world: int) -> list[list[tuple[int, int]]]:
        sampler = StepSampler(40, 16 // world, 1, rank, world, seed=1, stop_step=4, repeats=repeats)
        assert sampler.steps_per_epoch == 2
        return list(sampler)

    alone = keys(0, 1)
    assert [a + b for a, b in zip(keys(0, 2), keys(1, 2), strict=True)] == alone
    for step in alone:
        assert len(set(step)) == 16, "every copy has an augmentation of its own"
        counts = Counter(index for _, index in step)
        assert len(counts) == math.ceil(16 / repeats)
        assert max(counts.values()) == repeats
    epochs = [{epoch for epoch, _ in step} for step in alone]
    assert epochs[0] == epochs[1] == set(range(repeats))
    assert epochs[0].isdisjoint(epochs[2])
    images = [{index for _, index in step} for step in alone]
    assert images[0].isdisjoint(images[1]), "the steps of an epoch visit different images"
