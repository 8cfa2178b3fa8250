"""The monitor warns or stops when a metric stays out of its bounds, for our trainers and stock ones."""

import logging
import math

import pytest
import tiny
from trl import GRPOConfig, GRPOTrainer

from trl_trust import TrustGRPOConfig, TrustGRPOTrainer, TrustMonitor
from trl_trust.monitor import BOUNDS


class Flow:
    should_training_stop = False


class State:
    global_step = 7
    is_world_process_zero = True


def feed(monitor, values, name="trust/kl"):
    control = Flow()
    for value in values:
        monitor.on_log(None, State, control, logs={"loss": 0.1} | ({} if value is None else {name: value}))
    return control.should_training_stop


def test_only_a_row_of_logs_trips(caplog):
    logging.getLogger("trl_trust.monitor").propagate = True
    monitor = TrustMonitor(patience=3, stop=True)
    with caplog.at_level(logging.WARNING, logger="trl_trust.monitor"):
        assert not feed(monitor, [0.2, 0.2, 0.0, 0.2, None, math.nan, 0.2])
        assert monitor.tripped == [] and not caplog.text
        assert feed(monitor, [0.2])
    assert monitor.tripped == ["trust/kl"]
    assert "Step 7: trust/kl=0.2 has been above 0.1 for 3 logs; lower learning_rate" in caplog.text
    assert "Training stops." in caplog.text


def test_a_warning_alone_lets_training_go_on():
    monitor = TrustMonitor(patience=1)
    assert not feed(monitor, [0.001], "entropy") and monitor.tripped == ["entropy"]


def test_own_bounds_and_switched_off_defaults():
    monitor = TrustMonitor({"trust/kl": (-math.inf, 1.0), "entropy": None}, patience=1)
    assert not feed(monitor, [0.5]) and not feed(monitor, [0.0], "entropy") and monitor.tripped == []
    feed(monitor, [2.0])
    assert monitor.tripped == ["trust/kl"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"patience": 0}, "patience=0 must be"),
        ({"bounds": {"entropy": (1.0, 0.5)}}, r"bounds\['entropy'\]=\(1.0, 0.5\) must be \(low, high\)"),
        ({"bounds": {"entropy": 1.0}}, r"bounds\['entropy'\]=1.0 must be"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrustMonitor(**settings)


def test_it_stops_our_trainer(tiny_model_path, tmp_path):
    monitor = TrustMonitor({"trust/kl": (-math.inf, 1e-5)}, patience=2, stop=True)
    args = tiny.tiny_config(TrustGRPOConfig, tmp_path, max_steps=20)
    trainer = tiny.tiny_run(TrustGRPOTrainer, tiny_model_path, args, callbacks=[monitor])
    assert monitor.tripped == ["trust/kl"] and trainer.state.global_step < 20


def test_stock_grpo_is_watched_by_what_it_logs(tiny_model_path, tmp_path):
    monitor = TrustMonitor({"entropy": (1e6, math.inf)}, patience=2)
    tiny.tiny_run(GRPOTrainer, tiny_model_path, tiny.tiny_config(GRPOConfig, tmp_path), callbacks=[monitor])
    assert monitor.tripped == ["entropy"]
    with pytest.raises(ValueError, match=r"^bounds on trust/kl: not logged by this trainer; logged are .*entropy"):
        watch = TrustMonitor({"trust/kl": (0, 1)})
        tiny.tiny_run(GRPOTrainer, tiny_model_path, tiny.tiny_config(GRPOConfig, tmp_path), callbacks=[watch])


def test_every_default_is_a_metric_that_is_logged(tiny_model_path, tmp_path):
    args = tiny.tiny_config(TrustGRPOConfig, tmp_path, max_steps=1)
    trainer = tiny.tiny_run(TrustGRPOTrainer, tiny_model_path, args)
    assert set(BOUNDS) <= set(trainer.state.log_history[0])
