"""What a rollout worker may do wrong: a row left out is counted, anything else ends the run with one line."""

import queue
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from given_rows import GivenRows, async_config, async_run, async_trainer, history, row, rows

from trl_trust.asynchronous.base import AsyncTrustGRPOTrainer
from trl_trust.asynchronous.intake import RowIntake


NAN, INF = float("nan"), float("inf")


class Feed:
    """An intake over rows that are there, and what it was told to count."""

    def __init__(self, *given, version=5, health=None, **changes):
        self.rows, self.counted, self.looked = queue.Queue(), Counter(), 0
        for each in given:
            self.rows.put(each)
        settings = dict(stale_after_s=0.2, max_staleness=4, limit=10, vocabulary=56)
        self.health = health
        self.intake = RowIntake(
            self.rows,
            lambda: version,
            self.check_health,
            count=lambda name: self.counted.update([name]),
            **(settings | changes),
        )

    def check_health(self, stale_after_s):
        self.looked += 1
        if self.health:
            raise self.health


GOOD = row([3, 4, 5], [0, 1, 1], version=5)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (replace(GOOD, old_log_probs=np.array([0.0, NAN, -1.0], dtype=np.float32)), "nonfinite"),
        (replace(GOOD, old_log_probs=np.array([0.0, -1.0, -INF], dtype=np.float32)), "nonfinite"),
        (replace(GOOD, advantage=NAN), "nonfinite"),
        (replace(GOOD, completion_mask=np.zeros(3, dtype=np.int64)), "untrained"),
        (replace(GOOD, completion_mask=np.array([1, 0, 0])), "untrained"),  # nothing predicts the first token
    ],
)
def test_an_unusable_row_is_left_out_and_counted(bad, reason):
    feed = Feed(bad, bad, GOOD)
    assert feed.intake.get() is GOOD
    assert feed.intake.dropped == {reason: 2} and feed.counted == {f"trust/rows/dropped_{reason}_total": 2}
    assert feed.intake.lags == {0: 1}


def test_a_nan_where_nothing_is_trained_does_no_harm():
    fine = replace(GOOD, old_log_probs=np.array([NAN, -1.0, -1.0], dtype=np.float32))
    assert Feed(fine).intake.get() is fine


@pytest.mark.parametrize(
    "change, said",
    [
        ({"old_log_probs": np.zeros(2, dtype=np.float32)}, "have lengths 3, 3, 2"),
        ({"input_ids": np.array([3, 4, 56])}, "input_ids reach from 3 to 56, but the model knows 0 to 55"),
        ({"input_ids": np.array([-1, 4, 5])}, "input_ids reach from -1 to 5"),
        ({"input_ids": np.array([3.0, 4.0, 5.0])}, "input_ids is no array of numbers"),
        ({"input_ids": np.zeros((1, 3), dtype=np.int64)}, r"input_ids is no array of numbers \(n,\), but ndarray"),
        ({"completion_mask": None}, "completion_mask is no array of numbers"),
        ({"old_log_probs": np.array([0.0, None, -1.0])}, "old_log_probs is no array of numbers"),
        ({"advantage": None}, "advantage=None is no number"),
        ({"model_version": 6}, "model_version=6, but the trainer's weights are version 5"),
        ({"model_version": None}, "model_version=None"),
    ],
)
def test_a_malformed_row_ends_the_run_with_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=f"malformed row: .*{said}"):
        Feed(replace(GOOD, **change)).intake.get()


def test_what_is_no_row_at_all():
    with pytest.raises(ValueError, match="malformed row: input_ids is no array"):
        Feed({"input_ids": [1]}).intake.get()


def test_lags_are_those_of_rows_that_are_used():
    feed = Feed(*(replace(GOOD, model_version=v) for v in (5, 4, 3, 1, 0)))
    for _ in range(4):
        feed.intake.get()
    stale = feed.intake.get()  # TRL drops it, and counts it
    assert stale.model_version == 0 and feed.intake.dropped == {"stale": 1}
    assert feed.intake.lags == {0: 1, 1: 1, 2: 1, 4: 1} and feed.intake.recent == [0, 1, 2, 4]


def test_nothing_but_stale_rows():
    feed = Feed(*[replace(GOOD, model_version=0)] * 20)
    for _ in range(10):
        feed.intake.get()
    with pytest.raises(RuntimeError, match=r"11 left out in a row \(11 stale\): .*max_staleness=4.*raise it"):
        feed.intake.get()


def test_nothing_but_unusable_rows_and_then_silence():
    feed = Feed(replace(GOOD, advantage=NAN))
    with pytest.raises(RuntimeError, match=r"No usable row in \d+ s, 1 left out in a row \(1 nonfinite\): .*vLLM"):
        feed.intake.get()


def test_a_slow_worker_is_waited_for():
    """A healthy worker may take longer than any bound, as long as nothing that came was unusable."""
    feed = Feed(stale_after_s=0.1)
    feed.check_health = None

    def look(stale_after_s):
        feed.looked += 1
        if feed.looked == 3:
            feed.rows.put(GOOD)

    feed.intake.check_health = look
    assert feed.intake.get() is GOOD and feed.looked == 3


def test_a_dead_worker():
    with pytest.raises(RuntimeError, match="it is dead"):
        Feed(health=RuntimeError("it is dead")).intake.get()


# -- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_without_the_unusable_rows(tiny_model_path, tmp_path):
    """The same parameters as if they had never come, and a count."""
    given = rows(24)
    broken = []
    for i, sample in enumerate(given):
        if i % 5 == 1:
            broken.append(replace(sample, old_log_probs=np.full_like(sample.old_log_probs, NAN)))
        if i % 5 == 2:
            broken.append(replace(sample, completion_mask=np.zeros_like(sample.completion_mask)))
        broken.append(sample)
    runs = [
        async_run(AsyncTrustGRPOTrainer, tiny_model_path, async_config(output_dir=tmp_path), GivenRows(each))
        for each in (given, broken)
    ]
    assert all(map(torch.equal, runs[0].model.parameters(), runs[1].model.parameters()))
    dropped = Counter()
    for record in history(runs[1]):
        dropped.update({k: v for k, v in record.items() if k.startswith("trust/rows/") and v})
    assert dropped["trust/rows/dropped_nonfinite_total"] > 1 and dropped["trust/rows/dropped_untrained_total"] > 1
    assert all(p.isfinite().all() for p in runs[1].model.parameters())


@pytest.mark.parametrize("token_budget", [0, 40])
def test_a_worker_that_dies_ends_the_run(token_budget, tiny_model_path, tmp_path):
    worker = GivenRows(rows(10), RuntimeError("the worker is dead"))
    args = async_config(output_dir=tmp_path, token_budget=token_budget, max_steps=20)
    with pytest.raises(RuntimeError, match="the worker is dead"):
        async_run(AsyncTrustGRPOTrainer, tiny_model_path, args, worker)
    assert worker.stopped


def test_rows_that_are_all_too_old_end_the_run(tiny_model_path, tmp_path):
    args = async_config(output_dir=tmp_path, max_staleness=0, queue_maxsize=8, max_steps=9)
    worker = GivenRows(rows(60))  # all of version 1
    with pytest.raises(RuntimeError, match=r"9 left out in a row \(9 stale\): .*max_staleness=0"):
        async_run(AsyncTrustGRPOTrainer, tiny_model_path, args, worker)
    trainer = async_trainer(AsyncTrustGRPOTrainer, tiny_model_path, args, worker)
    assert trainer.lags == {}
