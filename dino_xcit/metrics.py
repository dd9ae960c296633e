"""Metric logging: progress bar, metrics.jsonl (authoritative), TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tqdm import tqdm

from dino_xcit.config import TrainConfig
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import Lines

if TYPE_CHECKING:
    from dino_xcit.data.load_monitor import DataLoadMonitor
    from dino_xcit.data.loader import StepSampler
    from dino_xcit.verdict import Judge

Record = Mapping[str, float | int]

NOT_AVERAGED = ("gradient_norm", "skipped_steps", "lr", "weight_decay", "momentum", "teacher_temp")
"""Per-step metrics that are not averaged over an epoch."""


METRICS_FILE = "metrics.jsonl"
_COUNTS = ("kind", "step", "steps_per_epoch")
"""Fields of metrics.jsonl that are not metrics."""


class Mirror(Protocol):
    """A further destination for records."""

    def write(self, kind: str, step: int, values: Record) -> None:
        """Write one record, as in :meth:`MetricsWriter.write`."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class TensorBoard:
    """TensorBoard event files with tags ``kind/name``."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """Hides the records of earlier starts after ``from_step``."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._board = SummaryWriter(str(folder), purge_step=from_step + 1)

    def write(self, kind: str, step: int, values: Record) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


class WandB:
    """A Weights & Biases run with ``trainer_step`` as the x axis. An error disables it with one warning.

    Other settings come from W&B's environment variables (WANDB_MODE=offline, WANDB_ENTITY, WANDB_NAME ...). A resumed
    run continues the W&B run. Steps repeated after its checkpoint appear twice, and earlier steps are not renumbered
    if the batch size changes.
    """

    def __init__(self, project: str, folder: Path, from_step: int, config: Mapping[str, Any]) -> None:
        """Stores the id of the W&B run in ``folder/wandb.json``; ``from_step`` 0 starts a new one."""
        self._run: Any = None
        with self._tolerated():
            import wandb

            path = folder / "wandb.json"
            run_id = uuid.uuid4().hex[:12]
            if from_step:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: a new W&B run
                    run_id = json.loads(path.read_bytes())["id"]
            atomic.write_json(path, {"id": run_id})
            settings = wandb.Settings(
                run_name=None if "WANDB_NAME" in os.environ else folder.absolute().name,
                console="off",
                init_timeout=20,  # below the grace period of schedulers
                finish_timeout=20,
                finish_timeout_raises=True,
            )
            self._run = wandb.init(
                project=project, id=run_id, resume="allow", dir=str(folder), config=dict(config), settings=settings
            )
            self._run.define_metric("trainer_step")
            self._run.define_metric("*", step_metric="trainer_step")

    def write(self, kind: str, step: int, values: Record) -> None:
        if self._run:
            with self._tolerated():
                self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {"trainer_step": step})

    def close(self) -> None:
        if self._run:
            with self._tolerated():
                self._run.finish()

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            log.warning(
                f"Weights & Biases logging stopped ({type(error).__name__}: {one_line(error)}); the run continues and "
                "metrics.jsonl is complete (WANDB_MODE=offline needs no network)"
            )


def require_wandb(project: str) -> None:
    """Raise InputError if a project is given and the package wandb is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"wandb is {project}, but the package wandb is not installed: pip install 'dino-xcit[wandb]', or leave "
            "--wandb out"
        )


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and passes them to TensorBoard and other mirrors."""

    def __init__(self, folder: Path, from_step: int, mirrors: Sequence[Mirror] = (), steps_per_epoch: int = 0) -> None:
        """Drop the records after ``from_step`` and of an incomplete epoch, which a resumed run writes again.

        If the number of steps per epoch changed, earlier records are renumbered, in TensorBoard too. An OSError (such
        as a full disk) is logged once and does not end the run.
        """
        self._write_failed, self._steps_per_epoch = False, steps_per_epoch
        self.path = folder / METRICS_FILE
        self._file: TextIO | None = None
        self._mirrors = list(mirrors)
        with self._warn_once_on_os_error():
            before = read_metrics(self.path)
            rows = [_with_steps_of(row, steps_per_epoch) for row in before]
            kept = [row for row in rows if row["step"] <= from_step and row["kind"] != "end"] if from_step else []
            aside = self.path.with_name(f".{METRICS_FILE}.tmp")
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(aside, self.path)
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by close()
            if rows != before:  # event files cannot be edited, so write them again
                shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            self._mirrors.append(board := TensorBoard(folder / "tensorboard", from_step))
            for row in kept if rows != before else ():
                if row["kind"] not in ("step", "epoch"):
                    continue
                values = {name: float(value) for name, value in row.items() if name not in _COUNTS}
                board.write(row["kind"], row["step"], values)

    def write(self, kind: str, step: int, values: Record) -> None:
        """Write one record. ``kind`` is ``step``, ``epoch``, or ``end`` for an epoch cut short by --max-steps.

        Non-finite values are written as strings, because JSON has no NaN.
        """
        self.append(kind, step, {n: value if math.isfinite(value) else str(value) for n, value in values.items()})
        for mirror in self._mirrors:
            with self._warn_once_on_os_error():
                mirror.write(kind, step, values)

    def append(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Write a record of JSON values to ``metrics.jsonl`` only, such as one of kind ``run`` or ``verdict``."""
        with self._warn_once_on_os_error():
            if self._file:
                counts = {"step": step, "steps_per_epoch": self._steps_per_epoch}
                self._file.write(json.dumps({"kind": kind, **counts, **values}) + "\n")

    def close(self) -> None:
        """Close the file and all mirrors."""
        with self._warn_once_on_os_error():
            if self._file:
                self._file.close()
        for mirror in self._mirrors:
            with self._warn_once_on_os_error():
                mirror.close()

    @contextlib.contextmanager
    def _warn_once_on_os_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._write_failed:
                why = error.strerror or error
                log.warning(f"cannot write metrics to {self.path.parent} ({why}): they are incomplete from now on")
            self._write_failed = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of ``metrics.jsonl``, without damaged or truncated lines."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # not JSON or not UTF-8
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
                records.append(record)
    return records


def _with_steps_of(row: dict[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    then = row.get("steps_per_epoch")
    if not isinstance(then, int) or then <= 0 or then == steps_per_epoch:
        return row
    return row | {"step": math.ceil(row["step"] * steps_per_epoch / then), "steps_per_epoch": steps_per_epoch}


class EpochAverages:
    """Means of the logged metrics over an epoch."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add a logged step, unless its loss is not finite (a skipped step)."""
        if math.isfinite(metrics["loss"]):
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """Return the means so far, and reset them."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values = {}
        return means


_SHOWN = {"knn_top1": "k-NN", "top1": "top-1"}
"""Evaluations on the progress bar."""


class Progress:
    """Progress bar with images/s, the share of time spent waiting for data, and the remaining time.

    In a file it writes a line every 15 s.
    """

    def __init__(self, total_steps: int, done: int, images_a_step: int, shown: bool) -> None:
        self._images_a_step = images_a_step
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            disable=not shown,
            file=sys.stderr if terminal else Lines(sys.stderr),
            dynamic_ncols=terminal,
            mininterval=0.5 if terminal else 15.0,
            ascii=not terminal,
            leave=terminal,
            bar_format="{desc}{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed} < ETA {remaining}{postfix}]",
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Reset the clock for the rates."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def step(self, epoch: int, waited: float) -> None:
        """Count one step of the 0-based ``epoch``, which waited ``waited`` seconds for data."""
        self._steps += 1
        self._waited += waited
        self._bar.set_description_str(f"epoch {epoch + 1} ", refresh=False)
        self._bar.update()

    def rates(self) -> dict[str, float]:
        """Return images/s and the data-wait share since the last call."""
        span = max(time.perf_counter() - self._since, 1e-9)
        rates = {"images_per_s": self._steps * self._images_a_step / span, "data_wait": self._waited / span}
        self.restart_clock()
        return rates

    def show(self, metrics: Mapping[str, float], state: str = "") -> None:
        """Show metrics, with the last evaluation if it is among them, and the state of the run on the bar."""
        parts = [
            f"{metrics['images_per_s']:.0f} img/s",
            f"data wait {100 * metrics['data_wait']:.0f}%",
            f"loss {metrics['loss']:.3f}",
            *(f"{name} {metrics[metric]:.1f}%" for metric, name in _SHOWN.items() if metric in metrics),
            *filter(None, [state]),
        ]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


class MetricLogger:
    """Context manager for progress bar, ``metrics.jsonl`` and its mirrors, and epoch means."""

    def __init__(
        self,
        config: TrainConfig,
        sampler: StepSampler,
        monitor: DataLoadMonitor,
        epochs: int | None = None,
        judge: Judge | None = None,
        start: Mapping[str, object] | None = None,
        details: Collection[str] = (),
    ) -> None:
        """Starts at the sampler's first step.

        Args:
            monitor: adds metrics of the data loader.
            epochs: number of epochs of the run; None: ``config.epochs``.
            judge: judges the logged steps on rank 0; its verdicts are logged when they change.
            start: describes this start of the run, for ``metrics.jsonl``.
            details: metrics of evaluators that are recorded, but not printed at epoch ends.
        """
        self._details = details
        self._judge, self._evaluated = judge, dict[str, float]()
        self._config, self._sampler, self._monitor = config, sampler, monitor
        self._epochs = config.epochs if epochs is None else epochs
        self._folder, start_step = Path(config.output_dir), sampler.start_step
        self._progress = Progress(
            sampler.stop_step,
            start_step,
            sampler.global_batch,
            shown=distributed.is_main() and not config.quiet,
        )
        self._averages = EpochAverages()
        self._writer: MetricsWriter | None = None
        if distributed.is_main():
            settings = dataclasses.asdict(config)
            mirrors = [WandB(config.wandb, self._folder, start_step, settings)] if config.wandb else []
            self._writer = MetricsWriter(self._folder, start_step, mirrors, sampler.steps_per_epoch)
            self._writer.append("run", start_step, start or {})
            if judge:
                self._replay(judge)

    def _replay(self, judge: Judge) -> None:
        """Judge the logged steps since the last start with changed settings, which may be the remedy."""
        assert self._writer
        rows = list[dict[str, Any]]()
        with contextlib.suppress(OSError):
            rows = read_metrics(self._writer.path)
        anew = [at for at, row in enumerate(rows) if row.get("settings", {}).get("resume") == "changed"]
        for row in rows[max(anew, default=0) :]:
            if row["kind"] == "step":
                judge.add(row["step"], row)

    def step(self, step: int, waited: float, read: Callable[[], Record]) -> None:
        """Count a step and log its metrics if it is due.

        Args:
            step: number of completed steps.
            waited: seconds that the step waited for images.
            read: returns the metrics of the step; called on logged steps only, because it waits for the device.
        """
        epoch = self._sampler.epochs(step)
        self._progress.step(epoch, waited)
        ends = self._sampler.ends_epoch(step) or self._sampler.ends_run(step)
        if not (step % self._config.log_every == 0 or step == 1 or ends):
            return
        metrics = dict(read())  # this is a CPU-GPU sync point
        self._averages.add({name: value for name, value in metrics.items() if name not in NOT_AVERAGED})
        metrics |= self._progress.rates()
        metrics |= self._monitor.metrics(metrics["data_wait"])
        if self._writer:
            self._writer.write("step", step, {"epoch": epoch, **metrics})
            if self._judge and self._judge.add(step, metrics):
                verdict = self._judge.verdict
                (log.warning if verdict.remedy else log.info)(f"verdict at step {step}: {verdict}")
                self._writer.append("verdict", step, verdict._asdict())
        self._progress.show(metrics | self._evaluated, self._judge.verdict.state if self._judge else "")

    def epoch(self, step: int, evaluated: Record) -> None:
        """Log the means and evaluations of an epoch, which may be cut short by the end of the run."""
        means, self._evaluated = self._averages.take(), self._evaluated | dict(evaluated)
        epoch_ends = self._sampler.ends_epoch(step)
        epoch = self._sampler.epochs(step)
        metrics = {"loss": means["loss"], **evaluated} if "loss" in means else evaluated
        metrics = {name: value for name, value in metrics.items() if name not in self._details}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
        cut_short = "" if epoch_ends else f", up to step {step}"
        log.info(f"epoch {epoch + 1}/{self._epochs}{cut_short}: {shown}")
        if self._writer:
            self._writer.write("epoch" if epoch_ends else "end", step, {"epoch": epoch, **means, **evaluated})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step, such as of a save or an evaluation, from images/s."""
        self._progress.restart_clock()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()
        self._progress.close()
