"""run_linear.py: choices of features, cached epochs, logistic regression, ImageNet variants, two ranks, kills."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from eval_fixtures import CLASSES, image_tree, tiny_checkpoint
from run_here import Here, forked, on_two_ranks

import run_linear
from eval.linear.logistic import LogisticRegression
from eval.linear.sgd import LinearHeads

WNIDS = {"bars": "n01440764", "dots": "n01443537", "waves": "n01484850"}
Probe = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and 30 training and 9 validation images of three classes named by wnids."""
    folder = tmp_path_factory.mktemp("choices")
    tree = image_tree(folder / "photos", train=10)
    for part in ("train", "val"):
        for name in CLASSES:
            (tree / part / name).rename(tree / part / WNIDS[name])
    return tiny_checkpoint(folder / "run", tree)


@pytest.fixture
def probe(weights: Path, tmp_path: Path, here: Here) -> Probe:
    """Function that runs a probe in this process, with an output folder and result file of the given name."""

    def run(name: str, *flags: object) -> tuple[int, str, dict[str, Any]]:
        done = here(run_linear, *words_of(weights, tmp_path / name, *flags))
        return done.code, done.out + done.err, result_of(tmp_path / name) if done.code == 0 else {}

    return run


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "a.json").read_text())
    return result


def words_of(weights: Path, folder: Path, *flags: object, batch: int = 4) -> list[object]:
    """Return the flags of a small probe: ``flags``, and defaults for those that are missing and would be used."""
    settings: dict[str, tuple[object, ...]] = {
        "--weights": (weights,), "--output-dir": (folder,), "--json": (folder / "a.json",), "--batch-size": (batch,),
        "--num-workers": (0,), "--holdout": (0.2,), "--cache-dir": (folder / "features",), "--device": ("cpu",),
    }  # fmt: skip
    if "--no-sgd" not in flags:
        settings |= {"--epochs": (3,), "--lrs": (0.5, 0.01), "--crop-scale": (0.5, 1)}
    if "--no-cache" in flags:
        del settings["--cache-dir"]
    if "--logreg" in flags:
        settings |= {"--logreg-cs": (1, 0.01, 100)}
    given = {name: words for name, words in settings.items() if name not in flags}
    return [*(word for name, words in given.items() for word in (name, *words)), *flags]


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a probe with all choices at once."""
    folder = tmp_path_factory.mktemp("whole")
    assert forked(run_linear, folder, *words_of(weights, folder, *ALL)) == [0]
    return folder


ALL = ("--features", "cls", "cls+mean", "last3", "--cached", "--cached-epochs", 2, "--logreg")


def tensors(folder: Path, name: str = "linear.pth") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return content


def test_each_choice_of_features_has_grid_and_all_values_of_c(whole: Path) -> None:
    result = result_of(whole)
    grid, logreg = result["results"]["grid"], result["results"]["logreg"]
    assert list(grid["held_out_top1_by_features"]) == ["cls", "cls+mean", "last3"]
    assert grid["held_out_top1"] == max(grid["held_out_top1_by_features"].values())
    assert [[c for c, _ in found] for found in logreg["held_out_top1_by_c"].values()] == [[0.01, 1.0, 100.0]] * 3
    assert logreg["held_out_top1"] == max(top1 for found in logreg["held_out_top1_by_c"].values() for _, top1 in found)
    assert logreg["converged"]
    assert [one["settings"]["classifier"] for one in result["metrics"]] == ["paper", "paper", "grid", "logreg"]
    shapes = {name: state["weight"].shape for name, state in tensors(whole)["grid"].items()}
    assert shapes == {"cls": (2, 3, 64), "cls+mean": (2, 3, 128), "last3": (2, 3, 256)}


def test_two_ranks_match_single_process(whole: Path, tmp_path: Path, weights: Path) -> None:
    on_two_ranks(run_linear, tmp_path, *words_of(weights, tmp_path / "two", *ALL, batch=2))
    one, two = result_of(whole), result_of(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    ours, theirs = tensors(tmp_path / "two"), tensors(whole)
    for name in ("cls", "cls+mean", "last3"):
        assert torch.allclose(ours["grid"][name]["weight"], theirs["grid"][name]["weight"], atol=1e-3)
    assert torch.allclose(ours["paper"]["weight"], theirs["paper"]["weight"], atol=1e-5)
    first, second = (result["results"]["logreg"]["held_out_top1_by_c"] for result in (one, two))
    assert np.allclose([*map(np.array, first.values())], [*map(np.array, second.values())])
    weight, other = (tensors(folder, "logreg.pth")["weight"] for folder in (tmp_path / "two", whole))
    assert weight.shape == other.shape
    assert float((weight - other).abs().max()) < 1e-2 * float(other.abs().max())


def test_caching_all_epochs_equals_full_protocol(probe: Probe, tmp_path: Path) -> None:
    words = ("--epochs", 2, "--cached", "--cached-precision", "float32", "--cached-epochs")
    for name, flags in {"full": words[:2], "kept": (*words, 9), "fewer": (*words, 1)}.items():
        assert probe(name, *flags)[0] == 0
    full, kept, fewer = (tensors(tmp_path / name) for name in ("full", "kept", "fewer"))
    assert torch.allclose(full["paper"]["weight"], kept["paper"]["weight"], atol=1e-5)
    assert torch.allclose(full["grid"]["cls"]["weight"], kept["grid"]["cls"]["weight"], atol=1e-4)
    assert not torch.allclose(full["grid"]["cls"]["weight"], fewer["grid"]["cls"]["weight"], 0, 1e-3)


def test_logreg_is_added_to_finished_probe_and_changed_setting_refused(probe: Probe, tmp_path: Path) -> None:
    assert probe("p", "--epochs", 1)[0] == 0
    before = (tmp_path / "p" / "linear.pth").read_bytes()
    code, out, result = probe("p", "--epochs", 1, "--logreg")
    assert code == 0, out
    assert "linear.pth holds this probe" in out
    assert list(result["results"]) == ["paper", "grid", "logreg"]
    assert (tmp_path / "p" / "linear.pth").read_bytes() == before
    _, out, again = probe("p", "--epochs", 1, "--logreg")
    assert "logreg.pth holds this regression" in out
    assert again["results"] == result["results"]
    code, out, _ = probe("p", "--epochs", 1, "--logreg", "--logreg-iterations", 5)
    assert code == 2
    assert "logreg.pth holds another probe (iterations 1000 -> 5)" in out


def test_logreg_runs_without_sgd(probe: Probe, tmp_path: Path) -> None:
    alone = ("--no-sgd", "--logreg", "--logreg-cs", 1, "--holdout", 0, "--logreg-iterations", 1)
    code, out, result = probe("alone", *alone)
    assert code == 0, out
    assert "did not converge in 1 iterations" in out
    assert list(result["results"]) == ["logreg"]
    assert result["results"]["logreg"]["held_out_top1"] is None
    assert (result["protocol"]["cs"], result["protocol"]["iterations"]) == ([1.0], 1)
    assert not result["protocol"].keys() & {"published", "epochs", "batch", "lr", "lrs", "crop_scale"}
    assert not (tmp_path / "alone" / "linear.pth").exists()


def test_recommended_classifier_is_evaluated_on_imagenet_variants(probe: Probe, tmp_path: Path, weights: Path) -> None:
    val = weights.parent.parent / "photos" / "val"
    v2, restricted = tmp_path / "v2", tmp_path / "a"
    for number, wnid in enumerate(sorted(WNIDS.values())):
        shutil.copytree(val / wnid, v2 / str(number))
        if number:
            shutil.copytree(val / wnid, restricted / wnid)
    real = [[CLASSES.index(path.name.split()[0])] for path in sorted(val.glob("*/*"), key=lambda path: path.name)]
    (tmp_path / "real.json").write_text(json.dumps([[], *real[1:]]))
    words = (
        "--also", f"imagenet-v2:{v2}", f"imagenet-a:{restricted}", f"sketch:{val}", f"real:{tmp_path / 'real.json'}",
    )  # fmt: skip
    code, out, result = probe("p", "--epochs", 1, "--logreg", *words)
    assert code == 0, out
    also = result["results"]["also"]
    best = result["results"][also["classifier"]]
    assert also["imagenet-v2"]["top1"] == pytest.approx(best["top1"]), "accuracies on the same images differ"
    assert also["sketch"]["top1"] == pytest.approx(best["top1"])
    assert (also["imagenet-a"]["images"], also["imagenet-a"]["classes"]) == (6, 2)
    assert also["real"]["images"] == 8
    assert also["real"]["data"]["labels"]
    _, out, later = probe("p", "--epochs", 1, *words[:2])
    assert "already complete" in out
    assert later["results"]["also"]["classifier"] == "grid"


MISTAKES = {
    "--features mean": "features has 'mean'",
    "--features last2 --holdout 0": "features is last2",
    "--no-sgd": "add --logreg",
    "--logreg --holdout 0": "held-out images",
    "--cached --no-cache": "both --cached and --no-cache are given",
    "--also imagenet-c:x": "also has 'imagenet-c:x'",
    "--cached-epochs 2": "cached_epochs is 2",
    "--no-sgd --logreg --lrs 0.1": "lrs is 0.1",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_invalid_flags_are_refused(probe: Probe, typed: str) -> None:
    code, out, _ = probe("wrong", *typed.split())
    assert (code, MISTAKES[typed] in out) == (2, True), out


# ---- kills


class Death(NamedTuple):
    """Sends SIGKILL to a process at its ``call``-th call of a function (from 1)."""

    owner: Any
    name: str
    call: int

    def arm(self) -> None:
        original, calls = getattr(self.owner, self.name), itertools.count(1)

        @functools.wraps(original)
        def dies(*arguments: Any, **named: Any) -> Any:
            if next(calls) == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(self.owner, self.name, dies)


STEPS, GRIDS = 7, 2
"""Steps per epoch, and choices of features. The grid of each choice steps along with the paper's classifier."""
WITHIN_EPOCH_2 = Death(LinearHeads, "step", (STEPS + 3) * (1 + GRIDS))
"""Calls are counted per process: one that resumes with epoch 2 dies in epoch 3."""
THE_THIRD_FILE = Death(os, "replace", 3)
"""Two atomic writes complete. The third leaves only its temporary file."""


def bits(value: Any) -> Any:
    """Convert to values that are equal only if all bits are, without ``seconds``."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(one) for name, one in value.items() if name != "seconds"}
    return [bits(one) for one in value] if isinstance(value, list) else value


def left_by(folder: Path) -> dict[str, Any]:
    """Return all output of a probe, including features, and assert that no temporary file is left."""
    result = json.loads((folder / "a.json").read_text())
    found = {name: bits(torch.load(folder / name, weights_only=True)) for name in ("linear.pth", "logreg.pth")}
    found |= {name: result[name] for name in ("results", "metrics", "history", "protocol")}
    # Temporary folders of killed extractions stay for an hour, as another process may be writing them.
    found |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("features/[!.]*/*.npy")}
    assert not [path.name for path in folder.glob(".*")]
    return found


def killed_and_gone_on(weights: Path, folder: Path, deaths: list[Death], more: Sequence[str], ranks: int) -> Any:
    """Return all output of a probe that is killed and resumed once per death, then completes."""
    flags = ("--features", "cls", "last3", "--logreg", "--logreg-cs", 0.01, 1, *more)
    command = words_of(weights, folder, *flags, batch=4 // ranks)
    for death in deaths:
        assert forked(run_linear, folder.parent, *command, ranks=ranks, before=death.arm)[0] == -9, death
    assert forked(run_linear, folder.parent, *command, ranks=ranks) == [0] * ranks
    return left_by(folder)


WITHIN = [
    WITHIN_EPOCH_2,
    WITHIN_EPOCH_2,  # in epoch 3
    Death(os, "replace", 2),  # linear.pth of the last epoch exists, logreg.pth does not yet
    Death(LogisticRegression, "solve", 2),
    Death(os, "replace", 2),
]
CACHED = ("--cached", "--cached-epochs", "2")


@pytest.mark.parametrize(
    ("ranks", "more", "deaths"),
    [
        pytest.param(1, (), WITHIN, marks=pytest.mark.slow),
        # Files: features of training, held-out and validation images and of two cached epochs, linear.pth three
        # times, logreg.pth once per regression and once at the end, the result file.
        (1, CACHED, [THE_THIRD_FILE] * 5),
        pytest.param(2, (), [WITHIN_EPOCH_2, WITHIN[3]], marks=pytest.mark.slow),
    ],
)
def test_resume_after_kill_matches_uninterrupted_probe_bitwise(
    weights: Path, tmp_path: Path, ranks: int, more: tuple[str, ...], deaths: list[Death]
) -> None:
    found = killed_and_gone_on(weights, tmp_path / "killed", deaths, more, ranks)
    assert found == killed_and_gone_on(weights, tmp_path / "straight", [], more, ranks)
    assert len(found["history"]) == 3
    assert sum(name.endswith("features.npy") for name in found) == (5 if more else 3)
