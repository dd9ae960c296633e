"""The training step: images a second, work a second and peak memory of the reference, of a plain step with timm's XCiT,
and of this project; in one run, taking turns.

    python benchmarks/step.py [--reference DIR] [--device cuda] [--batch N] [--rounds 7] [--only ours-fp32,ours-bf16]
        [--quick] [--against DIR]

``--reference`` names a folder with checkouts of facebookresearch/dino as ``dino/`` and of facebookresearch/xcit as
``xcit/``; without it that row is left out. First all of them are given the same weights and crops, and their losses
and gradients are compared: if they differ, the run ends with a sentence and exit code 1. Then each lives in a process
of its own, so that its peak memory is its own, and in each round each has one turn, so that a ratio is of one moment.
The work is counted once, on the plain step, for all rows. A second table has a small network on small images.

On a CPU all processes keep freed memory as run_pretrain.py does (runtime.memory); the reference's peak memory is
also taken without it, and the less of the two is what the others are held against. On a GPU ``--batch 0`` looks for
the largest batch of each row. ``--loader`` adds a row that the loader feeds. The last line is one JSON object:
``ratio_*`` is ours over the reference (bigger is better), ``memory_ratio_*`` likewise (smaller is better),
``ratio_small`` ours over timm's plain step for the small network, all medians over the rounds. ``--against`` instead
runs this script and that of an earlier commit's checkout in turn, with the same arguments (against.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from against import Figures, add_arguments, commit_of, compare_commits  # noqa: E402
from process_group import clean_up_on_sigterm  # noqa: E402
from step_settings import (  # noqa: E402
    CHECKS,
    QUICK,
    QUICK_SMALL,
    SMALL,
    Row,
    Settings,
    Task,
    fed_row,
    peak_row,
    reference_again,
    rows_for,
    small_rows,
)
from step_table import HEADER, json_of, line_of, peaks_of, ratio, text_of  # noqa: E402
from step_turns import Measured, PipelineFailed, checks, largest_batch, memory_alone, take_turns  # noqa: E402
from step_verdict import figures, judge, lines  # noqa: E402

from dino_xcit.errors import InputError, RunStopped, near_matches, run_main  # noqa: E402


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder with the checkouts dino/ and xcit/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arch", help="an XCiT's name, such as xcit_small_12_p8")
    parser.add_argument("--batch", type=int, help="images a step: 4 on a CPU, 64 on a GPU; 0: the largest that fits")
    parser.add_argument("--out-dim", type=int, help="prototypes K")
    parser.add_argument("--local-crops", type=int)
    parser.add_argument("--global-size", type=int)
    parser.add_argument("--local-size", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="rows by their names: reference,timm-fp32,ours-bf16,small-ours-fp32 ...")
    parser.add_argument("--loader", action="store_true", help="also ours in bf16 with the loader feeding it")
    parser.add_argument("--photos", default="sample:fashion-mnist", help="what it reads: anything --data-path takes")
    parser.add_argument("--quick", action="store_true", help="a try with tiny networks; its figures say nothing")
    add_arguments(parser)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The configuration of the first table.

    Raises:
        InputError: a number that cannot be.
    """
    least = {"batch": 0 if arguments.device == "cuda" else 1, "out_dim": 2, "local_crops": 0}
    least |= {"global_size": 1, "local_size": 1, "rounds": 1}
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            hint = " (0 looks for the largest that fits, on a GPU)" if (name, value) == ("batch", 0) else ""
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected at least {smallest}{hint}")
    start = QUICK if arguments.quick else Settings(batch=64 if arguments.device == "cuda" else 4)
    names = ("arch", "batch", "out_dim", "local_crops", "global_size", "local_size", "device")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(start, **given)


def chosen(rows: Sequence[Row], only: str | None) -> list[Row]:
    """Those rows that --only names."""
    return [row for row in rows if only is None or row.key in only.split(",")]


def refuse_unknown(only: str, rows: Sequence[Row]) -> None:
    """See that --only names nothing but rows.

    Raises:
        InputError: it does.
    """
    known = [row.key for row in rows]
    for name in only.split(","):
        if name not in known:
            near = near_matches(name, known)
            raise InputError(f"--only names no row by {name!r}{near} (known: {', '.join(known)})")


def compared(rows: Sequence[Row], within: Sequence[str] = ("rows",)) -> Figures:
    """What --against looks at in the rows of a table. Those of other projects tell how much the machine varies."""
    figures: Figures = {}
    for row in rows:
        figures |= {f"{row.key} img/s": ((*within, row.key, "img_per_s"), "more")}
        figures |= {f"{row.key} peak MB": ((*within, row.key, "peak_MB"), "less")}
    return figures


def checked(settings: Settings, rows: Sequence[Row], reference: str) -> tuple[dict[str, Any], list[Row]]:
    """Hold the pipelines beside each other: what that finds, and the rows that this version of the project has.

    Raises:
        RunStopped: they do not do the same work.
    """
    say(f"\n{settings.in_words()}, on {settings.device}")
    found = checks(Task(CHECKS, settings, reference), [row for row in rows if row.project == "ours"])
    say("\n".join(lines(found)))
    for key in found["left_out"]:
        say(f"  {key}: left out, as this version of the project has no such setting")
    wrong = judge(found)
    if wrong:
        raise RunStopped(1, "\n".join(f"error: {sentence}" for sentence in wrong))
    return found, [row for row in rows if row.key not in found["left_out"]]


def side_by_side(settings: Settings, rows: Sequence[Row], reference: str, rounds: int) -> list[Measured]:
    """Time rows that take turns, with the large product in their precisions among them.

    Those with checkpointing come afterwards, with the reference once more: all at once would need the memory of seven.
    """
    products = [peak_row(precision) for precision in sorted({row.precision for row in rows})]
    groups = [[row for row in rows if not row.checkpointing], [row for row in rows if row.checkpointing]]
    if groups[0] and groups[1]:
        groups[1] = [reference_again(row) for row in groups[0] if row.project == "reference"] + groups[1]
    measured: list[Measured] = []
    for group in groups:
        if group:
            tasks = [Task(row, settings, reference) for row in (*group, *products)]
            measured += take_turns(tasks, rounds, say)
            products = []
    return measured


def one_by_one(settings: Settings, rows: Sequence[Row], reference: str, rounds: int, least: int) -> list[Measured]:
    """Time each row with the largest batch that fits, ``least`` or it doubled again and again, with nothing beside."""
    measured: list[Measured] = []
    for row in rows:
        fits = largest_batch(Task(row, settings, reference), least, say)
        measured += take_turns([Task(row, fits, reference)], rounds, say)
    products = [peak_row(precision) for precision in sorted({row.precision for row in rows})]
    return measured + take_turns([Task(row, settings) for row in products], rounds, say)


def show(measured: Sequence[Measured], flops: float, against: str, memory: Measured | None) -> dict[str, Any]:
    """Print a table and return its rows.

    Args:
        flops: of an image.
        against: the key of the row that speeds are held against; rows with checkpointing, against its second turns.
        memory: what memory is held against, where it is not that row.
    """
    by_key = {found.row.key: found for found in measured}
    peaks = peaks_of(measured)
    say(HEADER)
    out: dict[str, Any] = {}
    for found in measured:
        if found.row.project != "peak":
            again = by_key.get(f"{against}-again") if found.row.checkpointing else None
            baseline = again or by_key.get(against)
            line = line_of(found, flops, peaks, baseline, memory or baseline)
            say(text_of(line))
            out[found.row.key] = json_of(line)
    say(
        f"  {flops / 1e9:.1f} GFLOP an image; the 2048^3 product: "
        + ", ".join(f"{precision} {value / 1e9:.0f} GFLOP/s" for precision, value in peaks.items())
    )
    return out


def hardware() -> str:
    """The processor's name, where the system says it."""
    try:
        lines_ = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines_ if line.startswith("model name")), "")


def run() -> None:
    """The command."""
    arguments = parse()
    settings = settings_of(arguments)
    main_rows, small = rows_for(settings.device), small_rows()
    if arguments.only is not None:
        refuse_unknown(arguments.only, (*main_rows, *small))
    if arguments.against:
        compare_commits("step.py", compared(main_rows) | compared(small, ("small", "rows")), arguments)
        return
    main_rows, small = chosen(main_rows, arguments.only), chosen(small, arguments.only)
    if not arguments.reference:
        if any(row.project == "reference" for row in main_rows):
            say("the reference is not measured: --reference DIR names a folder with its checkouts")
        main_rows = [row for row in main_rows if row.project != "reference"]
    result: dict[str, Any] = {"commit": commit_of(ROOT), "cpu": hardware(), "rounds": arguments.rounds}
    if main_rows:
        result |= first_table(settings, main_rows, arguments)
    if small:
        device = settings.device
        small_settings = dataclasses.replace(QUICK_SMALL if arguments.quick else SMALL, device=device)
        result["small"] = small_table(small_settings, small, arguments)
        for name in ("ratio_small", "ratio_small_bf16"):
            if name in result["small"]:
                result[name] = result["small"][name]
    say(json.dumps(result))


def first_table(settings: Settings, rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything against the reference."""
    rounds, largest = arguments.rounds, settings.batch == 0
    reference = str(arguments.reference.resolve()) if arguments.reference else ""
    settings = dataclasses.replace(settings, batch=settings.batch or 64)
    found, rows = checked(settings, rows, reference if any(row.project == "reference" for row in rows) else "")
    measured = (
        one_by_one(settings, rows, reference, rounds, settings.batch)
        if largest
        else side_by_side(settings, rows, reference, rounds)
    )
    by_key = {one.row.key: one for one in measured}
    flops = found["flops"] / settings.batch
    out: dict[str, Any] = {"settings": dataclasses.asdict(settings), "flops_per_image": flops, **figures(found)}
    theirs = memory = by_key.get("reference")
    if theirs and settings.device == "cpu":
        plain = memory_alone(Task(dataclasses.replace(theirs.row, keep_freed_memory=False), settings, reference))
        memory = min(plain, theirs, key=lambda one: one.peak)
        out["reference_peak_MB"] = {"keeping": round(theirs.peak / 1e6, 1), "glibc": round(plain.peak / 1e6, 1)}
    if arguments.loader:
        batch = by_key["ours-bf16"].batch if "ours-bf16" in by_key else settings.batch
        task = Task(fed_row(arguments.photos), dataclasses.replace(settings, batch=batch))
        measured += take_turns([task], rounds, say)
    out["machine"] = measured[0].about
    out["rows"] = show(measured, flops, "reference", memory)
    if "reference_peak_MB" in out:
        say(
            "  the reference's peak memory: {keeping:.0f} MB keeping what it frees, {glibc:.0f} MB as glibc does by "
            "itself; the less is the measure".format(**out["reference_peak_MB"])
        )
    for one in measured:
        if one.row.project == "ours":
            name, values = one.row.key.removeprefix("ours-").replace("-", "_"), out["rows"][one.row.key]
            if theirs:
                out[f"ratio_{name}"], out[f"memory_ratio_{name}"] = values["ratio"][0], values["memory_ratio"]
            timms = by_key.get(f"timm-{one.row.precision}")
            if timms and one.row.key in by_key and not one.row.checkpointing:
                out[f"over_timm_{name}"] = round(ratio(timms, one).median, 3)
    return out


def small_table(settings: Settings, rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    """A small network against timm's."""
    found, rows = checked(settings, rows, "")
    measured = side_by_side(settings, rows, "", arguments.rounds)
    by_key = {one.row.key: one for one in measured}
    flops = found["flops"] / settings.batch
    out: dict[str, Any] = {"settings": dataclasses.asdict(settings), "flops_per_image": flops, **figures(found)}
    out["machine"] = measured[0].about
    out["rows"] = show(measured, flops, "small-timm-fp32", None)
    for precision, name in (("fp32", "ratio_small"), ("bf16", "ratio_small_bf16")):
        theirs, own = by_key.get(f"small-timm-{precision}"), by_key.get(f"small-ours-{precision}")
        if theirs and own:
            spread = ratio(theirs, own)
            out[name] = round(spread.median, 3)
            say(f"  ours / timm's plain step, {precision}: {spread.text()}")
    return out


def main() -> None:
    """The command; a pipeline that fails is a sentence and exit code 1."""
    clean_up_on_sigterm()
    try:
        run()
    except PipelineFailed as failed:
        raise RunStopped(1, f"error: {failed}") from None


if __name__ == "__main__":
    run_main(main)
