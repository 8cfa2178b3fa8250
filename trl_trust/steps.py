"""The guard of every trainer of this package: an update whose loss or gradient is not finite is left out.

One NaN in the weights ends a run, and a run that writes it says so hours later. Here such an update changes neither
weights nor optimizer state, is counted, and stops the run when it keeps coming.

How an update is left out: its gradients are dropped before the optimizer's step, and an optimizer leaves a parameter
without a gradient alone, state included. So every rank still makes every forward, backward and collective.

Names of transformers touched here: `Trainer._get_grad_norm` (5.23: called once an update, between clipping and
`on_pre_optimizer_step`, with the norm that `clip_grad_norm_` returned over all ranks).
"""

import math

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)

NONFINITE_IN_A_ROW = 10  # updates, after which nothing will mend itself


class StepHooks(TrainerCallback):
    """Calls a trainer's `before_step` and `after_step` around its optimizer's step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_updates()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.before_step():
            self.trainer.optimizer.zero_grad(set_to_none=True)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.after_updates()


class GuardedSteps:
    """Mixin before a `transformers.Trainer`: leaves out updates that are not finite, and counts them.

    Logs `trust/skipped_nonfinite`, the updates left out since the start of this process. Under DeepSpeed, whose engine
    steps inside the last backward, its own check of the gradients does the same, and is switched on where it is off.
    A run in which no update had a gradient says so when it ends.

    Raises:
        RuntimeError: in training, after `NONFINITE_IN_A_ROW` such updates in a row, on every rank.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skipped_nonfinite = 0  # updates left out
        self._nonfinite_in_a_row = 0
        self._updates = self._updates_with_gradient = 0
        self._left_out = False  # the update at hand
        self._window_broken = None  # 0-d: micro-batches of this update whose loss is not finite
        self._grad_norm = None  # of this update, over all ranks
        self.add_callback(StepHooks(self))

    def training_step(self, *args, **kwargs):
        return self._watch(super().training_step(*args, **kwargs))

    def _watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Note whether this micro-batch's loss is finite; a `training_step` that calls no other one calls this."""
        broken = (~loss.detach().isfinite()).float()
        self._window_broken = broken if self._window_broken is None else self._window_broken + broken
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def begin_updates(self) -> None:
        """Called when training begins, with model and optimizer as they will be trained."""
        if self.is_deepspeed_enabled and hasattr(self.optimizer, "optimizer"):
            inner = self.optimizer.optimizer  # accelerate wraps the engine's
            if getattr(inner, "check_grad_overflow", None) is False:  # DeepSpeed 0.19, ZeRO 1 and 2 in float32
                inner.check_grad_overflow = True

    def before_step(self) -> bool:
        """Whether the update at hand is left out; decided alike on every rank, after clipping."""
        self._left_out = self._is_broken()
        if self._left_out:
            self._count_broken()
        else:
            self._nonfinite_in_a_row = 0
        return self._left_out

    def after_step(self) -> None:
        """Called after the optimizer's step, made or left out."""
        if self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            self._left_out = True
            self._count_broken()

    def after_updates(self) -> None:
        """Called when training has ended in an orderly way."""
        if self._updates and not self._updates_with_gradient:
            logger.warning(
                f"No update of {self._updates} had a gradient, so the model has learned nothing: "
                f"{self.why_no_gradient()}."
            )

    def why_no_gradient(self) -> str:
        """The likely cause, of a run in which no update had a gradient, and its mend."""
        return "every parameter is frozen, or every label is masked"

    def _is_broken(self) -> bool:
        broken, norm, self._window_broken = self._window_broken, self._grad_norm, None
        self._updates += 1
        if self.is_deepspeed_enabled:  # the engine has stepped, or not, already
            self._updates_with_gradient += norm is None or norm != 0
            return False
        if self.accelerator.scaler is not None:  # fp16: the scaler leaves such steps out, and lowers its scale by them
            self._updates_with_gradient += 1
            return False
        if self.accelerator.num_processes > 1:
            broken = self.accelerator.reduce(broken, reduction="sum")
        norm = torch.as_tensor(norm, device=broken.device).float()
        norm = (norm + torch.where(broken > 0, torch.nan, 0.0)).item()
        self._updates_with_gradient += norm != 0
        return not math.isfinite(norm)

    def _count_broken(self) -> None:
        self.skipped_nonfinite += 1
        self._nonfinite_in_a_row += 1
        rate = self._get_learning_rate()
        mend = (
            f"Most often the learning rate is too high (learning_rate={rate:g}), a reward or a stored log-probability "
            "is not finite, or 16-bit numbers overflow"
        )
        if self._nonfinite_in_a_row >= NONFINITE_IN_A_ROW:
            raise RuntimeError(
                f"the loss or gradient of {NONFINITE_IN_A_ROW} updates in a row, up to update "
                f"{self.state.global_step + 1}, was not finite; weights are as before them. {mend}."
            )
        if self.skipped_nonfinite == 1:
            logger.warning(
                f"Update {self.state.global_step + 1} was left out: its loss or gradient is not finite. {mend}. "
                f"`trust/skipped_nonfinite` counts such updates; after {NONFINITE_IN_A_ROW} in a row the run stops."
            )

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["trust/skipped_nonfinite"] = self.skipped_nonfinite  # in place, as TRL 1.16 adds its own
        super().log(logs, *args, **kwargs)
