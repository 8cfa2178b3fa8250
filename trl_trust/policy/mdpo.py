"""MDPO and OPMD: mirror descent instead of clipping (arXiv 2005.09814; 2501.12599, 2507.20534).

Nearest TRL loss: the clipped `dapo`/`grpo` term. MDPO removes the clip and subtracts KL(new || old) / t from the
importance-weighted objective, with several steps per iteration against a fixed old policy. OPMD, its form with a whole
response as one action (Kimi k1.5 and K2), has no ratio at all: it regresses tau log(new / old) on the advantage.

Provenance: MDPO **adapted**. Objective, direction of the KL, several steps and annealing are the authors'
(`manantomar/Mirror-Descent-Policy-Optimization`, `mdpo_on/mdpo.py`); the paper has no language model, so the use per
token, the `unbiased` estimator and the form per response are a reconstruction. OPMD **exact in formula** (2501.12599,
eq. 3), with the mean-reward baseline and the optimizer reset of the reports, whose tau is not published; length
normalisation, leave-one-out baselines and tau = 0.01 are from `horizon-rl/OpenKimi` (`openkimi/pmd/core_algos.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from .base import (
    LOG_RATIO_LIMIT,
    PolicyBatch,
    PolicyLoss,
    Rollouts,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    is_number,
    paper,
)
from .hidden import HiddenStates, whole


_NO_CLIP = {
    "epsilon": "there is no clip; the step size bounds the step",
    "epsilon_high": "there is no clip; the step size bounds the step",
    "delta": "there is no clip; the step size bounds the step",
}


def _require_whole_responses(args: TrustGRPOConfig) -> None:
    """Refuse what selects or weights tokens where the action is the response and its loss one number."""
    args._require(
        args.top_entropy_quantile == 1.0,
        "top_entropy_quantile",
        "selects tokens, but here a response is one action: leave it at 1.0",
    )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        args._require(
            args.vllm_importance_sampling_mode.startswith("sequence"),
            "vllm_importance_sampling_mode",
            "weights tokens, but here a response is one action: use 'sequence_mask' or 'sequence_truncate', or "
            "vllm_importance_sampling_correction=False",
        )


# --------------------------------------------------------------------------------------------------------------------
# MDPO
# --------------------------------------------------------------------------------------------------------------------


def annealed_step_size(k: int, iterations: int, step_size: float, step_size_min: float | None = None) -> float:
    """t_k of iteration k (from 0) of `iterations`: `max(step_size_min, step_size (1 - k / iterations))`.

    `step_size_min=None` is 2 / iterations, and never more than `step_size`.
    """
    floor = min(step_size, 2 / iterations) if step_size_min is None else step_size_min
    return max(floor, step_size * (1 - min(k, iterations - 1) / iterations))


def mdpo_loss(
    batch: PolicyBatch, *, level: str = "token", divergence: str = "unbiased", step_size: float = 1.0
) -> PolicyLoss:
    """`-ratio A + D / step_size`, D an estimate of KL(new || old) that vanishes with its gradient where new = old.

    With d the log-ratio of a token, or at `level="sequence"` of the response (the sum over its live tokens):

    - `"unbiased"`: `D = ratio d - ratio + 1`, whose mean under old samples is the KL, and which is >= 0 sample by
      sample. Gradient by d of the whole: `-ratio (A - d / step_size)`, zero at `d = step_size A` without any clip.
    - `"k2"`: `D = d^2 / 2`, right in gradient only near d = 0.
    - `"full"`: the KL over the vocabulary, from `batch.extras["divergence"]` (B, T), with its gradient; 0 where it is
      absent: then no update has been made since generation.

    Args:
        step_size: t_k of this iteration, > 0; `inf` leaves the unclipped importance-weighted term.

    Returns:
        per-token loss (B, T), or (B, 1) at `level="sequence"`; metrics `mdpo/step_size`, `mdpo/divergence` (mean D),
        `mdpo/stationarity` (mean |A - d / step_size| where A != 0; 0 when the step is solved), `mdpo/ratio/max`.
    """
    log_ratio = batch.logps - batch.old_logps  # (B, T)
    if level == "sequence":
        log_ratio = (log_ratio * batch.mask).sum(-1, keepdim=True)  # (B, 1)
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    if divergence == "unbiased":
        # `ratio d - ratio + 1` in a form whose value and gradient cancel exactly, not to rounding, as d goes to 0
        d = log_ratio.clamp(min=-LOG_RATIO_LIMIT)
        proximity = ratio * (d + torch.expm1(-d))
    elif divergence == "k2":
        proximity = log_ratio.square() / 2
    else:
        proximity = batch.extras.get("divergence", torch.zeros_like(batch.mask))

    distance = (batch.advantages - log_ratio.detach() / step_size).abs()
    return PolicyLoss(
        -ratio * batch.advantages + proximity / step_size,
        {
            "mdpo/step_size": torch.full((), step_size, device=ratio.device),
            "mdpo/divergence": proximity,
            "mdpo/stationarity": torch.where(batch.advantages != 0, distance, torch.nan),
            "mdpo/ratio/max": ratio,
        },
    )


@dataclass
class MDPOConfig(TrustGRPOConfig):
    r"""
    Configuration of [`MDPOTrainer`]: every field of [`TrustGRPOConfig`], and the mirror step.

    Parameters:
        level (`str`, *optional*, defaults to `"token"`):
            What an action is: `"token"`, or the response, `"sequence"` (heavy-tailed; for study).
        divergence (`str`, *optional*, defaults to `"unbiased"`):
            Proximity to the old policy: `"unbiased"`, `"k2"`, or `"full"` over the vocabulary (token level only). The
            last keeps the old policy's last hidden states, `tokens x hidden size` numbers a generation batch and
            process, and a copy of the output head where the head is trained.
        step_size (`float`, *optional*, defaults to `1.0`):
            t_0 > 0, in units of the advantage; `inf` switches the proximity off.
        step_size_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"` anneals t_k to `step_size_min` over the run; `"constant"`.
        step_size_min (`float`, *optional*):
            Floor of t_k, > 0 and at most `step_size`. `None`: 2 over the number of iterations.

    Raises:
        ValueError: for values outside the above, `loss_type` other than `"grpo"` at `level="sequence"`, a vLLM
            correction per token or `top_entropy_quantile` there, or `epsilon`, `epsilon_high`, `delta` or
            `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        **TrustGRPOConfig.unread_fields,
        **_NO_CLIP,
        "importance_sampling_level": "use `level`",
    }

    level: str = field(
        default="token", metadata={"help": "What an action is: token or response.", "choices": ["token", "sequence"]}
    )
    divergence: str = field(
        default="unbiased",
        metadata={
            "help": "Estimate of KL(new || old): per sampled token, its square, or over the vocabulary.",
            "choices": ["unbiased", "k2", "full"],
        },
    )
    step_size: float = field(
        default=1.0, metadata={"help": "Step size t of the mirror step. `inf` switches the proximity off."}
    )
    step_size_schedule: str = field(
        default="linear",
        metadata={"help": "How t moves over the run.", "choices": ["linear", "constant"]},
    )
    step_size_min: float | None = field(
        default=None, metadata={"help": "Floor of the annealed t. Default: 2 / number of generation batches."}
    )

    def validate(self) -> None:
        super().validate()
        for name in ("level", "divergence", "step_size_schedule"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}")
        t, floor = self.step_size, self.step_size_min
        self._require(is_number(t, finite=False) and t > 0, "step_size", "must be a number > 0 (`inf` is allowed)")
        self._require(
            floor is None or (is_number(floor) and 0 < floor <= t),
            "step_size_min",
            f"must be a finite number > 0 and at most step_size={t!r}, or None",
        )
        if self.level == "sequence":
            self._require(
                self.divergence != "full", "divergence", "is per token: use level='token', or 'unbiased' or 'k2'"
            )
            self._require(
                self.loss_type == "grpo",
                "loss_type",
                "must be 'grpo' with level='sequence', where a response is one action",
            )
            _require_whole_responses(self)


class MDPOTrainer(TrustGRPOTrainer):
    """
    GRPO with the mirror descent term of MDPO (arXiv 2005.09814) in the place of the clip. See [`mdpo_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`MDPOConfig`], or a `GRPOConfig` for the defaults. The
    step size follows from the trainer's global step, so a resumed run needs no further state.

    Raises:
        ValueError: for `divergence="full"` with a trained output head under DeepSpeed ZeRO-3, which shards it.
    """

    config_class = MDPOConfig
    _name = "MDPO"
    _tag_names = ["trl", "trl-trust", "mdpo"]
    _paper = paper(
        "Mirror Descent Policy Optimization",
        "2005.09814",
        "Manan Tomar and Lior Shani and Yonathan Efroni and Mohammad Ghavamzadeh",
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.divergence == "full":
            self._old_policy = OldDistribution(self.model, self.temperature, self.args.cast_lm_head_to_fp32)

    def generation_state(self) -> dict[str, Any]:
        if self.args.divergence != "full" or self._old_policy.old_head is None:
            return {}
        trained = self._old_policy.causal_lm.get_output_embeddings().weight.requires_grad
        return {"old_head": tuple(whole(x) for x in self._old_policy.old_head) if trained else None}

    def load_generation_state(self, state: dict[str, Any]) -> None:
        if "old_head" in state:
            head = self._old_policy.causal_lm.get_output_embeddings()
            self._old_policy.old_head = state["old_head"] or (head.weight, head.bias)

    def step_size(self) -> float:
        """t_k of the current iteration, one iteration being one generation batch."""
        args = self.args
        if args.step_size_schedule == "constant":
            return args.step_size
        micro_batches = args.steps_per_generation * self.num_iterations  # of one iteration
        k = self.state.global_step * args.gradient_accumulation_steps // micro_batches
        iterations = -(-self.state.max_steps * args.gradient_accumulation_steps // micro_batches)
        return annealed_step_size(k, max(iterations, 1), args.step_size, args.step_size_min)

    def extend_rollouts(self, rollouts: Rollouts) -> dict[str, Tensor]:
        # Without stored log-probabilities no update separates generation and training: the divergence is 0. So it is
        # in evaluation, which must leave alone the head that was kept for the updates still to come.
        if not self.model.training or self.args.divergence != "full" or "old_per_token_logps" not in rollouts.tensors:
            return {}
        with self._old_policy.recording(rollouts.tensors["completion_ids"].size(1)) as hidden:
            self.score_rollouts(rollouts.tensors)
        return {"old_hidden": torch.cat(hidden)}  # (n, T, d)

    def score_completions(self, model, inputs, batch_size=None):
        if "extras/old_hidden" not in inputs:
            return super().score_completions(model, inputs, batch_size)
        with self._old_policy.comparing(inputs["extras/old_hidden"], inputs["completion_mask"] > 0):
            return super().score_completions(model, inputs, batch_size)

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        if "old_hidden" in batch.extras:
            batch = replace(batch, extras={"divergence": self._old_policy.pop_divergence()})
        return mdpo_loss(batch, **{**self.settings(mdpo_loss), "step_size": self.step_size()})


class OldDistribution(HiddenStates):
    """The old policy's next-token distributions over the vocabulary: its last hidden states, and its output head.

    The head is the one in use where that is frozen (LoRA), else one copy. The policy's own states are met inside its
    forward, and the logits of both exist only in tiles (`trl.kernels`).
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, fp32_head: bool = False):
        super().__init__(model, temperature, fp32_head)
        if is_deepspeed_zero3_enabled() and self.causal_lm.get_output_embeddings().weight.requires_grad:
            raise ValueError(
                "divergence='full' keeps a copy of the trained output head, which DeepSpeed ZeRO-3 shards: use LoRA, "
                "ZeRO-2 or divergence='unbiased'."
            )
        self.old_head: tuple[Tensor, Tensor | None] | None = None
        self._divergence: Tensor | None = None

    @contextmanager
    def recording(self, length: int) -> Iterator[list[Tensor]]:
        """Collect the hidden states that predict the last `length` tokens, forward by forward, and keep the head."""
        chunks: list[Tensor] = []
        self.old_head = None
        with self.reading(partial(self._record, chunks), length):
            yield chunks

    def _record(self, chunks: list[Tensor], hidden: Tensor) -> None:
        if self.old_head is None:
            head = self.causal_lm.get_output_embeddings()
            copy = lambda x: x.detach().clone() if x is not None and x.requires_grad else x
            self.old_head = copy(head.weight), copy(head.bias)
        # in the dtype of the projection: what that would round is not worth keeping
        chunks.append(hidden.to(self.compute_dtype(hidden), copy=True))

    def comparing(self, old_hidden: Tensor, live: Tensor):
        """Within it, a forward leaves KL(new || old) at the `live` (B, T) tokens; `old_hidden` is (B, T, d)."""
        return self.reading(partial(self._compare, old_hidden, live), live.size(1))

    def _compare(self, old_hidden: Tensor, live: Tensor, hidden: Tensor) -> None:
        head = self.causal_lm.get_output_embeddings()
        hidden = hidden.to(self.compute_dtype(hidden))  # (B, T, d)
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are as autocast would make them
            kl, _ = ChunkedDivergenceFunction.apply(
                hidden[live],
                whole(head.weight),
                whole(head.bias),
                old_hidden[live],
                whole(self.old_head[0]),
                whole(self.old_head[1]),
                1.0,  # KL(student || teacher)
                self.temperature,
                *(self.scale, self.softcap) * 2,  # of student and teacher
            )
        # `masked_scatter` keeps the graph when nothing is live: no process may skip a backward
        self._divergence = kl.new_zeros(live.shape).masked_scatter(live, kl)  # (B, T)

    def pop_divergence(self) -> Tensor:
        """The (B, T) divergence of the last forward, forgotten here, so that its graph can be freed."""
        divergence, self._divergence = self._divergence, None
        return divergence


# --------------------------------------------------------------------------------------------------------------------
# OPMD
# --------------------------------------------------------------------------------------------------------------------


def opmd_advantages(rewards: Tensor, *, tau: float = 0.01, baseline: str = "mean") -> Tensor:
    """(P, G) rewards minus their baseline, for P prompts with G responses each; never divided by a deviation.

    The baseline is the group's `"mean"`, its `"log_mean_exp"`, `tau log mean exp(r / tau)`, or either over the other
    responses only (`"leave_one_out"`, `"log_mean_exp_leave_one_out"`). NaN rewards (unscored) are left out of it, and
    get 0, as does a response without any other to be compared with.
    """
    scored = ~rewards.isnan()
    count = scored.sum(-1, keepdim=True)  # (P, 1)
    if baseline in ("mean", "leave_one_out"):
        advantages = rewards - rewards.nanmean(-1, keepdim=True)
        if baseline == "leave_one_out":
            advantages = advantages * (count / (count - 1).clamp(min=1))
    else:
        scaled = torch.where(scored, rewards / tau, -torch.inf)  # (P, G)
        if baseline == "log_mean_exp_leave_one_out":
            itself = torch.eye(rewards.size(-1), dtype=torch.bool, device=rewards.device)
            scaled, count = scaled.unsqueeze(-2).masked_fill(itself, -torch.inf), count - 1  # (P, G, G)
            log_sum_exp = torch.logsumexp(scaled, -1)  # (P, G)
        else:
            log_sum_exp = torch.logsumexp(scaled, -1, keepdim=True)  # (P, 1)
        advantages = rewards - tau * (log_sum_exp - count.to(rewards).log())
    return torch.nan_to_num(advantages, nan=0.0)


def opmd_loss(
    batch: PolicyBatch,
    *,
    tau: float = 0.01,
    norm: str = "length",
    recentre: bool = False,
    max_completion_length: int = 256,
) -> PolicyLoss:
    """`(A - tau s)^2 / (2 tau norm)` per response, s the sum of its live log-ratios (2501.12599, eq. 3).

    Gradient by a token's log-probability: `-(A - tau s) / norm`; at s = 0 this is REINFORCE with the baseline in A,
    whatever tau. A must be a reward minus a baseline ([`opmd_advantages`]), not a standardised advantage.

    Args:
        tau: strength of the regularisation, in units of the reward, > 0.
        norm: 1 for `"none"`, the number of live tokens for `"length"`, `max_completion_length` for `"max_length"`.
        recentre: subtract from each residual the mean over the live, scored responses of its group (`batch.group`,
            whole groups needed), which carries gradient. The loss is then the same for `"mean"` and `"log_mean_exp"`,
            whose baseline is one number a group; a leave-one-out baseline differs between responses and stays.

    Returns:
        loss (B, 1); metrics `opmd/residual/mean_abs` (|A - tau s|), `opmd/log_ratio/mean` and `opmd/log_ratio/std` (s;
        the deviation is within a micro-batch), `opmd/pull` (mean |tau s|), `opmd/baseline` (mean r - A, with rewards).
    """
    length = batch.mask.sum(-1, keepdim=True)  # (B, 1)
    log_ratio = ((batch.logps - batch.old_logps) * batch.mask).sum(-1, keepdim=True)  # (B, 1)
    residual = batch.advantages - tau * log_ratio
    if recentre:
        counts = length > 0  # (B, 1)
        if batch.rewards is not None:
            counts = counts & ~batch.rewards.isnan().unsqueeze(1)
        same = (batch.group.unsqueeze(1) == batch.group.unsqueeze(0)) & counts.T  # (B, B)
        same = same.to(residual.dtype)
        mean = same @ residual / same.sum(-1, keepdim=True).clamp(min=1.0)
        residual = residual - torch.where(counts, mean, 0.0)
    divisor = {"none": 1.0, "length": length.clamp(min=1.0), "max_length": max_completion_length}[norm]

    detached = log_ratio.detach()
    metrics = {
        "opmd/residual/mean_abs": residual.abs(),
        "opmd/log_ratio/mean": detached,
        "opmd/log_ratio/std": detached.std(correction=0),
        "opmd/pull": (tau * detached).abs(),
    }
    if batch.rewards is not None:
        metrics["opmd/baseline"] = batch.rewards.unsqueeze(1) - batch.advantages
    return PolicyLoss(residual.square() / (2 * tau) / divisor, metrics)


@dataclass
class OPMDConfig(TrustGRPOConfig):
    r"""
    Configuration of [`OPMDTrainer`]: every field of [`TrustGRPOConfig`], and the regression.

    Two defaults of TRL's fields differ, and no other value is allowed: `loss_type="grpo"` (one loss a response,
    averaged over responses) and `scale_rewards="none"` (standardised advantages would break the regression).

    Parameters:
        tau (`float`, *optional*, defaults to `0.01`):
            Strength of the regularisation, > 0, in units of the reward: 0.01 suits rewards of 0/1 or +-1.
        baseline (`str`, *optional*, defaults to `"mean"`):
            What is subtracted from the reward: `"mean"`, `"leave_one_out"`, `"log_mean_exp"` or
            `"log_mean_exp_leave_one_out"`, of the group.
        norm (`str`, *optional*, defaults to `"length"`):
            Divisor of a response's loss: `"none"` (the reports' formula), `"length"`, `"max_length"`.
        recentre (`bool`, *optional*, defaults to `False`):
            Pairwise form: what a baseline has in common over a group cancels. A micro-batch must hold whole groups.
        reset_optimizer (`bool`, *optional*, defaults to `False`):
            Clear the optimizer's state at each new generation batch (Kimi k1.5).

    Raises:
        ValueError: for values outside the above, `loss_type` or `scale_rewards` other than the defaults, a vLLM
            correction per token, or `top_entropy_quantile`, `epsilon`, `epsilon_high`, `delta`,
            `importance_sampling_level` or `multi_objective_aggregation` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        **TrustGRPOConfig.unread_fields,
        **_NO_CLIP,
        "importance_sampling_level": "a response is one action, and there is no ratio",
        "multi_objective_aggregation": "it standardises rewards, which breaks the regression",
    }

    loss_type: str = field(
        default="grpo", metadata={"help": "Aggregation: one loss a response, averaged over responses. Only 'grpo'."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are never standardised here. Only 'none'."})
    tau: float = field(default=0.01, metadata={"help": "Strength of the regularisation, in units of the reward."})
    baseline: str = field(
        default="mean",
        metadata={
            "help": "What is subtracted from a reward, over its group.",
            "choices": ["mean", "leave_one_out", "log_mean_exp", "log_mean_exp_leave_one_out"],
        },
    )
    norm: str = field(
        default="length",
        metadata={"help": "Divisor of a response's loss.", "choices": ["none", "length", "max_length"]},
    )
    recentre: bool = field(default=False, metadata={"help": "Subtract the group's mean residual: the pairwise form."})
    reset_optimizer: bool = field(
        default=False, metadata={"help": "Clear the optimizer's state at each new generation batch."}
    )

    @property
    def needs_whole_groups(self) -> bool:
        return self.recentre

    def validate(self) -> None:
        super().validate()
        for name in ("baseline", "norm"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}")
        self._require(is_number(self.tau) and self.tau > 0, "tau", "must be a finite number > 0")
        self._require(self.loss_type == "grpo", "loss_type", "must be 'grpo': a response has one loss")
        self._require(
            self.scale_rewards == "none", "scale_rewards", "must be 'none': tau log(new / old) has units of the reward"
        )
        _require_whole_responses(self)


class OPMDTrainer(TrustGRPOTrainer):
    """
    GRPO with the squared regression of Kimi k1.5 and K2 (arXiv 2501.12599, 2507.20534). See [`opmd_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`OPMDConfig`], or a `GRPOConfig` for the defaults.

    Raises:
        ValueError: for `reset_optimizer=True` under DeepSpeed, whose optimizer keeps its state elsewhere.
    """

    config_class = OPMDConfig
    _name = "OPMD"
    _tag_names = ["trl", "trl-trust", "opmd"]
    _paper = paper("Kimi k1.5: Scaling Reinforcement Learning with LLMs", "2501.12599", "{Kimi Team}")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.reset_optimizer and self.is_deepspeed_enabled:
            raise ValueError("reset_optimizer=True cannot reach the optimizer of DeepSpeed: use DDP or FSDP2.")

    def extend_rollouts(self, rollouts: Rollouts) -> dict[str, Tensor]:
        by_group = rollouts.rewards.view(-1, rollouts.num_generations)
        advantages = opmd_advantages(by_group, tau=self.args.tau, baseline=self.args.baseline)
        rollouts.tensors["advantages"] = advantages.flatten()[rollouts.rows]
        if self.args.reset_optimizer and self.model.training:
            self.optimizer.state.clear()  # torch's optimizers make their state anew in the next step
        return {}

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return opmd_loss(batch, **self.settings(opmd_loss))
