"""What comes in from the rollout worker: each row is looked at before TRL's queue hands it on.

Stock `AsyncGRPOTrainer` (TRL 1.16) trains on what it is given: a NaN log-probability makes the loss NaN, a row without
a trained token ends the run in an index error, rows that are all too old are waited on for ever, and an exception on
process 0 leaves the others waiting. Here such rows are left out and counted, and the rest ends every process with one
line.
"""

import math
import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.logging import get_logger


logger = get_logger(__name__)

ROW = ("input_ids", "completion_mask", "old_log_probs")  # of TRL 1.16's `RolloutSample`, (n,) each
POLL_S = 0.5  # between two looks at the worker's health
DROPPED = {
    "nonfinite": "a log-probability or the advantage is not a finite number (vLLM reports None where it cannot score)",
    "untrained": "no token of it is trained",
}


class RowIntake:
    """TRL's rollout queue as its dataset reads it, `get` and `qsize`, with each row checked. On process 0 only.

    Attributes:
        lags: weight version of the trainer minus that of the row, when the row was pulled -> rows that were used.
        dropped: reason, a key of [`DROPPED`] or "stale" -> rows left out.
        failure: what ended the intake, where several processes have to hear of it.

    Args:
        rows: the worker's queue.
        version: the trainer's weight version.
        check_health: the worker's own; raises where it has died.
        stale_after_s: seconds without a usable row, of which some were left out, after which the run ends.
        max_staleness: lag up to which TRL uses a row.
        limit: rows left out in a row after which the run ends.
        vocabulary: number of token ids.
        count: called with the name of a counter at each row left out.
        end_row: makes the row by which other processes hear of a failure, or `None` in a single process.
    """

    def __init__(
        self,
        rows: Any,
        version: Callable[[], int],
        check_health: Callable[[float], None],
        *,
        stale_after_s: float,
        max_staleness: int,
        limit: int,
        vocabulary: int,
        count: Callable[[str], None],
        end_row: Callable[[], Any] | None = None,
    ):
        self.rows, self.version, self.check_health = rows, version, check_health
        self.stale_after_s, self.max_staleness, self.limit = stale_after_s, max_staleness, limit
        self.vocabulary, self.count, self.end_row = vocabulary, count, end_row
        self.lags: Counter[int] = Counter()
        self.dropped: Counter[str] = Counter()
        self.failure: Exception | None = None
        self.recent: list[int] = []  # lags since the last log
        self._in_a_row: Counter[str] = Counter()
        self._last = None  # when the last usable row came, or the first was waited for

    def qsize(self) -> int:
        return self.rows.qsize()

    def get(self, timeout: float | None = None) -> Any:
        """The next row that may be trained on, or that TRL itself drops as stale.

        Raises:
            RuntimeError: where the worker has died, or nothing but unusable rows come.
            ValueError: for a row that is malformed.
        """
        if self.failure is None:
            try:
                return self._next()
            except Exception as error:
                if self.end_row is None:
                    raise
                self.failure = error  # raised on every process, where its row arrives
        return self.end_row()

    def _next(self) -> Any:
        self._last = time.monotonic() if self._last is None else self._last
        while True:
            try:
                row = self.rows.get(timeout=POLL_S)
            except queue.Empty:
                self.check_health(self.stale_after_s)
                waited = time.monotonic() - self._last
                if self._in_a_row and waited > self.stale_after_s:
                    raise RuntimeError(f"No usable row in {waited:.0f} s, {self._left_out()}.") from None
                continue
            reason = self._unusable(row)
            if reason is None:
                lag = self.version() - int(row.model_version)
                self.lags[lag] += 1
                self.recent.append(lag)
                self._in_a_row.clear()
                self._last = time.monotonic()
                return row
            self.dropped[reason] += 1
            self._in_a_row[reason] += 1
            if self._in_a_row.total() > self.limit:
                raise RuntimeError(f"No usable row, {self._left_out()}.")
            if reason == "stale":
                return row  # TRL's to drop and to count
            self.count(f"trust/rows/dropped_{reason}_total")
            if self.dropped[reason] == 1:
                logger.warning(
                    f"A rollout row is left out: {DROPPED[reason]}. `trust/rows/dropped_{reason}_total` counts them."
                )

    def _left_out(self) -> str:
        left = ", ".join(f"{n} {reason}" for reason, n in self._in_a_row.items())
        mend = (
            f"rows are older than max_staleness={self.max_staleness} weight versions when they arrive: raise it, or "
            "generate faster, with less in flight (max_inflight_tasks, queue_maxsize)"
            if "stale" in self._in_a_row
            else "; ".join(DROPPED[reason] for reason in self._in_a_row)
        )
        return f"{self._in_a_row.total()} left out in a row ({left}): {mend}"

    def _unusable(self, row: Any) -> str | None:
        ids, mask, logps = (np.asarray(getattr(row, name, None)) for name in ROW)
        wrong = self._malformed(row, ids, mask, logps)
        if wrong:
            raise ValueError(f"The rollout worker returned a malformed row: {wrong}.")
        if self.version() - row.model_version > self.max_staleness:
            return "stale"
        trained = mask[1:] > 0  # the first token has no predecessor that could predict it
        if not trained.any():
            return "untrained"
        if not (np.isfinite(logps[1:][trained]).all() and math.isfinite(row.advantage)):
            return "nonfinite"
        return None

    def _malformed(self, row: Any, ids: np.ndarray, mask: np.ndarray, logps: np.ndarray) -> str | None:
        for name, kinds, x in zip(ROW, ("iu", "iub", "f"), (ids, mask, logps), strict=True):
            if x.ndim != 1 or not len(x) or x.dtype.kind not in kinds:
                return f"{name} is no array of numbers (n,), but {type(getattr(row, name, None)).__name__} {x.shape}"
        if not len(ids) == len(mask) == len(logps):
            return f"input_ids, completion_mask and old_log_probs have lengths {len(ids)}, {len(mask)}, {len(logps)}"
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            return f"input_ids reach from {ids.min()} to {ids.max()}, but the model knows 0 to {self.vocabulary - 1}"
        if not isinstance(row.advantage, float | int | np.floating):
            return f"advantage={row.advantage!r} is no number"
        version = row.model_version
        if not isinstance(version, int | np.integer) or version > self.version():
            return f"model_version={version!r}, but the trainer's weights are version {self.version()}"
        return None
