"""TRL's asynchronous GRPO with an exchangeable policy term.

`AsyncGRPOTrainer` packs its rows into one flat sequence of loss terms. Here they are put back into a
[`PolicyBatch`], a row each, for the same pure losses as on [`TrustGRPOTrainer`], and what these return goes back to
the flat sum. Packing, queue, staleness, weight transfer and accounting stay TRL's own.

This is the one module that knows the insides of `AsyncGRPOTrainer`, with `local`, which replaces what needs a GPU.
What it relies on was read in TRL 1.16; tests/test_trl_contract.py fails where the installed TRL differs.
"""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from ..cards import TrustCard
from ..policy.base import METHOD_STATE_FILE, active_dropout
from ..policy.control import SteeredSteps
from ..policy.telemetry import TrustTelemetry, telemetry
from ..policy.terms import PolicyBatch, PolicyLoss, grpo_loss
from .config import AsyncTrustGRPOConfig
from .intake import RowIntake


logger = get_logger(__name__)

PADDING_LOGP = -1.0  # of positions outside the mask: a log-probability that no term chokes on


def regroup(x: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int], padding: float = 0.0) -> Tensor:
    """(M,) loss terms as (B, T), with their gradient; `padding` where there is none."""
    return x.new_full(shape, padding).index_put((rows, columns), x)


def places(segment_id: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(M,) column of each loss term within its row, and the shape (B, T), of ascending row numbers (M,)."""
    counts = segment_id.bincount()  # (B,), 0 for a row without a trained token
    first = counts.cumsum(0) - counts
    columns = torch.arange(len(segment_id), device=segment_id.device) - first[segment_id]
    return columns, (len(counts), int(counts.max()))


class AsyncTrustGRPOTrainer(TrustCard, TrustTelemetry, SteeredSteps, AsyncGRPOTrainer):
    """
    [`trl.experimental.async_grpo.AsyncGRPOTrainer`] with an exchangeable policy term; on its own, its own term with
    the `trust/` telemetry.

    It takes the arguments of `AsyncGRPOTrainer`. `args` may be a plain `AsyncGRPOConfig`. The old policy of every term
    is the one that generated, as the sampler reported it: there is no recomputation. A response is a training row: a
    conversation that was tokenized anew counts as several, with one advantage. The loss is the sum over trained
    tokens by their number in the micro-batch, over all processes, then the mean over micro-batches.

    Logged beside the metrics of `AsyncGRPOTrainer`, whose `clip_ratio/*` is left to terms that clip so: `trust/*` as
    [`TrustGRPOTrainer`] has it; `trust/lag/{mean,p50,p90,max}`, weight versions between a row and the trainer when it
    was pulled (the first micro-batch of an update is pulled one update early, so it is one older when it is trained
    on); `trust/rows/dropped_{nonfinite,untrained}_total`, rows left out.

    Raises:
        ValueError: for settings that the method cannot honour here (see [`AsyncTrustGRPOConfig`]), or a term that is
            no loss per token.
    """

    config_class: ClassVar[type[AsyncTrustGRPOConfig]] = AsyncTrustGRPOConfig
    loss: ClassVar[Callable[..., PolicyLoss]] = staticmethod(grpo_loss)

    def __init__(self, model, reward_funcs=None, args=None, *rest, **kwargs):
        if args is None:
            args = self.config_class(f"{model.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            args = self.config_class.from_async_grpo_config(args)
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if self.accelerator.is_main_process:
            # TRL 1.16: `get_train_dataloader` hands `rollout_queue` to the dataset, which calls `get` and `qsize`
            self.rollout_queue = RowIntake(
                self.rollout_queue,
                lambda: self.model_version,
                self.rollout_worker.check_health,
                stale_after_s=args.heartbeat_stale_after_s,
                max_staleness=args.max_staleness,
                limit=args.queue_maxsize if args.queue_maxsize > 0 else 1024,
                vocabulary=self.model.config.get_text_config().vocab_size,
                count=lambda name: self.log_value(name, 1.0),
                end_row=self._end_row if self.accelerator.num_processes > 1 else None,
            )
        if args.step_control == "backtrack" and self.accelerator.scaler is not None:
            raise ValueError("step_control='backtrack' takes steps back, which fp16's scaler may skip; use bf16=True.")
        self.start_control(1)
        for warning in self._warnings():
            logger.warning(warning)

    def _warnings(self) -> Iterator[str]:
        """What is legal and puts something else than the policy's own movement into the ratio."""
        if (found := active_dropout(self.model)) is not None:
            name, rate = found
            yield f"{name}={rate}: the server samples without dropout, so the ratio holds its noise; set {name} to 0."
        args = self.args
        cuts = {"top_p": args.top_p < 1, "top_k": args.top_k > 0, "min_p": bool(args.min_p)}
        if given := ", ".join(f"{name}={getattr(args, name)}" for name, cut in cuts.items() if cut):
            yield (
                f"{given}: the sampler renormalizes its log-probabilities over the tokens that it keeps, so the ratio "
                f"to it is biased below 1. Leave top_p at 1, top_k at 0 and min_p unset."
            )

    # -- what a method sets ------------------------------------------------------------------------------------------

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        """The policy term. Called once a micro-batch, on every process."""
        return self.loss(batch, **self.settings(self.loss))

    def settings(self, loss: Callable[..., PolicyLoss]) -> dict[str, Any]:
        """The arguments of a pure loss, read from the config where it has them; `vocab_size` from the model."""
        names = list(inspect.signature(loss).parameters)[1:]
        found = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}
        if "vocab_size" in names:
            found["vocab_size"] = self.model.config.get_text_config().vocab_size
        return found

    @property
    def lags(self) -> Counter:
        """Weight versions between a row and the trainer when it was pulled -> rows used so far; on process 0."""
        return self.rollout_queue.lags

    # -- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(f"return_outputs=True: {type(self).__name__} returns the loss only; leave it False.")
        self._end_together(inputs)
        seen = []

        def forward(**given):
            seen.append(model(**given))
            return seen[-1]

        # TRL 1.16: calls the model once; its loss is left unused, its metrics and its accounting are kept
        super().compute_loss(forward, inputs)
        # PPO's band, which says nothing of another term; those that clip so report it themselves
        for name in [name for name in self._metrics["train"] if name.startswith("clip_ratio/")]:
            del self._metrics["train"][name]
        (outputs,) = seen
        batch, rows, columns = self._policy_batch(outputs, inputs)
        if self.step_control is not None:
            self._measure(batch, inputs)
        policy = self.policy_loss(batch)
        if policy.per_token_loss.shape != batch.logps.shape or policy.batch_loss is not None:
            raise ValueError(
                f"{type(self).__name__}: the term returns one loss a response or a batch, shape "
                f"{tuple(policy.per_token_loss.shape)}; the asynchronous trainer adds up losses of tokens, "
                f"{tuple(batch.logps.shape)}. Use the synchronous trainer."
            )
        # as TRL 1.16 has it: the micro-batch's own number of tokens, over all processes
        tokens = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1.0)
        loss = policy.per_token_loss[rows, columns].sum() / tokens.to(torch.float32)
        loss = loss / self.current_gradient_accumulation_steps
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        self._record({**policy.metrics, **telemetry(batch, policy, batch.old_logps)}, batch.mask)
        return loss

    def _policy_batch(self, outputs, inputs) -> tuple[PolicyBatch, Tensor, Tensor]:
        """The flat loss terms as a batch, and their rows (M,) and columns (M,) in it.

        TRL 1.16: -1 in `token_index` is padding between processes; a position that several rows share is there once a
        row; tokens of tools and of prompts are not there at all.
        """
        chosen = inputs["token_index"] >= 0
        token_index, rows = inputs["token_index"][chosen], inputs["segment_id"][chosen]  # (M,)
        columns, shape = places(rows)
        put = lambda x, padding=0.0: regroup(x, rows, columns, shape, padding)
        logps = outputs.log_probs.flatten()[token_index]
        # a row has one advantage
        advantages = inputs["advantages"][chosen]
        batch = PolicyBatch(
            logps=put(logps, PADDING_LOGP),
            old_logps=put(inputs["old_log_probs"][chosen], PADDING_LOGP),
            mask=put(torch.ones_like(advantages)),
            advantages=advantages.new_zeros(shape[0]).index_put((rows,), advantages).unsqueeze(1),  # (B, 1)
            entropies=put(outputs.entropy.flatten()[token_index]),
        )
        return batch, rows, columns

    # -- step control ------------------------------------------------------------------------------------------------

    def _measure(self, batch: PolicyBatch, inputs: dict[str, Any]) -> None:
        if self.args.step_control == "ess":
            self.measure_step(batch, inputs)  # of the ratios to the sampler
            return
        # What an update may add is measured on its own micro-batches, before against after: the distance to the
        # sampler holds the lag too, and is never 0. So each update counts as the first after a generation.
        self.step_control.generated()
        before, first = batch.logps.detach(), not self._measured
        self.measure_step(replace(batch, old_logps=before), inputs)
        if self.args.step_control == "kl" and first:
            self._step_window.append((inputs, before, batch.mask))

    def after_step(self) -> None:
        control, args = self.step_control, self.args
        if args.step_control == "kl" and not (self._left_out or self.accelerator.optimizer_step_was_skipped):
            group, nominal, scaled = self._scaled[0]
            rate, peak = float(nominal), float(group.get("initial_lr", nominal))
            warm = self.state.global_step >= args.get_warmup_steps(self.state.max_steps)
            fraction = rate / peak if warm and peak else 1.0
            kl = self._measure_again()
            control.controller.update(kl, args.target_kl, float(scaled) ** 2, rate, may_rise=warm, fraction=fraction)
        super().after_step()

    def _measure_again(self) -> float:
        self._decision.kl = super()._measure_again()  # what is logged: of the step as it stands
        self._decision.allowed = self.args.target_kl
        return self._decision.kl

    def score_completions(self, model, inputs, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) of a micro-batch's trained tokens, without TRL's accounting."""
        mask = inputs["attention_mask"].bool()
        tree = {k: inputs[k][inputs[k] >= 0] for k in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
        tree["tree_max_seqlen_q"], tree["tree_max_seqlen_k"] = inputs["tree_max_seqlens"][0].tolist()
        flat = {name: inputs[name][mask].unsqueeze(0) for name in ("input_ids", "position_ids", "shift_labels")}
        outputs = model(**flat, fused_lm_head=True, **tree)
        batch, _, _ = self._policy_batch(outputs, inputs)
        return batch.logps, batch.entropies

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)  # transformers 5.23; `trial` is of a hyperparameter search
        if self.step_control is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / METHOD_STATE_FILE).write_text(json.dumps({"step_control": self.step_control.state()}))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, METHOD_STATE_FILE)).exists():
            state = json.loads(path.read_text())
            if self.step_control is not None and "step_control" in state:
                self.step_control.load_state(state["step_control"])

    # -- what ends a run ends every process --------------------------------------------------------------------------

    def _end_row(self) -> RolloutSample:
        """A row that says that the intake has ended: its advantage is NaN, which no row has that passed it."""
        # as long as a row may be: where others are in a micro-batch already, it closes it
        n = max(self.args.token_budget or 0, 2)
        return RolloutSample(
            prompt=[],
            completion=[],
            input_ids=np.zeros(n, dtype=np.int64),
            completion_mask=np.eye(1, n, n - 1, dtype=np.int64)[0],
            old_log_probs=np.zeros(n, dtype=np.float32),
            advantage=float("nan"),
            model_version=self.model_version,
            group_id=-1,
            metrics={},
        )

    def _end_together(self, inputs) -> None:
        if self.accelerator.num_processes == 1:
            return
        ended = self.accelerator.reduce(inputs["advantages"].isnan().any().float(), reduction="sum")
        if ended > 0:
            failure = self.rollout_queue.failure if self.accelerator.is_main_process else None
            raise failure or RuntimeError("Process 0 can get no more rollouts; it says why.")

    # -- metrics -----------------------------------------------------------------------------------------------------

    def log_value(self, name: str, value: float) -> None:
        """Log a number that the host knows; how values are joined goes by the name (TRL 1.16: `_reduce_metric`)."""
        self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self._recorded("train").items():
            self._metrics["train"][name] += values
        if self.accelerator.is_main_process and (recent := self.rollout_queue.recent):
            self.rollout_queue.recent = []
            lags = sorted(recent)
            rank = lambda q: float(lags[round(q * (len(lags) - 1))])
            summary = {"mean": sum(lags) / len(lags), "p50": rank(0.5), "p90": rank(0.9), "max": float(lags[-1])}
            for name, value in summary.items():
                self.log_value(f"trust/lag/{name}", value)
        super().log(logs, start_time)


# editors, and tools that filter by signature, look here: the parameters are TRL's
AsyncTrustGRPOTrainer.__init__.__signature__ = inspect.signature(AsyncGRPOTrainer.__init__)
