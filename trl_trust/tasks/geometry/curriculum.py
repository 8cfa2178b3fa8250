"""A curriculum by proof length: problems grow as long as the reward lets them.

Spec of the package, in the aim of TrustGeoGen (arXiv 2504.15780), **inspired**: a target length kappa that rises while
the mean reward is above one half and falls while it is below. Transformers and TRL stay as they are: the data set is
wrapped, no private sampler is touched.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainerCallback


def kappas(start: float, rewards: Iterable[float], eta: float, low: float, high: float) -> list[float]:
    """`kappa <- clip(kappa + eta (reward - 1/2), low, high)`, the start first."""
    found = [start]
    for reward in rewards:
        found.append(min(max(found[-1] + eta * (reward - 0.5), low), high))
    return found


class NearKappa:
    """A data set of the same length, whose row i is one of the length next to kappa. See [`GeometryCurriculum`]."""

    def __init__(self, data, lengths: Sequence[int], curriculum: "GeometryCurriculum"):
        self.data, self.curriculum = data, curriculum
        self.by_length: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            self.by_length.setdefault(int(length), []).append(i)
        self.lengths = sorted(self.by_length)

    def __len__(self) -> int:
        return len(self.data)

    def nearest(self, kappa: float) -> int:
        """The length in the data that is next to kappa; the shorter of two."""
        place = bisect_left(self.lengths, kappa)
        return min(self.lengths[max(place - 1, 0) : place + 1], key=lambda length: (abs(length - kappa), length))

    def __getitem__(self, i: int) -> dict[str, Any]:
        window, kappa = self.curriculum.at_next_fetch()
        rows = self.by_length[self.nearest(kappa)]
        word = hashlib.blake2b(f"{self.curriculum.seed} {window} {i}".encode(), digest_size=8).digest()
        return self.data[rows[int.from_bytes(word, "big") % len(rows)]]


class GeometryCurriculum(TrainerCallback):
    """Draws problems whose proofs are about as long as the policy can do.

    After each log with a reward, `kappa <- clip(kappa + eta (mean reward - 1/2))`, between the shortest and the
    longest proof in the data. A generation sees rows of the length next to kappa, chosen by index, so that the repeats
    of a prompt stay repeats; which rows changes with kappa's move. Logged as `geometry/kappa`.

    What a batch sees depends on the step at which it is used and on the log before it, not on when a loader fetched
    it: a resumed run, whose log is in its checkpoint, sees what the other would have seen, and so do all processes.

        trainer = GRPOTrainer(..., train_dataset=geometry_dataset(n=2000, min_steps=1))
        trainer.add_callback(GeometryCurriculum(trainer))

    Args:
        trainer: a trainer on TRL's GRPO whose `train_dataset` has the column `proof_length`.
        eta: how far kappa moves for a reward of 1, halved; above 0.
        start: the first kappa; the shortest length by default.
        reward: name in the log of a mean in [0, 1].
        seed: of the choice among rows of a length.

    Raises:
        ValueError: for data without the column or without a length, loader workers, or eta that is not above 0.
    """

    def __init__(
        self,
        trainer,
        eta: float = 1.0,
        start: float | None = None,
        reward: str = "rewards/geometry_reward/mean",
        seed: int = 0,
    ):
        data, args = trainer.train_dataset, trainer.args
        if eta <= 0:
            raise ValueError(f"eta={eta}: a number above 0")
        if "proof_length" not in (getattr(data, "column_names", None) or []) or not hasattr(data, "__len__"):
            raise ValueError("the curriculum needs train_dataset with a column proof_length: geometry_dataset(...)")
        if args.dataloader_num_workers:
            raise ValueError(f"dataloader_num_workers={args.dataloader_num_workers}: the curriculum needs 0")
        lengths = list(data["proof_length"])
        self.low, self.high = min(lengths), max(lengths)
        self.eta, self.reward, self.seed = eta, reward, seed
        self.start = self.low if start is None else start
        # One fetch of TRL's loader is a generation batch of a process, once for each micro-step that uses it
        self.rows = args.per_device_train_batch_size * args.steps_per_generation
        self.updates = args.gradient_accumulation_steps
        self.fetched, self.state = 0, trainer.state
        self._found = None, (0, self.start)  # an update, and what holds for all its rows
        trainer.train_dataset = NearKappa(data, lengths, self)

    def history(self, before: int) -> list[float]:
        """Kappas after the logs of at most `before` updates, the start first."""
        logs = [entry for entry in self.state.log_history if self.reward in entry and entry["step"] <= before]
        return kappas(self.start, (entry[self.reward] for entry in logs), self.eta, self.low, self.high)

    def at_next_fetch(self) -> tuple[int, float]:
        """How often kappa had moved, and kappa, for the next row that is fetched; counts it.

        The loader is one micro-step ahead, so that the first of an update is fetched before the last update was
        logged: every row of an update goes by the log before that.
        """
        update = self.fetched // self.rows // self.updates
        self.fetched += 1
        if self._found[0] != update:
            found = self.history(update - 1)
            self._found = update, (len(found) - 1, found[-1])
        return self._found[1]

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = state
        self.fetched = state.global_step * self.updates * self.rows  # what came before a resume is skipped, not read
        self._found = None, (0, self.start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and self.reward in logs:
            now = self.history(state.global_step)[-1]
            logs["geometry/kappa"] = now
            state.log_history[-1]["geometry/kappa"] = now
