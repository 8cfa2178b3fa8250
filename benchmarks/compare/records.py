"""The records of the runs: where they lie, how one is added, and which rate an entry's tuning chose."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


RESULTS = Path(__file__).parents[1] / "results" / "compare"
GRID = (1e-4, 3e-4, 1e-3, 3e-3)  # the window
EDGES = (3e-5, 1e-2)  # tried in tuning where the best rate is the first or the last
TUNING = (1e-4, 3e-4, 1e-3)
CLOSE = 0.03  # tuning scores nearer than that are not told apart by two starts
STARTS = tuple(range(12))
RESERVE = tuple(range(12, 24))
FIRST_TUNING_START = 100


@dataclass(frozen=True)
class Job:
    """One run, and the name of its file."""

    task: str
    regime: str
    entry: str
    start: int
    learning_rate: float

    def path(self, root: Path) -> Path:
        return root / self.task / self.regime / self.entry / f"{self.learning_rate:.0e}-{self.start:03d}.json"


def write(root: Path, job: Job, record: dict) -> Path:
    """Add the record of `job`, whole or not at all. What is there stays.

    Raises:
        FileExistsError: if the run is there already.
    """
    path = job.path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.link(temporary, path)  # unlike a rename it does not replace
    finally:
        os.unlink(temporary)
    return path


def read(root: Path) -> list[dict]:
    """All records, in the order of their paths. Half-written files have other names."""
    return [json.loads(path.read_text()) for path in sorted(root.glob("*/*/*/[!.]*.json"))]


def close_rates(scores: dict[float, list[float]]) -> list[float]:
    """The rates whose mean score is within `CLOSE` of the best, by the starts that all rates have had."""
    shared = min(map(len, scores.values()))
    means = {rate: sum(found[:shared]) / shared for rate, found in scores.items()}
    return [rate for rate in sorted(means) if means[rate] >= max(means.values()) - CLOSE]


def tuned_rate(scores: dict[float, list[float]]) -> tuple[float, float | None]:
    """The rate with the best mean score, and the rate to try before it counts: the best one lies at an edge.

    Close rates are told apart by all starts that they share. Scores are in the order of their starts.
    """
    rates, close = sorted(scores), close_rates(scores)
    shared = min(len(scores[rate]) for rate in close)
    best = max(close, key=lambda rate: sum(scores[rate][:shared]))
    ladder = sorted({*GRID, *EDGES})
    position = ladder.index(best)
    beyond = None
    if best == rates[0] and position > 0:
        beyond = ladder[position - 1]
    elif best == rates[-1] and position + 1 < len(ladder):
        beyond = ladder[position + 1]
    return best, beyond


def tuning_scores(records: Iterable[dict]) -> dict[tuple[str, str, str], dict[float, list[float]]]:
    """Scores of the tuning starts, by (task, regime, entry) and rate."""
    found = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["start"] >= FIRST_TUNING_START:
            key = record["task"], record["regime"], record["entry"]
            found[key][record["learning_rate"]].append(record["score"])
    return found
