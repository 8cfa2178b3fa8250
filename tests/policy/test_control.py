"""Step control: the law and the controller, and what a trainer does with them."""

import json
import logging
import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

import trl_trust.optim  # noqa: F401  registers the optimizers
from trl_trust import ALPConfig, DPPOTrainer, ERPDConfig, TrustGRPOConfig, TrustGRPOTrainer
from trl_trust.policy.control import GROWTH, TOLERANCE, KLController, StepControl, allowed_kl
from trl_trust.policy.terms import PolicyBatch


def controller(**changes) -> KLController:
    return KLController(**{"slope": 0.0013, "scale": 0.1, "low": 1e-3, "high": 1.0} | changes)


# -- the law and the controller --------------------------------------------------------------------------------------


def test_the_law():
    assert [allowed_kl(k, 0.0013, 0.02) for k in (0, 1, 4, 15, 20)] == [0.0, 0.0013, 0.0052, 15 * 0.0013, 0.02]


def test_two_generations_by_hand():
    """Rate 1e-3, K = a E with a = 1300: a rate of sqrt(.0013 / 1300) = 1e-3, i.e. factor 1, meets the law."""
    c, a, rate = controller(), 1300.0, 1e-3
    travel, scales = 0.0, []
    for k in range(4):
        kl = a * travel
        scales.append(c.update(kl, allowed_kl(k, 0.0013, 0.02), travel, rate))
        travel += (scales[-1] * rate) ** 2
    assert scales == pytest.approx([0.1, 0.2, 0.4, 0.8])  # held, then doubled towards 1
    assert math.exp(c.log_a) == pytest.approx(a)
    # a second generation in which the policy moves four times as easily: the new a weighs .3 each time
    travel, log_a = 0.0, math.log(a)
    assert c.update(0.0, 0.0, 0.0, rate) == pytest.approx(0.8)  # k = 0: held
    travel = (0.8 * rate) ** 2
    kl = 4 * a * travel  # .003328, beyond 1.25 x .0013
    log_a += 0.3 * math.log(4)
    expected = math.sqrt(0.0013 / math.exp(log_a)) / rate * (TOLERANCE * 0.0013 / kl)
    assert c.update(kl, 0.0013, travel, rate) == pytest.approx(expected)


def test_the_nominal_rate_drops_out():
    """Whatever the rate, factor x rate ends at sqrt(slope / a)."""
    for rate in (1e-4, 1e-3, 1e-1):
        c = controller(high=100.0)
        for _ in range(10):  # generations of four updates
            travel = 0.0
            for k in range(4):
                scale = c.update(1300 * travel, allowed_kl(k, 0.0013, 0.02), travel, rate)
                travel += (scale * rate) ** 2
        assert scale * rate == pytest.approx(1e-3, rel=0.01)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 40)), max_size=30), st.floats(1e-6, 1.0))
def test_the_factor_stays_in_its_bounds(sequence, rate):
    c, travel = controller(), 0.0
    for kl, k in sequence:
        before = c.scale
        scale = c.update(kl, allowed_kl(k, 0.0013, 0.02), travel, rate)
        assert 1e-3 <= scale <= 1.0 and scale <= GROWTH * before
        travel = 0.0 if k == 0 else travel + (scale * rate) ** 2


@given(st.floats(0, 10), st.floats(0, 10), st.integers(1, 40), st.one_of(st.none(), st.floats(-5, 10)))
def test_more_divergence_never_gives_a_larger_step(one, other, k, log_a):
    scales = [
        controller(log_a=log_a).update(kl, allowed_kl(k, 0.0013, 0.02), 1e-6 * k, 1e-3) for kl in sorted((one, other))
    ]
    assert scales[0] >= scales[1]


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_lowers_the_factor(kl):
    c = controller(scale=0.5, log_a=1.0)
    assert c.update(kl, 0.0013, 1e-6, 1e-3) == 0.25
    assert c.log_a == 1.0
    assert controller(scale=1e-3).update(kl, 0.0013, 1e-6, 1e-3) == 1e-3


def test_warm_up_lets_the_factor_fall_and_not_rise():
    assert controller().update(1e-9, 0.0013, 1e-6, 1e-3, may_rise=False) == 0.1
    assert controller().update(1.0, 0.0013, 1e-6, 1e-3, may_rise=False) < 0.1


def test_above_one_the_target_follows_the_schedule():
    full, half = (controller(high=10.0, scale=5.0, log_a=math.log(1300)) for _ in range(2))
    a = full.update(0.0013, 0.0013, 1e-6, 1e-3)
    b = half.update(0.0013, 0.0013, 1e-6, 1e-3, fraction=0.25)
    assert b == pytest.approx(a / 2)


# -- one object a trainer --------------------------------------------------------------------------------------------


def batch(shift: float, rows: int = 4, tokens: int = 6, advantage: float = 1.0) -> PolicyBatch:
    old = torch.randn(rows, tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones_like(old)
    mask[-1, 2:] = 0
    return PolicyBatch(old + shift, old, mask, torch.full((rows, 1), advantage, dtype=torch.float64))


def step_control(mode="kl", **changes) -> StepControl:
    return StepControl(mode, 16, lambda sums: sums, **changes)


def part(whole: PolicyBatch, rows: slice) -> PolicyBatch:
    return PolicyBatch(whole.logps[rows], whole.old_logps[rows], whole.mask[rows], whole.advantages[rows])


def test_k_is_a_mean_over_live_tokens():
    control = step_control()
    control.made(1e-4)
    control.measure(batch(0.1))
    decision = control.decide(1e-3)
    assert decision.kl == pytest.approx(math.exp(0.1) - 1 - 0.1) and decision.allowed == 0.0013


@pytest.mark.parametrize("mode", ["kl", "ess", "stop"])
def test_accumulation_and_ranks_change_nothing(mode):
    """One micro-batch of 4 rows, two of 2, and two ranks with 2 each."""
    whole = batch(0.03)
    whole.logps[0] += 0.2
    halves = [part(whole, slice(0, 2)), part(whole, slice(2, 4))]

    def decide(*ranks):
        sent = []  # what each rank gives to the reduction
        for window in ranks:
            control = StepControl(mode, 16, lambda sums: sent.append(sums) or sums)
            control.made(1e-4)
            for micro_batch in window:
                control.measure(micro_batch)
            control.decide(1e-3)
        control = StepControl(mode, 16, lambda sums: sum(sent))
        control.made(1e-4)
        control.measure(whole)
        decision = control.decide(1e-3)
        return decision.kl, decision.allowed, decision.scale, decision.leave_out

    assert decide(halves) == pytest.approx(decide([whole]))
    assert decide(halves[:1], halves[1:]) == pytest.approx(decide([whole]))


@pytest.mark.parametrize("kind", ["no advantage", "no live token", "fresh"])
def test_held_where_there_is_nothing_to_measure(kind):
    control = step_control()
    if kind != "fresh":
        control.made(1e-4)
    measured = batch(0.5, advantage=0.0 if kind == "no advantage" else 1.0)
    if kind == "no live token":
        measured.mask.zero_()
    control.measure(measured)
    assert control.decide(1e-3).scale == 0.1 and control.controller.log_a is None


def test_effective_sample_size():
    control = step_control("ess", low=0.1)
    control.measure(batch(0.0))
    assert control.decide(1e-3).scale == 1.0
    skewed = batch(0.0)
    skewed.logps[0] += 2.0  # one response weighs e^12, the rest 1 each: ESS near 1 of 4
    control.measure(skewed)
    assert control.decide(1e-3).scale == pytest.approx(0.5, abs=1e-4)


def test_stop_leaves_the_rest_of_a_generation_out():
    control, made = step_control("stop"), []
    for shift in (0.0, 0.1, 0.3, 0.0, 0.1):  # K: 0, .0052, .0499, 0, .0052
        control.measure(batch(shift))
        made.append(not control.decide(1e-3).leave_out)
    assert made == [True, True, False, False, False]
    control.generated()
    control.measure(batch(0.0))
    assert not control.decide(1e-3).leave_out


def test_the_slope_leaves_room_for_all_updates_of_a_generation():
    assert step_control().controller.slope == 0.0013  # 16 updates: .02 / 15 is above
    assert StepControl("kl", 64, lambda s: s).controller.slope == pytest.approx(0.02 / 63)


# -- in a trainer ----------------------------------------------------------------------------------------------------


def run(model_path, out, trainer_class=TrustGRPOTrainer, callbacks=(), resume=None, **changes):
    """Train 8 updates, four a generation, and return the trainer."""
    args = tiny.tiny_config(trainer_class.config_class, out, **{"max_steps": 8} | changes)
    trainer = tiny.tiny_trainer(trainer_class, model_path, args, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CONSTANT = {"lr_scheduler_type": "constant"}


def logged(trainer, name):
    return [record[name] for record in trainer.state.log_history if name in record]


class Watch(TrainerCallback):
    """Weights, and the optimizer's state as text, around each update."""

    def __init__(self):
        self.before, self.unchanged, self.trainer = None, [], None

    def _now(self, model, optimizer):
        # TRAM's anchor apart: it gives the old one up in its ascent, before the update is left out
        states = optimizer.state_dict()["state"].items()
        state = {k: str({name: x for name, x in v.items() if name != "tram_anchor"}) for k, v in states}
        return {name: p.detach().clone() for name, p in model.named_parameters()}, state

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = self._now(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        (old, old_state), (new, new_state) = self.before, self._now(model, optimizer)
        self.unchanged.append(all(torch.equal(old[n], new[n]) for n in old) and old_state == new_state)


def test_a_factor_of_one_is_the_plain_run_to_the_bit(tiny_model_path, tmp_path):
    plain = run(tiny_model_path, tmp_path / "a")
    ones = {"step_scale_init": 1.0, "step_scale_min": 1.0}
    steered = run(tiny_model_path, tmp_path / "b", step_control="kl", **ones)
    assert tiny.parameter_gap(plain.model, steered.model) == 0.0
    assert logged(steered, "trust/step_scale") == [1.0] * 8 and not logged(plain, "trust/step_scale")


def test_the_rate_follows_the_divergence(tiny_model_path, tmp_path):
    trainer = run(tiny_model_path, tmp_path, step_control="kl", learning_rate=0.1, max_steps=24, **CONSTANT)
    kl, target, scale, rate = (logged(trainer, f"trust/step_{name}") for name in ("kl", "target", "scale", "lr"))
    assert target == pytest.approx([0.0, 0.0013, 0.0026, 0.0039] * 6)
    assert all(kl[i] == pytest.approx(0, abs=1e-9) for i in range(0, 24, 4)) and min(kl[i] for i in (1, 2, 3)) > 0
    assert scale[0] == 0.1 and min(scale) < 0.1
    assert rate == pytest.approx([0.1 * s for s in scale])
    assert logged(trainer, "learning_rate") == [0.1] * 24  # nominal
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1
    assert max(kl[12:]) < 0.04


@pytest.mark.parametrize("optim", ["adamw_torch", "auon", "tram_adamw"])
def test_a_left_out_update_leaves_weights_and_state(tiny_model_path, tmp_path, optim):
    watch = Watch()
    settings = {
        "step_control": "stop",
        "max_kl": 1e-6,
        "learning_rate": 0.05,
        "optim": optim,
    }
    trainer = run(tiny_model_path, tmp_path, callbacks=[watch], **settings)
    assert watch.unchanged == [False, True, True, True] * 2
    assert trainer.state.global_step == 8
    assert logged(trainer, "trust/step_scale") == [1.0, 0.0, 0.0, 0.0] * 2


@pytest.mark.parametrize("mode", ["kl", "ess", "backtrack"])
@pytest.mark.parametrize("optim", ["auon", "tram_adamw"])
def test_modes_under_other_optimizers(tiny_model_path, tmp_path, mode, optim):
    trainer = run(tiny_model_path, tmp_path, step_control=mode, optim=optim)
    assert len(logged(trainer, "trust/step_kl")) == 8
    assert all(math.isfinite(x) for x in logged(trainer, "trust/step_scale"))


def test_tram_is_measured_once_and_unperturbed(tiny_model_path, tmp_path):
    trainer = run(tiny_model_path, tmp_path, step_control="kl", optim="tram_adamw")
    assert [logged(trainer, "trust/step_kl")[i] for i in (0, 4)] == pytest.approx([0, 0], abs=1e-9)


def test_accumulation(tiny_model_path, tmp_path):
    """Four micro-batches of one row group are one update of the same K."""
    whole = run(tiny_model_path, tmp_path / "a", step_control="kl", per_device_train_batch_size=8)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
    parts = run(tiny_model_path, tmp_path / "b", step_control="kl", **sizes)
    for name in ("trust/step_kl", "trust/step_scale"):
        assert logged(whole, name) == pytest.approx(logged(parts, name), rel=1e-3, abs=1e-7)
    assert logged(parts, "trust/step_target") == pytest.approx([0.0, 0.0013, 0.0026, 0.0039] * 2)


def test_backtrack_holds_every_step_to_its_bound(tiny_model_path, tmp_path):
    seen = []

    class Checked(TrustGRPOTrainer):
        def _backtrack(self):
            fraction, bound = super()._backtrack(), self.step_control.bound()
            if fraction:
                seen.append(self._measure_again() / bound)
            return fraction

    trainer = run(tiny_model_path, tmp_path, Checked, step_control="backtrack", learning_rate=0.05)
    assert seen and max(seen) <= 1 + 1e-6
    scales = logged(trainer, "trust/step_scale")
    assert min(scales) < 1


def test_backtrack_undoes_what_cannot_be_shortened(tiny_model_path, tmp_path):
    class Hopeless(TrustGRPOTrainer):
        def _measure_again(self):
            return 1.0

    trainer = run(tiny_model_path, tmp_path, Hopeless, step_control="backtrack", max_steps=2)
    start = tiny.tiny_trainer(Hopeless, tiny_model_path, tiny.tiny_config(TrustGRPOConfig, tmp_path / "s"))
    assert tiny.parameter_gap(trainer.model, start.model) == 0.0
    assert logged(trainer, "trust/step_scale") == [0.0, 0.0] and trainer.step_control.k == 0


def test_resume_at_the_end_of_a_generation_is_bit_equal(tiny_model_path, tmp_path):
    settings = {
        "step_control": "kl",
        "learning_rate": 0.05,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 8,
    }
    whole = run(tiny_model_path, tmp_path / "a", **settings)
    state = json.loads(Path(tmp_path, "a", "checkpoint-8", "trl_trust_state.json").read_text())
    assert state["step_control"]["k"] == 4 and state["step_control"]["log_a"] is not None
    resumed = run(tiny_model_path, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-8"), **settings)
    assert tiny.parameter_gap(whole.model, resumed.model) == 0.0
    assert logged(whole, "trust/step_scale")[8:] == logged(resumed, "trust/step_scale")[-4:]


def test_a_method_and_lora_under_control(tiny_model_path, tmp_path):
    from peft import LoraConfig

    args = tiny.tiny_config(DPPOTrainer.config_class, tmp_path, step_control="kl", max_steps=8)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)
    trainer = tiny.tiny_run(DPPOTrainer, tiny_model_path, args, peft_config=adapter)
    assert len(logged(trainer, "trust/step_scale")) == 8


@pytest.mark.parametrize("mode", ["kl", "ess", "stop"])
def test_fresh_rollouts_alone_leave_nothing_to_measure(tiny_model_path, tmp_path, mode):
    with pytest.raises(ValueError, match=r"^step_control='\w+' measures nothing with .*num_iterations above 1"):
        run(tiny_model_path, tmp_path, step_control=mode, steps_per_generation=1)


def test_backtrack_works_on_fresh_rollouts(tiny_model_path, tmp_path):
    trainer = run(tiny_model_path, tmp_path, step_control="backtrack", steps_per_generation=1, max_steps=2)
    assert len(logged(trainer, "trust/step_scale")) == 2


@pytest.mark.parametrize(
    "config_class, settings, message",
    [
        (TrustGRPOConfig, {"step_control": "trust"}, "step_control='trust' must be one of 'none', 'kl'"),
        (TrustGRPOConfig, {"step_control": "kl", "target_kl": 0}, "target_kl=0 must be a finite number > 0"),
        (TrustGRPOConfig, {"step_control": "kl", "max_kl": math.inf}, "max_kl=inf must be a finite number > 0"),
        (TrustGRPOConfig, {"target_kl": 0.01}, r"target_kl=0.01: .* set step_control='kl' or 'backtrack'"),
        (TrustGRPOConfig, {"step_control": "stop", "step_scale_max": 2.0}, "step_scale_max=2.0: .*'kl' or 'ess'"),
        (TrustGRPOConfig, {"step_control": "kl", "target_kl": 0.1}, "target_kl=0.1 must be at most max_kl"),
        (TrustGRPOConfig, {"step_control": "kl", "step_scale_init": 2.0}, "step_scale_init=2.0 must lie in"),
        (TrustGRPOConfig, {"step_control": "ess", "step_scale_min": 2.0}, "step_scale_min=2.0 must be at most"),
        (ALPConfig, {"step_control": "kl"}, "step_control='kl' reads KL"),
    ],
)
def test_bad_settings_are_one_line(config_class, settings, message):
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        tiny.tiny_config(config_class, **settings)
    assert "\n" not in str(raised.value)


def test_stored_rollouts_have_no_step_control():
    assert "step_control" not in ERPDConfig.__dataclass_fields__


# -- the guard for updates that are not finite -----------------------------------------------------------------------


class Broken(TrustGRPOTrainer):
    """Its loss is NaN in the updates of `at`."""

    at: tuple[int, ...] = ()

    def policy_loss(self, batch):
        out = super().policy_loss(batch)
        if self.model.training and self.state.global_step in self.at:
            out.per_token_loss.data.fill_(math.nan)
            out.per_token_loss.register_hook(lambda gradient: gradient * math.nan)
        return out


def test_an_update_that_is_not_finite_is_left_out_and_counted(tiny_model_path, tmp_path, caplog):
    logging.getLogger("trl_trust.steps").propagate = True
    watch = Watch()
    with caplog.at_level(logging.WARNING, logger="trl_trust.steps"):
        trainer = run(tiny_model_path, tmp_path, type("Some", (Broken,), {"at": (2, 5)}), callbacks=[watch])
    assert watch.unchanged == [step in (2, 5) for step in range(8)]
    assert logged(trainer, "trust/skipped_nonfinite") == [0, 0, 1, 1, 1, 2, 2, 2]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert caplog.text.count("was left out") == 1 and "Update 3 was left out" in caplog.text


def test_a_run_of_such_updates_stops(tiny_model_path, tmp_path):
    always = type("Always", (Broken,), {"at": tuple(range(99))})
    with pytest.raises(RuntimeError, match=r"10 updates in a row, up to update 10, was not finite.*learning_rate"):
        run(tiny_model_path, tmp_path, always, max_steps=20)
