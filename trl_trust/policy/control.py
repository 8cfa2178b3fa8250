"""Step control: a step that keeps to its region, so that the learning rate stops being a setting.

A policy term decides which tokens push. None bounds how far a step goes, because a token without a gradient still
moves with its neighbours. Here the movement is measured, with log-probabilities that the loss has computed anyway, and
the learning rate follows it.

Definitions. An *update* is one optimizer step. k counts the updates made since the rollouts at hand were generated. K
is the mean over live tokens of `exp(d) - 1 - d`, d = logp - old_logp before the update: an estimate of KL(old || new).
The policy k updates after generation is allowed `T(k) = min(target_kl k, max_kl)`.

The law. Over a generation the policy walks: with noisy gradients its steps are nearly uncorrelated, so the squared
distance, and with it KL, grows as the *travel* `E`, the sum of squared rates of the updates since generation
(diffusion; a drift would give k^2). Then K = a E with one unknown a, in KL per squared rate, which every update
measures anew, and the rate at which K meets T(k) for each k is `sqrt(target_kl / a)`: the nominal rate drops out.

Provenance: **ours**, law and controller alike; what was measured is on the page docs/step_control.md. `ess` follows
VCPO (arXiv 2602.17616: learning rate times the square root of the effective sample size ratio of unclipped sequence
weights); `stop` is the early stopping on KL of PPO implementations; `backtrack` is TRPO's line search (arXiv
1502.05477, appendix C) on a step already made, without its test of the surrogate.

[`KLController`] is floats in, a float out; [`StepControl`] is told what happens and says what to do, and knows no
trainer; [`SteeredSteps`] is the part of a trainer that tells it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..steps import GuardedSteps
from .terms import LOG_RATIO_LIMIT, PolicyBatch


logger = get_logger(__name__)

# Chosen on column addition alone (docs/step_control.md).
TOLERANCE = 1.25  # K may pass T by this factor before the brake acts: one mini-batch measures K to about so much
MEMORY_UP, MEMORY_DOWN = 0.3, 0.1  # weight of a new measurement of log a: what speaks for smaller steps weighs more
GROWTH = 2.0  # the factor may at most double from one update to the next
BACKTRACK_TOLERANCE = 1.5  # the same for a step that was made already
SHORTENINGS = 4  # a step taken back is shortened so often, then undone


def allowed_kl(k: float, target_kl: float, max_kl: float) -> float:
    """T(k): the KL(old || new) that a policy may have k updates after generation."""
    return min(target_kl * k, max_kl)


@dataclass
class KLController:
    """The factor s on the learning rate under `step_control="kl"`. Pure: floats in, a float out.

    Args:
        slope: KL that each update may add.
        scale: the factor until the first measurement.
        low, high: bounds of the factor.
        log_a: logarithm of the measured KL per squared rate; `None` before the first measurement.
    """

    slope: float
    scale: float
    low: float
    high: float
    log_a: float | None = None

    def update(
        self, kl: float, allowed: float, travel: float, rate: float, *, may_rise: bool = True, fraction: float = 1.0
    ) -> float:
        """The factor for the update at hand.

        Args:
            kl: K, measured before the update; not finite lowers the factor by [`GROWTH`].
            allowed: T of the same tokens.
            travel: E of the same tokens, the sum of squared rates since generation.
            rate: the scheduled rate that the factor will multiply.
            may_rise: whether the factor may grow; not in warm-up.
            fraction: what the schedule leaves of its peak. Where the factor may exceed 1 the target follows it, so
                that a decaying schedule still decays.
        """
        if not math.isfinite(kl):
            self.scale = max(self.scale / GROWTH, self.low)
            return self.scale
        if allowed <= 0 or travel <= 0 or rate <= 0:
            return self.scale  # nothing has moved yet, or will: held
        log_a = math.log(max(kl, 1e-12) / travel)
        if self.log_a is None:
            self.log_a = log_a
        else:
            self.log_a += (MEMORY_UP if log_a > self.log_a else MEMORY_DOWN) * (log_a - self.log_a)
        slope = self.slope * fraction if self.high > 1 else self.slope
        scale = math.sqrt(slope / math.exp(self.log_a)) / rate
        if kl > TOLERANCE * allowed:
            scale *= TOLERANCE * allowed / kl
        ceiling = min(self.high, self.scale * (GROWTH if may_rise else 1.0))
        self.scale = max(min(scale, ceiling), self.low)
        return self.scale


class StepControl:
    """What a trainer tells of its updates, and what it is told in turn. One object a trainer, the same on every rank.

    The order within an update: [`measure`] once a micro-batch, [`decide`] after the last forward, [`made`] after the
    optimizer's step. [`generated`] at each generation.

    Args:
        mode: `kl`, `ess`, `stop` or `backtrack`.
        updates_per_generation: n, at least 1. The last of them is taken at k = n - 1, so a walk that may reach
            `max_kl` and no more adds at most `max_kl / (n - 1)` an update, or `target_kl` where that is less.
        reduce: sums a tensor over all ranks.
        target_kl, max_kl, init, low, high: the settings `target_kl`, `max_kl`, `step_scale_{init,min,max}`.

    Attributes:
        k: updates made since the last generation.
        travel: sum of the squared rates of these.
        halted: whether the rest of this generation's updates are left out (`stop`).
    """

    def __init__(
        self,
        mode: str,
        updates_per_generation: int,
        reduce: Callable[[Tensor], Tensor],
        *,
        target_kl: float = 0.0013,
        max_kl: float = 0.02,
        init: float = 0.1,
        low: float = 1e-3,
        high: float = 1.0,
    ):
        self.mode, self.reduce = mode, reduce
        self.target_kl, self.max_kl, self.low, self.high = target_kl, max_kl, low, high
        slope = min(target_kl, max_kl / max(updates_per_generation - 1, 1))
        self.controller = KLController(slope, min(max(init, low), high), low, high)
        self.k, self.travel, self.halted = 0, 0.0, False
        self._window: list[Tensor] = []  # sums of the micro-batches measured since the last update

    # -- what happens ------------------------------------------------------------------------------------------------

    def generated(self) -> None:
        """New rollouts are at hand: the policy is where the sampler is."""
        self.k, self.travel, self.halted = 0, 0.0, False

    def made(self, rate: float) -> None:
        """An update was made at `rate`, the factor included."""
        self.k += 1
        self.travel += rate**2

    @torch.no_grad()
    def measure(self, batch: PolicyBatch) -> None:
        """Sum up what the decision needs of one micro-batch, on its device; nothing waits for it."""
        live = batch.mask > 0  # (B, T)
        log_ratio = (batch.logps.detach() - batch.old_logps).masked_fill(~live, 0.0)
        d = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).double()
        tokens = live.sum().double()
        allowed = allowed_kl(self.k, self.target_kl, self.max_kl)
        log_weight = log_ratio.double().sum(1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)  # (B,) of whole responses
        weight = log_weight.exp() * live.any(1)
        sums = (
            (d.exp() - 1 - d).sum(),
            tokens,
            allowed * tokens,
            self.travel * tokens,
            ((batch.advantages != 0) & live).any().double(),
            weight.sum(),
            weight.square().sum(),
            live.any(1).sum().double(),
        )
        self._window.append(torch.stack(sums))

    def decide(self, rate: float, *, may_rise: bool = True, fraction: float = 1.0) -> "Decision":
        """Decide on the update whose micro-batches were measured: the one reduction and the one wait of an update.

        Args:
            rate, may_rise, fraction: see [`KLController.update`].
        """
        sums, self._window = torch.stack(self._window).sum(0), []
        k3, tokens, allowed, travel, signal, weight, square, rows = self.reduce(sums).tolist()
        kl, allowed, travel = (k3 / tokens, allowed / tokens, travel / tokens) if tokens else (0.0, 0.0, 0.0)
        decision = Decision(kl, allowed)
        if self.mode == "kl":
            if signal:
                decision.scale = self.controller.update(
                    kl, allowed, travel, rate, may_rise=may_rise, fraction=fraction
                )
            else:  # no live token, or none with an advantage: nothing pushes
                decision.scale = self.controller.scale
        elif self.mode == "ess":
            share = weight**2 / (square * rows) if square > 0 and math.isfinite(square) else 1.0
            decision.scale = min(max(math.sqrt(share), self.low), self.high)
        elif self.mode == "stop":
            self.halted = self.halted or not kl <= self.max_kl  # not finite halts too
            decision.leave_out = self.halted
        return decision

    def bound(self) -> float:
        """KL up to which `backtrack` lets the step stand that was just counted."""
        return min(BACKTRACK_TOLERANCE * allowed_kl(self.k, self.target_kl, self.max_kl), self.max_kl)

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, for JSON."""
        kept = {"scale": self.controller.scale, "log_a": self.controller.log_a}
        return kept | {"k": self.k, "travel": self.travel, "halted": self.halted}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what [`state`] returned."""
        self.controller.scale, self.controller.log_a = state["scale"], state["log_a"]
        self.k, self.travel, self.halted = state["k"], state["travel"], state["halted"]


@dataclass
class Decision:
    """What one update is to do, the same on every rank.

    Attributes:
        kl, allowed: K and T of the window.
        scale: the factor on the rate of every parameter group.
        leave_out: whether weights and optimizer state stay as they are.
    """

    kl: float
    allowed: float
    scale: float = 1.0
    leave_out: bool = False


class SteeredSteps(GuardedSteps):
    """Mixin of a trainer whose updates are steered; `start_control` gives it its [`StepControl`].

    The trainer calls [`measure_step`] at each forward of training, before the backward. Logs, where control is on:
    `trust/step_kl` (K), `trust/step_target` (T), `trust/step_scale` (the factor), `trust/step_lr` (factor times
    scheduled rate, of the first parameter group) and `trust/step_nonfinite` (updates so far whose K was not finite).
    """

    step_control: StepControl | None = None

    def start_control(self, updates_per_generation: int) -> None:
        args = self.args
        if args.step_control == "none":
            return
        self.step_control = StepControl(
            args.step_control,
            updates_per_generation,
            lambda sums: self.accelerator.reduce(sums, reduction="sum"),
            target_kl=args.target_kl,
            max_kl=args.max_kl,
            init=args.step_scale_init,
            low=args.step_scale_min,
            high=args.step_scale_max,
        )
        self._measured = True  # whether this micro-batch was; TRAM computes its loss more than once
        self._decision, self._scaled, self._step_nonfinite = None, [], 0
        self._start, self._step_window = None, []  # `backtrack`: weights before the step, and its micro-batches

    def training_step(self, *args, **kwargs):
        self._measured = False
        return super().training_step(*args, **kwargs)

    def measure_step(self, batch: PolicyBatch, inputs: dict[str, Any]) -> None:
        """Measure a micro-batch; with the last of an update, decide, and put the factor on every group's rate."""
        control = self.step_control
        if control is None or self._measured:
            return
        self._measured = True
        control.measure(batch)
        if control.mode == "backtrack":
            self._step_window.append((inputs, batch.old_logps.detach(), batch.mask))
        if not self.accelerator.sync_gradients:
            return
        groups, state = self.optimizer.param_groups, self.state
        rate = float(groups[0]["lr"])
        peak = float(groups[0].get("initial_lr", rate))
        warm = state.global_step >= self.args.get_warmup_steps(state.max_steps)
        self._decision = control.decide(rate, may_rise=warm, fraction=rate / peak if warm and peak else 1.0)
        if not math.isfinite(self._decision.kl):
            self._step_nonfinite += 1
            if self._step_nonfinite == 1:
                logger.warning(
                    f"Update {state.global_step + 1}: KL(old || new) is not finite; `trust/step_nonfinite` counts "
                    "such updates. A log-probability of the policy or of the rollouts is not finite."
                )
        self._scaled = [(group, group["lr"], group["lr"] * self._decision.scale) for group in groups]
        for group, _, scaled in self._scaled:
            group["lr"] = scaled

    def before_step(self) -> bool:
        left_out = super().before_step()
        if self.step_control is not None:
            left_out = self._left_out = left_out or self._decision.leave_out
            if self.step_control.mode == "backtrack" and not left_out:
                self._start = [(p, p.detach().clone()) for p in self._trained_parameters()]
        return left_out

    def _trained_parameters(self):
        return (p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None)

    def after_step(self) -> None:
        super().after_step()
        control = self.step_control
        if control is None:
            return
        decision, rate = self._decision, float(self._scaled[0][2])
        for group, nominal, scaled in self._scaled:
            if group["lr"] is scaled or group["lr"] == scaled:  # DeepSpeed 0.19 has stepped the scheduler already
                group["lr"] = nominal
        self._scaled = []
        if not (self._left_out or self.accelerator.optimizer_step_was_skipped):
            control.made(rate)
            if control.mode == "backtrack":
                decision.scale *= self._backtrack()
        self._start, self._step_window = None, []
        scale = 0.0 if self._left_out else decision.scale
        for name, value in {
            "step_kl": decision.kl,
            "step_target": decision.allowed,
            "step_scale": scale,
            "step_lr": rate if control.mode != "backtrack" else rate * scale,
            "step_nonfinite": float(self._step_nonfinite),
        }.items():
            self.log_value(f"trust/{name}", value)

    @torch.no_grad()
    def _backtrack(self) -> float:
        """Shorten the step just made until K is within its bound; the fraction of it that stands, 0 if undone."""
        bound, fraction = self.step_control.bound(), 1.0
        for _ in range(SHORTENINGS):
            kl = self._measure_again()
            if kl <= bound:
                return fraction
            # shorter than K ~ step^2 asks for, or the step ends just above the bound again and again, and is undone
            factor = 0.9 * math.sqrt(bound / kl) if math.isfinite(kl) else 0.1
            fraction *= factor
            for parameter, start in self._start:
                parameter.lerp_(start, 1 - factor)
        if self._measure_again() <= bound:
            return fraction
        for parameter, start in self._start:
            parameter.copy_(start)
        self.step_control.k -= 1
        return 0.0

    def _measure_again(self) -> float:
        """K of the policy as it is now on the micro-batches of this update, without dropout."""
        sums = []
        self.model.eval()
        try:
            for inputs, old_logps, mask in self._step_window:
                logps, *_ = self.score_completions(self.model_wrapped, inputs)
                d = (logps - old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).masked_fill(mask == 0, 0.0).double()
                sums.append(torch.stack([(d.exp() - 1 - d).sum(), mask.sum().double()]))
        finally:
            self.model.train()
            # After a forward without a backward FSDP2 leaves the last layer gathered, a copy that no step reaches
            for module in self.model_wrapped.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        k3, tokens = self.step_control.reduce(torch.stack(sums).sum(0)).tolist()
        return k3 / tokens if tokens else 0.0
