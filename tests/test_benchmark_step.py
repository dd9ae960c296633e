"""benchmarks/step.py: the pipelines do the same work, the work is counted rightly, and the table's arithmetic."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Server

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from step_checks import Common, check, relative_errors  # noqa: E402
from step_crops import draw_crops, normalised  # noqa: E402
from step_flops import flop_counter, flops_of_a_step  # noqa: E402
from step_ours import OurStep  # noqa: E402
from step_plain import PlainStep, plain_loss, timm_backbone  # noqa: E402
from step_settings import QUICK_SMALL, SMALL, Row, Settings, Task, peak_row, rows_for  # noqa: E402
from step_table import PEAK_FLOPS, json_of, line_of, peaks_of, ratio, text_of  # noqa: E402
from step_turns import Measured, _report, memory_alone, take_turns  # noqa: E402
from step_verdict import BF16, GRADIENT, judge  # noqa: E402

TINY = dataclasses.replace(QUICK_SMALL, batch=2, out_dim=64, head_hidden=32, head_bottleneck=16)
OURS = Row("ours-fp32", "ours, fp32", "ours", "fp32")
TIMM = Row("timm-fp32", "timm", "timm", "fp32")


# ---- the same work


def test_the_plain_step_and_ours_have_the_same_loss_and_gradients_on_the_same_weights_and_crops() -> None:
    common = Common(TINY, 0)
    plain, ours = common.plain("fp32"), common.ours(OURS)
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)
    errors = relative_errors(ours.gradients, plain.gradients)
    assert len(errors) > 100
    assert max(errors.values()) < 1e-3


def test_a_step_that_computes_something_else_is_found_out() -> None:
    common = Common(TINY, 0)
    plain = common.plain("fp32")
    common.student["head.last_layer.weight_v"][0] += 0.2
    other = common.ours(OURS)
    errors = relative_errors(other.gradients, plain.gradients)
    assert max(errors.values()) > GRADIENT
    del other.gradients["backbone.cls_token"]
    assert relative_errors(other.gradients, plain.gradients)["backbone.cls_token"] == float("inf")


def test_what_the_checks_find_passes_or_is_named() -> None:
    bf16 = Row("ours-bf16", "ours, bf16", "ours", "bf16")
    found = json.loads(json.dumps(check(TINY, [OURS, bf16], None)))  # as it comes from the process
    assert judge(found) == []
    assert found["left_out"] == []
    assert found["flops"] == flops_of_a_step(TINY)
    assert 0 < found["bf16_errors"]["ours-bf16"] < 0.1

    wrong = json.loads(json.dumps(found))
    wrong["losses"]["ours-fp32"] *= 1.001
    wrong["gradient_errors"]["ours-fp32"][1] = 2 * GRADIENT
    wrong["bf16_errors"]["ours-bf16"] = 1.1 * BF16 * wrong["bf16_errors"]["timm-bf16"]
    sentences = judge(wrong)
    assert len(sentences) == 3
    assert all("expected" in sentence and "ours" in sentence for sentence in sentences)
    wrong["losses"]["timm-fp32"] = float("nan")
    assert len(judge(wrong)) == 4


def test_the_timed_steps_do_train() -> None:
    plain, ours = PlainStep(TINY, "fp32", torch.device("cpu")), OurStep(TINY, OURS)
    for step, student, teacher, floats in (
        (plain, plain.student, plain.teacher, True),
        (ours, ours.state.method.student, ours.state.method.teacher, False),
    ):
        before = [parameter.detach().clone() for net in (student, teacher) for parameter in net.parameters()]
        for number in range(3):
            crops = draw_crops(TINY, number)
            assert bool(torch.isfinite(step(normalised(crops) if floats else crops)))
        after = [parameter.detach() for net in (student, teacher) for parameter in net.parameters()]
        moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        half = len(moved) // 2
        assert sum(moved[:half]) == half - 1  # the prototypes' length is fixed
        assert sum(moved[half:]) > 0.3 * half  # what is near 1 does not feel so small an average


def test_the_plain_loss_is_the_mean_over_pairs_of_different_views() -> None:
    student, teacher = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    center = torch.randn(1, 5).double()
    expected = []
    for g in range(2):
        for v in range(3):
            if g != v:
                q = ((teacher[2 * g : 2 * g + 2] - center) / 0.04).softmax(1)
                expected += [-(q * (student[2 * v : 2 * v + 2] / 0.1).log_softmax(1)).sum(1).mean()]
    torch.testing.assert_close(plain_loss(student, teacher, center, 3), sum(expected) / 4)  # type: ignore[operator]


def test_crops_are_the_same_bytes_in_every_process_and_others_in_the_next_step() -> None:
    first, again, other = draw_crops(TINY, 0), draw_crops(TINY, 0), draw_crops(TINY, 1)
    assert [tuple(crop.shape) for crop in first] == [(4, 3, 28, 28), (8, 3, 14, 14)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


# ---- the work


def test_the_work_of_a_forward_pass_is_the_papers() -> None:
    """4.82 GMAC at 224 pixels; the paper's count has norms and the like in it, a few in a thousand."""
    with torch.device("meta"):
        backbone = timm_backbone("xcit_small_12_p16", 0.0)
        with flop_counter() as counter:
            backbone(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(4.82, rel=0.01)


@pytest.mark.parametrize("groups", [1, 8])
def test_a_convolutions_gradients_cost_twice_its_forward_pass_with_groups_too(groups: int) -> None:
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    images = torch.randn(2, 8, 6, 6, requires_grad=True)
    with flop_counter() as counter:
        convolution(images).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 36) * (8 * 8 // groups * 9)


def test_the_work_of_a_step_follows_from_its_forward_passes() -> None:
    """Forward of teacher and student, and backward at twice the student's, but for the images' own gradient."""
    with torch.device("meta"):
        step = PlainStep(TINY, "fp32", torch.device("meta"))
        crops = [torch.empty(views * TINY.batch, 3, size, size) for views, size in TINY.groups]
        forward = []
        for inputs in (crops[:1], crops):
            with flop_counter() as counter:
                step.student(inputs)
            forward.append(counter.get_total_flops())
    whole = forward[0] + 3 * forward[1]
    assert 0.97 * whole < flops_of_a_step(TINY) < whole
    assert flops_of_a_step(dataclasses.replace(TINY, batch=4)) == pytest.approx(2 * flops_of_a_step(TINY), rel=0.01)


def test_our_backbone_does_the_work_that_is_counted_or_less() -> None:
    """Less where products that nobody uses are left out; so GFLOP/s in the table is work of the plain step done."""
    ours = OurStep(TINY, OURS).state.method.student.backbone
    images = torch.randn(2, 3, 28, 28)
    counted = []
    for backbone in (ours, timm_backbone(TINY.arch, 0.0)):
        with flop_counter() as counter:
            backbone(images)
        counted.append(counter.get_total_flops())
    assert 0.8 * counted[1] < counted[0] <= 1.001 * counted[1]


# ---- the table


def measured(row: Row, seconds: list[float], peak: int, batch: int = 4) -> Measured:
    return Measured(row, batch, seconds, first_step=9.0, peak=peak, imports=100)


def test_a_line_has_the_medians_and_the_ratios_round_by_round() -> None:
    reference = measured(Row("reference", "reference", "reference", "fp32"), [6.0, 9.0, 4.0], 500)
    ours = measured(OURS, [2.0, 4.5, 1.0], 300)
    product = measured(peak_row("fp32"), [0.2, 0.1, 0.4], 0)
    line = line_of(ours, 10e9, peaks_of([reference, ours, product]), reference, reference)
    assert line.speed is not None
    assert (line.speed.median, line.speed.least, line.speed.greatest) == (3.0, 2.0, 4.0)
    assert line.images_per_s == 2.0
    assert line.flops_per_s == 20e9
    assert line.of_peak == pytest.approx(20e9 / (PEAK_FLOPS / 0.2))
    assert line.memory == 0.6
    assert line.memory_above_imports == 0.5
    values = json_of(line)
    assert values["img_per_s"] == 2.0
    assert values["step_s"] == [2.0, 1.0, 4.5]
    assert values["ratio"] == [3.0, 2.0, 4.0]
    assert values["memory_ratio"] == 0.6
    assert "3.00 (2.00 - 4.00)" in text_of(line)


def test_a_ratio_is_of_images_whatever_the_batches() -> None:
    small, large = measured(TIMM, [1.0], 0, batch=4), measured(OURS, [2.0], 0, batch=16)
    assert ratio(small, large).median == 2.0


def test_a_line_without_a_baseline_says_so() -> None:
    line = line_of(measured(OURS, [2.0], 300), 10e9, {}, None, None)
    assert (line.speed, line.memory, line.of_peak) == (None, None, None)
    assert "ratio" not in json_of(line)


# ---- the processes


@pytest.mark.slow
def test_processes_take_turns_and_report_their_own_memory() -> None:
    said: list[str] = []
    found = take_turns([Task(TIMM, TINY), Task(peak_row("fp32"), TINY)], 2, said.append)
    assert [len(one.seconds) for one in found] == [2, 2]
    assert all(second > 0 for one in found for second in one.seconds)
    assert all(one.peak >= one.imports > 10e6 for one in found)
    assert found[0].about["torch"] == torch.__version__


def test_a_mistake_in_a_process_is_its_sentence() -> None:
    row = Row("reference", "reference", "reference", "fp32")
    with pytest.raises(ValueError, match="--reference is a folder that holds checkouts"):
        memory_alone(Task(row, TINY, "/nowhere"))


def test_a_process_that_computes_while_it_waits_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    class Busy:
        def ask(self, _: str) -> dict[str, float]:
            return {"peak": 1, "imports": 1, "helpers": 0, "waited": 10.0, "waited_cpu": 9.0}

        def about(self) -> dict[str, Any]:
            return {}

    measured = Measured(OURS, 4, [1.0])
    _report(Busy(), measured)  # type: ignore[arg-type]
    assert "'ours-fp32' used 90% of a core while it waited" in capsys.readouterr().err
    assert measured.waiting == 0.9


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch", "0"], "--batch is 0, expected at least 1 (0 looks for the largest that fits, on a GPU)"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--only", "our-fp32"], "names no row by 'our-fp32'; did you mean ours-fp32"),
        (["--only", "ours-fp32,small"], "names no row by 'small' (known: reference, timm-fp32, timm-bf16, ours-fp32,"),
    ],
)
def test_a_wrong_word_is_a_sentence(server: Server, words: list[str], sentence: str) -> None:
    done = server.python(BENCHMARKS / "step.py", *words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_survives_the_command_line() -> None:
    for row in rows_for("cuda"):
        task = Task(row, SMALL, "folder")
        assert Task.from_json(task.to_json()) == task
    assert Settings(local_size=224).groups == [(10, 224)]
