"""Verdict on a pretraining run from its logged steps: healthy, or what went wrong and which setting to change.

Most signals are compared with the best value that the run itself has reached, because their level depends on data,
network and method. A state needs two signals and must persist. benchmarks/collapse.py measures when runs that are made
to collapse are recognised, and that healthy runs cause no alarm.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from dino_xcit.config import PretrainConfig
from dino_xcit.runtime.logging import counted

HEALTHY, TOO_EARLY = "healthy", "too early to say"
UNIFORM, ONE_PROTOTYPE, DIMENSIONAL = "uniform", "one prototype", "dimensional collapse"
DIVERGING, PLATEAU = "diverging", "plateau"
COLLAPSED = (UNIFORM, ONE_PROTOTYPE, DIMENSIONAL)
"""States on which ``--on-collapse stop`` ends the run."""

FIRST_STEP = 60
"""Number of steps before the first verdict."""
WINDOW = 5
"""Logged steps whose median smooths a signal."""
PERSISTENCE = 40
"""Steps for which a state must hold."""
FALL, INFORMATION_FALL = 0.5, 0.7
"""Share of its own highest value below which a signal, or the mutual information, has fallen."""
UNIFORM_SHARE = 0.95
"""Share of its maximum ln K above which the teacher's entropy is that of a uniform output."""
NOISE, FAINT, EVEN = 0.01, 0.1, 0.99
"""Mutual information in nats that is none; that is none while the teacher's entropy is above this share of ln K."""
RECOVERY, LEAST_SHARE = 1.1, 0.3
"""Multiple of an earlier value, and share of the highest one, above which a signal rises again."""
FEW = 4
"""Number of prototypes in use that are too few."""
AGREEMENT = 0.98
"""Mean cosine of two views above which the features hardly depend on the image."""
RISE = 3.0
"""Multiple of its own lowest value above which a signal has risen."""
PLATEAU_STEPS = 200
"""Steps after which a run that still has the signals of its start is on a plateau, once the warm-up is over."""
MAX_DISTANCE = 0.15
"""Relative distance of teacher and student above which the student moves too fast for its teacher."""


class Verdict(NamedTuple):
    """A state with its reason."""

    state: str
    reason: str = ""
    """The signals, in one sentence."""
    remedy: str = ""
    """The flag and the value to change."""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.state, "; ".join(filter(None, [self.reason, self.remedy]))]))


class Signal:
    """Smoothed values of one metric, with their extremes."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.first = self.now = math.nan
        self._before: deque[float] = deque(maxlen=WINDOW)
        """Smoothed values of the last logged steps."""
        self.highest, self.lowest = -math.inf, math.inf

    def add(self, value: float) -> None:
        """Add the value of a logged step."""
        self._recent.append(value)
        self._before.append(self.now)
        self.now = median(self._recent)
        if len(self._recent) == WINDOW:
            self.highest, self.lowest = max(self.highest, self.now), min(self.lowest, self.now)
            self.first = self.now if math.isnan(self.first) else self.first

    def unchanged(self, tolerance: float) -> bool:
        """Whether the value is that of the start, up to a relative tolerance."""
        return abs(self.now - self.first) < tolerance * abs(self.first)

    @property
    def rises(self) -> bool:
        """Whether the value is above :data:`RECOVERY` times that of :data:`WINDOW` logged steps ago, and above
        :data:`LEAST_SHARE` of the highest."""
        return self.now > max(RECOVERY * self._before[0], LEAST_SHARE * self.highest)

    @property
    def share(self) -> float:
        """The value as a share of the highest one."""
        return self.now / self.highest if self.highest > 0 else math.nan


class Judge:
    """Judges a run step by step."""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self._signals: dict[str, Signal] = {}
        self._since: tuple[str, int] = (TOO_EARLY, 0)
        self.verdict = Verdict(TOO_EARLY)

    def add(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Add a logged step; return whether the state changed."""
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._signals.setdefault(name, Signal()).add(float(value))
        if step < FIRST_STEP:
            return False
        found = self._state(step)
        if found.state in COLLAPSED and self.verdict.state in COLLAPSED:
            found = found._replace(state=self.verdict.state)  # a collapse keeps its first name
        if found.state != self._since[0]:
            self._since = found.state, step
        if found.state == self.verdict.state:
            self.verdict = found
            return False
        at_once = self.verdict.state == TOO_EARLY and found.state == HEALTHY
        if not at_once and step - self._since[1] < PERSISTENCE:
            return False
        self.verdict = found
        return True

    @property
    def stops(self) -> bool:
        """Whether ``--on-collapse stop`` ends the run now."""
        return self._config.on_collapse == "stop" and self.verdict.state in COLLAPSED

    @property
    def sentence(self) -> str:
        """The error of a run that ends because of its verdict."""
        state, _, remedy = self.verdict
        return (
            f"error: the run collapsed ({state}): {remedy}, or continue from a checkpoint before the "
            "collapse: --init-weights OUTPUT_DIR/checkpoints/NAME with another --output-dir"
        )

    def _state(self, step: int) -> Verdict:
        """Return the state that the signals show now."""
        information, spread = self._get("mutual_information"), self._get("feature_std")
        dimensions, agreement = self._get("feature_dimensions"), self._get("view_agreement")
        if not any(math.isfinite(signal.highest) for signal in (information, spread, dimensions)):
            return Verdict(TOO_EARLY)
        used = self._get("prototype_perplexity").now
        share = self._get("teacher_entropy").now / math.log(self._config.out_dim)
        fallen = information.share < INFORMATION_FALL and not information.rises
        fallen = fallen or information.now < (FAINT if share > EVEN else NOISE)
        if fallen and (share > UNIFORM_SHARE or used <= FEW or spread.share < FALL):
            reason = (
                f"mutual information of image and prototype {information.now:.2g} nats (best "
                f"{information.highest:.2g}), {counted(round(used), 'prototype')} in use, teacher "
                f"entropy {100 * share:.0f}% of its maximum"
            )
            return Verdict(ONE_PROTOTYPE if used <= FEW else UNIFORM, reason, f"{self._remedy()} --resume never")
        if dimensions.share < FALL and (spread.share < FALL or agreement.now > AGREEMENT):
            reason = (
                f"the features vary in {dimensions.now:.1f} dimensions (best {dimensions.highest:.1f}), and the cosine "
                f"of two views of an image is {agreement.now:.3f}"
            )
            return Verdict(DIMENSIONAL, reason, f"{self._remedy()} --resume never")
        loss, gradient, lr, kl = (self._get(name) for name in ("loss", "gradient_norm", "lr", "kl"))
        apart = math.isnan(kl.now) or kl.now > RISE * kl.lowest  # methods without teacher targets have no kl
        if loss.now > loss.first and apart and gradient.now > RISE * gradient.lowest:
            reason = (
                f"the loss has risen to {loss.now:.3g} (best {loss.lowest:.3g}) and the gradient norm to "
                f"{gradient.now:.3g} (best {gradient.lowest:.3g})"
            )
            return Verdict(DIVERGING, reason, f"try --lr {self._config.lr / 10:.1g}")
        if (
            step > PLATEAU_STEPS
            and lr.highest / 2 < lr.now < lr.highest
            and loss.unchanged(0.02)
            and spread.unchanged(0.1)
            and dimensions.unchanged(0.25)
        ):
            reason = f"loss {loss.now:.3g} and feature spread {spread.now:.2g} are those of the start"
            return Verdict(PLATEAU, reason, f"try --lr {self._config.lr * 10:.1g}")
        return Verdict(HEALTHY)

    def _get(self, name: str) -> Signal:
        return self._signals.get(name, Signal())

    def _remedy(self) -> str:
        """Return the first setting that explains a collapse."""
        config, distance = self._config, self._get("teacher_distance").highest
        if config.method == "simdino":
            if config.coding_rate_weight < 1:
                return "try --coding-rate-weight 1"
        elif config.teacher_temp > 0.07 or config.teacher_temp >= config.student_temp:
            return "try --teacher-temp 0.04 --warmup-teacher-temp 0.04"
        elif config.centering == "centering" and config.center_momentum > 0.99:
            return "try --center-momentum 0.9"
        if config.momentum_teacher < 0.9:
            return "try --momentum-teacher 0.99"
        if distance > MAX_DISTANCE:
            return f"try --lr {config.lr / 10:.1g}"
        if config.method == "dino" and config.centering == "centering":
            return "try --centering sinkhorn_knopp"
        if config.method == "dino" and not config.koleo_weight:
            return "try --koleo-weight 0.1"
        return f"try --lr {config.lr / 3:.1g}"
