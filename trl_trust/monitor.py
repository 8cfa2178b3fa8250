"""`TrustMonitor`: a callback that speaks up when a policy leaves the bounds in which its updates can be trusted.

    GRPOTrainer(..., callbacks=[TrustMonitor(stop=True)])

For stock TRL trainers and those of this package. It reads what is logged, and computes nothing.
"""

import logging
import math
from collections.abc import Mapping

from transformers import TrainerCallback


logger = logging.getLogger(__name__)

INF = math.inf

# metric -> (low, high, what would mend it). Ours, and wide: what a healthy run of the quickstart stays far inside of.
BOUNDS: dict[str, tuple[float, float, str]] = {
    "trust/kl": (-INF, 0.1, "lower learning_rate or num_iterations, or set step_control='kl'"),
    "trust/ratio/p99": (-INF, 3.0, "lower learning_rate, num_iterations or steps_per_generation"),
    "trust/ess": (0.5, INF, "lower learning_rate, num_iterations or steps_per_generation, or set step_control='ess'"),
    "entropy": (0.005, INF, "raise entropy_coef, epsilon_high or temperature, or lower learning_rate"),
    "clip_ratio/region_mean": (-INF, 0.3, "lower learning_rate, num_iterations or steps_per_generation"),
}


class TrustMonitor(TrainerCallback):
    """Warns, or stops the training, when a metric has been out of its bounds for `patience` logs in a row.

    Args:
        bounds: metric to (low, high), over the defaults: `trust/kl` at most .1 nats, `trust/ratio/p99` at most 3,
            `trust/ess` at least .5, `entropy` at least .005 nats, `clip_ratio/region_mean` at most .3. `None` for a
            metric switches its default off. Stock `GRPOTrainer` logs none of the first three: there the others watch.
        patience: logs in a row, at least 1; a metric that is not in a log, or NaN, keeps its count.
        stop: end the training instead of warning alone.

    Raises:
        ValueError: for bounds that are not (low, high) with low < high, for `patience` below 1, and at the first log
            of training for a bound of yours on a metric that is not logged.
    """

    def __init__(
        self, bounds: Mapping[str, tuple[float, float] | None] | None = None, patience: int = 5, stop: bool = False
    ):
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience={patience!r} must be a whole number >= 1: logs in a row.")
        self.own = dict(bounds or {})
        self.bounds = dict(BOUNDS)
        for name, bound in self.own.items():
            if bound is None:
                self.bounds.pop(name, None)
                continue
            if not (isinstance(bound, tuple | list) and len(bound) == 2 and bound[0] < bound[1]):
                raise ValueError(f"bounds[{name!r}]={bound!r} must be (low, high) with low < high; use inf for none.")
            mend = BOUNDS[name][2] if name in BOUNDS else "see docs/metrics.md"
            self.bounds[name] = (*bound, mend)
        self.patience, self.stop = patience, stop
        self.outside = dict.fromkeys(self.bounds, 0)  # logs in a row
        self.tripped: list[str] = []  # metrics that were out for `patience` logs, in order
        self._checked = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:  # evaluation, or the summary at the end
            return
        if not self._checked:
            self._checked = True
            missing = [name for name, bound in self.own.items() if bound is not None and name not in logs]
            if missing:
                near = ", ".join(sorted(name for name in self.bounds if name in logs)) or "none of those with defaults"
                raise ValueError(f"bounds on {', '.join(missing)}: not logged by this trainer; logged are {near}.")
        for name, (low, high, mend) in self.bounds.items():
            value = logs.get(name)
            if value is None or math.isnan(value):
                continue
            self.outside[name] = 0 if low <= value <= high else self.outside[name] + 1
            if self.outside[name] == self.patience:
                self.tripped.append(name)
                bound = f"below {low:g}" if value < low else f"above {high:g}"
                end = "Training stops." if self.stop else "Training goes on."
                if state.is_world_process_zero:
                    out = f"{name}={value:.4g} has been {bound} for {self.patience} logs"
                    logger.warning(f"Step {state.global_step}: {out}; {mend}. {end}")
                control.should_training_stop = control.should_training_stop or self.stop
