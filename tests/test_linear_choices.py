"""run_linear.py with choices of features, kept epochs, regressions, variants: whole, interrupted, by two processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import CLASSES, image_tree, tiny_checkpoint
from ranks import Server
from run_here import Here

import run_linear
from dino_xcit.runtime import atomic
from eval.linear import logistic_search, probe_file, sgd

WNIDS = {"bars": "n01440764", "dots": "n01443537", "waves": "n01484850"}
Probe = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on 30 training and 9 validation images of three classes named by wnids."""
    folder = tmp_path_factory.mktemp("choices")
    tree = image_tree(folder / "photos", train=10)
    for part in ("train", "val"):
        for name in CLASSES:
            (tree / part / name).rename(tree / part / WNIDS[name])
    return tiny_checkpoint(folder / "run", tree)


@pytest.fixture
def probe(weights: Path, tmp_path: Path, here: Here) -> Probe:
    """Runs a probe in this process, with a folder and a result file of the name given."""

    def run(name: str, *flags: object) -> tuple[int, str, dict[str, Any]]:
        done = here(run_linear, *words_of(weights, tmp_path / name, [*map(str, flags)]))
        file = tmp_path / name / "card.json"
        return done.code, done.out + done.err, json.loads(file.read_text()) if file.exists() else {}

    return run


def words_of(weights: Path, folder: Path, flags: Sequence[str], batch: int = 4) -> list[str]:
    """Settings of a small probe, without those that ``flags`` give, or that decide nothing beside them."""
    settings = {
        "--weights": [str(weights)], "--output-dir": [str(folder)], "--json": [str(folder / "card.json")],
        "--batch-size": [str(batch)], "--num-workers": ["0"], "--holdout": ["0.2"],
        "--cache-dir": [str(folder / "features")],
    }  # fmt: skip
    if "--no-sgd" not in flags:
        settings |= {"--epochs": ["3"], "--lrs": ["0.5", "0.01"], "--crop-scale": ["0.5", "1"]}
    if "--logreg" in flags:
        settings |= {"--logreg-cs": ["1", "0.01", "100"]}
    given = {name: words for name, words in settings.items() if name not in flags}
    return [*(word for name, words in given.items() for word in (name, *words)), *flags]


ALL = ("--features", "cls", "cls+mean", "last3", "--cached", "--cached-epochs", 2, "--logreg")


def tensors(folder: Path, name: str = "linear.pth") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return content


def test_each_choice_of_features_has_the_grid_and_every_c(probe: Probe, tmp_path: Path) -> None:
    code, out, card = probe("whole", *ALL)
    assert code == 0, out
    grid, logreg = card["results"]["grid"], card["results"]["logreg"]
    assert list(grid["held_out_top1_by_features"]) == ["cls", "cls+mean", "last3"]
    assert grid["held_out_top1"] == max(grid["held_out_top1_by_features"].values())
    assert [[c for c, _ in found] for found in logreg["held_out_top1_by_c"].values()] == [[0.01, 1.0, 100.0]] * 3
    assert logreg["held_out_top1"] == max(top1 for found in logreg["held_out_top1_by_c"].values() for _, top1 in found)
    assert logreg["converged"]
    assert "cls (64 features), cls+mean (128 features), last3 (256 features)" in out
    assert "logistic regression" in out
    assert card["protocol"]["features"] == ["cls", "cls+mean", "last3"]
    assert card["protocol"]["cached"] == "2 epochs, float16"
    assert [one["settings"]["classifier"] for one in card["figures"]] == ["paper", "paper", "grid", "logreg"]
    shapes = {name: state["weight"].shape for name, state in tensors(tmp_path / "whole")["grid"].items()}
    assert shapes == {"cls": (2, 3, 64), "cls+mean": (2, 3, 128), "last3": (2, 3, 256)}


def test_the_class_token_s_classifiers_do_not_notice_the_others(probe: Probe, tmp_path: Path) -> None:
    assert probe("alone")[0] == 0
    assert probe("beside", "--features", "cls", "last2")[0] == 0
    alone, beside = (tensors(tmp_path / name) for name in ("alone", "beside"))
    for first, second in ((alone["paper"], beside["paper"]), (alone["grid"]["cls"], beside["grid"]["cls"])):
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_kept_epochs_as_many_as_are_asked_for_are_the_full_protocol(probe: Probe, tmp_path: Path) -> None:
    assert probe("full")[0] == 0
    assert probe("kept", "--cached", "--cached-epochs", 9, "--cached-precision", "float32")[0] == 0
    full, kept = (tensors(tmp_path / name) for name in ("full", "kept"))
    assert torch.allclose(full["paper"]["weight"], kept["paper"]["weight"], atol=1e-5)
    assert torch.allclose(full["grid"]["cls"]["weight"], kept["grid"]["cls"]["weight"], atol=1e-4)
    assert probe("fewer", "--cached", "--cached-epochs", 1)[0] == 0
    assert not torch.allclose(
        full["grid"]["cls"]["weight"], tensors(tmp_path / "fewer")["grid"]["cls"]["weight"], 0, 1e-3
    )


class Stop:
    """Calls a function as often as allowed, then interrupts after it."""

    def __init__(self, function: Callable[..., Any], after: int) -> None:
        self.function, self.left = function, after

    def __call__(self, *arguments: Any) -> Any:
        found = self.function(*arguments)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return found


def test_a_probe_that_is_interrupted_anywhere_ends_as_if_it_had_not_been(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the kept epochs, the training, the trying of Cs."""
    _, _, whole = probe("whole", *ALL)
    write = probe_file.write_probe
    for place, function, after, said in (
        (atomic, "write", 1, "keeping the features of 1 of 2 augmented epochs"),
        (sgd, "write_probe", 2, "after epoch 2"),
        (logistic_search, "write_probe", 4, "after 4 of 9 regressions"),
    ):
        original = getattr(place, function)
        monkeypatch.setattr(place, function, Stop(original, after))
        assert probe("parts", *ALL)[0] == 130
        monkeypatch.setattr(place, function, original)
        # What comes next is looked at by another interruption, at the very next file.
        monkeypatch.setattr(atomic, "write", Stop(atomic.write, 1))
        code, out, _ = probe("parts", *ALL)
        monkeypatch.undo()
        assert code == 130
        assert said in out, out
    assert write is probe_file.write_probe
    code, _, parts = probe("parts", *ALL)
    assert code == 0
    assert parts["results"] == whole["results"]
    assert parts["figures"] == whole["figures"]
    for name in ("linear.pth", "logreg.pth"):
        ours, theirs = tensors(tmp_path / "parts", name), tensors(tmp_path / "whole", name)
        found = [ours["classifier"] if name == "linear.pth" else ours, theirs.get("classifier", theirs)]
        assert torch.equal(found[0]["weight"], found[1]["weight"])
        assert torch.equal(found[0]["bias"], found[1]["bias"])


def test_a_regression_is_added_to_a_finished_probe_and_other_ones_are_refused(probe: Probe, tmp_path: Path) -> None:
    assert probe("p")[0] == 0
    before = (tmp_path / "p" / "linear.pth").read_bytes()
    code, out, card = probe("p", "--logreg")
    assert code == 0, out
    assert "linear.pth holds this probe" in out
    assert list(card["results"]) == ["paper", "grid", "logreg"]
    assert (tmp_path / "p" / "linear.pth").read_bytes() == before
    code, out, again = probe("p", "--logreg")
    assert "logreg.pth holds this regression" in out
    assert again["results"] == card["results"]
    code, out, _ = probe("p", "--logreg", "--logreg-iterations", 5)
    assert code == 2
    assert "logreg.pth holds another probe (iterations 1000 -> 5): choose another --output-dir" in out


def test_a_regression_alone_needs_no_sgd(probe: Probe, tmp_path: Path) -> None:
    code, out, card = probe("p", "--no-sgd", "--logreg", "--logreg-cs", 1, "--holdout", 0)
    assert code == 0, out
    assert list(card["results"]) == ["logreg"]
    assert card["results"]["logreg"]["held_out_top1"] is None
    assert not (tmp_path / "p" / "linear.pth").exists()
    code, out, _ = probe("q", "--no-sgd", "--logreg", "--logreg-iterations", 1)
    assert code == 0
    assert "has not converged after 1 iterations" in out


def test_what_was_not_trained_is_neither_said_nor_in_the_result_file(probe: Probe) -> None:
    code, out, card = probe("alone", "--no-sgd", "--logreg")
    assert code == 0, out
    assert card["protocol"]["name"].startswith("multinomial logistic regression")
    assert (card["protocol"]["cs"], card["protocol"]["iterations"]) == ([0.01, 1.0, 100.0], 1000)
    assert not card["protocol"].keys() & {"published", "epochs", "batch", "lr", "lrs", "crop_scale"}
    assert "logistic regression: 30 training images" in out
    assert not [word for word in ("epochs", "crop scale", "lr", "linear probe") if f"{word} " in out]
    code, out, card = probe("both", "--logreg", "--logreg-cs", 1, "--holdout", 0)
    assert code == 0, out
    assert card["protocol"]["name"].startswith("linear probe on the frozen class token, SGD")
    assert "grid" not in card["protocol"]["name"], "nothing is held out to choose on"
    assert card["protocol"]["logreg"]["cs"] == [1.0]
    assert "lr 0.001" in out
    assert "lr: for a batch of 256" in out


def test_the_recommended_classifier_is_measured_on_the_variants(probe: Probe, tmp_path: Path, weights: Path) -> None:
    val = weights.parent.parent / "photos" / "val"
    v2, restricted = tmp_path / "v2", tmp_path / "a"
    for number, wnid in enumerate(sorted(WNIDS.values())):
        shutil.copytree(val / wnid, v2 / str(number))
        if number:
            shutil.copytree(val / wnid, restricted / wnid)
    names = sorted(path.name for path in val.glob("*/*"))
    classes = ["bars", "dots", "waves"]
    real = [[classes.index(name.split()[0])] for name in names]
    real[0] = []
    (tmp_path / "real.json").write_text(json.dumps(real))
    words = (
        "--also", f"imagenet-v2:{v2}", f"imagenet-a:{restricted}", f"sketch:{val}", f"real:{tmp_path / 'real.json'}",
    )  # fmt: skip
    code, out, card = probe("p", "--logreg", *words)
    assert code == 0, out
    also = card["results"]["also"]
    best = card["results"][also["classifier"]]
    assert also["imagenet-v2"]["top1"] == pytest.approx(best["top1"]), "the same images in other folders"
    assert also["sketch"]["top1"] == pytest.approx(best["top1"])
    assert also["imagenet-a"]["images"] == 6
    assert also["imagenet-a"]["classes"] == 2
    assert also["real"]["images"] == 8
    assert also["real"]["data"]["labels"]
    assert "imagenet-v2 has 3 classes and 9 images here" in out
    assert "variant (" in out
    code, out, later = probe("p", *words[:2])
    assert code == 0, out
    assert "already complete" in out
    assert later["results"]["also"]["classifier"] == "grid"


MISTAKES = {
    "--features mean": "features has 'mean'",
    "--features cls cls": "features is cls cls",
    "--features last9": "last9, which needs 9 blocks, but the backbone has 4",
    "--features last2 --holdout 0": "features is last2",
    "--no-sgd": "add --logreg",
    "--logreg --holdout 0": "chosen on held-out images",
    "--logreg --logreg-cs 0": "logreg_cs is 0",
    "--cached --no-cache": "leave --no-cache out",
    "--also imagenet-c:x": "also has 'imagenet-c:x'",
    "--also sketch:a sketch:b": "also is sketch sketch",
    "--also sketch:/none": "no data at '/none'",
    "--lr inf": "lr is inf",
    "--logreg-cs 1": "logreg_cs is 1",
    "--cached-epochs 2": "cached_epochs is 2",
    "--no-sgd --logreg --cached": "cached is true",
    "--no-sgd --logreg --lrs 0.1": "lrs is 0.1",
    "--output-dir /proc/none/linear": "output_dir is /proc/none/linear, which cannot be written to",
}  # fmt: skip


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_sentences(probe: Probe, typed: str) -> None:
    code, out, _ = probe("wrong", *typed.split())
    assert code == 2
    assert MISTAKES[typed] in out
    assert "Traceback" not in out


def test_two_processes_measure_what_one_does(probe: Probe, server: Server, tmp_path: Path, weights: Path) -> None:
    _, _, one = probe("one", *ALL)
    words = words_of(weights, tmp_path / "two", [*map(str, ALL)], batch=2)
    server.runner_on_two_ranks("run_linear", words, tmp_path, timeout=240)
    two = json.loads((tmp_path / "two" / "card.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    ours, theirs = (tensors(tmp_path / name) for name in ("two", "one"))
    for name in ("cls", "cls+mean", "last3"):
        assert torch.allclose(ours["grid"][name]["weight"], theirs["grid"][name]["weight"], atol=1e-3)
    assert torch.allclose(ours["paper"]["weight"], theirs["paper"]["weight"], atol=1e-5)
    first, second = (card["results"]["logreg"]["held_out_top1_by_c"] for card in (one, two))
    assert np.allclose([*map(np.array, first.values())], [*map(np.array, second.values())])
    weight, other = (tensors(tmp_path / name, "logreg.pth")["weight"] for name in ("two", "one"))
    assert weight.shape == other.shape
    assert float((weight - other).abs().max()) < 1e-2 * float(other.abs().max())
